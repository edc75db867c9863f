// Offering coded rows to samples: the rows of lists, a first look at a fourth of the bytes after which the best are
// scored exactly, and the centers of lists.

constexpr int64_t kBlocksAhead = 2;
constexpr int64_t kCodedSamples = kCodedBytes < 32 ? 2 : 4;  // as many sums as registers hold

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

// A block of coded rows: `rows` of them are there; `ids`, or null for numbers from `first` on.
struct CodedBlock {
  const uint8_t* codes;
  const float* terms;
  const int32_t* ids;
  int64_t first;
  int64_t rows;
  const uint8_t* ahead;  // to be asked for
};

// One block against some samples.
template <int64_t Samples>
inline void offer_block(const CodedProblem& s, const CodedBlock& block, const int64_t* samples,
                        const Best<float>& best) {
  CodedInts sum[Samples][kCodedVectors];
  const int32_t* input[Samples];
  for (int64_t i = 0; i < Samples; ++i) {
    input[i] = s.input + samples[i] * s.quads;
    for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] = CodedInts{} - kCenterOffset * s.sum[samples[i]];
  }
  for (int64_t q = 0; q < s.quads; q += 2) {
    CenterBytes code[2][kCodedVectors];
    for (int64_t p = 0; p < 2; ++p) {
      __builtin_prefetch(block.ahead + (q + p) * 4 * kBlockRows);
      for (int64_t j = 0; j < kCodedVectors; ++j)
        code[p][j] = load<CenterBytes>(block.codes + (q + p) * 4 * kBlockRows + j * kCodedBytes);
    }
    for (int64_t i = 0; i < Samples; ++i) {
      const CodedInts x = CodedInts{} + input[i][q], y = CodedInts{} + input[i][q + 1];
      for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] = add_quads(sum[i][j], code[0][j], x, code[1][j], y);
    }
  }
  for (int64_t i = 0; i < Samples; ++i) {
    const float limit = best.limits[samples[i]];
    uint32_t worth = 0;  // a bit for each row; set for NaN too
    float scores[kBlockRows];
    for (int64_t j = 0; j < kCodedVectors; ++j) {
      const CodedFloats scale = load<CodedFloats>(block.terms + j * kCodedLanes) * s.input_scale[samples[i]];
      CodedFloats z = __builtin_convertvector(sum[i][j], CodedFloats) * scale +
                      load<CodedFloats>(block.terms + kBlockRows + j * kCodedLanes);
      if (s.spread_weight)
        z += load<CodedFloats>(block.terms + 2 * kBlockRows + j * kCodedLanes) * s.spread_weight[samples[i]];
      store(scores + j * kCodedLanes, z);
      worth |= lane_bits(~(z < limit)) << (j * kCodedLanes);
    }
    for (worth &= (uint32_t{1} << block.rows) - 1; worth; worth &= worth - 1) {
      const int r = __builtin_ctz(worth);
      offer<float>(best, samples[i], scores[r], block.ids ? block.ids[r] : block.first + r);
    }
  }
}

// Offers coded rows to the samples, and asks for those that come next: lists lie apart, and their first blocks must be
// asked for in time too.
inline void offer_coded(const CodedProblem& s, const CodedRows& coded, const CodedRows& following,
                        const int64_t* samples, int64_t sample_count, const Best<float>& best) {
  const int64_t block_bytes = kBlockRows * 4 * s.quads, terms = s.terms() * kBlockRows;
  const int64_t blocks = (coded.count + kBlockRows - 1) / kBlockRows;
  CodedBlock block = {coded.codes, coded.terms, coded.ids, coded.first, kBlockRows, nullptr};
  for (int64_t done = 0; done < blocks; ++done) {
    const int64_t later = done + kBlocksAhead, at = later < blocks ? later : later - blocks;
    const CodedRows& from = later < blocks ? coded : following;
    block.rows = min_of(kBlockRows, coded.count - done * kBlockRows);
    block.ahead = from.codes + at * block_bytes;
    for (int64_t t = 0; t < terms; t += kBlockRows) __builtin_prefetch(from.terms + at * terms + t);
    if (from.ids) __builtin_prefetch(from.ids + at * kBlockRows);
    int64_t i = 0;
    for (; i + kCodedSamples <= sample_count; i += kCodedSamples)
      offer_block<kCodedSamples>(s, block, samples + i, best);
    if (kCodedSamples > 3 && sample_count - i == 3) offer_block<3>(s, block, samples + i, best);
    if (kCodedSamples > 2 && sample_count - i == 2) offer_block<2>(s, block, samples + i, best);
    if (sample_count - i == 1) offer_block<1>(s, block, samples + i, best);
    block.codes += block_bytes;
    block.terms += terms;
    block.first += kBlockRows;
    if (block.ids) block.ids += kBlockRows;
  }
}
