// Hash families. Each lane of a vector is one input row: a block of `lanes` rows is transposed once, and every hash is
// then vertical arithmetic whose codes leave as contiguous stores into the (L, n) result.

// Transposes rows [first, first + count) into block[coordinate * stride + lane]; lanes past count repeat zeros.
// `defect` becomes NaN in a lane whose row holds NaN or Inf (0 * Inf is NaN), and stays 0 elsewhere.
template <class T>
inline Vec<T> load_block(const HashInput<T>& in, int64_t first, int64_t count, T* block,
                         int64_t stride = Simd<T>::lanes) {
  constexpr int64_t W = Simd<T>::lanes;
  const int64_t given = in.features + (in.has_bias ? 1 : 0);
  for (int64_t lane = 0; lane < W; ++lane) {
    if (lane >= count) {
      for (int64_t i = 0; i < given; ++i) block[i * stride + lane] = T(0);
      continue;
    }
    const int64_t row = in.rows ? in.rows[first + lane] : first + lane;
    const T* source = in.data + row * in.features;
    for (int64_t i = 0; i < in.features; ++i) block[i * stride + lane] = source[i];
    if (in.has_bias) block[in.features * stride + lane] = in.bias[row];
  }
  Vec<T> defect{};
  for (int64_t i = 0; i < given; ++i) {
    const Vec<T> value = load<Vec<T>>(block + i * stride);
    defect += value * T(0);
    if (in.center) store(block + i * stride, value - in.center[i]);
  }
  if (in.augmented) {
    Vec<T> squared{};
    for (int64_t i = 0; i < given; ++i) {
      const Vec<T> value = load<Vec<T>>(block + i * stride);
      squared += value * value;
    }
    T missing[W];
    store(missing, broadcast<T>(in.norm_bound * in.norm_bound) - squared);
    for (int64_t lane = 0; lane < W; ++lane)
      block[given * stride + lane] = missing[lane] > T(0) ? static_cast<T>(__builtin_sqrt(missing[lane])) : T(0);
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

// As store_codes, and where there are several probes the further codes of each row. `offer(lane, moves)` offers what
// else its hashes could have been.
template <class T, class Code, class Offer>
inline void store_probes(const HashOutput<Code>& out, int64_t table, int64_t first, int64_t count, IntVec<T> code,
                         Vec<T> defect, const Offer& offer) {
  Code* codes = out.codes + table * out.probes * out.stride + first;
  store_codes<T, Code>(codes, count, code, defect);
  for (int64_t lane = 0; out.probes > 1 && lane < count; ++lane) {
    MoveList moves(out.probes - 1);
    int32_t flips[kMaxProbes];
    int64_t found = 0;
    if (codes[lane] >= 0) {
      offer(lane, moves);
      found = probe_flips(moves, flips);
    }
    for (int64_t p = 1; p < out.probes; ++p)
      codes[p * out.stride + lane] = p <= found ? static_cast<Code>(codes[lane] ^ flips[p - 1]) : Code(-1);
  }
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

// One rotation H S3 H S2 H S1 (Andoni et al. 2015) of a block: D log D additions give D nearly independent
// projections where a dense matrix costs d multiplications for each. Appended coordinates, for which a power of two of
// features leaves no room, enter through Gaussian projections of the same scale.
template <class T>
inline void rotate(const HashInput<T>& in, const HadamardFunctions<T>& f, int64_t rotation, const T* block,
                   T* rotated) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  const int64_t D = f.size;
  const T* signs = f.signs + rotation * 3 * D;
  for (int64_t i = 0; i < in.features; ++i) store(rotated + i * W, load<V>(block + i * W) * signs[i]);
  for (int64_t i = in.features; i < D; ++i) store(rotated + i * W, V{});
  hadamard(rotated, D);
  for (int64_t round = 1; round < 3; ++round) {
    for (int64_t i = 0; i < D; ++i) store(rotated + i * W, load<V>(rotated + i * W) * signs[round * D + i]);
    hadamard(rotated, D);
  }
  for (int64_t e = 0; e < in.extras(); ++e) {
    const V extra = load<V>(block + (in.features + e) * W) * T(D);
    const T* projection = f.extra_projection + ((in.has_bias ? e : 1) * f.rotations + rotation) * D;
    for (int64_t i = 0; i < D; ++i) store(rotated + i * W, load<V>(rotated + i * W) + extra * projection[i]);
  }
}

// The signs of `hashes` projections as bits of a code; a probe flips those whose projections are nearest to zero.
template <class T, class Code>
inline void store_signs(const HashOutput<Code>& out, int64_t table, int64_t first, int64_t count, const Vec<T>* value,
                        Vec<T> defect) {
  IntVec<T> code{};
  for (int64_t bit = 0; bit < out.hashes; ++bit) code |= (value[bit] > T(0)) & (typename IntegerOf<T>::type(1) << bit);
  store_probes<T>(out, table, first, count, code, defect, [&](int64_t lane, MoveList& moves) {
    for (int64_t bit = 0; bit < out.hashes; ++bit) {
      const double distance = static_cast<double>(value[bit][lane]);
      moves.offer(distance * distance, static_cast<int32_t>(bit), int32_t{1} << bit);
    }
  });
}

// SimHash (Charikar 2002) by structured rotations.
template <class T, class Code>
void simhash_hadamard(const HashInput<T>& in, const HadamardFunctions<T>& f, const HashOutput<Code>& out, int64_t begin,
                      int64_t end, T* scratch) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes;
  T* block = scratch;
  T* rotated = scratch + in.width() * W;
  for (int64_t first = begin; first < end; first += W) {
    const int64_t count = min_of(W, end - first);
    const V defect = load_block(in, first, count, block);
    int64_t position = f.size, rotation = -1;
    for (int64_t table = 0; table < out.tables; ++table) {
      V value[32];  // a code has at most 24 bits
      for (int64_t bit = 0; bit < out.hashes; ++bit, ++position) {
        if (position == f.size) {  // the rotation is used up: draw the next
          position = 0;
          rotate(in, f, ++rotation, block, rotated);
        }
        value[bit] = load<V>(rotated + position * W);
      }
      store_signs<T>(out, table, first, count, value, defect);
    }
  }
}

// SimHash by an explicit (hashes * tables, width) matrix of Gaussian numbers.
template <class T, class Code>
void simhash_dense(const HashInput<T>& in, const T* projection, const HashOutput<Code>& out, int64_t begin, int64_t end,
                   T* scratch) {
  using V = Vec<T>;
  constexpr int64_t W = Simd<T>::lanes, group = 8;
  const int64_t width = in.width();
  for (int64_t first = begin; first < end; first += W) {
    const int64_t count = min_of(W, end - first);
    const V defect = load_block(in, first, count, scratch);
    for (int64_t table = 0; table < out.tables; ++table) {
      V value[32];
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
        for (int64_t j = 0; j < now; ++j) value[bit + j] = sum[j];
      }
      store_signs<T>(out, table, first, count, value, defect);
    }
  }
}

