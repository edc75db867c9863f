// Centers of lists as small integers, and the best of them by what a list's rows may score.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "../common/tensors.h"
#include "coded_inputs.h"

namespace slide_torch {

constexpr int64_t kRankedTogether = 4;  // samples that a kernel takes at a time

inline int64_t blocks_of(int64_t lists) {
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

  CodedCenters(const char* op, const char* codes_name, const Tensor& codes_in, const char* terms_name,
               const Tensor& terms_in, int64_t lists_in, int64_t features)
      : lists(lists_in), blocks(blocks_of(lists)), quads(quads_of(features)) {
    check(1 <= lists && lists <= int64_t{1} << kMaxCodeBits, op, "lists: expected 1 to 2^", kMaxCodeBits, ", got ",
          lists);
    check_tensor(op, codes_name, codes_in, ScalarType::Byte, {-1, blocks, quads, kBlockRows, 4});
    tables = codes_in.size(0);
    check_tensor(op, terms_name, terms_in, ScalarType::Float, {tables, blocks, kCenterTerms, kBlockRows});
    codes = data<uint8_t>(codes_in), terms = data<float>(terms_in);
  }

  CodedRows table(int64_t t) const {
    return {.codes = codes + t * blocks * quads * 4 * kBlockRows,
            .terms = terms + t * blocks * kCenterTerms * kBlockRows,
            .ids = nullptr,
            .count = lists};
  }

  // Calls put(sample, scores) for samples [begin, end), with the scores of a table's centers. A few samples at a time,
  // whose scores stay in the second-level cache.
  template <class F>
  void score(int64_t t, const CodedProblem& problem, int64_t begin, int64_t end, const F& put) const {
    constexpr int64_t together = 16;
    const int64_t stride = blocks * kBlockRows;
    const auto scores = std::make_unique_for_overwrite<float[]>(std::min(together, end - begin) * stride);
    std::array<int64_t, together> samples;
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = std::min(together, end - first);
      std::iota(samples.begin(), samples.begin() + count, first);
      kernels().quads.score_coded(problem, table(t), samples.data(), count, scores.get());
      for (int64_t i = 0; i < count; ++i) put(first + i, scores.get() + i * stride);
    }
  }
};

// The numbers of the `wanted` largest of the scores, the best first if `sorted`: NaN is larger than any number, and
// equal scores go by the smaller number. They are in the lower halves of `keys`, whose upper halves are the smaller the
// larger the score: integers are compared faster. `found` is scratch.
inline void best_scores(const float* scores, int64_t count, int64_t wanted, bool sorted, std::vector<int32_t>& found,
                        std::vector<uint64_t>& keys) {
  found.resize(count);
  if (wanted < count)
    found.resize(kernels().reaching_best(scores, count, wanted, found.data()));
  else
    std::iota(found.begin(), found.end(), 0);
  keys.clear();
  for (const int32_t i : found) {
    const float value = scores[i];
    const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);  // no -0
    const uint32_t descending = value != value ? 0 : bits >> 31 ? bits : ~bits & 0x7fffffff;
    keys.push_back(uint64_t{descending} << 32 | static_cast<uint32_t>(i));
  }
  if (wanted < std::ssize(keys)) {
    std::nth_element(keys.begin(), keys.begin() + wanted, keys.end());
    keys.resize(wanted);
  }
  if (sorted) std::sort(keys.begin(), keys.end());
}

}  // namespace slide_torch
