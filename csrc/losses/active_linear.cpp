// Linear maps into and out of active neurons, for hidden layers: z = <weight[row], x> + bias for the active pairs of
// neuron and sample (`linear`), and y = sum of z weight[row] over a sample's active neurons (`weighted_rows`). Each
// is the other's backward: the kernels are those of the losses' gradients. `sparse` speaks to autograd only.
//
// Values stand as in the losses: (U, B) neuron-major in the shared pattern, sample-major (pairs) in the other.
#include "gradients.h"

namespace slide_torch {

Tensor shared_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor rows,
                     [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    const LayerArgs<decltype(zero)> layer(op, input, weight, bias);
    return shared_logits(shared_problem(op, layer, rows), input);
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last is empty without `has_bias`.
Gradients shared_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, bool has_bias) {
  constexpr const char* op = "shared_linear_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, input, weight), rows);
    check_tensor(op, "grad_values", grad_values, input.scalar_type(), {s.active, s.batch});
    return shared_gradients<T>(s, input, data<T>(grad_values), {.rows = true, .bias = has_bias});
  });
}

Tensor shared_weighted_rows(Tensor values, Tensor weight, Tensor rows, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_weighted_rows";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "values", values, values.scalar_type(), {rows.numel(), -1});
    check_tensor(op, "weight", weight, values.scalar_type(), {-1, -1});
    Tensor output = empty({values.size(1), weight.size(1)}, values.scalar_type());
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, output, weight), rows);
    shared_sums(s, data<T>(values), mutable_data<T>(output));
    return output;
  });
}

// Returns grad_values (U, B), grad_rows (U, d).
std::tuple<Tensor, Tensor> shared_weighted_rows_backward(Tensor grad_output, Tensor values, Tensor weight,
                                                         Tensor rows) {
  constexpr const char* op = "shared_weighted_rows_backward";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, grad_output, weight), rows);
    check_tensor(op, "values", values, grad_output.scalar_type(), {s.active, s.batch});
    const auto& k = real_kernels<T>();
    Tensor grad_rows = empty({s.active, s.features}, values.scalar_type());
    T* to_rows = mutable_data<T>(grad_rows);
    const std::vector<T> packed = pack(data<T>(grad_output), s.batch, s.features, false);
    parallel_tiles(s.active, k.tile_rows, s.batch * s.features, [&](int64_t b, int64_t e) {
      k.shared_grad_rows(s, data<T>(values), packed.data(), to_rows, nullptr, b, e);
    });
    return {shared_logits(s, grad_output), grad_rows};
  });
}

Tensor sample_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor rows, Tensor offsets,
                     Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    return sample_logits(SampleActive<T>(op, layer, {rows, offsets, pair_offsets, pair_positions, pair_samples}));
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last is empty without `has_bias`.
Gradients sample_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, Tensor offsets,
                                 Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, bool has_bias) {
  constexpr const char* op = "sample_linear_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SampleActive<T> active(op, LayerArgs<T>(op, input, weight),
                                 {rows, offsets, pair_offsets, pair_positions, pair_samples});
    check_tensor(op, "grad_values", grad_values, input.scalar_type(), {active.pairs});
    return sample_gradients<T>(active, input, data<T>(grad_values), {.rows = true, .bias = has_bias});
  });
}

Tensor sample_weighted_rows(Tensor values, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets,
                            Tensor pair_positions, Tensor pair_samples, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_weighted_rows";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, values.scalar_type(), {-1, -1});
    check_tensor(op, "offsets", offsets, ScalarType::Long, {-1});
    check(offsets.numel() >= 1, op, "offsets: expected at least one, got none");
    Tensor output = empty({offsets.numel() - 1, weight.size(1)}, values.scalar_type());
    const SampleActive<T> active(op, LayerArgs<T>(op, output, weight),
                                 {rows, offsets, pair_offsets, pair_positions, pair_samples});
    check_tensor(op, "values", values, values.scalar_type(), {active.pairs});
    const T* z = data<T>(values);
    sum_of_chunks<T>(active, output, [&](T* sums, int64_t b, int64_t e) {
      real_kernels<T>().sample_weighted_rows(active.problem, z, sums, b, e);
    });
    return output;
  });
}

// Returns grad_values (pairs), grad_rows (U, d).
std::tuple<Tensor, Tensor> sample_weighted_rows_backward(Tensor grad_output, Tensor values, Tensor weight, Tensor rows,
                                                         Tensor offsets, Tensor pair_offsets, Tensor pair_positions,
                                                         Tensor pair_samples) {
  constexpr const char* op = "sample_weighted_rows_backward";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const SampleActive<T> active(op, LayerArgs<T>(op, grad_output, weight),
                                 {rows, offsets, pair_offsets, pair_positions, pair_samples});
    const SampleProblem<T>& s = active.problem;
    check_tensor(op, "values", values, grad_output.scalar_type(), {active.pairs});
    Tensor grad_rows = empty({s.active, s.features}, values.scalar_type());
    T* to_rows = mutable_data<T>(grad_rows);
    parallel_for(0, s.active, active.grain_of_rows(),
                 [&](int64_t b, int64_t e) { real_kernels<T>().sample_grad_rows(s, data<T>(values), to_rows, b, e); });
    return {sample_logits(active), grad_rows};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("shared_linear", TORCH_BOX(&shared_linear));
  m.impl("shared_linear_backward", TORCH_BOX(&shared_linear_backward));
  m.impl("shared_weighted_rows", TORCH_BOX(&shared_weighted_rows));
  m.impl("shared_weighted_rows_backward", TORCH_BOX(&shared_weighted_rows_backward));
  m.impl("sample_linear", TORCH_BOX(&sample_linear));
  m.impl("sample_linear_backward", TORCH_BOX(&sample_linear_backward));
  m.impl("sample_weighted_rows", TORCH_BOX(&sample_weighted_rows));
  m.impl("sample_weighted_rows_backward", TORCH_BOX(&sample_weighted_rows_backward));
}

}  // namespace slide_torch
