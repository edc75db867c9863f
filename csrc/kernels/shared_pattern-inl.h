// Softmax cross entropy over one active set shared by the batch: logits (U, B) neuron-major, so that softmax statistics
// are vertical arithmetic over samples.

// logits[u, b] = scale (<weight[rows[u]], x[b]> + bias[rows[u]]) + log_weight[u] for u in [begin, end).
template <class T>
void shared_logits(const SharedProblem<T>& s, const T* packed_input, T* logits, int64_t begin, int64_t end) {
  constexpr int64_t N = tile_columns<T>();
  const T* a[kTileRows];
  for (int64_t u = begin; u < end; u += kTileRows) {
    const int64_t rows = min_of(kTileRows, end - u);
    for (int64_t i = 0; i < rows; ++i) {
      a[i] = s.weight + s.rows[u + i] * s.features;
      if (u + i + kTileRows < end)  // the next tile's rows are scattered: the hardware cannot guess them
        prefetch_row(s.weight + s.rows[u + i + kTileRows] * s.features, s.features);
    }
    for (int64_t b = 0; b < s.batch; b += N)
      any_tile(a, 1, packed_input + b * s.features, N, s.features, logits + u * s.batch + b, s.batch, false, rows,
               min_of(N, s.batch - b));
    for (int64_t i = 0; i < rows; ++i) {
      const T bias = s.bias ? s.bias[s.rows[u + i]] : T(0), extra = s.log_weight ? s.log_weight[u + i] : T(0);
      T* z = logits + (u + i) * s.batch;
      for (int64_t b = 0; b < s.batch; ++b) z[b] = (z[b] + bias) * s.scale + extra;
    }
  }
}

// log_normalizer[b] = log sum_u exp(logits[u, b]) for samples [begin, end): maximum first, then the sum in
// blocks of rows (the error grows with the block, not with U).
template <class T>
void shared_log_normalizer(const T* logits, int64_t active, int64_t batch, T* log_normalizer, int64_t begin,
                           int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  constexpr T lowest = -__builtin_huge_val();
  for (int64_t b = begin; b < end; b += W) {
    const int64_t width = min_of(W, end - b);
    T edge[W] = {};
    auto column = [&](int64_t u) {
      if (width == W) return load<V>(logits + u * batch + b);
      for (int64_t i = 0; i < width; ++i) edge[i] = logits[u * batch + b + i];
      return load<V>(edge);
    };
    V largest = broadcast<T>(lowest);
    for (int64_t u = 0; u < active; ++u) {
      const V z = column(u);
      largest = select<T>(z > largest, z, largest);
    }
    V total{};
    for (int64_t block = 0; block < active; block += 64) {
      V sum{};
      for (int64_t u = block; u < min_of(block + 64, active); ++u) sum += vector_exp(column(u) - largest);
      total += sum;
    }
    T top[W], mass[W];
    store(top, largest);
    store(mass, total);
    for (int64_t i = 0; i < width; ++i) log_normalizer[b + i] = top[i] + static_cast<T>(__builtin_log(mass[i]));
  }
}

// gradient[u, :] of rows [begin, end): the loss's derivative by the logits without the labels' share, which the caller
// subtracts: scale[b] * softmax[u, b].
template <class T>
void shared_softmax_gradient(const T* logits, const T* log_normalizer, const T* scale, int64_t batch, T* gradient,
                             int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t u = begin; u < end; ++u) {
    int64_t b = 0;
    for (; b + W <= batch; b += W)
      store(gradient + u * batch + b,
            load<V>(scale + b) * vector_exp(load<V>(logits + u * batch + b) - load<V>(log_normalizer + b)));
    if (b < batch) {
      T z[W] = {};
      for (int64_t i = 0; i < batch - b; ++i) z[i] = logits[u * batch + b + i] - log_normalizer[b + i];
      store(z, vector_exp(load<V>(z)));
      for (int64_t i = 0; i < batch - b; ++i) gradient[u * batch + b + i] = scale[b + i] * z[i];
    }
  }
}

// grad_rows[u, :] = sum_b gradient[u, b] x[b, :] and grad_bias[u] = sum_b gradient[u, b], u in [begin, end); either
// may be null.
template <class T>
void shared_grad_rows(const SharedProblem<T>& s, const T* gradient, const T* packed_columns, T* grad_rows, T* grad_bias,
                      int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t N = tile_columns<T>(), W = Simd<T>::lanes;
  const T* a[kTileRows];
  for (int64_t u = begin; u < end; u += kTileRows) {
    const int64_t rows = min_of(kTileRows, end - u);
    for (int64_t k = 0; grad_rows && k < s.features; k += N)
      for (int64_t p = 0; p == 0 || p < s.batch; p += kDepth) {  // once for an empty batch too: zeros
        for (int64_t i = 0; i < rows; ++i) a[i] = gradient + (u + i) * s.batch + p;
        any_tile(a, 1, packed_columns + k * s.batch + p * N, N, min_of(kDepth, s.batch - p),
                 grad_rows + u * s.features + k, s.features, p > 0, rows, min_of(N, s.features - k));
      }
    for (int64_t i = 0; grad_bias && i < rows; ++i) {
      const T* g = gradient + (u + i) * s.batch;
      V sum{};
      int64_t b = 0;
      for (; b + W <= s.batch; b += W) sum += load<V>(g + b);
      T rest = T(0);
      for (; b < s.batch; ++b) rest += g[b];
      grad_bias[u + i] = horizontal_sum<T>(sum) + rest;
    }
  }
}

// grad_input[b, :] = sum_u gradient[u, b] weight[rows[u], :] for samples [begin, end). `panel` holds kDepth rows'
// columns of one tile.
template <class T>
void shared_grad_input(const SharedProblem<T>& s, const T* gradient, T* grad_input, int64_t begin, int64_t end,
                       T* panel) {
  constexpr int64_t N = tile_columns<T>();
  const T* a[kTileRows];
  for (int64_t i = begin * s.features; i < end * s.features; ++i) grad_input[i] = T(0);
  for (int64_t p = 0; p < s.active; p += kDepth) {
    const int64_t depth = min_of(kDepth, s.active - p);
    for (int64_t k = 0; k < s.features; k += N) {
      const int64_t columns = min_of(N, s.features - k);
      pack_panel(s.weight + k, s.features, s.rows + p, depth, columns, panel);
      for (int64_t b = begin; b < end; b += kTileRows) {
        const int64_t rows = min_of(kTileRows, end - b);
        for (int64_t i = 0; i < rows; ++i) a[i] = gradient + p * s.batch + b + i;
        any_tile(a, s.batch, panel, N, depth, grad_input + b * s.features + k, s.features, true, rows, columns);
      }
    }
  }
}
