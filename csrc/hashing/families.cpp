// Hash families: rows (n, d) -> codes (L * probes, n), row t * probes + p holding the p-th best codes of table t. The
// code of a row with NaN or Inf is -1.
#include "rows.h"

namespace slide_torch {
namespace {

// How many functions a family has: L tables of K hashes of `hash_bits` bits each, `probes` codes of a table.
struct FunctionArgs {
  int64_t K;
  int64_t L;
  int64_t hash_bits;
  int64_t probes;

  // Each number is bounded before any is multiplied by another.
  FunctionArgs(const char* op, int64_t K_in, int64_t L_in, int64_t hash_bits_in, int64_t probes_in)
      : K(K_in), L(L_in), hash_bits(hash_bits_in), probes(probes_in) {
    check(1 <= K && K <= kMaxCodeBits && 1 <= hash_bits && K * hash_bits <= kMaxCodeBits, op,
          "K: expected codes of 1 to ", kMaxCodeBits, " bits, got ", K, " hashes of ", hash_bits, " bits each");
    check_integer(op, "L", L, 1, kMaxTables);
    check(1 <= probes && probes <= kMaxTables && L * probes <= kMaxTables, op,
          "probes: expected at least 1 and at most ", kMaxTables, " of all ", L, " tables together, got ", probes);
  }

  int64_t hashes() const { return K * L; }
  bool narrow() const { return K * hash_bits <= 15; }  // codes are int16
};

// Runs body(kernels of the code's width, output, begin, end) over all rows; `work` is a row's.
template <class T, class Body>
Tensor hash_rows(int64_t count, const FunctionArgs& f, int64_t work, const Body& body) {
  const auto& k = real_kernels<T>();
  Tensor codes = empty({f.L * f.probes, count}, f.narrow() ? ScalarType::Short : ScalarType::Int);
  const auto output = [&]<class Code>(Code) {
    return HashOutput<Code>{
        .codes = mutable_data<Code>(codes), .stride = count, .tables = f.L, .hashes = f.K, .probes = f.probes};
  };
  parallel_tiles(count, k.tile_columns, work, [&](int64_t begin, int64_t end) {
    if (f.narrow())
      body(k.hash16, output(int16_t{}), begin, end);
    else
      body(k.hash32, output(int32_t{}), begin, end);
  });
  return codes;
}

// The functions of `needed` coordinates of rotated vectors, converted to T.
template <class T>
struct Rotations {
  std::vector<T> signs, extra_projection;
  HadamardFunctions<T> functions;

  Rotations(const char* op, const Tensor& signs_in, const Tensor& extra, int64_t features, int64_t needed) {
    check_tensor(op, "signs", signs_in, ScalarType::Char, {-1, 3, -1});
    const int64_t rotations = signs_in.size(0), size = signs_in.size(2);
    check_tensor(op, "extra_projection", extra, ScalarType::Float, {2, rotations, size});
    check(size >= features && (size & (size - 1)) == 0, op, "signs: expected a power of two of at least ", features,
          " coordinates, got ", size);
    check(rotations * size >= needed, op, "signs: ", rotations, " rotations of ", size, " give fewer than the ", needed,
          " coordinates of all hashes");
    signs.assign(data<int8_t>(signs_in), data<int8_t>(signs_in) + signs_in.numel());
    extra_projection.assign(data<float>(extra), data<float>(extra) + extra.numel());
    functions = {signs.data(), extra_projection.data(), rotations, size};
  }
};

}  // namespace

Tensor simhash_hadamard(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                        std::optional<Tensor> center, Tensor signs, Tensor extra_projection, int64_t K, int64_t L,
                        std::optional<double> norm_bound, int64_t probes) {
  constexpr const char* op = "simhash_hadamard";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = args.in;
    const FunctionArgs functions(op, K, L, 1, probes);
    const Rotations<T> rotations(op, signs, extra_projection, in.features, functions.hashes());
    const HadamardFunctions<T>& f = rotations.functions;
    const int64_t scratch_size = (in.width() + f.size) * real_kernels<T>().lanes;
    return hash_rows<T>(args.count, functions, f.rotations * f.size * 16,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(scratch_size);
                          k.simhash_hadamard(in, f, out, b, e, scratch.data());
                        });
  });
}

