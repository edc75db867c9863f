// Inputs as small integers, for coded rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "../kernels/dispatch.h"
#include "quantize.h"

namespace slide_torch {

// Inputs (B, d) as int8, four in an int32.
class CodedInputs {
 public:
  template <class T>
  CodedInputs(const T* x, int64_t batch, int64_t features)
      : quads_(quads_of(features)), codes_(batch * quads_), sums_(batch), scales_(batch) {
    // a sum over all features of products with codes stays below 2^31
    const int64_t most = std::numeric_limits<int32_t>::max() / (4 * quads_ * (kCenterOffset + kCenterLimit) + 1);
    const int64_t limit = std::min<int64_t>(kCenterLimit, most);
    parallel_for(0, batch, grain(4 * features), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        int8_t* own = reinterpret_cast<int8_t*>(codes_.data() + i * quads_);
        scales_[i] = quantize(x + i * features, features, limit, [&](int64_t p, int32_t value) {
          own[p] = static_cast<int8_t>(value);
          sums_[i] += value;
        });
      }
    });
  }

  int64_t batch() const { return static_cast<int64_t>(scales_.size()); }

  // What rows are met with; with spread_weight (B), or null, as CodedProblem has it.
  CodedProblem problem(const float* spread_weight) const {
    return {.input = codes_.data(),
            .sum = sums_.data(),
            .input_scale = scales_.data(),
            .spread_weight = spread_weight,
            .quads = quads_};
  }

 private:
  int64_t quads_;
  std::vector<int32_t> codes_, sums_;
  std::vector<float> scales_;
};

}  // namespace slide_torch
