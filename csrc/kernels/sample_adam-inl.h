// The per-sample pattern's gradient and Adam in one pass: of each active row a few vectors of the gradient stay in
// registers from the row's first sample to the step, so that it never goes through memory. The operations on an
// element are those of sample_gradients and adam_rows, in their order: the same bits.

// A row's derivatives by its logits lie anywhere among the sample-major ones: asked for so many pairs ahead.
constexpr int64_t kPairsAhead = 16;

// `Vectors` vectors of row u, from element i on.
template <class T, int64_t Vectors, class Memory>
inline void sample_adam_strip(const SampleProblem<T>& s, const T* gradient, T* grad_input, const Memory& memory,
                              const AdamStep<T>& step, int64_t u, int64_t i) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  const int64_t place = s.rows[u] * s.features + i, first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
  const int64_t later = s.rows[min_of(u + kRowsAhead, s.active - 1)] * s.features + i;
  V w[Vectors], sum[Vectors] = {};
  for (int64_t j = 0; j < Vectors; ++j) w[j] = load<V>(s.weight + place + j * W);
  for (int64_t k = 0; k < Vectors * W; k += line<T>()) prefetch_later(memory.param_at(later + k));
  for (int64_t e = first; e < last; ++e) {
    const T g = gradient[s.pair_positions[e]];
    const T* x = s.input + s.pair_samples[e] * s.features + i;
    T* gx = grad_input + s.pair_samples[e] * s.features + i;
    if (e == first)
      meet_sample<T, true, Vectors>(g, w, x, gx, sum);
    else
      meet_sample<T, false, Vectors>(g, w, x, gx, sum);
  }
  for (int64_t j = 0; j < Vectors; ++j) {
    for (int state = 0; j * W % line<T>() == 0 && state < 2; ++state)
      prefetch_later(memory.state_at(state, later + j * W));
    V param, states[2];
    memory.read(place + j * W, param, states);
    step(param, states, sum[j]);
    memory.write(place + j * W, param, states);
  }
}

// The elements of row u after its last vector.
template <class T, class Memory>
inline void sample_adam_rest(const SampleProblem<T>& s, const T* gradient, T* grad_input, const Memory& memory,
                             const AdamStep<T>& step, int64_t u, int64_t i) {
  const int64_t place = s.rows[u] * s.features + i, first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
  T sum[Simd<T>::lanes] = {};
  for (int64_t e = first; e < last; ++e) {
    const int64_t sample = s.pair_samples[e] * s.features + i;
    meet_rest(gradient[s.pair_positions[e]], s.weight + place, s.input + sample, s.features - i, e == first,
              grad_input + sample, sum);
  }
  for (int64_t k = 0; k < s.features - i; ++k) {
    T param, states[2];
    memory.read(place + k, param, states);
    step(param, states, sum[k]);
    memory.write(place + k, param, states);
  }
}

template <class T, class Memory>
inline void sample_adam_rows(const SampleProblem<T> s, const T* gradient, T* grad_input, T* grad_bias,
                             const Memory memory, const AdamStep<T> step, int64_t begin, int64_t end) {
  constexpr int64_t W = Simd<T>::lanes, kVectors = 4;
  const int64_t last_pair = s.pair_offsets[s.active] - 1;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t first = s.pair_offsets[u], last = s.pair_offsets[u + 1];
    for (int64_t e = first; e < last; ++e)
      __builtin_prefetch(gradient + s.pair_positions[min_of(e + kPairsAhead, last_pair)]);
    int64_t i = 0;
    for (; i + kVectors * W <= s.features; i += kVectors * W)
      sample_adam_strip<T, kVectors>(s, gradient, grad_input, memory, step, u, i);
    for (; i + W <= s.features; i += W) sample_adam_strip<T, 1>(s, gradient, grad_input, memory, step, u, i);
    if (i < s.features) sample_adam_rest(s, gradient, grad_input, memory, step, u, i);
    if (grad_bias) grad_bias[u] = bias_gradient(s, gradient, u);
  }
}

// What sample_gradients gives, but for the gradient rows: Adam takes these, on the weight's rows in `update`, whose
// states it has too.
template <class T>
void sample_gradients_adam(const SampleProblem<T>& s, const T* gradient, T* grad_input, T* grad_bias,
                           const RowUpdate<T>& update, const AdamScalars<T>& scalars, int64_t begin, int64_t end) {
  const AdamStep<T> step{scalars};
  if constexpr (sizeof(T) == sizeof(float)) {
    if (update.bfloat16_state[0] != nullptr)
      return sample_adam_rows(s, gradient, grad_input, grad_bias, NarrowStates{update}, step, begin, end);
  }
  sample_adam_rows(s, gradient, grad_input, grad_bias, Exact<T, 2>{update}, step, begin, end);
}
