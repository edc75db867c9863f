// The rows that a hash family is given, checked.
#pragma once

#include "../common/tensors.h"
#include "../kernels/dispatch.h"

namespace slide_torch {

// Rows to hash, and how many. (A record: clang before 16 does not capture structured bindings.)
template <class T>
struct RowArgs {
  HashInput<T> in;
  int64_t count;

  RowArgs(const char* op, const Tensor& input, const std::optional<Tensor>& bias, const std::optional<Tensor>& rows,
          const std::optional<Tensor>& center, std::optional<double> norm_bound = std::nullopt) {
    check(input.dim() == 2, op, "input: expected shape (n, d), got ", shape_of(input));
    const int64_t n = input.size(0);
    check_tensor(op, "input", input, scalar_type_of<T>(), {n, -1});
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {n});
    count = n;
    if (rows) {
      check_tensor(op, "rows", *rows, ScalarType::Long, {-1});
      count = rows->numel();
      check_range(op, "rows", data<int64_t>(*rows), count, n);
    }
    if (center) check_tensor(op, "center", *center, scalar_type_of<T>(), {input.size(1) + (bias ? 1 : 0)});
    in = {.data = data<T>(input),
          .rows = data_or_null<int64_t>(rows),
          .bias = data_or_null<T>(bias),
          .center = data_or_null<T>(center),
          .features = input.size(1),
          .augmented = norm_bound.has_value(),
          .norm_bound = static_cast<T>(norm_bound.value_or(0.0)),
          .has_bias = bias.has_value()};
  }
};

}  // namespace slide_torch
