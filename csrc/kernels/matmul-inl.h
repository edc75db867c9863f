// Small matrix products whose operands are gathered: C(i, j) = sum over p of A(i, p) B(p, j). A tile of C stays in
// registers, rows x two vectors wide. Each element of C is summed by one thread in the order of p (in blocks of
// `kDepth`, which also bounds the rounding error), whatever the number of threads.

constexpr int64_t kTileRows = SLIDE_TILE_ROWS;
constexpr int64_t kDepth = 256;

template <class T>
constexpr int64_t tile_columns() {
  return 2 * Simd<T>::lanes;
}

// a[i] points to A(i, 0), the next p lies a_step further; b[p * b_stride] is the first of the two vectors.
template <class T, int64_t Rows>
inline void tile(const T* const* a, int64_t a_step, const T* b, int64_t b_stride, int64_t depth, T* c, int64_t c_stride,
                 bool accumulate) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V sum[Rows][2] = {};
  for (int64_t p = 0; p < depth; ++p) {
    const V b0 = load<V>(b + p * b_stride), b1 = load<V>(b + p * b_stride + W);
    for (int64_t i = 0; i < Rows; ++i) {
      const T value = a[i][p * a_step];
      sum[i][0] += b0 * value;
      sum[i][1] += b1 * value;
    }
  }
  for (int64_t i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < 2; ++j) {
      T* target = c + i * c_stride + j * W;
      store(target, accumulate ? load<V>(target) + sum[i][j] : sum[i][j]);
    }
}

// The same for a tile with `rows` <= kTileRows rows and `columns` <= tile_columns columns of C to write.
template <class T>
inline void any_tile(const T* const* a, int64_t a_step, const T* b, int64_t b_stride, int64_t depth, T* c,
                     int64_t c_stride, bool accumulate, int64_t rows, int64_t columns) {
  constexpr int64_t N = tile_columns<T>();
  if (rows == kTileRows && columns == N)
    return tile<T, kTileRows>(a, a_step, b, b_stride, depth, c, c_stride, accumulate);
  T part[kTileRows * N];
  const T* pointers[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) pointers[i] = a[i < rows ? i : 0];
  tile<T, kTileRows>(pointers, a_step, b, b_stride, depth, part, N, false);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      T* target = c + i * c_stride + j;
      *target = accumulate ? *target + part[i * N + j] : part[i * N + j];
    }
}

// Copies columns [panel * N, ...) of row-major rows into a zero-padded (depth, N) panel.
template <class T>
inline void pack_panel(const T* source, int64_t row_stride, const int64_t* rows, int64_t depth, int64_t columns,
                       T* panel) {
  constexpr int64_t N = tile_columns<T>();
  for (int64_t p = 0; p < depth; ++p) {
    const T* row = source + (rows ? rows[p] : p) * row_stride;
    for (int64_t j = 0; j < columns; ++j) panel[p * N + j] = row[j];
    for (int64_t j = columns; j < N; ++j) panel[p * N + j] = T(0);
  }
}

// Packs the transpose of row-major x (count, width): panel k holds rows of x [k N, k N + N) as columns.
template <class T>
void pack_transposed(const T* x, int64_t count, int64_t width, int64_t first_panel, int64_t last_panel, T* packed) {
  constexpr int64_t N = tile_columns<T>();
  for (int64_t k = first_panel; k < last_panel; ++k) {
    T* panel = packed + k * width * N;
    for (int64_t j = 0; j < N; ++j) {
      const int64_t row = k * N + j;
      for (int64_t p = 0; p < width; ++p) panel[p * N + j] = row < count ? x[row * width + p] : T(0);
    }
  }
}

// Packs row-major x (count, width) by columns: panel k holds columns [k N, k N + N) of all rows.
template <class T>
void pack_columns(const T* x, int64_t count, int64_t width, int64_t first_panel, int64_t last_panel, T* packed) {
  constexpr int64_t N = tile_columns<T>();
  for (int64_t k = first_panel; k < last_panel; ++k)
    pack_panel(x + k * N, width, nullptr, count, min_of(N, width - k * N), packed + k * count * N);
}

// scores[i * Vectors * W + j] = <a[i], column j of the panel>, in the order of p.
template <class T, int64_t Rows, int64_t Vectors>
inline void score_tile(const T* const* a, const T* panel, int64_t features, T* scores) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>();
  V sum[Rows][Vectors] = {};
  for (int64_t p = 0; p < features; ++p) {
    V b[Vectors];
    for (int64_t j = 0; j < Vectors; ++j) b[j] = load<V>(panel + p * N + j * W);
    for (int64_t i = 0; i < Rows; ++i)
      for (int64_t j = 0; j < Vectors; ++j) sum[i][j] += b[j] * a[i][p];
  }
  for (int64_t i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < Vectors; ++j) store(scores + (i * Vectors + j) * W, sum[i][j]);
}
