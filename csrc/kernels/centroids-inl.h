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
