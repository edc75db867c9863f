// Binary cross entropy of logits z against 0 (the labels' share is the caller's): softplus(z) = log(1 + e^z) summed
// over the active neurons of each sample, and its derivative, the sigmoid.

// log(1 + y) for 0 <= y <= 1: 2 artanh(s) with s = y / (2 + y) <= 1/3, whose series to s^13 leaves 2e-8 of the value.
inline Vec<float> vector_log1p(Vec<float> y) {
  using V = Vec<float>;
  const V s = y / (y + 2.0f), q = s * s;
  V p = broadcast<float>(1.0f / 13);
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return (s + s) * (p * q + 1.0f);
}

// float64 exists for checking: lane by lane through the C library.
inline Vec<double> vector_log1p(Vec<double> y) {
  double lane[Simd<double>::lanes];
  store(lane, y);
  for (int64_t i = 0; i < Simd<double>::lanes; ++i) lane[i] = __builtin_log1p(lane[i]);
  return load<Vec<double>>(lane);
}

template <class T>
inline Vec<T> vector_softplus(Vec<T> z) {
  const IntVec<T> positive = z > Vec<T>{};
  return select<T>(positive, z, Vec<T>{}) + vector_log1p(vector_exp(select<T>(positive, -z, z)));
}

template <class T>
inline Vec<T> vector_sigmoid(Vec<T> z) {
  const IntVec<T> positive = z > Vec<T>{};
  const Vec<T> small = vector_exp(select<T>(positive, -z, z));
  return select<T>(positive, broadcast<T>(1), small) / (small + T(1));
}

// losses[b] = sum_u weight[u] softplus(logits[u, b]) for samples [begin, end); no weight counts as 1. Blocks of rows
// bound the rounding error.
template <class T>
void shared_softplus(const T* logits, const T* weight, int64_t active, int64_t batch, T* losses, int64_t begin,
                     int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t b = begin; b < end; b += W) {
    const int64_t width = min_of(W, end - b);
    T edge[W] = {};
    V total{};
    for (int64_t block = 0; block < active; block += 64) {
      V sum{};
      for (int64_t u = block; u < min_of(block + 64, active); ++u) {
        for (int64_t i = 0; width < W && i < width; ++i) edge[i] = logits[u * batch + b + i];
        const V z = width < W ? load<V>(edge) : load<V>(logits + u * batch + b);
        sum += vector_softplus<T>(z) * (weight ? weight[u] : T(1));
      }
      total += sum;
    }
    store(edge, total);
    for (int64_t i = 0; i < width; ++i) losses[b + i] = edge[i];
  }
}

// gradient[u, b] = scale[b] weight[u] sigmoid(logits[u, b]) of rows [begin, end).
template <class T>
void shared_sigmoid(const T* logits, const T* weight, const T* scale, int64_t batch, T* gradient, int64_t begin,
                    int64_t end) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t u = begin; u < end; ++u) {
    const T factor = weight ? weight[u] : T(1);
    int64_t b = 0;
    for (; b + W <= batch; b += W)
      store(gradient + u * batch + b, load<V>(scale + b) * factor * vector_sigmoid<T>(load<V>(logits + u * batch + b)));
    if (b < batch) {
      T edge[W] = {};
      for (int64_t i = 0; i < batch - b; ++i) edge[i] = logits[u * batch + b + i];
      store(edge, vector_sigmoid<T>(load<V>(edge)));
      for (int64_t i = 0; i < batch - b; ++i) gradient[u * batch + b + i] = scale[b + i] * factor * edge[i];
    }
  }
}

// One sample's logits (count): sum of weight softplus, and gradient[i] = scale weight[i] sigmoid(logits[i]).
template <class T>
T sample_softplus(const T* logits, const T* weight, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  V total{};
  T rest = T(0);
  for (int64_t block = 0; block < count; block += 64 * W) {
    V sum{};
    for (int64_t i = block; i < min_of(block + 64 * W, count); i += W) {
      if (i + W <= count) {
        const V loss = vector_softplus<T>(load<V>(logits + i));
        sum += weight ? loss * load<V>(weight + i) : loss;
        continue;
      }
      T edge[W] = {};
      for (int64_t j = 0; j < count - i; ++j) edge[j] = logits[i + j];
      store(edge, vector_softplus<T>(load<V>(edge)));
      for (int64_t j = 0; j < count - i; ++j) rest += edge[j] * (weight ? weight[i + j] : T(1));
    }
    total += sum;
  }
  return horizontal_sum<T>(total) + rest;
}

template <class T>
void sample_sigmoid(const T* logits, const T* weight, int64_t count, T scale, T* gradient) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t i = 0; i < count; i += W) {
    T edge[W] = {};
    const int64_t width = min_of(W, count - i);
    for (int64_t j = 0; j < width; ++j) edge[j] = logits[i + j];
    store(edge, vector_sigmoid<T>(load<V>(edge)) * scale);
    for (int64_t j = 0; j < width; ++j) gradient[i + j] = edge[j] * (weight ? weight[i + j] : T(1));
  }
}