Tensor simhash_dense(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
                     Tensor projection, int64_t K, int64_t L, std::optional<double> norm_bound, int64_t probes) {
  constexpr const char* op = "simhash_dense";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = args.in;
    const int64_t width = in.width();
    const FunctionArgs functions(op, K, L, 1, probes);
    check_tensor(op, "projection", projection, ScalarType::Float, {functions.hashes(), width});
    const std::vector<T> matrix(data<float>(projection), data<float>(projection) + projection.numel());
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(args.count, functions, functions.hashes() * width,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(width * lanes);
                          k.simhash_dense(in, matrix.data(), out, b, e, scratch.data());
                        });
  });
}

Tensor dwta(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
            Tensor coordinates, int64_t K, int64_t L, std::optional<double> norm_bound, int64_t probes) {
  constexpr const char* op = "dwta";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = args.in;
    const int64_t width = in.width();
    check(coordinates.dim() == 2, op, "coordinates: expected shape (K L, bin), got ", shape_of(coordinates));
    const int64_t bin = coordinates.size(1);
    check(bin >= 2 && (bin & (bin - 1)) == 0, op, "coordinates: expected bins of 2, 4, 8, ..., got ", bin);
    const FunctionArgs functions(op, K, L, __builtin_ctzll(bin), probes);
    check_tensor(op, "coordinates", coordinates, ScalarType::Int, {functions.hashes(), bin});
    check_range(op, "coordinates", data<int32_t>(coordinates), coordinates.numel(), width);
    const WinnerFunctions winners{.coordinates = data<int32_t>(coordinates), .bin = bin, .bits = functions.hash_bits};
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(args.count, functions, functions.hashes() * bin * 2,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(width * lanes);
                          std::vector<int32_t> won(functions.hashes() * lanes);
                          k.dwta(in, winners, out, b, e, scratch.data(), won.data());
                        });
  });
}

// centroids (L, 2^bits, width): codes are places of centroids.
Tensor nearest_centroids(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                         std::optional<Tensor> center, Tensor centroids, std::optional<double> norm_bound,
                         int64_t probes) {
  constexpr const char* op = "nearest_centroids";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = args.in;
    const int64_t width = in.width();
    check_tensor(op, "centroids", centroids, ScalarType::Float, {-1, -1, width});
    const int64_t tables = centroids.size(0), size = centroids.size(1);
    check(size >= 2 && (size & (size - 1)) == 0, op, "centroids: expected 2, 4, 8, ... a table, got ", size);
    const FunctionArgs functions(op, 1, tables, __builtin_ctzll(size), probes);
    std::vector<T> converted;
    const T* matrix;
    if constexpr (std::is_same_v<T, float>) {
      matrix = data<float>(centroids);
    } else {
      converted.assign(data<float>(centroids), data<float>(centroids) + centroids.numel());
      matrix = converted.data();
    }
    const int64_t columns = real_kernels<T>().tile_columns;
    return hash_rows<T>(args.count, functions, tables * size * width,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch((width + (probes > 1 ? size : 0)) * columns);
                          k.nearest_centroids(in, {matrix, size}, out, b, e, scratch.data());
                        });
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("simhash_hadamard", TORCH_BOX(&simhash_hadamard));
  m.impl("simhash_dense", TORCH_BOX(&simhash_dense));
  m.impl("dwta", TORCH_BOX(&dwta));
  m.impl("nearest_centroids", TORCH_BOX(&nearest_centroids));
}

}  // namespace slide_torch
