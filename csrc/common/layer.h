// A linear layer as an operator is given it, checked where it is made.
#pragma once

#include "tensors.h"

namespace slide_torch {

// input (B, d), weight (N, d), bias (N) or none, all of type T.
template <class T>
struct LayerArgs {
  const Tensor& input;
  const Tensor& weight;
  const T* bias = nullptr;

  LayerArgs(const char* op, const Tensor& input_in, const Tensor& weight_in,
            const std::optional<Tensor>& bias_in = std::nullopt)
      : input(input_in), weight(weight_in) {
    check(input.dim() == 2 && weight.dim() == 2, op, "expected input (B, d) and weight (N, d), got ", shape_of(input),
          " and ", shape_of(weight));
    check_tensor(op, "input", input, scalar_type_of<T>(), {-1, weight.size(1)});
    check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
    if (bias_in) check_tensor(op, "bias", *bias_in, scalar_type_of<T>(), {weight.size(0)});
    bias = data_or_null<T>(bias_in);
  }

  int64_t batch() const { return input.size(0); }
  int64_t features() const { return weight.size(1); }
};

}  // namespace slide_torch
