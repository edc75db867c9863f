// Hash families: rows (n, d) -> codes (L * probes, n), row t * probes + p holding the p-th best codes of table t. The
// code of a row with NaN or Inf is -1.
#include <algorithm>
#include <cmath>

#include "common.h"

namespace slide_torch {
namespace {

// Rows to hash, and how many: a record and no structured binding, which clang before 16 does not capture.
template <class T>
struct Rows {
  HashInput<T> in;
  int64_t count;
};

template <class T>
Rows<T> check_input(const char* op, const Tensor& input, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& rows, const std::optional<Tensor>& center,
                    std::optional<double> norm_bound = std::nullopt) {
  check(input.dim() == 2, op, "input: expected shape (n, d), got ", shape_of(input));
  const int64_t n = input.size(0);
  check_tensor(op, "input", input, scalar_type_of<T>(), {n, -1});
  if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {n});
  int64_t count = n;
  if (rows) {
    check_tensor(op, "rows", *rows, ScalarType::Long, {-1});
    count = rows->numel();
    check_range(op, "rows", data<int64_t>(*rows), count, n);
  }
  if (center) check_tensor(op, "center", *center, scalar_type_of<T>(), {input.size(1) + (bias ? 1 : 0)});
  return {{data<T>(input), data_or_null<int64_t>(rows), data_or_null<T>(bias), data_or_null<T>(center), input.size(1),
           norm_bound.has_value(), static_cast<T>(norm_bound.value_or(0.0)), bias.has_value()},
          count};
}

// Checks the numbers of hashes, tables and probes; `hash_bits` are those of one hash. Each is bounded before any is
// multiplied by another.
void check_functions(const char* op, int64_t K, int64_t L, int64_t hash_bits, int64_t probes) {
  check(1 <= K && K <= kMaxCodeBits && 1 <= hash_bits && K * hash_bits <= kMaxCodeBits, op,
        "K: expected codes of 1 to ", kMaxCodeBits, " bits, got ", K, " hashes of ", hash_bits, " bits each");
  check_integer(op, "L", L, 1, kMaxTables);
  check(1 <= probes && probes <= kMaxTables && L * probes <= kMaxTables, op, "probes: expected at least 1 and at most ",
        kMaxTables, " of all ", L, " tables together, got ", probes);
}

// Runs body(kernels of the code's width, output, begin, end) over all rows; codes are int16 up to 15 bits.
template <class T, class Body>
Tensor hash_rows(int64_t count, int64_t hashes, int64_t tables, int64_t bits, int64_t probes, int64_t work,
                 const Body& body) {
  const auto& k = real_kernels<T>();
  const bool narrow = bits <= 15;
  Tensor codes = empty({tables * probes, count}, narrow ? ScalarType::Short : ScalarType::Int);
  const int64_t lanes = k.tile_columns, blocks = (count + lanes - 1) / lanes;
  parallel_for(0, blocks, grain(lanes * work), [&](int64_t first, int64_t last) {
    const int64_t begin = first * lanes, end = last * lanes < count ? last * lanes : count;
    if (narrow)
      body(k.hash16, HashOutput<int16_t>{mutable_data<int16_t>(codes), count, tables, hashes, probes}, begin, end);
    else
      body(k.hash32, HashOutput<int32_t>{mutable_data<int32_t>(codes), count, tables, hashes, probes}, begin, end);
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
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    check_functions(op, K, L, 1, probes);
    const Rotations<T> rotations(op, signs, extra_projection, in.features, K * L);
    const HadamardFunctions<T>& f = rotations.functions;
    const int64_t scratch_size = (in.width() + f.size) * real_kernels<T>().lanes;
    return hash_rows<T>(count, K, L, K, probes, f.rotations * f.size * 16,
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
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.width();
    check_functions(op, K, L, 1, probes);
    check_tensor(op, "projection", projection, ScalarType::Float, {K * L, width});
    const std::vector<T> matrix(data<float>(projection), data<float>(projection) + projection.numel());
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(count, K, L, K, probes, K * L * width,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(width * lanes);
                          k.simhash_dense(in, matrix.data(), out, b, e, scratch.data());
                        });
  });
}

namespace {

// dwta and minhash: the same but for who wins a bin.
Tensor bin_winners(const char* op, bool minhash, const Tensor& input, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& rows, const std::optional<Tensor>& center, const Tensor& coordinates,
                   int64_t K, int64_t L, std::optional<double> norm_bound, int64_t probes) {
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.width();
    check(coordinates.dim() == 2, op, "coordinates: expected shape (K L, bin), got ", shape_of(coordinates));
    const int64_t bin = coordinates.size(1);
    check(bin >= 2 && (bin & (bin - 1)) == 0, op, "coordinates: expected bins of 2, 4, 8, ..., got ", bin);
    const WinnerFunctions functions{data<int32_t>(coordinates), bin, __builtin_ctzll(bin)};
    check_functions(op, K, L, functions.bits, probes);
    check_tensor(op, "coordinates", coordinates, ScalarType::Int, {K * L, bin});
    check_range(op, "coordinates", data<int32_t>(coordinates), coordinates.numel(), width);
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(count, K, L, K * functions.bits, probes, K * L * bin * 2,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(width * lanes);
                          std::vector<int32_t> winners(K * L * lanes);
                          (minhash ? k.minhash : k.dwta)(in, functions, out, b, e, scratch.data(), winners.data());
                        });
  });
}

}  // namespace

