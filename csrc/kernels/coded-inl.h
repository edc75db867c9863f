// The best of rows kept as int8 codes, for inputs of int16: a first look at a fourth of the bytes, after which the
// best are scored exactly. A block is 16 rows; for each pair of features it has 16 pairs of codes, so that one
// multiplication of int16 pairs makes a term of as many rows as a vector has lanes. Sums are integers, and so the same
// at every instruction set.

constexpr int64_t kCodedBytes = SLIDE_VECTOR_BYTES;  // multiplied pairs at a time
constexpr int64_t kCodedLanes = kCodedBytes / 4, kCodedVectors = kBlockRows / kCodedLanes;
constexpr int64_t kBlocksAhead = 2;
constexpr int64_t kCodedSamples = kCodedBytes < 32 ? 2 : 4;  // as many sums as registers hold

typedef int8_t CodedBytes __attribute__((vector_size(kCodedBytes / 2)));
typedef int16_t CodedShorts __attribute__((vector_size(kCodedBytes)));
typedef int32_t CodedInts __attribute__((vector_size(kCodedBytes)));
typedef float CodedFloats __attribute__((vector_size(kCodedBytes)));

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
inline CodedInts multiply_pairs(CodedShorts a, CodedShorts b) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES == 64
  return (CodedInts)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 32
  return (CodedInts)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (CodedInts)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const CodedInts x = (CodedInts)a, y = (CodedInts)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

inline CodedShorts widen(const int8_t* codes) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES == 64
  return (CodedShorts)_mm512_cvtepi8_epi16(load<__m256i>(codes));
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 32
  return (CodedShorts)_mm256_cvtepi8_epi16(load<__m128i>(codes));
#else
  return __builtin_convertvector(load<CodedBytes>(codes), CodedShorts);
#endif
}

// A bit for each lane of a comparison's result.
inline uint32_t lane_bits(CodedInts mask) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__x86_64__) && SLIDE_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kCodedLanes; ++lane) bits |= (static_cast<uint32_t>(mask[lane]) & 1) << lane;
  return bits;
#endif
}

// out[p * kBlockRows + r] = in[r * pairs + p] for the kBlockRows rows of a block.
inline void interleave(const uint16_t* in, int64_t pairs, uint16_t* out) {
  int64_t done = 0;
#if defined(__x86_64__)
  for (; done + 8 <= pairs; done += 8)
    for (int64_t first = 0; first < kBlockRows; first += 8) {
      __m128i a[8], b[8];
      for (int64_t i = 0; i < 8; ++i) a[i] = load<__m128i>(in + (first + i) * pairs + done);
      for (int64_t i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
      }
      for (int64_t i = 0; i < 4; ++i) {
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
      }
      for (int64_t i = 0; i < 4; ++i) {
        store(out + (done + 2 * i) * kBlockRows + first, _mm_unpacklo_epi16(a[i], a[i + 4]));
        store(out + (done + 2 * i + 1) * kBlockRows + first, _mm_unpackhi_epi16(a[i], a[i + 4]));
      }
    }
#endif
  for (int64_t p = done; p < pairs; ++p)
    for (int64_t r = 0; r < kBlockRows; ++r) out[p * kBlockRows + r] = in[r * pairs + p];
}

// The largest of some lanes, as sum_halves adds them.
template <class T, int64_t Lanes>
inline T largest_of_halves(const T* lane) {
  if constexpr (Lanes == 2) {
    return lane[0] > lane[1] ? lane[0] : lane[1];
  } else {
    typedef T Half __attribute__((vector_size(Lanes / 2 * sizeof(T))));
    const Half left = load<Half>(lane), right = load<Half>(lane + Lanes / 2);
    T half[Lanes / 2];
    store(half, left > right ? left : right);
    return largest_of_halves<T, Lanes / 2>(half);
  }
}

// The largest magnitude, by the bits without the sign, which are ordered as magnitudes are; Inf or NaN if there is one.
template <class T>
inline T largest_magnitude(const T* x, int64_t features) {
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes;
  constexpr Int no_sign =
      static_cast<Int>(~(uint64_t{1} << (8 * sizeof(Int) - 1)) & (~uint64_t{0} >> (64 - 8 * sizeof(Int))));
  IntVec<T> largest{};
  int64_t p = 0;
  for (; p + W <= features; p += W) {
    const IntVec<T> bits = load<IntVec<T>>(x + p) & no_sign;
    largest = bits > largest ? bits : largest;
  }
  Int lane[W];
  store(lane, largest);
  Int most = largest_of_halves<Int, W>(lane);
  for (; p < features; ++p) {
    const Int bits = load<Int>(x + p) & no_sign;
    most = bits > most ? bits : most;
  }
  return load<T>(&most);
}

