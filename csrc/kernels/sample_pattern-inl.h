// Softmax cross entropy where every sample has its own active set (SLIDE's pattern), traversed neuron-major: a weight
// row comes from memory once a batch and meets every sample that activated it; the inputs of the batch sit in the
// second-level cache.

// <w, x> + bias for the samples of pairs [first, last), w being as wide as `Vectors` vectors, which are loaded once.
// Most rows meet one sample or two: loops over the width would cost as much as the products.
template <class T, int64_t Vectors>
inline void held_row_logits(const SampleProblem<T>& s, const T* w, T bias, int64_t first, int64_t last, T* logits) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V row[Vectors];
  for (int64_t j = 0; j < Vectors; ++j) row[j] = load<V>(w + j * W);
  for (int64_t e = first; e < last; ++e) {
    const T* x = s.input + s.pair_samples[e] * (Vectors * W);
    V even = row[0] * load<V>(x), odd = row[1] * load<V>(x + W);
    for (int64_t j = 2; j < Vectors; j += 2) {
      even += row[j] * load<V>(x + j * W);
      odd += row[j + 1] * load<V>(x + (j + 1) * W);
    }
    logits[s.pair_positions[e]] = horizontal_sum<T>(even + odd) + bias;
  }
}

// The same for any width.
template <class T>
inline void row_logits(const SampleProblem<T>& s, const T* w, T bias, int64_t first, int64_t last, T* logits) {
  int64_t e = first;
  for (; e + 4 <= last; e += 4) {
    const T* x[4];
    T result[4];
    for (int64_t j = 0; j < 4; ++j) x[j] = s.input + s.pair_samples[e + j] * s.features;
    dot4(w, x, s.features, result);
    for (int64_t j = 0; j < 4; ++j) logits[s.pair_positions[e + j]] = result[j] + bias;
  }
  for (; e < last; ++e)
    logits[s.pair_positions[e]] = dot(w, s.input + s.pair_samples[e] * s.features, s.features) + bias;
}

// logits[position] = <weight[rows[u]], x[sample]> + bias[rows[u]] for the pairs of rows [begin, end).
template <class T>
void sample_logits(const SampleProblem<T>& s, T* logits, int64_t begin, int64_t end) {
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t u = begin; u < end; ++u) {
    const T* w = s.weight + s.rows[u] * s.features;
    prefetch_row(s.weight + s.rows[min_of(u + kRowsAhead, s.active - 1)] * s.features, s.features);
    const T bias = s.bias ? s.bias[s.rows[u]] : T(0);
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    if (s.features == 8 * W)
      held_row_logits<T, 8>(s, w, bias, first, last, logits);
    else if (s.features == 16 * W)
      held_row_logits<T, 16>(s, w, bias, first, last, logits);
    else
      row_logits(s, w, bias, first, last, logits);
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

// sum = g x, or += where the row has met a sample before, and gx += g w, of some vectors.
template <class T, bool First, int64_t Vectors>
inline void meet_sample(T g, const Vec<T>* w, const T* x, T* gx, Vec<T>* sum) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t j = 0; j < Vectors; ++j) {
    const V gradient = load<V>(x + j * W) * g;
    sum[j] = First ? gradient : sum[j] + gradient;
    store(gx + j * W, load<V>(gx + j * W) + w[j] * g);
  }
}

// The same of the elements after a row's last vector. One function for all: inlined, a compiler may round the products
// here and not there, and two ways to the same gradient would differ in their last bits.
template <class T>
[[gnu::noinline]] void meet_rest(T g, const T* w, const T* x, int64_t count, bool first, T* gx, T* sum) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] = first ? x[i] * g : sum[i] + x[i] * g;
    gx[i] += w[i] * g;
  }
}

// out = g x, or += where the row has met a sample before, and gx += g w.
template <class T, bool First>
inline void pair_gradient(T g, const T* __restrict w, const T* __restrict x, const T* ahead, int64_t n,
                          T* __restrict gx, T* __restrict out) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  const auto vector_step = [&](int64_t i) {
    const V row = load<V>(w + i);
    V sum = First ? V{} : load<V>(out + i);
    meet_sample<T, First, 1>(g, &row, x + i, gx + i, &sum);
    store(out + i, sum);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    if (First)
      for (int64_t k = 0; k < 2 * W; k += line<T>()) __builtin_prefetch(ahead + i + k);
    vector_step(i);
    vector_step(i + W);
  }
  for (; i + W <= n; i += W) vector_step(i);
  if (i < n) meet_rest(g, w + i, x + i, n - i, First, gx + i, out + i);
}

// gx += g w, as pair_gradient does.
template <class T>
inline void add_multiple(T g, const T* __restrict w, int64_t n, T* __restrict gx) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(gx + i, load<V>(gx + i) + load<V>(w + i) * g);
  for (; i < n; ++i) gx[i] += w[i] * g;
}

