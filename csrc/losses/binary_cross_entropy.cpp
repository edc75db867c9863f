// Binary cross entropy with logits over active sets: forward gives each sample's loss, backward the gradient of the
// input and of the active rows. With z the logits of the active set and v, e the labels' values and extra weights:
//   loss = sum w softplus(z) + sum over labels (e softplus(z) - v z),
// where w, `row_weight`, is what an active neuron stands for (1 without it). Targets of 1 are v = 1, e = 0; a weight p
// of positives makes that v = p, e = p - 1.
// `scale` multiplies the logits; backward expects it in grad_loss. `sparse` speaks to autograd only.
#include "gradients.h"

namespace slide_torch {
namespace {

LabelArgs label_args(const Tensor& offsets, const Tensor& places, const Tensor& values,
                     const std::optional<Tensor>& extra) {
  return {.offsets = offsets, .places = places, .name = "label_values", .values = values, .extra = extra};
}

// Adds the labels' share to losses (B).
template <class T>
void add_labels(const Labels<T>& labels, const T* logits, T* losses) {
  for (int64_t b = 0; b < labels.batch; ++b)
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) {
      const T z = logits[labels.at(b, i)];
      losses[b] += (labels.extra ? labels.extra[i] * softplus(z) : T(0)) - labels.values[i] * z;
    }
}

// Adds the labels' share to the gradient of the logits.
template <class T>
void add_label_gradients(const Labels<T>& labels, const T* logits, const T* grad_loss, T* gradient) {
  for (int64_t b = 0; b < labels.batch; ++b)
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) {
      const int64_t at = labels.at(b, i);
      const T extra = labels.extra ? labels.extra[i] * sigmoid(logits[at]) : T(0);
      gradient[at] += grad_loss[b] * (extra - labels.values[i]);
    }
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
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, input, weight, bias), rows, scale);
    const T* w = numbers_of<T>(op, "row_weight", row_weight, s.active);
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_values, label_extra), s);
    const auto& k = real_kernels<T>();
    Tensor logits = shared_logits(s, input), losses = empty({s.batch}, input.scalar_type());
    const T* z = data<T>(logits);
    T* loss = mutable_data<T>(losses);
    parallel_tiles(s.batch, 4 * k.lanes, 8 * s.active,
                   [&](int64_t b, int64_t e) { k.shared_softplus(z, w, s.active, s.batch, loss, b, e); });
    add_labels(labels, z, loss);
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
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, input, weight), rows);
    const T* w = numbers_of<T>(op, "row_weight", row_weight, s.active);
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_values, label_extra), s);
    check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {s.batch});
    check_tensor(op, "logits", logits, input.scalar_type(), {s.active, s.batch});
    const auto& k = real_kernels<T>();
    Tensor gradient = empty({s.active, s.batch}, input.scalar_type());
    const T *z = data<T>(logits), *by_loss = data<T>(grad_loss);
    T* g = mutable_data<T>(gradient);
    parallel_tiles(s.active, k.tile_rows, 8 * s.batch,
                   [&](int64_t b, int64_t e) { k.shared_sigmoid(z, w, by_loss, s.batch, g, b, e); });
    add_label_gradients(labels, z, by_loss, g);
    return shared_gradients<T>(s, input, g, {.rows = has_rows, .bias = has_bias});
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
    const SampleActive<T> active(op, LayerArgs<T>(op, input, weight, bias),
                                 {rows, offsets, pair_offsets, pair_positions, pair_samples});
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_values, label_extra), active);
    const T* w = numbers_of<T>(op, "row_weight", row_weight, active.pairs);
    const auto& k = real_kernels<T>();
    Tensor logits = sample_logits(active), losses = empty({active.batch}, input.scalar_type());
    T *z = mutable_data<T>(logits), *loss = mutable_data<T>(losses);
    const int64_t* start = active.offsets;
    parallel_for(0, active.batch, active.grain_of_samples(8), [&](int64_t first, int64_t last) {
      for (int64_t i = start[first]; scale != 1 && i < start[last]; ++i) z[i] *= static_cast<T>(scale);
      for (int64_t b = first; b < last; ++b)
        loss[b] = k.sample_softplus(z + start[b], w ? w + start[b] : nullptr, start[b + 1] - start[b]);
    });
    add_labels(labels, z, loss);
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
    const SampleActive<T> active(op, LayerArgs<T>(op, input, weight),
                                 {rows, offsets, pair_offsets, pair_positions, pair_samples});
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_values, label_extra), active);
    const T* w = numbers_of<T>(op, "row_weight", row_weight, active.pairs);
    check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {active.batch});
    check_tensor(op, "logits", logits, input.scalar_type(), {active.pairs});
    const auto& k = real_kernels<T>();
    const T *z = data<T>(logits), *by_loss = data<T>(grad_loss);
    const int64_t* start = active.offsets;
    std::vector<T> gradient(active.pairs);
    parallel_for(0, active.batch, active.grain_of_samples(8), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        k.sample_sigmoid(z + start[b], w ? w + start[b] : nullptr, start[b + 1] - start[b], by_loss[b],
                         gradient.data() + start[b]);
    });
    add_label_gradients(labels, z, by_loss, gradient.data());
    return sample_gradients<T>(active, input, gradient.data(), {.rows = has_rows, .bias = has_bias});
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("shared_binary_cross_entropy", TORCH_BOX(&shared_binary_cross_entropy));
  m.impl("shared_binary_cross_entropy_backward", TORCH_BOX(&shared_binary_cross_entropy_backward));
  m.impl("sample_binary_cross_entropy", TORCH_BOX(&sample_binary_cross_entropy));
  m.impl("sample_binary_cross_entropy_backward", TORCH_BOX(&sample_binary_cross_entropy_backward));
}

}  // namespace slide_torch