Tensor dwta(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
            Tensor coordinates, int64_t K, int64_t L, std::optional<double> norm_bound, int64_t probes) {
  return bin_winners("dwta", false, input, bias, rows, center, coordinates, K, L, norm_bound, probes);
}

Tensor minhash(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
               Tensor coordinates, int64_t K, int64_t L) {
  return bin_winners("minhash", true, input, bias, rows, center, coordinates, K, L, std::nullopt, 1);
}

Tensor cross_polytope(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                      std::optional<Tensor> center, Tensor signs, Tensor extra_projection, int64_t bin, int64_t K,
                      int64_t L, std::optional<double> norm_bound, int64_t probes) {
  constexpr const char* op = "cross_polytope";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    check(bin >= 2 && bin < int64_t{1} << kMaxCodeBits && (bin & (bin - 1)) == 0, op, "bin: expected 2, 4, 8, ..., 2^",
          kMaxCodeBits - 1, ", got ", bin);
    const int64_t hash_bits = __builtin_ctzll(bin) + 1;
    check_functions(op, K, L, hash_bits, probes);
    const Rotations<T> rotations(op, signs, extra_projection, in.features, K * L * bin);
    const HadamardFunctions<T>& f = rotations.functions;
    check(bin <= f.size, op, "bin: expected at most ", f.size, ", the size of a rotation, got ", bin);
    const int64_t scratch_size = (in.width() + f.size + K * bin) * real_kernels<T>().lanes;
    return hash_rows<T>(count, K, L, K * hash_bits, probes, f.rotations * f.size * 16,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(scratch_size);
                          k.cross_polytope(in, f, bin, out, b, e, scratch.data());
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
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.width();
    check_tensor(op, "centroids", centroids, ScalarType::Float, {-1, -1, width});
    const int64_t tables = centroids.size(0), size = centroids.size(1);
    check(size >= 2 && (size & (size - 1)) == 0, op, "centroids: expected 2, 4, 8, ... a table, got ", size);
    check_functions(op, 1, tables, __builtin_ctzll(size), probes);
    std::vector<T> converted;
    const T* matrix;
    if constexpr (std::is_same_v<T, float>) {
      matrix = data<float>(centroids);
    } else {
      converted.assign(data<float>(centroids), data<float>(centroids) + centroids.numel());
      matrix = converted.data();
    }
    const int64_t columns = real_kernels<T>().tile_columns;
    return hash_rows<T>(count, 1, tables, __builtin_ctzll(size), probes, tables * size * width,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch((width + (probes > 1 ? size : 0)) * columns);
                          k.nearest_centroids(in, {matrix, size}, out, b, e, scratch.data());
                        });
  });
}

