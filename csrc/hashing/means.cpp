// What families learn from rows: the rows as they are hashed, their mean, the means of groups of them.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace slide_torch {

// What the families hash of each row, as a matrix (n, width): bias appended, center subtracted, norm augmented.
Tensor hashed_rows(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows, std::optional<Tensor> center,
                   std::optional<double> norm_bound) {
  constexpr const char* op = "hashed_rows";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, input, bias, rows, center, norm_bound);
    const HashInput<T>& in = args.in;
    const int64_t count = args.count;
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

// The mean of at most `most` rows, evenly spaced, bias appended: where the cloud of rows lies. One thread sums in
// float64, so that it is the same everywhere.
Tensor mean_row(Tensor weight, std::optional<Tensor> bias, int64_t most) {
  constexpr const char* op = "mean_row";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> args(op, weight, bias, std::nullopt, std::nullopt);
    const HashInput<T>& in = args.in;
    const int64_t count = args.count;
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

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("hashed_rows", TORCH_BOX(&hashed_rows));
  m.impl("mean_row", TORCH_BOX(&mean_row));
  m.impl("group_means", TORCH_BOX(&group_means));
}

}  // namespace slide_torch
