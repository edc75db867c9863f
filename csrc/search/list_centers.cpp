// Mean rows of lists, by which a query chooses among them.
#include "lists.h"

namespace slide_torch {

// Returns the mean row of each list, centers (lists, d), or (lists, d + 1) with the bias appended, and radius (lists),
// the root mean square distance of a list's rows from it. Zeros for an empty list.
std::tuple<Tensor, Tensor> list_centers(Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                        Tensor list_rows) {
  constexpr const char* op = "list_centers";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const RealRows<T> rows(op, weight, bias);
    const Lists lists(op, list_offsets, list_rows);
    check_range(op, "list_rows", lists.rows, list_rows.numel(), rows.count);
    const int64_t width = rows.features + (bias ? 1 : 0);
    Tensor centers = empty({lists.count, width}, scalar_type_of<T>()),
           radius = empty({lists.count}, scalar_type_of<T>());
    T* center = mutable_data<T>(centers);
    T* distance = mutable_data<T>(radius);
    share_out(lists.count, workers_for(lists.count), [&](int64_t, int64_t l) {
      T* own = center + l * width;
      real_kernels<T>().rows_center(rows.weight, rows.bias, rows.features, lists.rows_of(l), lists.size(l), own,
                                    own + rows.features, distance + l);
    });
    return {centers, radius};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("list_centers", TORCH_BOX(&list_centers));
}

}  // namespace slide_torch