// As nearest_centroids for one table (1, n), looking only into the groups of centroids whose own centroids are nearest:
// members (2^bits) has the centroids' numbers, those of group g at [offsets[g], offsets[g + 1]).
Tensor nearest_in_groups(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                         std::optional<Tensor> center, Tensor centroids, Tensor group_centroids, Tensor offsets,
                         Tensor members, int64_t looked, std::optional<double> norm_bound) {
  constexpr const char* op = "nearest_in_groups";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.width();
    check_tensor(op, "centroids", centroids, ScalarType::Float, {-1, width});
    check_tensor(op, "group_centroids", group_centroids, ScalarType::Float, {-1, width});
    const int64_t size = centroids.size(0), groups = group_centroids.size(0);
    check(size >= 2 && size <= int64_t{1} << kMaxCodeBits, op, "centroids: expected 2 to 2^", kMaxCodeBits, ", got ",
          size);
    check_tensor(op, "offsets", offsets, ScalarType::Long, {groups + 1});
    check_tensor(op, "members", members, ScalarType::Int, {size});
    check_offsets(op, "offsets", data<int64_t>(offsets), groups, size);
    check_range(op, "members", data<int32_t>(members), size, size);
    check(looked >= 1, op, "looked: expected at least 1, got ", looked);
    std::vector<int64_t> used;  // the groups that have any
    for (int64_t g = 0; g < groups; ++g)
      if (data<int64_t>(offsets)[g] < data<int64_t>(offsets)[g + 1]) used.push_back(g);
    const int64_t some = static_cast<int64_t>(used.size());

    const auto& k = real_kernels<T>();
    const int64_t columns = k.tile_columns, coarse_panels = (some + columns - 1) / columns;
    const int64_t* offset = data<int64_t>(offsets);
    std::vector<int64_t> panels(some + 1, 0);
    for (int64_t g = 0; g < some; ++g)
      panels[g + 1] = panels[g] + (offset[used[g] + 1] - offset[used[g]] + columns - 1) / columns;
    std::vector<T> coarse(coarse_panels * columns * width), packed(panels[some] * columns * width);
    std::vector<int32_t> ids(panels[some] * columns);
    const auto pack = [&](const float* source, int64_t column, std::vector<T>& target) {
      for (int64_t i = 0; i < width; ++i)
        target[(column / columns * width + i) * columns + column % columns] = static_cast<T>(source[i]);
    };
    for (int64_t g = 0; g < some; ++g) pack(data<float>(group_centroids) + used[g] * width, g, coarse);
    parallel_for(0, some, grain(2 * width * (size / some + 1)), [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g)
        for (int64_t column = panels[g] * columns; column < panels[g + 1] * columns; ++column) {
          const int64_t at = std::min(offset[used[g]] + column - panels[g] * columns, offset[used[g] + 1] - 1);
          ids[column] = data<int32_t>(members)[at];
          pack(data<float>(centroids) + ids[column] * width, column, packed);
        }
    });

    const int64_t looks = std::min(looked, some);
    const CentroidGroups<T> all = {coarse.data(), packed.data(), ids.data(), panels.data(), some, looks};
    std::vector<int32_t> found(count);
    const int64_t chunks = (count + kGroupedRows - 1) / kGroupedRows;
    parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      std::vector<T> numbers(kGroupedRows * (width + 1) + k.tile_rows * coarse_panels * columns);
      std::vector<int32_t> places(2 * kGroupedRows * looks);
      std::vector<int64_t> starts(some + 1);
      T* best = numbers.data() + kGroupedRows * width;
      const GroupScratch<T> scratch = {
          numbers.data(), best, best + kGroupedRows, places.data(), places.data() + kGroupedRows * looks,
          starts.data()};
      for (int64_t chunk = first; chunk < last; ++chunk)
        k.nearest_in_groups(in, all, found.data(), chunk * kGroupedRows, std::min(count, (chunk + 1) * kGroupedRows),
                            scratch);
    });
    const bool narrow = size <= int64_t{1} << 15;
    Tensor codes = empty({1, count}, narrow ? ScalarType::Short : ScalarType::Int);
    for (int64_t i = 0; i < count; ++i)
      narrow ? mutable_data<int16_t>(codes)[i] = static_cast<int16_t>(found[i])
             : mutable_data<int32_t>(codes)[i] = found[i];
    return codes;
  });
}