// Offers the runner-up of each hash of one table, as far as it is behind the winner.
template <class T>
inline void offer_second(const T* block, const WinnerFunctions& f, int64_t first_bin, int64_t hashes, int64_t lane,
                         MoveList& moves) {
  constexpr int64_t W = Simd<T>::lanes;
  for (int64_t h = 0; h < hashes; ++h) {
    const int32_t* coordinate = f.coordinates + (first_bin + h) * f.bin;
    int64_t best = -1, second = -1;
    const auto value = [&](int64_t i) { return block[coordinate[i] * W + lane]; };
    for (int64_t i = 0; i < f.bin; ++i) {
      if (value(i) == T(0)) continue;
      if (best < 0 || value(i) > value(best)) {
        second = best;
        best = i;
      } else if (second < 0 || value(i) > value(second)) {
        second = i;
      }
    }
    if (second < 0) continue;  // nothing, or nothing else, is there
    const double distance = static_cast<double>(value(best)) - static_cast<double>(value(second));
    moves.offer(distance * distance, static_cast<int32_t>(h), static_cast<int32_t>((best ^ second) << (h * f.bits)));
  }
}

// Fills the empty bins (-1) of one row, whose winners are `stride` apart: each borrows from a bin that its own number
// determines, so equal vectors borrow equally (densification: Shrivastava 2017). A row with no coordinate at all gets
// zeros. Bins borrow from those that were full before any borrowing: filled ones are marked below -1 until the end.
inline void fill_empty_bins(int32_t* winners, int64_t stride, int64_t bins) {
  int64_t full = 0;
  for (int64_t b = 0; b < bins; ++b) full += winners[b * stride] >= 0;
  for (int64_t b = 0; b < bins; ++b) {
    if (winners[b * stride] >= 0) continue;
    int32_t borrowed = 0;
    if (full > 0) {
      uint32_t probe = mix(static_cast<uint32_t>(b) + 0x9e3779b9U);
      int64_t source = probe % bins;
      for (int attempt = 0; attempt < 64 && winners[source * stride] < 0; ++attempt) {
        probe = mix(probe + 0x9e3779b9U);
        source = probe % bins;
      }
      while (winners[source * stride] < 0) source = source + 1 == bins ? 0 : source + 1;
      borrowed = winners[source * stride];
    }
    winners[b * stride] = -2 - borrowed;
  }
  for (int64_t b = 0; b < bins; ++b)
    if (winners[b * stride] < 0) winners[b * stride] = -2 - winners[b * stride];
}

// Densified winner-take-all (Yagnik et al. 2011; Chen & Shrivastava 2018): the place of the largest coordinate of each
// bin; one that is zero counts as absent.
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
    for (int64_t lane = 0; any_empty && lane < count; ++lane) fill_empty_bins(winners + lane, W, bins);
    for (int64_t table = 0; table < out.tables; ++table) {
      Int lane_codes[W] = {};
      for (int64_t h = 0; h < out.hashes; ++h)
        for (int64_t lane = 0; lane < W; ++lane) {
          const int32_t w = winners[(table * out.hashes + h) * W + lane];
          lane_codes[lane] |= static_cast<Int>(w < 0 ? 0 : w) << (h * f.bits);
        }
      store_probes<T>(out, table, first, count, load<I>(lane_codes), defect, [&](int64_t lane, MoveList& moves) {
        offer_second(scratch, f, table * out.hashes, out.hashes, lane, moves);
      });
    }
  }
}