// x (features) as int8, scaled by its largest magnitude; returns the scale. Zeros for what holds NaN or Inf, and NaN
// for a scale; what is too small for a scale counts as zero. Halves are rounded away from zero, in integers, so that
// codes are the same at every instruction set.
template <class T>
inline float code_row(const T* x, int64_t features, int8_t* codes) {
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes;
  typedef int8_t Bytes __attribute__((vector_size(W)));
  const T most = largest_magnitude(x, features);
  const bool finite = most - most == T(0);
  const float scale = static_cast<float>(most / T(127));
  if (!finite || scale < __FLT_MIN__) {
    for (int64_t i = 0; i < features; ++i) codes[i] = 0;
    return finite ? 0.0f : __builtin_nanf("");
  }
  const T twice = T(254) / most;
  int64_t p = 0;
  for (; p + W <= features; p += W) {
    const IntVec<T> doubled = __builtin_convertvector(load<Vec<T>>(x + p) * twice, IntVec<T>);
    const IntVec<T> sign = doubled >> (8 * sizeof(T) - 1);
    const IntVec<T> rounded = (((((doubled ^ sign) - sign) + 1) >> 1) ^ sign) - sign;
    const Bytes narrow = __builtin_convertvector(rounded, Bytes);
    __builtin_memcpy(codes + p, &narrow, W);
  }
  for (; p < features; ++p) {
    const Int doubled = static_cast<Int>(x[p] * twice), magnitude = doubled < 0 ? -doubled : doubled;
    codes[p] = static_cast<int8_t>(doubled < 0 ? -((magnitude + 1) >> 1) : (magnitude + 1) >> 1);
  }
  return scale;
}

// Codes and terms of `count` rows, from the beginning of a block on; the last block is filled up with zeros.
// `scratch` has room for kBlockRows rows of an even number of features.
template <class T>
void code_rows(const T* weight, const T* bias, int64_t features, const int32_t* ids, int64_t count, int8_t* codes,
               float* terms, int8_t* scratch) {
  const int64_t pairs = (features + 1) / 2;
  for (int64_t first = 0; first < count; first += kBlockRows) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      int8_t* own = scratch + r * 2 * pairs;
      own[2 * pairs - 1] = 0;
      if (first + r < count) {
        const int64_t id = ids[first + r];
        terms[r] = code_row(weight + id * features, features, own);
        terms[kBlockRows + r] = bias ? static_cast<float>(bias[id]) : 0.0f;
      } else {
        for (int64_t p = 0; p < features; ++p) own[p] = 0;
        terms[r] = terms[kBlockRows + r] = 0.0f;
      }
    }
    interleave(reinterpret_cast<const uint16_t*>(scratch), pairs, reinterpret_cast<uint16_t*>(codes));
    codes += kBlockRows * 2 * pairs;
    terms += 2 * kBlockRows;
  }
}

// Codes and terms, at their places (block * kBlockRows + row of the block), of rows that have changed.
template <class T>
void recode_rows(const T* weight, const T* bias, int64_t features, const int64_t* ids, int64_t count,
                 const int32_t* places, int8_t* codes, float* terms, int8_t* scratch) {
  const int64_t pairs = (features + 1) / 2;
  scratch[2 * pairs - 1] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = places[ids[i]] / kBlockRows, lane = places[ids[i]] % kBlockRows;
    terms[2 * block * kBlockRows + lane] = code_row(weight + ids[i] * features, features, scratch);
    if (bias) terms[(2 * block + 1) * kBlockRows + lane] = static_cast<float>(bias[ids[i]]);
    for (int64_t p = 0; p < pairs; ++p)
      __builtin_memcpy(codes + 2 * ((block * pairs + p) * kBlockRows + lane), scratch + 2 * p, 2);
  }
}