// What the families hash of each row, as a matrix (n, width): bias appended, center subtracted, norm augmented.
Tensor hashed_rows(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
                   std::optional<double> norm_bound) {
  constexpr const char* op = "hashed_rows";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t given = in.features + (bias ? 1 : 0), width = in.width();
    Tensor result = empty({count, width}, input.scalar_type());
    parallel_for(0, count, grain(4 * width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t row = in.rows ? in.rows[r] : r;
        T* out = mutable_data<T>(result) + r * width;
        std::copy(in.data + row * in.features, in.data + (row + 1) * in.features, out);
        if (in.bias) out[in.features] = in.bias[row];
        for (int64_t i = 0; in.center && i < given; ++i) out[i] -= in.center[i];
        if (!in.augmented) continue;
        T squared = T(0);
        for (int64_t i = 0; i < given; ++i) squared += out[i] * out[i];
        out[given] = std::sqrt(std::max(in.norm_bound * in.norm_bound - squared, T(0)));
      }
    });
    return result;
  });
}

// means[g] = the mean of the rows of `values` whose group is g, zero for an empty one; counts[g]. Rows of group -1
// belong to none. Each group is summed by one thread, in the order of rows.
std::tuple<Tensor, Tensor> group_means(Tensor values, Tensor groups, int64_t count) {
  constexpr const char* op = "group_means";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "values", values, scalar_type_of<T>(), {-1, -1});
    const int64_t n = values.size(0), width = values.size(1);
    check_tensor(op, "groups", groups, ScalarType::Long, {n});
    check_integer(op, "count", count, 1, int64_t{1} << kMaxCodeBits);
    const int64_t* group = data<int64_t>(groups);
    std::vector<int64_t> start(count + 1, 0), order(n);
    for (int64_t i = 0; i < n; ++i) {
      check(group[i] >= -1 && group[i] < count, op, "groups: expected values in [-1, ", count, "), got ", group[i]);
      if (group[i] >= 0) ++start[group[i] + 1];
    }
    for (int64_t g = 0; g < count; ++g) start[g + 1] += start[g];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      if (group[i] >= 0) order[next[group[i]]++] = i;
    Tensor means = empty({count, width}, values.scalar_type()), counts = empty({count}, ScalarType::Long);
    parallel_for(0, count, grain(width * (n / count + 1)), [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        T* mean = mutable_data<T>(means) + g * width;
        std::fill(mean, mean + width, T(0));
        for (int64_t e = start[g]; e < start[g + 1]; ++e)
          for (int64_t i = 0; i < width; ++i) mean[i] += data<T>(values)[order[e] * width + i];
        const int64_t size = start[g + 1] - start[g];
        for (int64_t i = 0; i < width; ++i) mean[i] /= static_cast<T>(std::max<int64_t>(size, 1));
        mutable_data<int64_t>(counts)[g] = size;
      }
    });
    return {means, counts};
  });
}

// The mean of at most `most` rows, evenly spaced, bias appended: where the cloud of rows lies. One thread sums in
// float64, so that it is the same everywhere.
Tensor mean_row(Tensor weight, std::optional<Tensor> bias, int64_t most) {
  constexpr const char* op = "mean_row";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, weight, bias, std::nullopt, std::nullopt);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    check(most >= 1, op, "most: expected at least 1, got ", most);
    const int64_t stride = count > 0 ? (count - 1) / most + 1 : 1;
    std::vector<double> sum(in.features + 1, 0.0);
    int64_t rows = 0;
    for (int64_t row = 0; row < count; row += stride, ++rows) {
      for (int64_t i = 0; i < in.features; ++i) sum[i] += in.data[row * in.features + i];
      if (in.bias) sum[in.features] += in.bias[row];
    }
    Tensor mean = empty({in.features + (bias ? 1 : 0)}, weight.scalar_type());
    for (int64_t i = 0; i < mean.numel(); ++i)
      mutable_data<T>(mean)[i] = static_cast<T>(sum[i] / (rows > 0 ? rows : 1));
    return mean;
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("mean_row", TORCH_BOX(&mean_row));
  m.impl("simhash_hadamard", TORCH_BOX(&simhash_hadamard));
  m.impl("simhash_dense", TORCH_BOX(&simhash_dense));
  m.impl("dwta", TORCH_BOX(&dwta));
  m.impl("minhash", TORCH_BOX(&minhash));
  m.impl("cross_polytope", TORCH_BOX(&cross_polytope));
  m.impl("nearest_centroids", TORCH_BOX(&nearest_centroids));
  m.impl("nearest_in_groups", TORCH_BOX(&nearest_in_groups));
  m.impl("hashed_rows", TORCH_BOX(&hashed_rows));
  m.impl("group_means", TORCH_BOX(&group_means));
}

}  // namespace slide_torch