// The sum over row u's pairs of the derivative by their logits.
template <class T>
inline T bias_gradient(const SampleProblem<T>& s, const T* gradient, int64_t u) {
  T sum = T(0);
  for (int64_t e = s.pair_offsets[u]; e < s.pair_offsets[u + 1]; ++e) sum += gradient[s.pair_positions[e]];
  return sum;
}

// For the pairs of rows [begin, end): grad_rows[u] = sum g x, and grad_input[sample] += g weight[rows[u]] into
// this chunk's own accumulator. Chunks are cut by the data, not by the threads, and added in order. grad_rows and
// grad_bias may be null.
template <class T>
void sample_gradients(const SampleProblem<T>& s, const T* gradient, T* grad_input, T* grad_rows, T* grad_bias,
                      int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const T* w = s.weight + s.rows[u] * s.features;
    const T* ahead = s.weight + s.rows[min_of(u + kRowsAhead, s.active - 1)] * s.features;
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    for (int64_t e = first; !grad_rows && e < last; ++e)
      add_multiple(gradient[s.pair_positions[e]], w, s.features, grad_input + s.pair_samples[e] * s.features);
    T* out = grad_rows ? grad_rows + u * s.features : nullptr;
    for (int64_t e = first; grad_rows && e < last; ++e) {
      const T g = gradient[s.pair_positions[e]];
      const T* x = s.input + s.pair_samples[e] * s.features;
      T* gx = grad_input + s.pair_samples[e] * s.features;
      if (e == first)
        pair_gradient<T, true>(g, w, x, ahead, s.features, gx, out);
      else
        pair_gradient<T, false>(g, w, x, nullptr, s.features, gx, out);
    }
    for (int64_t i = 0; grad_rows && first == last && i < s.features; ++i) out[i] = T(0);
    if (grad_bias) grad_bias[u] = bias_gradient(s, gradient, u);
  }
}

// y[sample] += value weight[rows[u]] for the pairs of rows [begin, end), into this chunk's own sums y (B, features).
// A few vectors of the row stay in registers while they meet the row's samples.
template <class T>
void sample_weighted_rows(const SampleProblem<T>& s, const T* values, T* y, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, kVectors = 4;
  for (int64_t u = begin; u < end; ++u) {
    const T* w = s.weight + s.rows[u] * s.features;
    const T* ahead = s.weight + s.rows[min_of(u + kRowsAhead, s.active - 1)] * s.features;
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    int64_t i = 0;
    for (; i + kVectors * W <= s.features; i += kVectors * W) {
      V part[kVectors];
      for (int64_t j = 0; j < kVectors; ++j) part[j] = load<V>(w + i + j * W);
      for (int64_t k = 0; k < kVectors * W; k += line<T>()) __builtin_prefetch(ahead + i + k);
      for (int64_t e = first; e < last; ++e) {
        const T value = values[s.pair_positions[e]];
        T* target = y + s.pair_samples[e] * s.features + i;
        for (int64_t j = 0; j < kVectors; ++j) store(target + j * W, load<V>(target + j * W) + part[j] * value);
      }
    }
    for (int64_t e = first; i < s.features && e < last; ++e) {
      const T value = values[s.pair_positions[e]];
      T* target = y + s.pair_samples[e] * s.features;
      for (int64_t k = i; k < s.features; ++k) target[k] += w[k] * value;
    }
  }
}

// grad_rows[u] = sum over the row's pairs of value x[sample], rows [begin, end).
template <class T>
void sample_grad_rows(const SampleProblem<T>& s, const T* values, T* grad_rows, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, kVectors = 8;
  for (int64_t u = begin; u < end; ++u) {
    T* out = grad_rows + u * s.features;
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    int64_t i = 0;
    for (; i + kVectors * W <= s.features; i += kVectors * W) {
      V sum[kVectors] = {};
      for (int64_t e = first; e < last; ++e) {
        const T value = values[s.pair_positions[e]];
        const T* x = s.input + s.pair_samples[e] * s.features + i;
        for (int64_t j = 0; j < kVectors; ++j) sum[j] += load<V>(x + j * W) * value;
      }
      for (int64_t j = 0; j < kVectors; ++j) store(out + i + j * W, sum[j]);
    }
    for (int64_t k = i; k < s.features; ++k) out[k] = T(0);
    for (int64_t e = first; i < s.features && e < last; ++e) {
      const T value = values[s.pair_positions[e]];
      const T* x = s.input + s.pair_samples[e] * s.features;
      for (int64_t k = i; k < s.features; ++k) out[k] += x[k] * value;
    }
  }
}
