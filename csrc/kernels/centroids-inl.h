// Nearest centroids by inner product (the largest wins: rows of any length, centroids of length 1 make it the
// smallest angle): a matrix product whose tiles are reduced while they are in registers.

// A panel is `tile_columns` rows, transposed: coordinate p of them at panel + p * tile_columns. Fills best and index
// (tile_columns) for one table; scores (count, tile_columns), or null, receives all inner products.
template <class T>
inline void score_centroids(const T* panel, int64_t width, const T* centroids, int64_t count, T* scores, T* best,
                            typename IntegerOf<T>::type* index) {
  using V = Vec<T>;
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>();
  V largest[2] = {broadcast<T>(-__builtin_huge_val()), broadcast<T>(-__builtin_huge_val())};
  IntVec<T> nearest[2] = {};
  T part[kTileRows * N];
  for (int64_t c = 0; c < count; c += kTileRows) {
    const int64_t rows = min_of(kTileRows, count - c);
    const T* a[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) a[i] = centroids + (c + min_of(i, rows - 1)) * width;
    tile<T, kTileRows>(a, 1, panel, N, width, part, N, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < 2; ++j) {
        const V score = load<V>(part + i * N + j * W);
        const IntVec<T> nearer = score > largest[j];
        largest[j] = select<T>(nearer, score, largest[j]);
        nearest[j] = nearer ? IntVec<T>{} + Int(c + i) : nearest[j];
        if (scores) store(scores + (c + i) * N + j * W, score);
      }
  }
  for (int64_t j = 0; j < 2; ++j) {
    store(best + j * W, largest[j]);
    store(index + j * W, nearest[j]);
  }
}

// The best so far of one column, the best first, of equal ones the one that came first.
template <class T>
struct RankedScores {
  T score[kMaxProbes];
  int32_t id[kMaxProbes];
  int64_t held;

  void offer(T value, int64_t number, int64_t most) {
    if (held == most && !(value > score[most - 1])) return;
    int64_t at = held < most ? held++ : most - 1;
    for (; at > 0 && value > score[at - 1]; --at) {
      score[at] = score[at - 1];
      id[at] = id[at - 1];
    }
    score[at] = value;
    id[at] = static_cast<int32_t>(number);
  }
};

// The `wanted` best of scores (count, tile_columns) for each of W columns. A part of the scores tells first how large
// the last of them may be: the others then cost a vector comparison each, but for the few that are larger.
template <class T>
inline void rank_scores(const T* scores, int64_t count, int64_t wanted, RankedScores<T>* best) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>();
  const int64_t stride = count / (4 * wanted);
  T limit[W];
  for (int64_t lane = 0; lane < W; ++lane) limit[lane] = -__builtin_huge_val();
  if (stride > 1) {
    // wanted / stride of them are expected in the part; nearly always the twofold and some are more than that
    const int64_t rank = 2 * (wanted / stride) + 4;
    for (int64_t lane = 0; lane < W; ++lane) {
      best[lane].held = 0;
      for (int64_t c = 0; c < count; c += stride) best[lane].offer(scores[c * N + lane], c, rank);
      limit[lane] = best[lane].score[rank - 1];
    }
  }
  const V limits = load<V>(limit);
  for (int64_t lane = 0; lane < W; ++lane) best[lane].held = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (!any_lane<T>(load<V>(scores + c * N) >= limits)) [[likely]]
      continue;
    for (int64_t lane = 0; lane < W; ++lane)
      if (scores[c * N + lane] >= limit[lane]) best[lane].offer(scores[c * N + lane], c, wanted);
  }
  for (int64_t lane = 0; lane < W; ++lane) {
    if (best[lane].held >= min_of(wanted, count)) continue;
    best[lane].held = 0;
    for (int64_t c = 0; c < count; ++c) best[lane].offer(scores[c * N + lane], c, wanted);
  }
}

