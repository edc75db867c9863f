// Row-sparse gradients handed over as dense tensors.
#include <algorithm>
#include <cstring>

#include "common.h"

namespace slide_torch {

Tensor rows_to_dense(Tensor rows, Tensor values, int64_t neurons) {
  constexpr const char* op = "rows_to_dense";
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  const int64_t count = rows.numel();
  check(neurons >= 0, op, "neurons: expected at least 0, got ", neurons);
  check_rows(op, data<int64_t>(rows), count, neurons);
  check(values.dim() >= 1 && values.size(0) == count && values.is_contiguous() && values.is_cpu(), op,
        "values: expected a contiguous CPU tensor with ", count, " rows, got shape ", shape_of(values));
  std::vector<int64_t> sizes = sizes_of(values);
  sizes[0] = neurons;
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    Tensor dense = empty(sizes, values.scalar_type());
    const int64_t width = neurons > 0 ? dense.numel() / neurons : 0;
    T* target = mutable_data<T>(dense);
    const T* source = data<T>(values);
    const int64_t* row = data<int64_t>(rows);
    parallel_for(0, neurons, grain(width), [&](int64_t first, int64_t last) {
      int64_t u = std::lower_bound(row, row + count, first) - row;
      for (int64_t next = first; next < last; ++u) {
        const int64_t stop = u < count && row[u] < last ? row[u] : last;
        std::memset(target + next * width, 0, (stop - next) * width * sizeof(T));
        if (stop < last) std::memcpy(target + stop * width, source + u * width, width * sizeof(T));
        next = stop + 1;
      }
    });
    return dense;
  };
  if (values.scalar_type() == ScalarType::BFloat16) return copy(uint16_t{});
  return dispatch_real(op, values.scalar_type(), copy);
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("rows_to_dense", TORCH_BOX(&rows_to_dense));
}

}  // namespace slide_torch
