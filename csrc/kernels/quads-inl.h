// Products of coded rows with coded inputs: bytes of seven bits, four features to a lane (a quad). Sums are integers,
// and so the same at every instruction set. SLIDE_DPBUSD names the intrinsic, where there is one, that adds to each
// lane the products of four unsigned bytes with four signed ones.

constexpr int64_t kCodedBytes = SLIDE_VECTOR_BYTES;
constexpr int64_t kCodedLanes = kCodedBytes / 4, kCodedVectors = kBlockRows / kCodedLanes;

typedef uint8_t CenterBytes __attribute__((vector_size(kCodedBytes)));
typedef int16_t CodedShorts __attribute__((vector_size(kCodedBytes)));
typedef int32_t CodedInts __attribute__((vector_size(kCodedBytes)));
typedef float CodedFloats __attribute__((vector_size(kCodedBytes)));

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
inline CodedInts multiply_pairs(CodedShorts a, CodedShorts b) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES == 16
  return (CodedInts)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const CodedInts x = (CodedInts)a, y = (CodedInts)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// sum + the products of two quads of features: of codes a and b with inputs x and y, four in each lane. What an int16
// holds of them is below 2 * 2 * (kCenterOffset + kCenterLimit) * kCenterLimit.
static_assert(4 * (kCenterOffset + kCenterLimit) * kCenterLimit < 1 << 15);

inline CodedInts add_quads(CodedInts sum, CenterBytes a, CodedInts x, CenterBytes b, CodedInts y) {
#if defined(SLIDE_DPBUSD)
  // added from zero on: the instruction takes several cycles, which would follow one another along the whole sum
  typedef long long Words __attribute__((vector_size(kCodedBytes)));
  return sum + (CodedInts)SLIDE_DPBUSD(SLIDE_DPBUSD(Words{}, (Words)a, (Words)x), (Words)b, (Words)y);
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 64
  const __m512i pairs =
      _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)x), _mm512_maddubs_epi16((__m512i)b, (__m512i)y));
  return sum + (CodedInts)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 32
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)x), _mm256_maddubs_epi16((__m256i)b, (__m256i)y));
  return sum + (CodedInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__aarch64__)
  const int8x16_t a_bytes = (int8x16_t)a, b_bytes = (int8x16_t)b;  // codes are below 128: signed bytes as well
  const int8x16_t x_bytes = (int8x16_t)x, y_bytes = (int8x16_t)y;
  const int16x8_t low =
      vmlal_s8(vmull_s8(vget_low_s8(a_bytes), vget_low_s8(x_bytes)), vget_low_s8(b_bytes), vget_low_s8(y_bytes));
  const int16x8_t high = vmlal_high_s8(vmull_high_s8(a_bytes, x_bytes), b_bytes, y_bytes);
  return (CodedInts)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#else
  const auto products = [](CenterBytes codes, CodedInts input) {
    const CodedShorts code = (CodedShorts)codes, value = (CodedShorts)input;  // bytes are the halves of shorts
    return multiply_pairs(code & 255, value << 8 >> 8) + multiply_pairs(code >> 8, value >> 8);
  };
  return sum + products(a, x) + products(b, y);
#endif
}
