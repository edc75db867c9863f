// Optimizers on the touched rows of a parameter, read and written once, and the sum of duplicate gradient rows.
// The limit is memory: Adam moves 28 bytes an element, the gradient included (20 with moments in bfloat16), against a
// division and a square root every 8 lanes.

// gcc turns the lanes into one vsqrtps (given -fno-math-errno); clang has the operation.
template <class V, class T>
inline V square_root(V x) {
#if __has_builtin(__builtin_elementwise_sqrt)
  return __builtin_elementwise_sqrt(x);
#else
  V result;
  for (int64_t i = 0; i < Simd<T>::lanes; ++i) result[i] = static_cast<T>(__builtin_sqrt(x[i]));
  return result;
#endif
}
template <>
inline float square_root<float, float>(float x) {
  return __builtin_sqrtf(x);
}
template <>
inline double square_root<double, double>(double x) {
  return __builtin_sqrt(x);
}

// Asking for scattered rows ahead helps rows of some cache lines; of longer ones the hardware prefetches the rest by
// itself, and rows of single elements share their lines with their neighbours.
template <class T>
inline bool worth_prefetching(int64_t width) {
  const int64_t bytes = width * int64_t(sizeof(T));
  return bytes >= 16 && bytes <= 512;
}

// For rows [begin, end): step(param, state, gradient) on vectors, then on the scalars left over. `memory` takes them in
// and out of memory.
template <class T, int States, class Memory, class Step>
inline void update_rows(const RowUpdate<T>& update, int64_t begin, int64_t end, const Memory& memory,
                        const Step& step) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, L = W > line<T>() ? W : line<T>();
  const int64_t width = update.width;
  const bool prefetch = worth_prefetching<T>(width);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t offset = update.rows[u] * width, gradient_offset = u * width;
    const int64_t next = update.rows[min_of(u + kRowsAhead, update.count - 1)] * width;
    const auto step_of = [&]<class X>(X param, int64_t i) {
      X gradient, state[States + 1];
      memory.read(offset + i, param, state);
      memory.read_gradient(gradient_offset + i, gradient);
      step(param, state, gradient);
      memory.write(offset + i, param, state);
    };
    int64_t i = 0;
    for (; i + L <= width; i += L) {  // a cache line of each
      if (prefetch) {
        __builtin_prefetch(memory.param_at(next + i), 1);
        for (int s = 0; s < States; ++s) __builtin_prefetch(memory.state_at(s, next + i), 1);
      }
      for (int64_t k = 0; k < L; k += W) step_of(V{}, i + k);
    }
    for (; i + W <= width; i += W) step_of(V{}, i);
    for (; i < width; ++i) step_of(T{}, i);
  }
}

// All of the parameter's own type.
template <class T, int States>
struct Exact {
  RowUpdate<T> update;

  const void* param_at(int64_t i) const { return update.param + i; }
  const void* state_at(int s, int64_t i) const { return update.state[s] + i; }
  template <class X>
  void read(int64_t i, X& param, X* state) const {
    param = load<X>(update.param + i);
    for (int s = 0; s < States; ++s) state[s] = load<X>(update.state[s] + i);
  }
  template <class X>
  void read_gradient(int64_t i, X& gradient) const {
    gradient = load<X>(update.gradient + i);
  }
  template <class X>
  void write(int64_t i, X param, const X* state) const {
    for (int s = 0; s < States; ++s) store(update.state[s] + i, state[s]);
    store(update.param + i, param);
  }
};

// float to bfloat16 and back. Rounded up or down at random, with the probability that makes the mean right: rounded to
// nearest, what moves by a thousandth a step would not move at all. The random bits are a hash of step and element, so
// they are the same at any number of threads and on every replica of a model.
struct Stochastic {
  typedef uint16_t Narrow __attribute__((vector_size(SLIDE_VECTOR_BYTES / 2)));
  using Bits = Vec<uint32_t>;

  uint32_t random;

