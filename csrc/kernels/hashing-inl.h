// Hash families. Each lane of a vector is one input row: a block of `lanes` rows is transposed once, and
// every hash is then vertical arithmetic whose codes leave as contiguous stores into the (L, n) result.

// Transposes rows [first, first + count) into block[coordinate][lane]; lanes past count repeat zeros.
// `defect` becomes NaN in a lane whose row holds NaN or Inf (0 * Inf is NaN), and stays 0 elsewhere.
template <class T>
inline Vec<T> load_block(const HashInput<T>& in, int64_t first, int64_t count, T* block) {
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t lane = 0; lane < W; ++lane) {
    if (lane >= count) {
      for (int64_t i = 0; i < in.features; ++i) block[i * W + lane] = T(0);
      if (in.bias) block[in.features * W + lane] = T(0);
      continue;
    }
    const int64_t row = in.rows ? in.rows[first + lane] : first + lane;
    const T* source = in.data + row * in.features;
    for (int64_t i = 0; i < in.features; ++i) block[i * W + lane] = source[i];
    if (in.bias) block[in.features * W + lane] = in.bias[row];
  }
  Vec<T> defect{};
  for (int64_t i = 0; i < in.features + (in.bias ? 1 : 0); ++i) {
    const Vec<T> value = load<Vec<T>>(block + i * W);
    defect += value * T(0);
    if (in.center) store(block + i * W, value - in.center[i]);
  }
  return defect;
}

// Writes one table's codes of a block; the code of a defective row is -1.
template <class T, class Code>
inline void store_codes(Code* out, int64_t count, IntVec<T> code, Vec<T> defect) {
  constexpr int64_t W = Simd<T>::lanes;
  code = code | (defect != defect);  // all bits set where the defect is NaN: -1
  typename IntegerOf<T>::type lane[W];
  store(lane, code);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(lane[i]);
}

// In-place fast Walsh-Hadamard transform of D = 2^log vectors, radix 4 to halve the loads and stores.
template <class T>
inline void hadamard(T* data, int64_t size) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  int64_t half = 1;
  for (; half * 4 <= size; half *= 4) {
    for (int64_t base = 0; base < size; base += 4 * half)
      for (int64_t i = base; i < base + half; ++i) {
        T* p = data + i * W;
        const V a = load<V>(p), b = load<V>(p + half * W);
        const V c = load<V>(p + 2 * half * W), d = load<V>(p + 3 * half * W);
        const V ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        store(p, ab + cd);
        store(p + half * W, a_b + c_d);
        store(p + 2 * half * W, ab - cd);
        store(p + 3 * half * W, a_b - c_d);
      }
  }
  if (half < size)
    for (int64_t i = 0; i < half; ++i) {
      T* p = data + i * W;
      const V a = load<V>(p), b = load<V>(p + half * W);
      store(p, a + b);
      store(p + half * W, a - b);
    }
}

// SimHash (Charikar 2002) by structured rotations H S3 H S2 H S1 (Andoni et al. 2015): D log D additions give D
// nearly independent signs where a dense projection costs d multiplications for each.
template <class T, class Code>
void simhash_hadamard(const HashInput<T>& in, const HadamardFunctions<T>& f, const HashOutput<Code>& out, int64_t begin,
                      int64_t end, T* scratch) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  T* block = scratch;
  T* rotated = scratch + (in.features + 1) * W;
  const int64_t D = f.size;
  for (int64_t first = begin; first < end; first += W) {
    const int64_t count = min_of(W, end - first);
    const V defect = load_block(in, first, count, block);
    const V bias = in.bias ? load<V>(block + in.features * W) * T(D) : V{};
    int64_t bit = 0, position = D, rotation = -1;
    IntVec<T> code{};
    for (int64_t table = 0; table < out.tables; ++table) {
      code = IntVec<T>{};
      for (bit = 0; bit < out.hashes; ++bit, ++position) {
        if (position == D) {  // the rotation is used up: draw the next
          position = 0;
          ++rotation;
          const T* signs = f.signs + rotation * 3 * D;
          for (int64_t i = 0; i < in.features; ++i) store(rotated + i * W, load<V>(block + i * W) * signs[i]);
          for (int64_t i = in.features; i < D; ++i) store(rotated + i * W, V{});
          hadamard(rotated, D);
          for (int64_t round = 1; round < 3; ++round) {
            for (int64_t i = 0; i < D; ++i) store(rotated + i * W, load<V>(rotated + i * W) * signs[round * D + i]);
            hadamard(rotated, D);
          }
        }
        const V value = load<V>(rotated + position * W) + bias * f.bias_projection[rotation * D + position];
        code |= (value > T(0)) & (typename IntegerOf<T>::type(1) << bit);
      }
      store_codes<T, Code>(out.codes + table * out.stride + first, count, code, defect);
    }
  }
}

