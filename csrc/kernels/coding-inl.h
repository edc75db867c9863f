// Coding rows for quads-inl.h, and the means of lists of rows, coded or not.

// out[q * kBlockRows + r] = in[r * quads + q] for the kBlockRows rows of a block; an even number of quads.
inline void interleave(const uint32_t* in, int64_t quads, uint32_t* out) {
  int64_t done = 0;
#if defined(__x86_64__)
  for (; done + 4 <= quads; done += 4)
    for (int64_t first = 0; first < kBlockRows; first += 4) {
      __m128i a[4], b[4];
      for (int64_t i = 0; i < 4; ++i) a[i] = load<__m128i>(in + (first + i) * quads + done);
      for (int64_t i = 0; i < 2; ++i) {
        b[2 * i] = _mm_unpacklo_epi32(a[i], a[i + 2]);
        b[2 * i + 1] = _mm_unpackhi_epi32(a[i], a[i + 2]);
      }
      for (int64_t i = 0; i < 2; ++i) {
        store(out + (done + 2 * i) * kBlockRows + first, _mm_unpacklo_epi32(b[i], b[i + 2]));
        store(out + (done + 2 * i + 1) * kBlockRows + first, _mm_unpackhi_epi32(b[i], b[i + 2]));
      }
    }
#endif
  for (int64_t q = done; q < quads; ++q)
    for (int64_t r = 0; r < kBlockRows; ++r) out[q * kBlockRows + r] = in[r * quads + q];
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

// Half of an integer, or of a vector of them, rounded away from zero; `shift` brings the sign to the last bit.
template <class I>
inline I halved(I doubled, int shift) {
  return (doubled + 1 + (doubled >> shift)) >> 1;
}

// x (features) as codes, scaled by its largest magnitude, into `codes` (4 quads); returns the scale. Zeros for what
// holds NaN or Inf, and NaN for a scale; what is too small for a scale counts as zero. Halves are rounded away from
// zero, in integers, so that codes are the same at every instruction set.
template <class T>
inline float code_row(const T* x, int64_t features, uint8_t* codes) {
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes;
  constexpr int shift = 8 * sizeof(T) - 1;
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  const T most = largest_magnitude(x, features);
  const bool finite = most - most == T(0);
  const float scale = static_cast<float>(most / T(kCenterLimit));
  int64_t p = 0;
  if (finite && scale >= __FLT_MIN__) {
    const T twice = T(2 * kCenterLimit) / most;
    for (; p + W <= features; p += W) {
      const IntVec<T> rounded = halved(__builtin_convertvector(load<Vec<T>>(x + p) * twice, IntVec<T>), shift);
      const Bytes narrow = __builtin_convertvector(rounded + kCenterOffset, Bytes);
      __builtin_memcpy(codes + p, &narrow, W);
    }
    for (; p < features; ++p)
      codes[p] = static_cast<uint8_t>(halved(static_cast<Int>(x[p] * twice), shift) + kCenterOffset);
  }
  for (; p < 4 * quads_of(features); ++p) codes[p] = kCenterOffset;
  return finite ? (scale >= __FLT_MIN__ ? scale : 0.0f) : __builtin_nanf("");
}

// Codes and terms of `count` rows, from the beginning of a block on; the last block is filled up with zeros.
// `scratch` has room for kBlockRows rows of codes.
template <class T>
void code_rows(const T* weight, const T* bias, int64_t features, const int32_t* ids, int64_t count, uint8_t* codes,
               float* terms, uint8_t* scratch) {
  const int64_t quads = quads_of(features);
  for (int64_t first = 0; first < count; first += kBlockRows) {
    for (int64_t r = 0; r < kBlockRows; ++r) {
      uint8_t* own = scratch + r * 4 * quads;
      if (first + r < count) {
        const int64_t id = ids[first + r];
        terms[r] = code_row(weight + id * features, features, own);
        terms[kBlockRows + r] = bias ? static_cast<float>(bias[id]) : 0.0f;
      } else {
        for (int64_t p = 0; p < 4 * quads; ++p) own[p] = kCenterOffset;
        terms[r] = terms[kBlockRows + r] = 0.0f;
      }
    }
    interleave(reinterpret_cast<const uint32_t*>(scratch), quads, reinterpret_cast<uint32_t*>(codes));
    codes += kBlockRows * 4 * quads;
    terms += kRowTerms * kBlockRows;
  }
}

// Codes and terms, at their places (block * kBlockRows + row of the block), of rows that have changed.
template <class T>
void recode_rows(const T* weight, const T* bias, int64_t features, const int64_t* ids, int64_t count,
                 const int32_t* places, uint8_t* codes, float* terms, uint8_t* scratch) {
  const int64_t quads = quads_of(features), ahead = 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t later = ids[min_of(i + ahead, count - 1)], target = places[later] / kBlockRows * quads;
    prefetch_row(weight + later * features, features);
    for (int64_t q = 0; q < quads; ++q) __builtin_prefetch(codes + (target + q) * 4 * kBlockRows, 1);
    const int64_t block = places[ids[i]] / kBlockRows, lane = places[ids[i]] % kBlockRows;
    float* own = terms + block * kRowTerms * kBlockRows + lane;
    own[0] = code_row(weight + ids[i] * features, features, scratch);
    if (bias) own[kBlockRows] = static_cast<float>(bias[ids[i]]);
    for (int64_t q = 0; q < quads; ++q)
      __builtin_memcpy(codes + 4 * ((block * quads + q) * kBlockRows + lane), scratch + 4 * q, 4);
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

// Lanes are as many as a block has rows at every instruction set.
inline float sum_of_block(const CodedFloats* value) {
  float lane[kBlockRows];
  for (int64_t j = 0; j < kCodedVectors; ++j) store(lane + j * kCodedLanes, value[j]);
  return sum_halves<float, kBlockRows>(lane);
}

// As rows_center, of coded rows; without biases where there is no place for their mean.
inline void coded_center(const uint8_t* codes, const float* terms, int64_t count, int64_t features, float* center,
                         float* bias_center, float* radius) {
  const int64_t quads = quads_of(features), blocks = (count + kBlockRows - 1) / kBlockRows;
  const float share = 1.0f / static_cast<float>(count > 0 ? count : 1);
  float variance = 0.0f;
  for (int64_t q = 0; q < quads; ++q) {
    CodedFloats sum[4][kCodedVectors] = {}, squares[kCodedVectors] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < kCodedVectors; ++j) {
        const uint8_t* quad = codes + (b * quads + q) * 4 * kBlockRows + j * kCodedBytes;
        const CodedInts code = (CodedInts)(load<CenterBytes>(quad) - static_cast<uint8_t>(kCenterOffset));
        const CodedFloats scale = load<CodedFloats>(terms + b * kRowTerms * kBlockRows + j * kCodedLanes);
        for (int64_t f = 0; f < 4; ++f) {
          const CodedFloats value = __builtin_convertvector(code << (24 - 8 * f) >> 24, CodedFloats) * scale;
          sum[f][j] += value;
          squares[j] += value * value;
        }
      }
    variance += sum_of_block(squares) * share;
    for (int64_t f = 0; f < 4 && 4 * q + f < features; ++f) {
      const float mean = sum_of_block(sum[f]) * share;
      center[4 * q + f] = mean;
      variance -= mean * mean;
    }
  }
  if (bias_center) {
    const auto bias_of = [&](int64_t i) {
      return terms[(i / kBlockRows * kRowTerms + 1) * kBlockRows + i % kBlockRows];
    };
    const float origin = count > 0 ? bias_of(0) : 0.0f;
    float sum = 0.0f, squares = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float value = bias_of(i) - origin;
      sum += value;
      squares += value * value;
    }
    *bias_center = origin + sum * share;
    variance += squares * share - sum * share * (sum * share);
  }
  *radius = variance > 0.0f ? static_cast<float>(__builtin_sqrtf(variance)) : 0.0f;
}
