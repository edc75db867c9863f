// Linear maps into and out of active neurons, for hidden layers: z = <weight[row], x> + bias for the active pairs of
// neuron and sample (`linear`), and y = sum of z weight[row] over a sample's active neurons (`weighted_rows`). Each
// is the other's backward: the kernels are those of the losses' gradients. `sparse` speaks to autograd only.
//
// Values stand as in the losses: (U, B) neuron-major in the shared pattern, sample-major (pairs) in the other.
#include "loss.h"

namespace slide_torch {
namespace {

template <class T>
SharedProblem<T> shared_problem(const char* op, const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& rows) {
  check_layer<T>(op, input, weight, bias, rows);
  return {data<T>(weight), data_or_null<T>(bias), data<int64_t>(rows), nullptr,
          rows.numel(),    weight.size(1),        input.size(0),       T(1)};
}

// values (U, B) of the products with the rows of x (B, width).
template <class T>
Tensor shared_products(const SharedProblem<T>& s, const Tensor& x) {
  const auto& k = real_kernels<T>();
  Tensor values = empty({s.active, s.batch}, x.scalar_type());
  T* z = mutable_data<T>(values);
  const std::vector<T> packed = pack(data<T>(x), s.batch, s.features, true);
  parallel_tiles(s.active, k.tile_rows, s.batch * s.features,
                 [&](int64_t b, int64_t e) { k.shared_logits(s, packed.data(), z, b, e); });
  return values;
}

// values (pairs).
template <class T>
Tensor sample_products(const SampleProblem<T>& s, int64_t pairs) {
  Tensor values = empty({pairs}, scalar_type_of<T>());
  T* z = mutable_data<T>(values);
  parallel_for(0, s.active, grain(s.features * (pairs / (s.active + 1) + 1)),
               [&](int64_t b, int64_t e) { real_kernels<T>().sample_logits(s, z, b, e); });
  return values;
}

}  // namespace

Tensor shared_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor rows,
                     [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return shared_products(shared_problem<T>(op, input, weight, bias, rows), input);
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last is empty without `has_bias`.
Gradients shared_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, bool has_bias) {
  constexpr const char* op = "shared_linear_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem<T>(op, input, weight, std::nullopt, rows);
    check_tensor(op, "grad_values", grad_values, input.scalar_type(), {s.active, s.batch});
    return shared_gradients<T>(s, input, data<T>(grad_values), true, has_bias);
  });
}

Tensor shared_weighted_rows(Tensor values, Tensor weight, Tensor rows, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_weighted_rows";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "values", values, values.scalar_type(), {rows.numel(), -1});
    check(weight.dim() == 2, op, "weight: expected (N, d), got ", shape_of(weight));
    Tensor output = empty({values.size(1), weight.size(1)}, values.scalar_type());
    const SharedProblem<T> s = shared_problem<T>(op, output, weight, std::nullopt, rows);
    const auto& k = real_kernels<T>();
    T* y = mutable_data<T>(output);
    parallel_tiles(s.batch, 4 * k.tile_rows, s.active * s.features, [&](int64_t b, int64_t e) {
      std::vector<T> panel(k.depth * k.tile_columns);
      k.shared_grad_input(s, data<T>(values), y, b, e, panel.data());
    });
    return output;
  });
}

// Returns grad_values (U, B), grad_rows (U, d).
std::tuple<Tensor, Tensor> shared_weighted_rows_backward(Tensor grad_output, Tensor values, Tensor weight,
                                                         Tensor rows) {
  constexpr const char* op = "shared_weighted_rows_backward";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem<T>(op, grad_output, weight, std::nullopt, rows);
    check_tensor(op, "values", values, grad_output.scalar_type(), {s.active, s.batch});
    const auto& k = real_kernels<T>();
    Tensor grad_rows = empty({s.active, s.features}, values.scalar_type());
    T* to_rows = mutable_data<T>(grad_rows);
    const std::vector<T> packed = pack(data<T>(grad_output), s.batch, s.features, false);
    parallel_tiles(s.active, k.tile_rows, s.batch * s.features, [&](int64_t b, int64_t e) {
      k.shared_grad_rows(s, data<T>(values), packed.data(), to_rows, nullptr, b, e);
    });
    return {shared_products(s, grad_output), grad_rows};
  });
}

Tensor sample_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor rows, Tensor offsets,
                     Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SampleProblem<T> s =
        sample_problem<T>(op, input, weight, bias, rows, offsets, pair_offsets, pair_positions, pair_samples);
    return sample_products(s, pair_positions.numel());
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last is empty without `has_bias`.
Gradients sample_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, Tensor offsets,
                                 Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, bool has_bias) {
  constexpr const char* op = "sample_linear_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SampleProblem<T> s =
        sample_problem<T>(op, input, weight, std::nullopt, rows, offsets, pair_offsets, pair_positions, pair_samples);
    const int64_t pairs = pair_positions.numel();
    check_tensor(op, "grad_values", grad_values, input.scalar_type(), {pairs});
    return sample_gradients<T>(s, input, pairs, data<T>(grad_values), true, has_bias);
  });
}

Tensor sample_weighted_rows(Tensor values, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets,
                            Tensor pair_positions, Tensor pair_samples, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_weighted_rows";
  return dispatch_real(op, values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check(weight.dim() == 2, op, "weight: expected (N, d), got ", shape_of(weight));
    check_tensor(op, "offsets", offsets, ScalarType::Long, {-1});
    check(offsets.numel() >= 1, op, "offsets must not be empty");
    Tensor output = empty({offsets.numel() - 1, weight.size(1)}, values.scalar_type());
    const SampleProblem<T> s =
        sample_problem<T>(op, output, weight, std::nullopt, rows, offsets, pair_offsets, pair_positions, pair_samples);
    const int64_t pairs = pair_positions.numel();
    check_tensor(op, "values", values, values.scalar_type(), {pairs});
    const T* z = data<T>(values);
    sum_of_chunks<T>(s, pairs, output,
                     [&](T* sums, int64_t b, int64_t e) { real_kernels<T>().sample_weighted_rows(s, z, sums, b, e); });
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
    const SampleProblem<T> s = sample_problem<T>(op, grad_output, weight, std::nullopt, rows, offsets, pair_offsets,
                                                 pair_positions, pair_samples);
    const int64_t pairs = pair_positions.numel();
    check_tensor(op, "values", values, grad_output.scalar_type(), {pairs});
    Tensor grad_rows = empty({s.active, s.features}, values.scalar_type());
    T* to_rows = mutable_data<T>(grad_rows);
    parallel_for(0, s.active, grain(s.features * (pairs / (s.active + 1) + 1)),
                 [&](int64_t b, int64_t e) { real_kernels<T>().sample_grad_rows(s, data<T>(values), to_rows, b, e); });
    return {sample_products(s, pairs), grad_rows};
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