// The mean of some rows, center (features), that of their biases, and the root mean square distance from both.
template <class T>
void rows_center(const T* weight, const T* bias, int64_t features, const int32_t* ids, int64_t count, T* center,
                 T* bias_center, T* radius) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, strip = 4, ahead = 8;
  const T share = T(1) / static_cast<T>(count > 0 ? count : 1);
  T variance = T(0);  // E (x - o)^2 - (E x - o)^2 over all coordinates, the first row being the origin o
  int64_t p = 0;
  for (; p + strip * W <= features; p += strip * W) {
    V origin[strip] = {}, sum[strip] = {}, squares[strip] = {};
    for (int64_t j = 0; count > 0 && j < strip; ++j) origin[j] = load<V>(weight + ids[0] * features + p + j * W);
    for (int64_t i = 0; i < count; ++i) {
      if (p == 0 && i + ahead < count) prefetch_row(weight + ids[i + ahead] * features, features);
      for (int64_t j = 0; j < strip; ++j) {
        const V value = load<V>(weight + ids[i] * features + p + j * W) - origin[j];
        sum[j] += value;
        squares[j] += value * value;
      }
    }
    V apart{};
    for (int64_t j = 0; j < strip; ++j) {
      const V mean = sum[j] * share;
      store(center + p + j * W, origin[j] + mean);
      apart += squares[j] * share - mean * mean;
    }
    variance += horizontal_sum<T>(apart);
  }
  for (; p < features + (bias ? 1 : 0); ++p) {
    const auto at = [&](int64_t i) { return p < features ? weight[ids[i] * features + p] : bias[ids[i]]; };
    const T origin = count > 0 ? at(0) : T(0);
    T sum = T(0), squares = T(0);
    for (int64_t i = 0; i < count; ++i) {
      const T value = at(i) - origin;
      sum += value;
      squares += value * value;
    }
    const T mean = sum * share;
    (p < features ? center[p] : *bias_center) = origin + mean;
    variance += squares * share - mean * mean;
  }
  *radius = variance > T(0) ? static_cast<T>(__builtin_sqrt(variance)) : T(0);
}

// One block against some samples; asks for the block `ahead`.
template <int64_t Samples>
inline void offer_block(const CodedProblem& s, const int8_t* codes, const float* terms, const int32_t* ids,
                        int64_t rows, const int8_t* ahead, const int64_t* samples, const Best<float>& best) {
  CodedInts sum[Samples][kCodedVectors] = {};
  const int32_t* input[Samples];
  for (int64_t i = 0; i < Samples; ++i) input[i] = s.input + samples[i] * s.pairs;
  for (int64_t p = 0; p < s.pairs; ++p) {
    CodedShorts row[kCodedVectors];
    __builtin_prefetch(ahead + p * 2 * kBlockRows);
    for (int64_t j = 0; j < kCodedVectors; ++j) row[j] = widen(codes + p * 2 * kBlockRows + j * (kCodedBytes / 2));
    for (int64_t i = 0; i < Samples; ++i) {
      const CodedShorts pair = (CodedShorts)(CodedInts{} + input[i][p]);
      for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] += multiply_pairs(row[j], pair);
    }
  }
  for (int64_t i = 0; i < Samples; ++i) {
    const float limit = best.limits[samples[i]];
    uint32_t worth = 0;  // a bit for each row; set for NaN too
    float scores[kBlockRows];
    for (int64_t j = 0; j < kCodedVectors; ++j) {
      const CodedFloats scale = load<CodedFloats>(terms + j * kCodedLanes) * s.input_scale[samples[i]];
      const CodedFloats bias = load<CodedFloats>(terms + kBlockRows + j * kCodedLanes);
      const CodedFloats z = __builtin_convertvector(sum[i][j], CodedFloats) * scale + bias;
      store(scores + j * kCodedLanes, z);
      worth |= lane_bits(~(z < limit)) << (j * kCodedLanes);
    }
    for (worth &= (uint32_t{1} << rows) - 1; worth; worth &= worth - 1) {
      const int r = __builtin_ctz(worth);
      offer<float>(best, samples[i], scores[r], ids[r]);
    }
  }
}

// Offers `count` coded rows, from the beginning of a block on, to the samples; ids has their numbers. `following` are
// the codes that will come next: lists lie apart, and their first blocks must be asked for in time too.
inline void topk_coded(const CodedProblem& s, const int8_t* codes, const float* terms, const int32_t* ids,
                       int64_t count, const int8_t* following, const int64_t* samples, int64_t sample_count,
                       const Best<float>& best) {
  const int64_t block_bytes = kBlockRows * 2 * s.pairs, blocks = (count + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kBlockRows, rows = min_of(kBlockRows, count - first), later = block + kBlocksAhead;
    const int8_t* ahead =
        later < blocks ? codes + kBlocksAhead * block_bytes : following + (later - blocks) * block_bytes;
    int64_t i = 0;
    for (; i + kCodedSamples <= sample_count; i += kCodedSamples)
      offer_block<kCodedSamples>(s, codes, terms, ids + first, rows, ahead, samples + i, best);
    if (i + 2 <= sample_count) {
      offer_block<2>(s, codes, terms, ids + first, rows, ahead, samples + i, best);
      i += 2;
    }
    if (i < sample_count) offer_block<1>(s, codes, terms, ids + first, rows, ahead, samples + i, best);
    codes += block_bytes;
    terms += 2 * kBlockRows;
  }
}
