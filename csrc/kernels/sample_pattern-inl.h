// Softmax cross entropy where every sample has its own active set (SLIDE's pattern), traversed neuron-major:
// a weight row comes from memory once a batch and meets every sample that activated it; the inputs of the
// batch sit in the second-level cache.

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V sum0{}, sum1{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum0 += load<V>(a + i) * load<V>(b + i);
    sum1 += load<V>(a + i + W) * load<V>(b + i + W);
  }
  for (; i + W <= n; i += W) sum0 += load<V>(a + i) * load<V>(b + i);
  T rest = T(0);
  for (; i < n; ++i) rest += a[i] * b[i];
  return horizontal_sum<T>(sum0 + sum1) + rest;
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

template <class T>
inline void prefetch_row(const T* row, int64_t features) {
  for (int64_t byte = 0; byte < features * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// How many rows ahead to ask for.
constexpr int64_t kPrefetchRows = 4;

// logits[position] = <weight[rows[u]], x[sample]> + bias[rows[u]] for the pairs of rows [begin, end).
template <class T>
void sample_logits(const SampleProblem<T>& s, T* logits, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const T* w = s.weight + s.rows[u] * s.features;
    const T bias = s.bias ? s.bias[s.rows[u]] : T(0);
    if (u + kPrefetchRows < end) prefetch_row(s.weight + s.rows[u + kPrefetchRows] * s.features, s.features);
    int64_t e = s.pair_offsets[u];
    for (; e + 4 <= s.pair_offsets[u + 1]; e += 4) {
      const T* x[4];
      T result[4];
      for (int64_t j = 0; j < 4; ++j) x[j] = s.input + s.pair_samples[e + j] * s.features;
      dot4(w, x, s.features, result);
      for (int64_t j = 0; j < 4; ++j) logits[s.pair_positions[e + j]] = result[j] + bias;
    }
    for (; e < s.pair_offsets[u + 1]; ++e)
      logits[s.pair_positions[e]] = dot(w, s.input + s.pair_samples[e] * s.features, s.features) + bias;
  }
}

// log sum exp of one sample's logits.
template <class T>
T sample_log_normalizer(const T* logits, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  constexpr T lowest = -__builtin_huge_val();
  T edge[W];
  auto at = [&](int64_t i) {
    if (i + W <= count) return load<V>(logits + i);
    for (int64_t j = 0; j < W; ++j) edge[j] = i + j < count ? logits[i + j] : lowest;
    return load<V>(edge);
  };
  V largest = broadcast<T>(lowest);
  for (int64_t i = 0; i < count; i += W) {
    const V z = at(i);
    largest = select<T>(z > largest, z, largest);
  }
  T lane[W];
  store(lane, largest);
  T top = lowest;
  for (int64_t j = 0; j < W; ++j) top = lane[j] > top ? lane[j] : top;
  V total{};
  for (int64_t block = 0; block < count; block += 64 * W) {
    V sum{};
    for (int64_t i = block; i < min_of(block + 64 * W, count); i += W) sum += vector_exp(at(i) - top);
    total += sum;
  }
  return top + static_cast<T>(__builtin_log(horizontal_sum<T>(total)));
}

// gradient[i] = scale * exp(logits[i] - log_normalizer) of one sample.
template <class T>
void sample_softmax_gradient(const T* logits, int64_t count, T log_normalizer, T scale, T* gradient) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(gradient + i, vector_exp(load<V>(logits + i) - log_normalizer) * scale);
  if (i < count) {
    T edge[W] = {};
    for (int64_t j = 0; j < count - i; ++j) edge[j] = logits[i + j] - log_normalizer;
    store(edge, vector_exp(load<V>(edge)) * scale);
    for (int64_t j = 0; j < count - i; ++j) gradient[i + j] = edge[j];
  }
}

// For the pairs of rows [begin, end): grad_rows[u] = sum g x, and grad_input[sample] += g weight[rows[u]] into
// this chunk's own accumulator. Chunks are cut by the data, not by the threads, and added in order.
template <class T>
void sample_gradients(const SampleProblem<T>& s, const T* gradient, T* grad_input, T* grad_rows, T* grad_bias,
                      int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, step = 4 * W;
  for (int64_t u = begin; u < end; ++u) {
    const T* w = s.weight + s.rows[u] * s.features;
    T* out = grad_rows + u * s.features;
    if (u + kPrefetchRows < end) prefetch_row(s.weight + s.rows[u + kPrefetchRows] * s.features, s.features);
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    if (grad_bias) {
      T sum = T(0);
      for (int64_t e = first; e < last; ++e) sum += gradient[s.pair_positions[e]];
      grad_bias[u] = sum;
    }
    int64_t k = 0;
    for (; k + step <= s.features; k += step) {
      V row[4], sum[4] = {};
      for (int64_t j = 0; j < 4; ++j) row[j] = load<V>(w + k + j * W);
      for (int64_t e = first; e < last; ++e) {
        const T g = gradient[s.pair_positions[e]];
        const T* x = s.input + s.pair_samples[e] * s.features + k;
        T* gx = grad_input + s.pair_samples[e] * s.features + k;
        for (int64_t j = 0; j < 4; ++j) {
          sum[j] += load<V>(x + j * W) * g;
          store(gx + j * W, load<V>(gx + j * W) + row[j] * g);
        }
      }
      for (int64_t j = 0; j < 4; ++j) store(out + k + j * W, sum[j]);
    }
    for (int64_t i = k; i < s.features; ++i) out[i] = T(0);
    for (int64_t e = first; k < s.features && e < last; ++e) {
      const T g = gradient[s.pair_positions[e]];
      const T* x = s.input + s.pair_samples[e] * s.features;
      T* gx = grad_input + s.pair_samples[e] * s.features;
      for (int64_t i = k; i < s.features; ++i) {
        out[i] += g * x[i];
        gx[i] += g * w[i];
      }
    }
  }
}
