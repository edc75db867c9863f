// Which lists an input looks into: their centers as small integers, ranked by what a list's rows may score.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "../common/reservoirs.h"
#include "../common/tensors.h"
#include "coded_inputs.h"
#include "quantize.h"

namespace slide_torch {
namespace {

constexpr int64_t kRankedTogether = 4;  // samples that a kernel takes at a time

int64_t blocks_of(int64_t lists) {
  return (lists + kBlockRows - 1) / kBlockRows;
}

// Centers of one or more tables, each table beginning a block.
struct CodedCenters {
  const uint8_t* codes;
  const float* terms;
  int64_t tables;
  int64_t lists;
  int64_t blocks;  // of a table
  int64_t quads;

  CodedCenters(const char* op, const Tensor& codes_in, const Tensor& terms_in, int64_t lists_in, int64_t features)
      : lists(lists_in), blocks(blocks_of(lists)), quads(quads_of(features)) {
    check(1 <= lists && lists <= int64_t{1} << kMaxCodeBits, op, "lists: expected 1 to 2^", kMaxCodeBits, ", got ",
          lists);
    check_tensor(op, "codes", codes_in, ScalarType::Byte, {-1, blocks, quads, kBlockRows, 4});
    tables = codes_in.size(0);
    check_tensor(op, "terms", terms_in, ScalarType::Float, {tables, blocks, kCenterTerms, kBlockRows});
    codes = data<uint8_t>(codes_in), terms = data<float>(terms_in);
  }

  // Up to `count` of them, from the beginning of a block on.
  CodedRows some(int64_t table, int64_t block, int64_t count) const {
    const int64_t at = table * blocks + block, first = block * kBlockRows;
    return {.codes = codes + at * quads * 4 * kBlockRows,
            .terms = terms + at * kCenterTerms * kBlockRows,
            .ids = nullptr,
            .first = first,
            .count = std::min(count, lists - first)};
  }
};

// The best centers of a table for some samples. A part of the blocks tells first how large the last of them may be: of
// the others few are larger, and need to be kept.
class Ranking {
 public:
  Ranking(const CodedCenters& centers, const CodedProblem& problem, int64_t batch, int64_t wanted)
      : centers_(centers), problem_(problem), batch_(batch), wanted_(std::min(wanted, centers.lists)) {}

  // Finds those of `samples`, for append_to.
  void run(int64_t table, std::vector<int64_t> samples) {
    best_.clear(batch_, wanted_, 4 * wanted_ + 256);  // more than a limit lets pass
    if (centers_.blocks >= 4 * kBlocksApart && centers_.lists >= 4 * wanted_) look_ahead(table, samples);
    offer(centers_.some(table, 0, centers_.lists), samples, best_);
    std::erase_if(samples, [&](int64_t b) { return best_.held(b) >= wanted_; });
    if (samples.empty()) return;
    for (const int64_t b : samples) best_.restart(b);
    offer(centers_.some(table, 0, centers_.lists), samples, best_);
  }

  void append_to(std::vector<Entry<float>>& entries, int64_t sample) const { best_.append_to(entries, sample); }

 private:
  static constexpr int64_t kBlocksApart = 32;  // those that are looked at first

  // Sets limits that are nearly always below the last wanted.
  void look_ahead(int64_t table, const std::vector<int64_t>& samples) {
    const int64_t rank = 2 * (wanted_ / kBlocksApart) + 4;
    part_.clear(batch_, rank);
    for (int64_t block = 0; block < centers_.blocks; block += kBlocksApart)
      offer(centers_.some(table, block, kBlockRows), samples, part_);
    for (const int64_t b : samples) best_.restart(b, part_.limit(b));
  }

  void offer(const CodedRows& some, const std::vector<int64_t>& samples, Reservoirs<float>& to) const {
    kernels().quads.offer_coded(problem_, some, some, samples.data(), static_cast<int64_t>(samples.size()), to.best());
  }

  const CodedCenters& centers_;
  const CodedProblem& problem_;
  int64_t batch_, wanted_;
  Reservoirs<float> best_, part_;
};

// Entries as integers that are smaller the larger the value, and the smaller the id of equal ones, in the lower half:
// the first `count` of them, sorted. Comparing is most of what ranking costs.
void sort_keys(const std::vector<Entry<float>>& entries, int64_t count, std::vector<uint64_t>& keys) {
  keys.clear();
  for (const Entry<float>& entry : entries) {
    const uint32_t bits = std::bit_cast<uint32_t>(entry.value + 0.0f);  // no -0
    const uint32_t descending = bits >> 31 ? bits : ~bits & 0x7fffffff;
    keys.push_back(uint64_t{descending} << 32 | static_cast<uint32_t>(entry.id));
  }
  if (count < std::ssize(keys)) {
    std::nth_element(keys.begin(), keys.begin() + count, keys.end());
    keys.resize(count);
  }
  std::sort(keys.begin(), keys.end());
}

// Ranks (tables * probes, batch) of samples [begin, end); a sample that is not finite has none.
template <class Code>
void write_ranks(const CodedCenters& centers, const CodedProblem& problem, int64_t batch, int64_t probes, int64_t begin,
                 int64_t end, Code* ranks) {
  std::vector<int64_t> finite;
  for (int64_t b = begin; b < end; ++b)
    if (problem.input_scale[b] == problem.input_scale[b]) finite.push_back(b);
  Ranking ranking(centers, problem, batch, probes);
  std::vector<Entry<float>> found;
  std::vector<uint64_t> keys;
  for (int64_t table = 0; table < centers.tables; ++table) {
    ranking.run(table, finite);
    for (int64_t b = begin; b < end; ++b) {
      found.clear();
      ranking.append_to(found, b);
      sort_keys(found, probes, keys);
      for (int64_t p = 0; p < probes; ++p)
        ranks[(table * probes + p) * batch + b] = p < std::ssize(keys) ? static_cast<Code>(keys[p]) : Code(-1);
    }
  }
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
    const CodedCenters centers(op, codes, terms, lists, features);
    check(1 <= probes && probes <= kMaxTables && centers.tables * probes <= kMaxTables, op,
          "probes: expected at least 1 and at most ", kMaxTables, " of all ", centers.tables, " tables together, got ",
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
