// Which lists an input looks into: their centers as small integers, ranked by what a list's rows may score.
#include "center_scores.h"
#include "quantize.h"

namespace slide_torch {
namespace {

// Ranks (tables * probes, batch) of samples [begin, end); a sample that is not finite has none.
template <class Code>
void write_ranks(const CodedCenters& centers, const CodedProblem& problem, int64_t batch, int64_t probes, int64_t begin,
                 int64_t end, Code* ranks) {
  std::vector<int32_t> found;
  std::vector<uint64_t> best;
  for (int64_t table = 0; table < centers.tables; ++table)
    centers.score(table, problem, begin, end, [&](int64_t b, const float* scores) {
      best.clear();
      if (problem.input_scale[b] == problem.input_scale[b])
        best_scores(scores, centers.lists, std::min(probes, centers.lists), true, found, best);
      for (int64_t p = 0; p < probes; ++p)
        ranks[(table * probes + p) * batch + b] = p < std::ssize(best) ? static_cast<Code>(best[p]) : Code(-1);
    });
}

}  // namespace

// centers (tables, lists, d), bias (tables, lists) or none, spread (tables, lists): returns codes (tables, blocks,
// quads of features, 16, 4) and terms (tables, blocks, 3, 16), the scale, the bias and the spread of each center.
std::tuple<Tensor, Tensor> code_centers(Tensor centers, std::optional<Tensor> bias, Tensor spread) {
  constexpr const char* op = "code_centers";
  check_tensor(op, "centers", centers, ScalarType::Float, {-1, -1, -1});
  const int64_t tables = centers.size(0), lists = centers.size(1), features = centers.size(2);
  if (bias) check_tensor(op, "bias", *bias, ScalarType::Float, {tables, lists});
  check_tensor(op, "spread", spread, ScalarType::Float, {tables, lists});
  const int64_t blocks = blocks_of(lists), quads = quads_of(features);
  Tensor codes = empty({tables, blocks, quads, kBlockRows, 4}, ScalarType::Byte);
  Tensor terms = empty({tables, blocks, kCenterTerms, kBlockRows}, ScalarType::Float);
  uint8_t* all_codes = mutable_data<uint8_t>(codes);
  float* all_terms = mutable_data<float>(terms);
  std::fill_n(all_codes, codes.numel(), static_cast<uint8_t>(kCenterOffset));
  std::fill_n(all_terms, terms.numel(), 0.0f);
  parallel_for(0, tables * lists, grain(4 * features), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i / lists * blocks + i % lists / kBlockRows, lane = i % lists % kBlockRows;
      uint8_t* code = all_codes + (block * quads * kBlockRows + lane) * 4;
      float* term = all_terms + block * kCenterTerms * kBlockRows + lane;
      term[0] = quantize(data<float>(centers) + i * features, features, kCenterLimit, [&](int64_t p, int32_t value) {
        code[p / 4 * 4 * kBlockRows + p % 4] = static_cast<uint8_t>(value + kCenterOffset);
      });
      term[kBlockRows] = bias ? data<float>(*bias)[i] : 0.0f;
      term[2 * kBlockRows] = data<float>(spread)[i];
    }
  });
  return {codes, terms};
}

// Of each table the `probes` lists, the best first, with the largest <center, x> + bias + spread_weight * spread, for
// each of input (B, d) and spread_weight (B): (tables * probes, B), -1 where there are fewer.
Tensor rank_centers(Tensor input, Tensor spread_weight, Tensor codes, Tensor terms, int64_t lists, int64_t probes) {
  constexpr const char* op = "rank_centers";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "input", input, scalar_type_of<T>(), {-1, -1});
    const int64_t batch = input.size(0), features = input.size(1);
    check_tensor(op, "spread_weight", spread_weight, ScalarType::Float, {batch});
    const CodedCenters centers(op, "codes", codes, "terms", terms, lists, features);
    const int64_t most = centers.tables == 1 ? int64_t{1} << kMaxCodeBits : kMaxTables;
    check(1 <= probes && probes <= most && centers.tables * probes <= most, op,
          "probes: expected at least 1 and at most ", most, " of all ", centers.tables, " tables together, got ",
          probes);
    const CodedInputs inputs(data<T>(input), batch, features);
    const CodedProblem problem = inputs.problem(data<float>(spread_weight));
    const bool narrow = lists <= int64_t{1} << 15;
    Tensor ranks = empty({centers.tables * probes, batch}, narrow ? ScalarType::Short : ScalarType::Int);
    parallel_tiles(batch, kRankedTogether, centers.tables * lists * features, [&](int64_t begin, int64_t end) {
      if (narrow)
        write_ranks(centers, problem, batch, probes, begin, end, mutable_data<int16_t>(ranks));
      else
        write_ranks(centers, problem, batch, probes, begin, end, mutable_data<int32_t>(ranks));
    });
    return ranks;
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("code_centers", TORCH_BOX(&code_centers));
  m.impl("rank_centers", TORCH_BOX(&rank_centers));
}

}  // namespace slide_torch
