// The largest k of <weight[row], x> + bias[row] for each sample: products are made in register tiles and looked at
// while they are in the first-level cache, so that logits are never held. Nearly every product is below the worst of
// its sample's best k so far, which costs one vector comparison.

// One tile of rows against the `count` <= Vectors * W samples, from `first` on, of one panel.
template <class T, int64_t Vectors>
inline void offer_tile(const T* const* a, const T* bias, const int64_t* ids, int64_t rows, const T* panel,
                       int64_t features, int64_t first, int64_t count, const Best<T>& best, Vec<T>* thresholds) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  T scores[kTileRows * Vectors * W];
  score_tile<T, kTileRows, Vectors>(a, panel, features, scores);
  IntVec<T> worth[Vectors] = {};
  for (int64_t i = 0; i < kTileRows; ++i)
    for (int64_t j = 0; j < Vectors; ++j) {
      T* at = scores + (i * Vectors + j) * W;
      const V z = load<V>(at) + bias[i];
      store(at, z);
      worth[j] |= ~(z < thresholds[j]);  // true for NaN too
    }
  for (int64_t j = 1; j < Vectors; ++j) worth[0] |= worth[j];
  if (!any_lane<T>(worth[0])) [[likely]]
    return;
  T limits[Vectors * W];
  for (int64_t j = 0; j < Vectors; ++j) store(limits + j * W, thresholds[j]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j) {
      const T z = scores[i * Vectors * W + j];
      if (z < limits[j]) continue;
      offer(best, first + j, z, ids[i]);
      limits[j] = best.limits[first + j];
    }
  for (int64_t j = 0; j < Vectors; ++j) thresholds[j] = load<V>(limits + j * W);
}

// Rows of a block and one panel of inputs stay in the first-level cache together.
template <class T>
inline int64_t rows_of_a_block(int64_t features) {
  const int64_t tiles = features > 0 ? 16384 / (features * int64_t(sizeof(T)) * kTileRows) : 8;
  return kTileRows * (tiles > 1 ? min_of(tiles, 8) : 1);
}

// Offers rows [begin, end) of the problem to its inputs. `packed` holds their panels (pack_transposed). The last
// panel's samples, where they are few, are met one by one: for them a tile would compute mostly padding, and a batch of
// one is a matter of bandwidth.
template <class T>
void topk_rows(const TopkProblem<T>& s, const T* packed, const Best<T>& best, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, N = tile_columns<T>(), few = 3;
  const int64_t single = s.batch % N <= few ? s.batch % N : 0, tiled = s.batch - single;
  const int64_t block = tiled ? rows_of_a_block<T>(s.features) : kTileRows;
  const T* a[kTileRows * 8];
  T bias[kTileRows * 8];
  int64_t ids[kTileRows * 8];
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = min_of(block, end - first);
    for (int64_t i = 0; i < block; ++i) {  // the last tile repeats a row where there is none
      ids[i] = first + min_of(i, rows - 1);
      a[i] = s.weight + ids[i] * s.features;
      bias[i] = s.bias ? s.bias[ids[i]] : T(0);
    }
    for (int64_t c = 0; c < tiled; c += N) {
      const int64_t columns = min_of(N, tiled - c);
      T limits[N];
      for (int64_t j = 0; j < N; ++j) limits[j] = j < columns ? best.limits[c + j] : T(0);
      for (int64_t j = columns; j < N; ++j) limits[j] = __builtin_huge_val();
      V thresholds[2] = {load<V>(limits), load<V>(limits + W)};
      for (int64_t i = 0; i < rows; i += kTileRows)
        (columns > W ? offer_tile<T, 2> : offer_tile<T, 1>)(a + i, bias + i, ids + i, min_of(kTileRows, rows - i),
                                                            packed + c * s.features, s.features, c, columns, best,
                                                            thresholds);
    }
    for (int64_t c = tiled; c < s.batch; ++c) {
      const T* x = s.input + c * s.features;
      for (int64_t i = 0; i < rows; ++i) {
        const T z = dot(a[i], x, s.features) + bias[i];
        if (!(z < best.limits[c])) offer(best, c, z, ids[i]);
      }
    }
  }
}