// The code of a row is the centroid that it has the largest inner product with; further probes are the next best.
// `scratch` holds a panel, and where there are probes the scores of one table.
template <class T, class Code>
void nearest_centroids(const HashInput<T>& in, const Centroids<T>& centroids, const HashOutput<Code>& out,
                       int64_t begin, int64_t end, T* scratch) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>();
  const int64_t width = in.width();
  T* scores = out.probes > 1 ? scratch + width * N : nullptr;
  T best[N];
  typename IntegerOf<T>::type index[N];
  for (int64_t first = begin; first < end; first += N) {
    const int64_t count = min_of(N, end - first);
    V defect[2];
    for (int64_t j = 0; j < 2; ++j)
      defect[j] = load_block(in, first + j * W, min_of(W, count - j * W), scratch + j * W, N);
    for (int64_t table = 0; table < out.tables; ++table) {
      score_centroids(scratch, width, centroids.data + table * centroids.count * width, centroids.count, scores, best,
                      index);
      Code* codes = out.codes + table * out.probes * out.stride + first;
      for (int64_t j = 0; j < 2 && j * W < count; ++j)
        store_codes<T, Code>(codes + j * W, min_of(W, count - j * W), load<IntVec<T>>(index + j * W), defect[j]);
      for (int64_t j = 0; scores && j * W < count; ++j) {
        RankedScores<T> ranked[W];
        rank_scores(scores + j * W, centroids.count, out.probes, ranked);
        for (int64_t lane = 0; lane < min_of(W, count - j * W); ++lane)
          for (int64_t p = 0; p < out.probes; ++p) {
            Code* code = codes + p * out.stride + j * W + lane;
            if (codes[j * W + lane] < 0 || p >= ranked[lane].held)
              *code = Code(-1);
            else
              *code = static_cast<Code>(ranked[lane].id[p]);
          }
      }
    }
  }
}

// A row of what is hashed: bias appended, centered, augmented. Returns NaN where it holds NaN or Inf, else 0.
template <class T>
inline T load_row(const HashInput<T>& in, int64_t row, T* out) {
  const int64_t given = in.features + (in.has_bias ? 1 : 0);
  const T* source = in.data + row * in.features;
  T defect = T(0), squared = T(0);
  for (int64_t i = 0; i < in.features; ++i) out[i] = source[i];
  if (in.has_bias) out[in.features] = in.bias[row];
  for (int64_t i = 0; i < given; ++i) defect += out[i] * T(0);
  for (int64_t i = 0; in.center && i < given; ++i) out[i] -= in.center[i];
  if (in.augmented) {
    for (int64_t i = 0; i < given; ++i) squared += out[i] * out[i];
    const T missing = in.norm_bound * in.norm_bound - squared;
    out[given] = missing > T(0) ? static_cast<T>(__builtin_sqrt(missing)) : T(0);
  }
  return defect;
}

// The places of the `wanted` largest of `scores` (count).
template <class T>
inline void largest_places(const T* scores, int64_t count, int64_t wanted, int32_t* places) {
  int64_t held = 0;
  for (int64_t g = 0; g < count; ++g) {
    if (held == wanted && !(scores[g] > scores[places[held - 1]])) continue;
    int64_t at = held < wanted ? held++ : held - 1;
    for (; at > 0 && scores[g] > scores[places[at - 1]]; --at) places[at] = places[at - 1];
    places[at] = static_cast<int32_t>(g);
  }
}

