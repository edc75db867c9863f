// Fixed-width vectors through the compiler's vector extension, so that one body serves SSE2, AVX2, AVX-512 and NEON.
// Included once per instruction set, after the target pragma, inside that set's anonymous namespace; therefore no
// include guard, and no call to a standard library template in any *-inl.h file: the linker might keep the copy
// compiled for the wider instruction set for everybody.

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(SLIDE_VECTOR_BYTES)));
  static constexpr int64_t lanes = SLIDE_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::Vec;

// The integer of the same width: what comparing two Vec<T> gives.
template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using IntVec = Vec<typename IntegerOf<T>::type>;

template <class V, class T>
inline V load(const T* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* target, V value) {
  __builtin_memcpy(target, &value, sizeof(V));
}

template <class T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

template <class T>
inline Vec<T> select(IntVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

// Lanes are added as a halving tree: the same on every call at one instruction set. Halves are vectors too, so that
// the compiler sees shuffles and not a chain of scalars.
template <class T, int64_t Lanes>
inline T sum_halves(const T* lane) {
  if constexpr (Lanes == 2) {
    return lane[0] + lane[1];
  } else {
    typedef T Half __attribute__((vector_size(Lanes / 2 * sizeof(T))));
    T half[Lanes / 2];
    store(half, load<Half>(lane) + load<Half>(lane + Lanes / 2));
    return sum_halves<T, Lanes / 2>(half);
  }
}

template <class T>
inline T horizontal_sum(Vec<T> value) {
  T lane[Simd<T>::lanes];
  store(lane, value);
  return sum_halves<T, Simd<T>::lanes>(lane);
}

template <class T>
inline bool any_lane(IntVec<T> mask) {
  int64_t part[SLIDE_VECTOR_BYTES / 8], any = 0;
  store(part, mask);
  for (int64_t i = 0; i < SLIDE_VECTOR_BYTES / 8; ++i) any |= part[i];
  return any != 0;
}

// The largest of some lanes, as sum_halves adds them.
template <class T, int64_t Lanes>
inline T largest_of_halves(const T* lane) {
  if constexpr (Lanes == 2) {
    return lane[0] > lane[1] ? lane[0] : lane[1];
  } else {
    typedef T Half __attribute__((vector_size(Lanes / 2 * sizeof(T))));
    const Half left = load<Half>(lane), right = load<Half>(lane + Lanes / 2);
    T half[Lanes / 2];
    store(half, left > right ? left : right);
    return largest_of_halves<T, Lanes / 2>(half);
  }
}

inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// A hash of uint32_t, or of a vector of them: every input bit reaches every output bit (Wellons, "lowbias32").
template <class U>
inline U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// exp(x) for float: x = n ln2 + r with |r| <= ln2/2, a degree-6 polynomial for exp(r), then 2^n put into the exponent
// in two halves so that results near the limits stay right. At most 2 ulp off; exp(-inf) = 0, NaN stays NaN.
inline Vec<float> vector_exp(Vec<float> x) {
  using V = Vec<float>;
  using I = IntVec<float>;
  const V low = broadcast<float>(-104.0f), high = broadcast<float>(89.0f);
  const I is_number = (x == x);
  V bounded = select<float>(x < low, low, x);
  bounded = select<float>(bounded > high, high, bounded);
  bounded = select<float>(is_number, bounded, V{});
  const V shifted = bounded * 1.44269504088896341f + 12582912.0f;  // round to nearest: 1.5 * 2^23
  const V n = shifted - 12582912.0f;
  V r = bounded - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  V p = broadcast<float>(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I exponent = __builtin_convertvector(n, I);
  const I half = exponent >> 1;
  union {
    I bits;
    V value;
  } first, second;
  first.bits = (half + 127) << 23;
  second.bits = (exponent - half + 127) << 23;
  const V result = p * first.value * second.value;
  return select<float>(is_number, result, x);
}

// float64 exists for checking: lane by lane through the C library.
inline Vec<double> vector_exp(Vec<double> x) {
  double lane[Simd<double>::lanes];
  store(lane, x);
  for (int64_t i = 0; i < Simd<double>::lanes; ++i) lane[i] = __builtin_exp(lane[i]);
  return load<Vec<double>>(lane);
}