// SimHash by an explicit (hashes * tables, features [+ 1]) matrix: Gaussian or sparse signs.
template <class T, class Code>
void simhash_dense(const HashInput<T>& in, const T* projection, const HashOutput<Code>& out, int64_t begin, int64_t end,
                   T* scratch) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, group = 8;
  const int64_t width = in.features + (in.bias ? 1 : 0);
  for (int64_t first = begin; first < end; first += W) {
    const int64_t count = min_of(W, end - first);
    const V defect = load_block(in, first, count, scratch);
    for (int64_t table = 0; table < out.tables; ++table) {
      IntVec<T> code{};
      for (int64_t bit = 0; bit < out.hashes; bit += group) {
        const int64_t now = min_of(group, out.hashes - bit);
        const T* p = projection + (table * out.hashes + bit) * width;
        V sum[group] = {};
        if (now == group) {
          for (int64_t i = 0; i < width; ++i) {
            const V x = load<V>(scratch + i * W);
            for (int64_t j = 0; j < group; ++j) sum[j] += x * p[j * width + i];
          }
        } else {
          for (int64_t j = 0; j < now; ++j)
            for (int64_t i = 0; i < width; ++i) sum[j] += load<V>(scratch + i * W) * p[j * width + i];
        }
        for (int64_t j = 0; j < now; ++j) code |= (sum[j] > T(0)) & (typename IntegerOf<T>::type(1) << (bit + j));
      }
      store_codes<T, Code>(out.codes + table * out.stride + first, count, code, defect);
    }
  }
}

inline uint32_t mix(uint32_t h) {  // a 32-bit finaliser: every input bit reaches every output bit
  h ^= h >> 16;
  h *= 0x7feb352dU;
  h ^= h >> 15;
  h *= 0x846ca68bU;
  return h ^ (h >> 16);
}

// Densified winner-take-all (Yagnik et al. 2011; Chen & Shrivastava 2018): a hash is the place of the largest
// of `bin` chosen coordinates, zeros counting as absent. An empty bin borrows from a bin that its own number
// determines, so equal vectors borrow equally; a vector with no coordinate at all has code 0.
template <class T, class Code>
void dwta(const HashInput<T>& in, const WinnerFunctions& f, const HashOutput<Code>& out, int64_t begin, int64_t end,
          T* scratch, int32_t* winners) {
  using V = Vec<T>;
  using I = IntVec<T>;
  using Int = typename IntegerOf<T>::type;
  constexpr int64_t W = Simd<T>::lanes;
  const int64_t bins = out.tables * out.hashes;
  for (int64_t first = begin; first < end; first += W) {
    const int64_t count = min_of(W, end - first);
    const V defect = load_block(in, first, count, scratch);
    bool any_empty = false;
    for (int64_t b = 0; b < bins; ++b) {
      const int32_t* coordinate = f.coordinates + b * f.bin;
      V best{};
      I winner = I{} - 1;
      for (int64_t i = 0; i < f.bin; ++i) {
        const V value = load<V>(scratch + coordinate[i] * W);
        const I take = (value != V{}) & ((value > best) | (winner < 0));
        best = take ? value : best;
        winner = take ? I{} + Int(i) : winner;
      }
      Int lane[W];
      store(lane, winner);
      for (int64_t i = 0; i < W; ++i) {
        winners[b * W + i] = static_cast<int32_t>(lane[i]);
        any_empty |= (lane[i] < 0) & (i < count);
      }
    }
    for (int64_t lane = 0; any_empty && lane < count; ++lane) {
      // Borrow from bins that were full before any borrowing: filled ones are marked below -1 until the end.
      int64_t full = 0;
      for (int64_t b = 0; b < bins; ++b) full += winners[b * W + lane] >= 0;
      for (int64_t b = 0; b < bins; ++b) {
        if (winners[b * W + lane] >= 0) continue;
        int32_t borrowed = 0;
        if (full > 0) {
          uint32_t probe = mix(static_cast<uint32_t>(b) + 0x9e3779b9U);
          int64_t source = probe % bins;
          for (int attempt = 0; attempt < 64 && winners[source * W + lane] < 0; ++attempt) {
            probe = mix(probe + 0x9e3779b9U);
            source = probe % bins;
          }
          while (winners[source * W + lane] < 0) source = source + 1 == bins ? 0 : source + 1;
          borrowed = winners[source * W + lane];
        }
        winners[b * W + lane] = -2 - borrowed;
      }
      for (int64_t b = 0; b < bins; ++b)
        if (winners[b * W + lane] < 0) winners[b * W + lane] = -2 - winners[b * W + lane];
    }
    for (int64_t table = 0; table < out.tables; ++table) {
      Int lane_codes[W] = {};
      for (int64_t h = 0; h < out.hashes; ++h)
        for (int64_t lane = 0; lane < W; ++lane) {
          const int32_t w = winners[(table * out.hashes + h) * W + lane];
          lane_codes[lane] |= static_cast<Int>(w < 0 ? 0 : w) << (h * f.bits);
        }
      store_codes<T, Code>(out.codes + table * out.stride + first, count, load<I>(lane_codes), defect);
    }
  }
}
