// Binary cross entropy with logits over active sets: forward gives each sample's loss, backward the gradient of the
// input and of the active rows. With z the logits of the active set and v, e the labels' values and extra weights:
//   loss = sum w softplus(z) + sum over labels (e softplus(z) - v z),
// where w, `row_weight`, is what an active neuron stands for (1 without it). Targets of 1 are v = 1, e = 0; a weight p
// of positives makes that v = p, e = p - 1.
// `scale` multiplies the logits; backward expects it in grad_loss. `sparse` speaks to autograd only.
#include <cmath>

#include "loss.h"

namespace slide_torch {
namespace {

template <class T>
struct BinaryLabels {
  const int64_t* offsets;
  const int64_t* places;  // shared: index of the row; per sample: index of the pair
  const T* values;
  const T* extra;
};

template <class T>
BinaryLabels<T> check_labels(const char* op, const Tensor& offsets, const Tensor& places, const Tensor& values,
                             const std::optional<Tensor>& extra, int64_t batch, int64_t limit) {
  check_tensor(op, "label_offsets", offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "label_places", places, ScalarType::Long, {-1});
  check_tensor(op, "label_values", values, scalar_type_of<T>(), {places.numel()});
  if (extra) check_tensor(op, "label_extra", *extra, scalar_type_of<T>(), {places.numel()});
  check_offsets(op, "label_offsets", data<int64_t>(offsets), batch, places.numel());
  check_range(op, "label_places", data<int64_t>(places), places.numel(), limit);
  return {data<int64_t>(offsets), data<int64_t>(places), data<T>(values), data_or_null<T>(extra)};
}

// Adds the labels' share to losses (B).
template <class T, class Index>
void add_labels(const BinaryLabels<T>& labels, const T* logits, int64_t batch, T* losses, const Index& index) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) {
      const T z = logits[index(b, labels.places[i])];
      const T softplus = (z > T(0) ? z : T(0)) + std::log1p(std::exp(-std::abs(z)));
      losses[b] += (labels.extra ? labels.extra[i] * softplus : T(0)) - labels.values[i] * z;
    }
}

// Adds the labels' share to the gradient of the logits.
template <class T, class Index>
void add_label_gradients(const BinaryLabels<T>& labels, const T* logits, const T* grad_loss, int64_t batch, T* gradient,
                         const Index& index) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) {
      const int64_t at = index(b, labels.places[i]);
      const T sigmoid = T(1) / (T(1) + std::exp(-logits[at]));
      gradient[at] += grad_loss[b] * ((labels.extra ? labels.extra[i] * sigmoid : T(0)) - labels.values[i]);
    }
}

template <class T>
SharedProblem<T> shared_problem(const char* op, const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& rows,
                                const std::optional<Tensor>& row_weight, double scale) {
  check_layer<T>(op, input, weight, bias, rows);
  if (row_weight) check_tensor(op, "row_weight", *row_weight, scalar_type_of<T>(), {rows.numel()});
  return {data<T>(weight), data_or_null<T>(bias), data<int64_t>(rows), nullptr,
          rows.numel(),    weight.size(1),        input.size(0),       static_cast<T>(scale)};
}

}  // namespace

// Returns losses (B), logits (U, B).
std::tuple<Tensor, Tensor> shared_binary_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                       Tensor rows, std::optional<Tensor> row_weight,
                                                       Tensor label_offsets, Tensor label_places, Tensor label_values,
                                                       std::optional<Tensor> label_extra, double scale,
                                                       [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_binary_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem<T>(op, input, weight, bias, rows, row_weight, scale);
    const auto labels = check_labels<T>(op, label_offsets, label_places, label_values, label_extra, s.batch, s.active);
    const auto& k = real_kernels<T>();
    Tensor logits = empty({s.active, s.batch}, input.scalar_type()), losses = empty({s.batch}, input.scalar_type());
    const std::vector<T> packed = pack(data<T>(input), s.batch, s.features, true);
    T* z = mutable_data<T>(logits);
    parallel_tiles(s.active, k.tile_rows, s.batch * s.features,
                   [&](int64_t b, int64_t e) { k.shared_logits(s, packed.data(), z, b, e); });
    parallel_tiles(s.batch, 4 * k.lanes, 8 * s.active, [&](int64_t b, int64_t e) {
      k.shared_softplus(z, data_or_null<T>(row_weight), s.active, s.batch, mutable_data<T>(losses), b, e);
    });
    add_labels(labels, z, s.batch, mutable_data<T>(losses), [&](int64_t b, int64_t u) { return u * s.batch + b; });
    return {losses, logits};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients shared_binary_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows,
                                               std::optional<Tensor> row_weight, Tensor label_offsets,
                                               Tensor label_places, Tensor label_values,
                                               std::optional<Tensor> label_extra, Tensor logits, bool has_rows,
                                               bool has_bias) {
  constexpr const char* op = "shared_binary_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> Gradients {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem<T>(op, input, weight, std::nullopt, rows, row_weight, 1.0);
    const auto labels = check_labels<T>(op, label_offsets, label_places, label_values, label_extra, s.batch, s.active);
    check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {s.batch});
    check_tensor(op, "logits", logits, input.scalar_type(), {s.active, s.batch});
    const auto& k = real_kernels<T>();
    Tensor gradient = empty({s.active, s.batch}, input.scalar_type());
    T* g = mutable_data<T>(gradient);
    parallel_tiles(s.active, k.tile_rows, 8 * s.batch, [&](int64_t b, int64_t e) {
      k.shared_sigmoid(data<T>(logits), data_or_null<T>(row_weight), data<T>(grad_loss), s.batch, g, b, e);
    });
    add_label_gradients(labels, data<T>(logits), data<T>(grad_loss), s.batch, g,
                        [&](int64_t b, int64_t u) { return u * s.batch + b; });
    return shared_gradients<T>(s, input, g, has_rows, has_bias);
  });
}

