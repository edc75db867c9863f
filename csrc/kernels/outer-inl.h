// Sums of outer products of rows: upper triangles, row i of D (D + 1) / 2 numbers begins at i D - i (i - 1) / 2.

// sums = over rows [begin, end) of weight (bias, unless null, appended) of row^T row.
template <class T>
void outer_sum(const T* weight, const T* bias, int64_t features, int64_t begin, int64_t end, T* sums) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, kRows = 4;
  const int64_t width = features + (bias ? 1 : 0);
  for (int64_t i = 0; i < width * (width + 1) / 2; ++i) sums[i] = T(0);
  for (int64_t first = begin; first < end; first += kRows) {
    const T* row[kRows];
    T present[kRows], last[kRows];  // where rows run out, one counts 0 times
    for (int64_t k = 0; k < kRows; ++k) {
      const int64_t r = min_of(first + k, end - 1);
      row[k] = weight + r * features;
      present[k] = first + k < end ? T(1) : T(0);
      last[k] = bias ? bias[r] : T(0);
    }
    T* out = sums;
    for (int64_t i = 0; i < features; out += width - i, ++i) {
      T factor[kRows];
      for (int64_t k = 0; k < kRows; ++k) factor[k] = row[k][i] * present[k];
      int64_t j = i;
      for (; j + W <= features; j += W) {
        V sum = load<V>(out + j - i);
        for (int64_t k = 0; k < kRows; ++k) sum += load<V>(row[k] + j) * factor[k];
        store(out + j - i, sum);
      }
      for (; j < features; ++j)
        for (int64_t k = 0; k < kRows; ++k) out[j - i] += row[k][j] * factor[k];
      for (int64_t k = 0; bias && k < kRows; ++k) out[features - i] += factor[k] * last[k];
    }
    for (int64_t k = 0; bias && k < kRows; ++k) *out += present[k] * last[k] * last[k];
  }
}

template <class T>
T dot_product(const T* a, const T* b, int64_t n) {
  return dot(a, b, n);
}
