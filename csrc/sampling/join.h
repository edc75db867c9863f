// Lists of the samples, found each by itself, in one tensor.
#pragma once

#include <algorithm>

#include "../common/tensors.h"

namespace slide_torch {

// offsets (B + 1) and active (pairs).
inline std::tuple<Tensor, Tensor> join(const char* op, const std::vector<std::vector<int32_t>>& lists) {
  const int64_t batch = static_cast<int64_t>(lists.size());
  Tensor offsets = empty({batch + 1}, ScalarType::Long);
  int64_t* offset = mutable_data<int64_t>(offsets);
  offset[0] = 0;
  for (int64_t b = 0; b < batch; ++b) offset[b + 1] = offset[b] + static_cast<int64_t>(lists[b].size());
  const int64_t total = offset[batch];
  check(total < INT32_MAX, op, "the batch activates ", total,
        " neurons in all, more than 2^31 - 1: lower the budget, the tail or the batch");
  Tensor active = empty({total}, ScalarType::Int);
  int32_t* ids = mutable_data<int32_t>(active);
  parallel_for(0, batch, grain(total / (batch + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) std::copy(lists[b].begin(), lists[b].end(), ids + offset[b]);
  });
  return {offsets, active};
}

}  // namespace slide_torch
