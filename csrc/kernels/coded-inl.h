// The best of rows kept as int8 codes, for inputs of int16: a first look at a fourth of the bytes, after which the
// best are scored exactly. A block is 16 rows; for each pair of features it has 16 pairs of codes, so that one
// multiplication of int16 pairs makes a term of as many rows as a vector has lanes. Sums are integers, and so the same
// at every instruction set.

constexpr int64_t kCodedBytes = SLIDE_VECTOR_BYTES < 32 ? SLIDE_VECTOR_BYTES : 32;  // multiplied pairs at a time
constexpr int64_t kCodedLanes = kCodedBytes / 4, kCodedVectors = kBlockRows / kCodedLanes;
constexpr int64_t kCodedSamples = kCodedBytes < 32 ? 2 : 4;  // as many sums as registers hold

typedef int8_t CodedBytes __attribute__((vector_size(kCodedBytes / 2)));
typedef int16_t CodedShorts __attribute__((vector_size(kCodedBytes)));
typedef int32_t CodedInts __attribute__((vector_size(kCodedBytes)));
typedef float CodedFloats __attribute__((vector_size(kCodedBytes)));

// a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]
inline CodedInts multiply_pairs(CodedShorts a, CodedShorts b) {
#if defined(__x86_64__) && SLIDE_VECTOR_BYTES >= 32
  return (CodedInts)__builtin_ia32_pmaddwd256(a, b);
#elif defined(__x86_64__)
  return (CodedInts)__builtin_ia32_pmaddwd128(a, b);
#else
  const CodedInts x = (CodedInts)a, y = (CodedInts)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// One block against some samples.
template <int64_t Samples>
inline void offer_block(const CodedProblem& s, const int8_t* codes, const float* terms, const int32_t* ids,
                        int64_t rows, const int64_t* samples, const Best<float>& best) {
  CodedInts sum[Samples][kCodedVectors] = {};
  const int32_t* input[Samples];
  for (int64_t i = 0; i < Samples; ++i) input[i] = s.input + samples[i] * s.pairs;
  for (int64_t p = 0; p < s.pairs; ++p) {
    CodedShorts row[kCodedVectors];
    for (int64_t j = 0; j < kCodedVectors; ++j)
      row[j] =
          __builtin_convertvector(load<CodedBytes>(codes + p * 2 * kBlockRows + j * (kCodedBytes / 2)), CodedShorts);
    for (int64_t i = 0; i < Samples; ++i) {
      const CodedShorts pair = (CodedShorts)(CodedInts{} + input[i][p]);
      for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] += multiply_pairs(row[j], pair);
    }
  }
  for (int64_t i = 0; i < Samples; ++i) {
    float* values = best.values + samples[i] * best.k;
    CodedInts worth{};
    float scores[kBlockRows];
    for (int64_t j = 0; j < kCodedVectors; ++j) {
      const CodedFloats scale = load<CodedFloats>(terms + j * kCodedLanes) * s.input_scale[samples[i]];
      const CodedFloats bias = load<CodedFloats>(terms + kBlockRows + j * kCodedLanes);
      const CodedFloats z = __builtin_convertvector(sum[i][j], CodedFloats) * scale + bias;
      store(scores + j * kCodedLanes, z);
      worth |= ~(z < values[0]);  // true for NaN too
    }
    int64_t part[kCodedBytes / 8], any = 0;
    store(part, worth);
    for (int64_t j = 0; j < kCodedBytes / 8; ++j) any |= part[j];
    if (!any) [[likely]]
      continue;
    for (int64_t r = 0; r < rows; ++r)
      if (!(scores[r] < values[0])) offer<float>(scores[r], ids[r], values, best.ids + samples[i] * best.k, best.k);
  }
}

// Offers `count` coded rows, from the beginning of a block on, to the samples; ids has their numbers.
inline void topk_coded(const CodedProblem& s, const int8_t* codes, const float* terms, const int32_t* ids,
                       int64_t count, const int64_t* samples, int64_t sample_count, const Best<float>& best) {
  for (int64_t first = 0; first < count; first += kBlockRows) {
    const int64_t rows = min_of(kBlockRows, count - first);
    int64_t i = 0;
    for (; i + kCodedSamples <= sample_count; i += kCodedSamples)
      offer_block<kCodedSamples>(s, codes, terms, ids + first, rows, samples + i, best);
    for (; i < sample_count; ++i) offer_block<1>(s, codes, terms, ids + first, rows, samples + i, best);
    codes += kBlockRows * 2 * s.pairs;
    terms += 2 * kBlockRows;
  }
}
