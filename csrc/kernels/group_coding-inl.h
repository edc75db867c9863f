// Rows and centroids as small integers, for groups-inl.h.

// Rounds x (count) * twice / 2 to int8; returns the sum of all.
template <class T>
inline int32_t round_codes(const T* x, int64_t count, T twice, int8_t* codes) {
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes;
  constexpr int shift = 8 * sizeof(T) - 1;
  typedef int8_t Bytes __attribute__((vector_size(W)));
  IntVec<T> sums{};
  int64_t p = 0;
  for (; p + W <= count; p += W) {
    const IntVec<T> code = halved(__builtin_convertvector(load<Vec<T>>(x + p) * twice, IntVec<T>), shift);
    const Bytes narrow = __builtin_convertvector(code, Bytes);
    __builtin_memcpy(codes + p, &narrow, W);
    sums += code;
  }
  Int lane[W], sum = 0;
  store(lane, sums);
  for (int64_t i = 0; i < W; ++i) sum += lane[i];
  for (; p < count; ++p) {
    const Int code = halved(static_cast<Int>(x[p] * twice), shift);
    codes[p] = static_cast<int8_t>(code);
    sum += code;
  }
  return static_cast<int32_t>(sum);
}

// A vector as integers: codes (4 * quads) of its features and their `sum`, multiples of `unit`, and in `extras` two
// int16 of what follows the features, a bias or an augmented coordinate, which may be far larger. The unit is NaN where
// the vector holds NaN or Inf; what is too small for a unit counts as zero.
struct CodedVector {
  int32_t sum;
  int32_t extras;
  float unit;
};

template <class T>
inline CodedVector code_vector(const T* x, const CodedShape& shape, int8_t* codes) {
  using Int = typename IntegerOf<T>::type;
  const T* extra = x + shape.features;
  const T most = largest_magnitude(x, shape.features), extra_most = largest_magnitude(extra, shape.extras);
  const T by_features = most / static_cast<T>(shape.limit), by_extras = extra_most / T(kExtraLimit);
  const T unit = by_features > by_extras ? by_features : by_extras;
  const bool finite = most - most == T(0) && extra_most - extra_most == T(0);
  if (!finite || unit < T(__FLT_MIN__)) {
    for (int64_t p = 0; p < 4 * shape.quads; ++p) codes[p] = 0;
    return {.sum = 0, .extras = 0, .unit = finite ? 0.0f : __builtin_nanf("")};
  }
  const T twice = T(2) / unit, finer = twice * T(1 << kExtraBits);
  CodedVector coded = {
      .sum = round_codes(x, shape.features, twice, codes), .extras = 0, .unit = static_cast<float>(unit)};
  for (int64_t p = shape.features; p < 4 * shape.quads; ++p) codes[p] = 0;
  int16_t pair[2] = {};
  for (int64_t e = 0; e < shape.extras; ++e)
    pair[e] = static_cast<int16_t>(halved(static_cast<Int>(extra[e] * finer), 8 * sizeof(Int) - 1));
  __builtin_memcpy(&coded.extras, pair, sizeof(pair));
  return coded;
}

// Codes blocks [begin, end) of the centroids (any, features + extras) that `ids` (blocks, kBlockRows) names; where it
// is -1, the unit becomes NaN. `scratch` has room for the quads of one.
inline void code_centroids(const float* centroids, const int32_t* ids, const CodedShape& shape, int64_t begin,
                           int64_t end, const CodedCentroids& out, int8_t* scratch) {
  constexpr int64_t ahead = 4;
  const int64_t width = shape.features + shape.extras, quads = shape.quads;
  for (int64_t place = begin * kBlockRows; place < end * kBlockRows; ++place) {
    const int64_t id = ids[place], later = ids[min_of(place + ahead, end * kBlockRows - 1)];
    if (later >= 0) prefetch_row(centroids + later * width, width);
    CodedVector coded = {.sum = 0, .extras = 0, .unit = __builtin_nanf("")};
    if (id >= 0) coded = code_vector(centroids + id * width, shape, scratch);
    for (int64_t p = 0; p < 4 * quads; ++p) scratch[p] = static_cast<int8_t>(id < 0 ? 0 : scratch[p] + kCenterOffset);
    uint8_t* codes = out.codes + place / kBlockRows * shape.block_bytes() + place % kBlockRows * 4;
    for (int64_t q = 0; q < quads; ++q) __builtin_memcpy(codes + q * 4 * kBlockRows, scratch + 4 * q, 4);
    out.extras[place] = coded.extras;
    out.units[place] = coded.unit;
  }
}

// A row of what is hashed: bias appended, centered, augmented.
template <class T>
inline void load_row(const HashInput<T>& in, int64_t row, T* out) {
  const int64_t given = in.features + (in.has_bias ? 1 : 0);
  const T* source = in.data + row * in.features;
  for (int64_t i = 0; i < in.features; ++i) out[i] = in.center ? source[i] - in.center[i] : source[i];
  if (in.has_bias) out[in.features] = in.bias[row] - (in.center ? in.center[in.features] : T(0));
  if (!in.augmented) return;
  T squared = T(0);
  for (int64_t i = 0; i < given; ++i) squared += out[i] * out[i];
  const T missing = in.norm_bound * in.norm_bound - squared;
  out[given] = missing > T(0) ? static_cast<T>(__builtin_sqrt(missing)) : T(0);
}

// Codes rows [begin, end), and lists those that are finite in `members`; returns how many these are. `row` has room
// for one.
template <class T>
inline int64_t code_hashed_rows(const HashInput<T>& in, const CodedShape& shape, int64_t begin, int64_t end,
                                const GroupScratch& rows, T* row) {
  constexpr int64_t ahead = 4;
  const auto row_at = [&](int64_t i) { return in.rows ? in.rows[begin + i] : begin + i; };
  int64_t finite = 0;
  for (int64_t i = 0; i < end - begin; ++i) {
    if (i + ahead < end - begin) prefetch_row(in.data + row_at(i + ahead) * in.features, in.features);
    load_row(in, row_at(i), row);
    const CodedVector coded = code_vector(row, shape, reinterpret_cast<int8_t*>(rows.codes + i * shape.quads));
    rows.sums[i] = coded.sum;
    rows.extras[i] = coded.extras;
    if (coded.unit == coded.unit) rows.members[finite++] = static_cast<int32_t>(i);
  }
  return finite;
}