  static void widen(const uint16_t* source, Vec<float>& value) {
    const Bits bits = __builtin_convertvector(load<Narrow>(source), Bits) << 16;
    value = load<Vec<float>>(reinterpret_cast<const float*>(&bits));
  }
  static void widen(const uint16_t* source, float& value) {
    const uint32_t bits = uint32_t{*source} << 16;
    __builtin_memcpy(&value, &bits, sizeof(value));
  }
  // Two of element i, each by 16 random bits of its own.
  void narrow(int64_t i, uint16_t* const target[2], const Vec<float>* value) const {
    const Bits noise = mix((lane_numbers() + static_cast<uint32_t>(i)) ^ random_of(i));
    store(target[0] + i, rounded(value[0], noise >> 16));
    store(target[1] + i, rounded(value[1], noise & 0xffffU));
  }
  void narrow(int64_t i, uint16_t* const target[2], const float* value) const {
    const uint32_t noise = mix(static_cast<uint32_t>(i) ^ random_of(i));
    target[0][i] = rounded(value[0], noise >> 16);
    target[1][i] = rounded(value[1], noise & 0xffffU);
  }
  void narrow(int64_t i, uint16_t* target, Vec<float> value) const {
    const Bits noise = mix((lane_numbers() + static_cast<uint32_t>(i)) ^ random_of(i));
    store(target + i, rounded(value, noise >> 16));
  }
  void narrow(int64_t i, uint16_t* target, float value) const {
    target[i] = rounded(value, mix(static_cast<uint32_t>(i) ^ random_of(i)) >> 16);
  }

 private:
  uint32_t random_of(int64_t i) const { return random + static_cast<uint32_t>(i >> 32) * 0x9e3779b9U; }
  static Bits lane_numbers() {
    Bits numbers;
    for (uint32_t lane = 0; lane < Simd<uint32_t>::lanes; ++lane) numbers[lane] = lane;
    return numbers;
  }
  static Narrow rounded(Vec<float> value, Bits noise) {
    Bits bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bits = value == value ? bits + noise : bits;  // NaN could carry into the sign
    return __builtin_convertvector(bits >> 16, Narrow);
  }
  static uint16_t rounded(float value, uint32_t noise) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>((value == value ? bits + noise : bits) >> 16);
  }
};

// Two states in bfloat16, parameter and gradient in float.
struct NarrowStates {
  RowUpdate<float> update;
  Stochastic rounding{mix(update.step)};

  const void* param_at(int64_t i) const { return update.param + i; }
  const void* state_at(int s, int64_t i) const { return update.bfloat16_state[s] + i; }
  template <class X>
  void read(int64_t i, X& param, X* state) const {
    param = load<X>(update.param + i);
    for (int s = 0; s < 2; ++s) Stochastic::widen(update.bfloat16_state[s] + i, state[s]);
  }
  template <class X>
  void read_gradient(int64_t i, X& gradient) const {
    gradient = load<X>(update.gradient + i);
  }
  template <class X>
  void write(int64_t i, X param, const X* state) const {
    rounding.narrow(i, update.bfloat16_state, state);
    store(update.param + i, param);
  }
};

// All in bfloat16.
template <int States>
struct Narrow {
  RowUpdate<float> update;
  Stochastic of_states{mix(update.step)}, of_param{mix(~update.step)};

  const void* param_at(int64_t i) const { return update.bfloat16_param + i; }
  const void* state_at(int s, int64_t i) const { return update.bfloat16_state[s] + i; }
  template <class X>
  void read(int64_t i, X& param, X* state) const {
    Stochastic::widen(update.bfloat16_param + i, param);
    for (int s = 0; s < States; ++s) Stochastic::widen(update.bfloat16_state[s] + i, state[s]);
  }
  template <class X>
  void read_gradient(int64_t i, X& gradient) const {
    Stochastic::widen(update.bfloat16_gradient + i, gradient);
  }
  template <class X>
  void write(int64_t i, X param, const X* state) const {
    if constexpr (States == 2) of_states.narrow(i, update.bfloat16_state, state);
    if constexpr (States == 1) of_states.narrow(i, update.bfloat16_state[0], state[0]);
    of_param.narrow(i, update.bfloat16_param, param);
  }
};

