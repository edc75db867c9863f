// Rows of a weight as an operator is given them.
#pragma once

#include <algorithm>
#include <cstring>

#include "../kernels/dispatch.h"
#include "tensors.h"

namespace slide_torch {

// Rows of a weight (N, features): of type T, or bits of bfloat16, which are widened where they are read.
template <class T>
class StoredRows {
 public:
  StoredRows(const Tensor& weight, int64_t features) : features_(features) {
    if (weight.scalar_type() == ScalarType::BFloat16)
      narrow_ = data<uint16_t>(weight);
    else
      exact_ = data<T>(weight);
  }

  // Where row `id` stands, for prefetching, and how many bytes it has.
  const char* address(int64_t id) const {
    return exact_ ? reinterpret_cast<const char*>(exact_ + id * features_)
                  : reinterpret_cast<const char*>(narrow_ + id * features_);
  }
  int64_t bytes() const { return features_ * static_cast<int64_t>(exact_ ? sizeof(T) : sizeof(uint16_t)); }

  // Row `id` where it stands, or widened into `space` (features).
  const T* row(int64_t id, T* space) const {
    if (exact_) return exact_ + id * features_;
    for (int64_t i = 0; i < features_; ++i) {
      const uint32_t bits = uint32_t{narrow_[id * features_ + i]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      space[i] = static_cast<T>(value);
    }
    return space;
  }

  // scores[i] = <row ids[i], x> + bias[ids[i]].
  void score(const T* bias, const T* x, const int32_t* ids, int64_t count, T* scores) const {
    if (exact_) return real_kernels<T>().score_rows(exact_, bias, x, features_, ids, count, scores);
    constexpr int32_t kAtOnce = 16;
    constexpr int32_t places[kAtOnce] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    std::vector<T> wide(kAtOnce * features_);
    for (int64_t first = 0; first < count; first += kAtOnce) {
      const int64_t some = std::min<int64_t>(kAtOnce, count - first);
      for (int64_t i = 0; i < some; ++i) row(ids[first + i], wide.data() + i * features_);
      real_kernels<T>().score_rows(wide.data(), nullptr, x, features_, places, some, scores + first);
      for (int64_t i = 0; bias && i < some; ++i) scores[first + i] += bias[ids[first + i]];
    }
  }

 private:
  const T* exact_ = nullptr;
  const uint16_t* narrow_ = nullptr;
  int64_t features_;
};

}  // namespace slide_torch
