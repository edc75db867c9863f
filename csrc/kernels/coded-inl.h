// Scores of coded rows: those of lists, a first look at a fourth of the bytes after which the best are scored exactly,
// are offered to samples; those of lists' centers are written down.

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

// A block of coded rows: `rows` of them are there.
struct CodedBlock {
  const uint8_t* codes;
  const float* terms;
  const int32_t* ids;
  int64_t rows;
  const uint8_t* ahead;  // to be asked for
};

// One block against some samples: to(i, scores) gets those of the i-th sample, and NaN where its input is not finite.
template <int64_t Samples, class To>
inline void score_block(const CodedProblem& s, const CodedBlock& block, const int64_t* samples, const To& to) {
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
    CodedFloats scores[kCodedVectors];
    for (int64_t j = 0; j < kCodedVectors; ++j) {
      const CodedFloats scale = load<CodedFloats>(block.terms + j * kCodedLanes) * s.input_scale[samples[i]];
      scores[j] = __builtin_convertvector(sum[i][j], CodedFloats) * scale +
                  load<CodedFloats>(block.terms + kBlockRows + j * kCodedLanes);
      if (s.spread_weight)
        scores[j] += load<CodedFloats>(block.terms + 2 * kBlockRows + j * kCodedLanes) * s.spread_weight[samples[i]];
    }
    to(i, scores);
  }
}

// Calls body.operator()<n>(i) for the i-th of `count` samples and those that follow, n together.
template <class F>
inline void by_groups(int64_t count, const F& body) {
  int64_t i = 0;
  for (; i + kCodedSamples <= count; i += kCodedSamples) body.template operator()<kCodedSamples>(i);
  if (kCodedSamples > 3 && count - i == 3) body.template operator()<3>(i);
  if (kCodedSamples > 2 && count - i == 2) body.template operator()<2>(i);
  if (count - i == 1) body.template operator()<1>(i);
}

// Offers a block's scores to a sample.
inline void offer_scores(const CodedBlock& block, const CodedFloats (&scores)[kCodedVectors], int64_t sample,
                         const Best<float>& best) {
  const float limit = best.limits[sample];
  uint32_t worth = 0;  // a bit for each row; set for NaN too
  float score[kBlockRows];
  for (int64_t j = 0; j < kCodedVectors; ++j) {
    store(score + j * kCodedLanes, scores[j]);
    worth |= lane_bits(~(scores[j] < limit)) << (j * kCodedLanes);
  }
  for (worth &= (uint32_t{1} << block.rows) - 1; worth; worth &= worth - 1) {
    const int r = __builtin_ctz(worth);
    offer<float>(best, sample, score[r], block.ids[r]);
  }
}

// Offers coded rows to the samples, and asks for those that come next: lists lie apart, and their first blocks must be
// asked for in time too.
inline void offer_coded(const CodedProblem& s, const CodedRows& coded, const CodedRows& following,
                        const int64_t* samples, int64_t sample_count, const Best<float>& best) {
  const int64_t block_bytes = kBlockRows * 4 * s.quads, terms = s.terms() * kBlockRows;
  const int64_t blocks = (coded.count + kBlockRows - 1) / kBlockRows;
  CodedBlock block = {coded.codes, coded.terms, coded.ids, kBlockRows, nullptr};
  for (int64_t done = 0; done < blocks; ++done) {
    const int64_t later = done + kBlocksAhead, at = later < blocks ? later : later - blocks;
    const CodedRows& from = later < blocks ? coded : following;
    block.rows = min_of(kBlockRows, coded.count - done * kBlockRows);
    block.ahead = from.codes + at * block_bytes;
    for (int64_t t = 0; t < terms; t += kBlockRows) __builtin_prefetch(from.terms + at * terms + t);
    __builtin_prefetch(from.ids + at * kBlockRows);
    by_groups(sample_count, [&]<int64_t Samples>(int64_t i) {
      score_block<Samples>(s, block, samples + i,
                           [&](int64_t j, const auto& scores) { offer_scores(block, scores, samples[i + j], best); });
    });
    block.codes += block_bytes;
    block.terms += terms;
    block.ids += kBlockRows;
  }
}

// scores (sample_count, blocks of coded, 16): of the rows that a block lacks, anything.
inline void score_coded(const CodedProblem& s, const CodedRows& coded, const int64_t* samples, int64_t sample_count,
                        float* scores) {
  const int64_t block_bytes = kBlockRows * 4 * s.quads, terms = s.terms() * kBlockRows;
  const int64_t blocks = (coded.count + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const CodedBlock block = {.codes = coded.codes + b * block_bytes,
                              .terms = coded.terms + b * terms,
                              .ids = nullptr,
                              .rows = kBlockRows,
                              .ahead = coded.codes + min_of(b + kBlocksAhead, blocks - 1) * block_bytes};
    by_groups(sample_count, [&]<int64_t Samples>(int64_t i) {
      score_block<Samples>(s, block, samples + i, [&](int64_t j, const auto& own) {
        float* to = scores + ((i + j) * blocks + b) * kBlockRows;
        for (int64_t v = 0; v < kCodedVectors; ++v) store(to + v * kCodedLanes, own[v]);
      });
    });
  }
}