// Updates rows whose states are of the parameter's type, whichever it is.
template <class T, int States, class Step>
inline void update_alike(const RowUpdate<T>& update, int64_t begin, int64_t end, const Step& step) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (update.bfloat16_param != nullptr)
      return update_rows<T, States>(update, begin, end, Narrow<States>{update}, step);
  }
  update_rows<T, States>(update, begin, end, Exact<T, States>{update}, step);
}

// state = {exp_avg, exp_avg_sq}. The order of operations is torch.optim.SparseAdam's.
template <class T>
struct AdamStep {
  AdamScalars<T> c;

  template <class X>
  void operator()(X& param, X* state, X gradient) const {
    gradient *= c.sign;
    param *= c.keep;
    state[0] += (gradient - state[0]) * c.rate1;
    state[1] += (gradient * gradient - state[1]) * c.rate2;
    param -= c.step_size * (state[0] / (square_root<X, T>(state[1]) + c.eps));
  }
};

template <class T>
void adam_rows(const RowUpdate<T>& update, const AdamScalars<T>& c, int64_t begin, int64_t end) {
  const AdamStep<T> step{c};
  if constexpr (sizeof(T) == sizeof(float)) {
    if (update.bfloat16_param == nullptr && update.bfloat16_state[0] != nullptr)
      return update_rows<T, 2>(update, begin, end, NarrowStates{update}, step);
  }
  update_alike<T, 2>(update, begin, end, step);
}

// state = {momentum_buffer}, or none.
template <class T>
void sgd_rows(const RowUpdate<T>& update, const SgdScalars<T>& c, int64_t begin, int64_t end) {
  if (update.state[0] == nullptr && update.bfloat16_state[0] == nullptr)
    return update_alike<T, 0>(update, begin, end, [&c]<class X>(X& param, X*, X gradient) {
      param -= c.lr * (gradient * c.sign + param * c.weight_decay);
    });
  update_alike<T, 1>(update, begin, end, [&c]<class X>(X& param, X* state, X gradient) {
    gradient = gradient * c.sign + param * c.weight_decay;
    state[0] = state[0] * c.momentum + gradient;
    param -= c.lr * (state[0] * c.from_buffer + gradient * c.from_gradient);
  });
}

// state = {sum}.
template <class T>
void adagrad_rows(const RowUpdate<T>& update, T lr, T eps, T sign, int64_t begin, int64_t end) {
  update_alike<T, 1>(update, begin, end, [=]<class X>(X& param, X* state, X gradient) {
    state[0] += gradient * gradient;
    param -= lr * sign * (gradient / (square_root<X, T>(state[0]) + eps));
  });
}

// out[u] = sum of values[entry] for the entries [starts[u], starts[u + 1]), added in their order.
template <class T>
void sum_rows(const RowSum<T>& sum, T* out, int64_t begin, int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, step = 4 * W;
  const int64_t width = sum.width, last_entry = sum.starts[end];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t first = sum.starts[u], last = sum.starts[u + 1];
    T* target = out + u * width;
    for (int64_t e = first; e < last; ++e)
      if (e + kRowsAhead < last_entry) prefetch_row(sum.values + sum.entries[e + kRowsAhead].position * width, width);
    int64_t k = 0;
    for (; k + step <= width; k += step) {
      V total[4];
      const T* source = sum.values + sum.entries[first].position * width + k;
      for (int64_t j = 0; j < 4; ++j) total[j] = load<V>(source + j * W);
      for (int64_t e = first + 1; e < last; ++e) {
        source = sum.values + sum.entries[e].position * width + k;
        for (int64_t j = 0; j < 4; ++j) total[j] += load<V>(source + j * W);
      }
      for (int64_t j = 0; j < 4; ++j) store(target + k + j * W, total[j]);
    }
    for (; k < width; ++k) {
      T total = sum.values[sum.entries[first].position * width + k];
      for (int64_t e = first + 1; e < last; ++e) total += sum.values[sum.entries[e].position * width + k];
      target[k] = total;
    }
  }
}