// Returns losses (B), logits (pairs, sample-major).
std::tuple<Tensor, Tensor> sample_binary_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                       Tensor rows, Tensor offsets, Tensor pair_offsets,
                                                       Tensor pair_positions, Tensor pair_samples,
                                                       std::optional<Tensor> row_weight, Tensor label_offsets,
                                                       Tensor label_places, Tensor label_values,
                                                       std::optional<Tensor> label_extra, double scale,
                                                       [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_binary_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const auto s =
        sample_problem<T>(op, input, weight, bias, rows, offsets, pair_offsets, pair_positions, pair_samples);
    const int64_t batch = input.size(0), active = rows.numel(), pairs = pair_positions.numel();
    const auto labels = check_labels<T>(op, label_offsets, label_places, label_values, label_extra, batch, pairs);
    if (row_weight) check_tensor(op, "row_weight", *row_weight, input.scalar_type(), {pairs});
    const auto& k = real_kernels<T>();
    Tensor logits = empty({pairs}, input.scalar_type()), losses = empty({batch}, input.scalar_type());
    T* z = mutable_data<T>(logits);
    const T* w = data_or_null<T>(row_weight);
    const int64_t* start = data<int64_t>(offsets);
    parallel_for(0, active, grain(s.features * (pairs / (active + 1) + 1)),
                 [&](int64_t b, int64_t e) { k.sample_logits(s, z, b, e); });
    parallel_for(0, batch, grain(8 * (pairs / (batch + 1) + 1)), [&](int64_t first, int64_t last) {
      for (int64_t i = start[first]; scale != 1 && i < start[last]; ++i) z[i] *= static_cast<T>(scale);
      for (int64_t b = first; b < last; ++b)
        mutable_data<T>(losses)[b] =
            k.sample_softplus(z + start[b], w ? w + start[b] : nullptr, start[b + 1] - start[b]);
    });
    add_labels(labels, z, batch, mutable_data<T>(losses), [](int64_t, int64_t place) { return place; });
    return {losses, logits};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients sample_binary_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows,
                                               Tensor offsets, Tensor pair_offsets, Tensor pair_positions,
                                               Tensor pair_samples, std::optional<Tensor> row_weight,
                                               Tensor label_offsets, Tensor label_places, Tensor label_values,
                                               std::optional<Tensor> label_extra, Tensor logits, bool has_rows,
                                               bool has_bias) {
  constexpr const char* op = "sample_binary_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> Gradients {
    using T = decltype(zero);
    const auto s =
        sample_problem<T>(op, input, weight, std::nullopt, rows, offsets, pair_offsets, pair_positions, pair_samples);
    const int64_t batch = input.size(0), pairs = pair_positions.numel();
    const auto labels = check_labels<T>(op, label_offsets, label_places, label_values, label_extra, batch, pairs);
    if (row_weight) check_tensor(op, "row_weight", *row_weight, input.scalar_type(), {pairs});
    check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {batch});
    check_tensor(op, "logits", logits, input.scalar_type(), {pairs});
    const auto& k = real_kernels<T>();
    const T* w = data_or_null<T>(row_weight);
    const int64_t* start = data<int64_t>(offsets);
    std::vector<T> gradient(pairs);
    parallel_for(0, batch, grain(8 * (pairs / (batch + 1) + 1)), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        k.sample_sigmoid(data<T>(logits) + start[b], w ? w + start[b] : nullptr, start[b + 1] - start[b],
                         data<T>(grad_loss)[b], gradient.data() + start[b]);
    });
    add_label_gradients(labels, data<T>(logits), data<T>(grad_loss), batch, gradient.data(),
                        [](int64_t, int64_t place) { return place; });
    return sample_gradients<T>(s, input, pairs, gradient.data(), has_rows, has_bias);
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("shared_binary_cross_entropy", TORCH_BOX(&shared_binary_cross_entropy));
  m.impl("shared_binary_cross_entropy_backward", TORCH_BOX(&shared_binary_cross_entropy_backward));
  m.impl("sample_binary_cross_entropy", TORCH_BOX(&sample_binary_cross_entropy));
  m.impl("sample_binary_cross_entropy_backward", TORCH_BOX(&sample_binary_cross_entropy_backward));
}

}  // namespace slide_torch
