// Vectors as small integers times a scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace slide_torch {

// x (features) as integers up to `limit` times the scale returned, through put(feature, integer). What is not finite
// has only zeros, and NaN for a scale; what is too small for a scale counts as zero.
template <class T, class F>
float quantize(const T* x, int64_t features, int64_t limit, const F& put) {
  T largest = T(0);
  bool finite = true;
  for (int64_t p = 0; p < features; ++p) {
    finite &= std::isfinite(x[p]);
    largest = std::max(largest, std::abs(x[p]));
  }
  const float scale = static_cast<float>(largest / static_cast<T>(limit));
  const bool any = finite && scale >= std::numeric_limits<float>::min();
  const T inverse = any ? static_cast<T>(limit) / largest : T(0);
  for (int64_t p = 0; p < features; ++p) put(p, any ? static_cast<int32_t>(std::nearbyint(x[p] * inverse)) : 0);
  return finite ? (any ? scale : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace slide_torch
