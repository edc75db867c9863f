// Adam's step: what an operator is given for it, and what kernels take.
#pragma once

#include <cmath>

#include "../common/tensors.h"
#include "../kernels/dispatch.h"

namespace slide_torch {

struct AdamArgs {
  const Tensor& exp_avg;
  const Tensor& exp_avg_sq;
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  int64_t step;
  bool maximize;

  template <class T>
  AdamScalars<T> scalars(const char* op) const {
    check(step >= 1, op, "step: expected at least 1, got ", step);
    const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
    return {.sign = static_cast<T>(maximize ? -1 : 1),
            .keep = static_cast<T>(1 - lr * weight_decay),
            .rate1 = static_cast<T>(1 - beta1),
            .rate2 = static_cast<T>(1 - beta2),
            .step_size = static_cast<T>(lr * std::sqrt(correction2) / correction1),
            .eps = static_cast<T>(eps)};
  }
};

template <class T>
void set_state(RowUpdate<T>& update, size_t index, const Tensor& state) {
  if (state.scalar_type() == scalar_type_of<T>())
    update.state[index] = mutable_data<T>(state);
  else
    update.bfloat16_state[index] = mutable_data<uint16_t>(state);
}

// Adam applied to the active rows inside backward, right after each row's gradient, instead of handing them over.
template <class T>
struct RowAdam {
  RowUpdate<T> states;  // of the whole parameter
  AdamScalars<T> scalars;

  RowAdam(const char* op, const Tensor& weight, const AdamArgs& args) : states{}, scalars(args.scalars<T>(op)) {
    const std::vector<int64_t> shape = sizes_of(weight);
    const ScalarType dtype = stored_dtype<T>(args.exp_avg);
    check_tensor(op, "exp_avg", args.exp_avg, dtype, shape);
    check_tensor(op, "exp_avg_sq", args.exp_avg_sq, dtype, shape);
    states.param = mutable_data<T>(weight);
    set_state(states, 0, args.exp_avg);
    set_state(states, 1, args.exp_avg_sq);
    states.step = static_cast<uint32_t>(args.step);
  }
};

}  // namespace slide_torch
