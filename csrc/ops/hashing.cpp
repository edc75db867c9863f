// Hash families: rows (n, d) -> codes (L, n). The code of a row with NaN or Inf is -1.
#include "common.h"

namespace slide_torch {
namespace {

template <class T>
struct Rows {
  HashInput<T> in;
  int64_t count;
};

template <class T>
Rows<T> check_input(const char* op, const Tensor& input, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& rows, const std::optional<Tensor>& center) {
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
  return {{data<T>(input), data_or_null<int64_t>(rows), data_or_null<T>(bias), data_or_null<T>(center), input.size(1)},
          count};
}

// Runs body(kernels of the code's width, output, begin, end) over all rows; codes are int16 up to 15 bits.
template <class T, class Body>
Tensor hash_rows(const char* op, int64_t count, int64_t hashes, int64_t tables, int64_t bits, int64_t work,
                 const Body& body) {
  check(hashes >= 1 && tables >= 1, op, "K and L must be positive");
  check(bits >= 1 && bits <= kMaxCodeBits, op, "expected 1 to ", kMaxCodeBits, " bits a code, got ", bits);
  const auto& k = real_kernels<T>();
  const bool narrow = bits <= 15;
  Tensor codes = empty({tables, count}, narrow ? ScalarType::Short : ScalarType::Int);
  const int64_t lanes = k.lanes, blocks = (count + lanes - 1) / lanes;
  parallel_for(0, blocks, grain(lanes * work), [&](int64_t first, int64_t last) {
    const int64_t begin = first * lanes, end = last * lanes < count ? last * lanes : count;
    if (narrow)
      body(k.hash16, HashOutput<int16_t>{mutable_data<int16_t>(codes), count, tables, hashes}, begin, end);
    else
      body(k.hash32, HashOutput<int32_t>{mutable_data<int32_t>(codes), count, tables, hashes}, begin, end);
  });
  return codes;
}

}  // namespace

Tensor simhash_hadamard(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                        std::optional<Tensor> center, Tensor signs, Tensor bias_projection, int64_t K, int64_t L) {
  constexpr const char* op = "simhash_hadamard";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    check_tensor(op, "signs", signs, ScalarType::Char, {-1, 3, -1});
    const int64_t rotations = signs.size(0), size = signs.size(2);
    check_tensor(op, "bias_projection", bias_projection, ScalarType::Float, {rotations, size});
    check(size >= in.features && (size & (size - 1)) == 0, op, "signs: expected a power of two of at least ",
          in.features, " coordinates, got ", size);
    check(rotations * size >= K * L, op, "signs: ", rotations, " rotations of ", size,
          " give fewer than K * L = ", K * L, " hashes");
    std::vector<T> sign(rotations * 3 * size), projection(rotations * size);
    for (size_t i = 0; i < sign.size(); ++i) sign[i] = static_cast<T>(data<int8_t>(signs)[i]);
    for (size_t i = 0; i < projection.size(); ++i) projection[i] = static_cast<T>(data<float>(bias_projection)[i]);
    const HadamardFunctions<T> functions{sign.data(), projection.data(), size};
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(op, count, K, L, K, rotations * size * 16,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch((in.features + 1 + size) * lanes);
                          k.simhash_hadamard(in, functions, out, b, e, scratch.data());
                        });
  });
}

Tensor simhash_dense(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
                     Tensor projection, int64_t K, int64_t L) {
  constexpr const char* op = "simhash_dense";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.features + (bias ? 1 : 0);
    check_tensor(op, "projection", projection, ScalarType::Float, {K * L, width});
    std::vector<T> matrix(K * L * width);
    for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<T>(data<float>(projection)[i]);
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(op, count, K, L, K, K * L * width, [&](const auto& k, const auto& out, int64_t b, int64_t e) {
      std::vector<T> scratch(width * lanes);
      k.simhash_dense(in, matrix.data(), out, b, e, scratch.data());
    });
  });
}

Tensor dwta(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
            Tensor coordinates, int64_t K, int64_t L) {
  constexpr const char* op = "dwta";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> checked = check_input<T>(op, input, bias, rows, center);
    const HashInput<T>& in = checked.in;
    const int64_t count = checked.count;
    const int64_t width = in.features + (bias ? 1 : 0);
    check_tensor(op, "coordinates", coordinates, ScalarType::Int, {K * L, -1});
    const int64_t bin = coordinates.size(1);
    check(bin >= 2 && (bin & (bin - 1)) == 0, op, "coordinates: expected bins of 2, 4, 8, ..., got ", bin);
    check_range(op, "coordinates", data<int32_t>(coordinates), coordinates.numel(), width);
    const WinnerFunctions functions{data<int32_t>(coordinates), bin, __builtin_ctzll(bin)};
    const int64_t lanes = real_kernels<T>().lanes;
    return hash_rows<T>(op, count, K, L, K * functions.bits, K * L * bin * 2,
                        [&](const auto& k, const auto& out, int64_t b, int64_t e) {
                          std::vector<T> scratch(width * lanes);
                          std::vector<int32_t> winners(K * L * lanes);
                          k.dwta(in, functions, out, b, e, scratch.data(), winners.data());
                        });
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
    const int64_t stride = (count + most - 1) / most > 0 ? (count + most - 1) / most : 1;
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
}

}  // namespace slide_torch