// The best groups of `count` rows, `chosen`, and in starts[g + 1] how many rows chose group g.
template <class T>
inline void choose_groups(const CentroidGroups<T>& groups, int64_t count, int64_t width,
                          const GroupScratch<T>& scratch) {
  constexpr int64_t N = tile_columns<T>();
  const int64_t panels = (groups.count + N - 1) / N;
  const T* a[kTileRows];
  T scores[kTileRows * N];
  for (int64_t g = 0; g <= groups.count; ++g) scratch.starts[g] = 0;
  for (int64_t first = 0; first < count; first += kTileRows) {
    const int64_t rows = min_of(kTileRows, count - first);
    for (int64_t i = 0; i < kTileRows; ++i) a[i] = scratch.rows + (first + min_of(i, rows - 1)) * width;
    for (int64_t panel = 0; panel < panels; ++panel) {
      score_tile<T, kTileRows, 2>(a, groups.coarse + panel * N * width, width, scores);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < N; ++j) scratch.coarse[(i * panels + panel) * N + j] = scores[i * N + j];
    }
    for (int64_t i = 0; i < rows; ++i) {
      int32_t* chosen = scratch.chosen + (first + i) * groups.looked;
      largest_places(scratch.coarse + i * panels * N, groups.count, groups.looked, chosen);
      for (int64_t p = 0; p < groups.looked; ++p) ++scratch.starts[chosen[p] + 1];
    }
  }
}

// The rows that chose each group, `members`; starts[g] becomes the end of group g's.
template <class T>
inline void list_members(const CentroidGroups<T>& groups, int64_t count, const GroupScratch<T>& scratch) {
  for (int64_t g = 0; g < groups.count; ++g) scratch.starts[g + 1] += scratch.starts[g];
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < groups.looked; ++p)
      scratch.members[scratch.starts[scratch.chosen[i * groups.looked + p]]++] = static_cast<int32_t>(i);
}

// Offers the centroids of group g to at most kTileRows rows, its `members`.
template <class T>
inline void search_group(const CentroidGroups<T>& groups, int64_t g, const int32_t* members, int64_t rows,
                         int64_t width, const GroupScratch<T>& scratch, int32_t* codes) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>();
  const T* a[kTileRows];
  T scores[kTileRows * N];
  for (int64_t i = 0; i < kTileRows; ++i) a[i] = scratch.rows + members[min_of(i, rows - 1)] * width;
  for (int64_t panel = groups.panels[g]; panel < groups.panels[g + 1]; ++panel) {
    score_tile<T, kTileRows, 2>(a, groups.packed + panel * N * width, width, scores);
    const int32_t* ids = groups.ids + panel * N;
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t row = members[i];
      const V left = load<V>(scores + i * N), right = load<V>(scores + i * N + W);
      if (!any_lane<T>((left >= scratch.best[row]) | (right >= scratch.best[row]))) [[likely]]
        continue;
      for (int64_t j = 0; j < N; ++j) {
        const T score = scores[i * N + j];
        if (score < scratch.best[row] || (score == scratch.best[row] && codes[row] <= ids[j])) continue;
        if (!(score == score) || scratch.best[row] == T(__builtin_huge_val())) continue;
        scratch.best[row] = score;
        codes[row] = ids[j];
      }
    }
  }
}

// codes[i], for rows [begin, end), at most kGroupedRows: the best centroid of the row's best groups. Group by group, so
// that its centroids meet many rows while they are in the first-level cache. Of equal ones the smaller number wins.
template <class T>
void nearest_in_groups(const HashInput<T>& in, const CentroidGroups<T>& groups, int32_t* codes, int64_t begin,
                       int64_t end, const GroupScratch<T>& scratch) {
  const int64_t count = end - begin, width = in.width();
  for (int64_t i = 0; i < count; ++i) {
    const T defect = load_row(in, in.rows ? in.rows[begin + i] : begin + i, scratch.rows + i * width);
    scratch.best[i] = defect == T(0) ? T(-__builtin_huge_val()) : T(__builtin_huge_val());  // nothing beats the latter
    codes[begin + i] = -1;
  }
  choose_groups(groups, count, width, scratch);
  list_members(groups, count, scratch);
  int64_t first = 0;
  for (int64_t g = 0; g < groups.count; ++g)
    for (const int64_t last = scratch.starts[g]; first < last; first = min_of(first + kTileRows, last))
      search_group(groups, g, scratch.members + first, min_of(kTileRows, last - first), width, scratch, codes + begin);
}
