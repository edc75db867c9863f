// Centers of lists as codes of seven bits, for inputs of seven bits: products of bytes, four features to a lane. Sums
// are integers, and so the same at every instruction set.

typedef uint8_t CenterBytes __attribute__((vector_size(kCodedBytes)));

// sum + the products of two quads of features: of codes a and b with inputs x and y, four in each lane. What an int16
// holds of them is below 2 * 2 * (kCenterOffset + kCenterLimit) * kCenterLimit.
static_assert(4 * (kCenterOffset + kCenterLimit) * kCenterLimit < 1 << 15);

inline CodedInts add_quads(CodedInts sum, CenterBytes a, CodedInts x, CenterBytes b, CodedInts y) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES == 64
  const __m512i pairs =
      _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)x), _mm512_maddubs_epi16((__m512i)b, (__m512i)y));
  return sum + (CodedInts)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 32
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)x), _mm256_maddubs_epi16((__m256i)b, (__m256i)y));
  return sum + (CodedInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const auto products = [](CenterBytes codes, CodedInts input) {
    const CodedShorts code = (CodedShorts)codes, value = (CodedShorts)input;  // bytes are the halves of shorts
    return multiply_pairs(code & 255, value << 8 >> 8) + multiply_pairs(code >> 8, value >> 8);
  };
  return sum + products(a, x) + products(b, y);
#endif
}

// A block of centers, of which `rows` are there, against some samples.
template <int64_t Samples>
inline void offer_center_block(const CenterProblem& s, const uint8_t* codes, const float* terms, int64_t first,
                               int64_t rows, const int64_t* samples, const Best<float>& best) {
  CodedInts sum[Samples][kCodedVectors];
  const int32_t* input[Samples];
  for (int64_t i = 0; i < Samples; ++i) {
    input[i] = s.input + samples[i] * s.quads;
    for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] = CodedInts{} - kCenterOffset * s.sum[samples[i]];
  }
  for (int64_t q = 0; q < s.quads; q += 2) {
    CenterBytes code[2][kCodedVectors];
    for (int64_t p = 0; p < 2; ++p)
      for (int64_t j = 0; j < kCodedVectors; ++j)
        code[p][j] = load<CenterBytes>(codes + (q + p) * 4 * kBlockRows + j * kCodedBytes);
    for (int64_t i = 0; i < Samples; ++i) {
      const CodedInts x = CodedInts{} + input[i][q], y = CodedInts{} + input[i][q + 1];
      for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] = add_quads(sum[i][j], code[0][j], x, code[1][j], y);
    }
  }
  for (int64_t i = 0; i < Samples; ++i) {
    const float limit = best.limits[samples[i]];
    uint32_t worth = 0;  // a bit for each center; set for NaN too
    float scores[kBlockRows];
    for (int64_t j = 0; j < kCodedVectors; ++j) {
      const CodedFloats scale = load<CodedFloats>(terms + j * kCodedLanes) * s.input_scale[samples[i]];
      const CodedFloats bias = load<CodedFloats>(terms + kBlockRows + j * kCodedLanes);
      const CodedFloats spread = load<CodedFloats>(terms + 2 * kBlockRows + j * kCodedLanes);
      const CodedFloats z =
          __builtin_convertvector(sum[i][j], CodedFloats) * scale + bias + spread * s.spread_weight[samples[i]];
      store(scores + j * kCodedLanes, z);
      worth |= lane_bits(~(z < limit)) << (j * kCodedLanes);
    }
    for (worth &= (uint32_t{1} << rows) - 1; worth; worth &= worth - 1) {
      const int r = __builtin_ctz(worth);
      offer<float>(best, samples[i], scores[r], first + r);
    }
  }
}

// Offers centers to the samples.
inline void offer_centers(const CenterProblem& s, const CenterBlocks& centers, const int64_t* samples,
                          int64_t sample_count, const Best<float>& best) {
  const uint8_t* codes = centers.codes;
  const float* terms = centers.terms;
  for (int64_t done = 0; done < centers.count; done += kBlockRows) {
    const int64_t first = centers.first + done, rows = min_of(kBlockRows, centers.count - done);
    int64_t i = 0;
    for (; i + kCodedSamples <= sample_count; i += kCodedSamples)
      offer_center_block<kCodedSamples>(s, codes, terms, first, rows, samples + i, best);
    for (; i < sample_count; ++i) offer_center_block<1>(s, codes, terms, first, rows, samples + i, best);
    codes += 4 * kBlockRows * s.quads;
    terms += kCenterTerms * kBlockRows;
  }
}
