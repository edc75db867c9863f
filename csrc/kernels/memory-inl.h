// What memory can do for operators that read, or read and write, scattered rows: a measure to hold them against.

// Exclusive or of all numbers' bits in rows [begin, end) of table (any, width); `write` inverts every bit of them.
// Some rows ahead are asked for, a line with each line read.
template <class T>
int64_t touch_rows(T* table, const int64_t* rows, int64_t width, bool write, int64_t begin, int64_t end) {
  using Int = typename IntegerOf<T>::type;
  using V = IntVec<T>;
  constexpr int64_t W = Simd<T>::lanes, line = 64 / int64_t(sizeof(T)), ahead = 4;
  V seen{};
  Int rest = 0;
  for (int64_t u = begin; u < end; ++u) {
    T* row = table + rows[u] * width;
    const T* later = table + rows[min_of(u + ahead, end - 1)] * width;
    int64_t i = 0;
    for (; i + line <= width; i += line) {
      __builtin_prefetch(later + i);
      for (int64_t j = i; j < i + line; j += W) {
        const V bits = load<V>(row + j);
        seen ^= bits;
        if (write) store(row + j, ~bits);
      }
    }
    for (; i < width; ++i) {
      Int bits;
      __builtin_memcpy(&bits, row + i, sizeof(Int));
      rest ^= bits;
      bits = ~bits;
      if (write) __builtin_memcpy(row + i, &bits, sizeof(Int));
    }
  }
  Int lane[W];
  store(lane, seen);
  for (int64_t i = 0; i < W; ++i) rest ^= lane[i];
  return rest;
}
