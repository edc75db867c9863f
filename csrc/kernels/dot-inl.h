// Products of rows with vectors, and with four at a time.

// <a, b>.
template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int64_t j = 0; j < 4; ++j) sum[j] += load<V>(a + i + j * W) * load<V>(b + i + j * W);
  for (; i + W <= n; i += W) sum[0] += load<V>(a + i) * load<V>(b + i);
  T rest = T(0);
  for (; i < n; ++i) rest += a[i] * b[i];
  return horizontal_sum<T>((sum[0] + sum[2]) + (sum[1] + sum[3])) + rest;
}

// Four products with one row: its vectors are loaded once.
template <class T>
inline void dot4(const T* w, const T* const* x, int64_t n, T* result) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V even[4] = {}, odd[4] = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const V w0 = load<V>(w + i), w1 = load<V>(w + i + W);
    for (int64_t j = 0; j < 4; ++j) {
      even[j] += w0 * load<V>(x[j] + i);
      odd[j] += w1 * load<V>(x[j] + i + W);
    }
  }
  for (; i + W <= n; i += W)
    for (int64_t j = 0; j < 4; ++j) even[j] += load<V>(w + i) * load<V>(x[j] + i);
  for (int64_t j = 0; j < 4; ++j) {
    T rest = T(0);
    for (int64_t k = i; k < n; ++k) rest += w[k] * x[j][k];
    result[j] = horizontal_sum<T>(even[j] + odd[j]) + rest;
  }
}
