// Softmax cross entropy over active sets: forward gives each sample's loss, backward the gradient of the input
// and of the active rows. Labels come as CSR over samples: places in the active set, and probabilities.
//
// With z the logits of the active set, n = log sum exp z and p the labels' probabilities (sum t):
//   loss = sum p (n - z),   d loss / d z = t softmax(z) - p.
// `scale` multiplies the logits; backward expects it in grad_loss. `sparse` speaks to autograd only.
// Where the normaliser is the sum of several active sets' (a softmax over shards), the loss is no function of these
// results alone: backward takes the derivative by n apart, in grad_log_normalizer, and
//   d loss / d z = grad_log_normalizer softmax(z) - grad_loss p.
#include "gradients.h"

namespace slide_torch {
namespace {

LabelArgs label_args(const Tensor& offsets, const Tensor& places, const Tensor& probabilities) {
  static const std::optional<Tensor> none;
  return {.offsets = offsets, .places = places, .name = "label_probabilities", .values = probabilities, .extra = none};
}

// losses[b] = sum p (log_normalizer - logits of the label); no label, no loss.
template <class T>
void losses_of(const Labels<T>& labels, const T* logits, const T* log_normalizer, T* losses) {
  for (int64_t b = 0; b < labels.batch; ++b) {
    T sum = T(0);
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i)
      sum += labels.values[i] * (log_normalizer[b] - logits[labels.at(b, i)]);
    losses[b] = sum;
  }
}

// scale[b] = grad_loss[b] * sum of the sample's label probabilities; 0 for a sample without labels whatever
// grad_loss is (NaN for the mean over a batch that is ignored as a whole), as in torch. Or what is given for it.
template <class T>
std::vector<T> softmax_scale(const Labels<T>& labels, const T* grad_loss, const T* grad_log_normalizer) {
  if (grad_log_normalizer) return {grad_log_normalizer, grad_log_normalizer + labels.batch};
  std::vector<T> scale(labels.batch);
  for (int64_t b = 0; b < labels.batch; ++b) {
    T sum = T(0);
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) sum += labels.values[i];
    scale[b] = labels.offsets[b] == labels.offsets[b + 1] ? T(0) : grad_loss[b] * sum;
  }
  return scale;
}

template <class T>
void subtract_labels(const Labels<T>& labels, const T* grad_loss, T* gradient) {
  for (int64_t b = 0; b < labels.batch; ++b)
    for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i)
      gradient[labels.at(b, i)] -= grad_loss[b] * labels.values[i];
}

// What forward saved and what comes back, and what is wanted of it.
struct BackwardArgs {
  const Tensor& grad_loss;
  const Tensor& logits;
  const Tensor& log_normalizer;
  const std::optional<Tensor>& grad_log_normalizer;
  bool has_rows;
  bool has_bias;
  const AdamArgs* adam = nullptr;

  // All checks are done before the first update.
  template <class T>
  Wanted<T> check_for(const char* op, const Tensor& weight, int64_t batch,
                      const std::vector<int64_t>& logits_shape) const {
    check_tensor(op, "grad_loss", grad_loss, scalar_type_of<T>(), {batch});
    check_tensor(op, "logits", logits, scalar_type_of<T>(), logits_shape);
    check_tensor(op, "log_normalizer", log_normalizer, scalar_type_of<T>(), {batch});
    if (grad_log_normalizer)
      check_tensor(op, "grad_log_normalizer", *grad_log_normalizer, scalar_type_of<T>(), {batch});
    Wanted<T> wanted{.rows = has_rows, .bias = has_bias};
    if (adam) wanted.adam.emplace(op, weight, *adam);
    return wanted;
  }
};

template <class T>
Gradients shared_backward(const char* op, const LayerArgs<T>& layer, const Tensor& rows, const LabelArgs& label_args,
                          const BackwardArgs& args) {
  const SharedProblem<T> s = shared_problem(op, layer, rows);
  const Labels<T> labels(op, label_args, s);
  const Wanted<T> wanted = args.check_for<T>(op, layer.weight, s.batch, {s.active, s.batch});
  const auto& k = real_kernels<T>();
  Tensor gradient = empty({s.active, s.batch}, scalar_type_of<T>());
  T* g = mutable_data<T>(gradient);
  const T *z = data<T>(args.logits), *n = data<T>(args.log_normalizer), *grad_loss = data<T>(args.grad_loss);
  const std::vector<T> scale = softmax_scale(labels, grad_loss, data_or_null<T>(args.grad_log_normalizer));
  parallel_tiles(s.active, k.tile_rows, 4 * s.batch,
                 [&](int64_t b, int64_t e) { k.shared_softmax_gradient(z, n, scale.data(), s.batch, g, b, e); });
  subtract_labels(labels, grad_loss, g);
  return shared_gradients(s, layer.input, g, wanted);
}

template <class T>
Gradients sample_backward(const char* op, const LayerArgs<T>& layer, const SampleArgs& sample_args,
                          const LabelArgs& label_args, const BackwardArgs& args) {
  const SampleActive<T> active(op, layer, sample_args);
  const Labels<T> labels(op, label_args, active);
  const Wanted<T> wanted = args.check_for<T>(op, layer.weight, active.batch, {active.pairs});
  const auto& k = real_kernels<T>();
  Tensor gradient = empty({active.pairs}, scalar_type_of<T>());
  T* g = mutable_data<T>(gradient);
  const T *z = data<T>(args.logits), *n = data<T>(args.log_normalizer), *grad_loss = data<T>(args.grad_loss);
  const std::vector<T> scale = softmax_scale(labels, grad_loss, data_or_null<T>(args.grad_log_normalizer));
  const int64_t* start = active.offsets;
  parallel_for(0, active.batch, active.grain_of_samples(4), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      k.sample_softmax_gradient(z + start[b], start[b + 1] - start[b], n[b], scale[b], g + start[b]);
  });
  subtract_labels(labels, grad_loss, g);
  return sample_gradients(active, layer.input, g, wanted);
}

}  // namespace

// Returns losses (B), logits (U, B), log_normalizer (B).
std::tuple<Tensor, Tensor, Tensor> shared_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                        Tensor rows, std::optional<Tensor> log_weight,
                                                        Tensor label_offsets, Tensor label_places,
                                                        Tensor label_probabilities, double scale,
                                                        [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    SharedProblem<T> s = shared_problem(op, layer, rows, scale);
    s.log_weight = numbers_of<T>(op, "log_weight", log_weight, s.active);
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_probabilities), s);
    const auto& k = real_kernels<T>();
    Tensor logits = shared_logits(s, input);
    Tensor log_normalizer = empty({s.batch}, input.scalar_type()), losses = empty({s.batch}, input.scalar_type());
    const T* z = data<T>(logits);
    T* n = mutable_data<T>(log_normalizer);
    parallel_tiles(s.batch, 4 * k.lanes, 4 * s.active,
                   [&](int64_t b, int64_t e) { k.shared_log_normalizer(z, s.active, s.batch, n, b, e); });
    losses_of(labels, z, n, mutable_data<T>(losses));
    return {losses, logits, log_normalizer};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients shared_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool has_rows, bool has_bias,
                                        std::optional<Tensor> grad_log_normalizer) {
  constexpr const char* op = "shared_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    return shared_backward(op, LayerArgs<decltype(zero)>(op, input, weight), rows,
                           label_args(label_offsets, label_places, label_probabilities),
                           {.grad_loss = grad_loss,
                            .logits = logits,
                            .log_normalizer = log_normalizer,
                            .grad_log_normalizer = grad_log_normalizer,
                            .has_rows = has_rows,
                            .has_bias = has_bias});
  });
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> shared_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor label_offsets, Tensor label_places,
    Tensor label_probabilities, Tensor logits, Tensor log_normalizer, bool has_bias, Tensor exp_avg, Tensor exp_avg_sq,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, bool maximize,
    std::optional<Tensor> grad_log_normalizer) {
  constexpr const char* op = "shared_cross_entropy_backward_adam_";
  const AdamArgs adam{exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize};
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    const auto [grad_input, grad_rows, grad_bias] =
        shared_backward(op, LayerArgs<decltype(zero)>(op, input, weight), rows,
                        label_args(label_offsets, label_places, label_probabilities),
                        {.grad_loss = grad_loss,
                         .logits = logits,
                         .log_normalizer = log_normalizer,
                         .grad_log_normalizer = grad_log_normalizer,
                         .has_rows = true,
                         .has_bias = has_bias,
                         .adam = &adam});
    return {grad_input, grad_bias};
  });
}

// Returns losses (B), logits (pairs, sample-major), log_normalizer (B).
std::tuple<Tensor, Tensor, Tensor> sample_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                        Tensor rows, Tensor offsets, Tensor pair_offsets,
                                                        Tensor pair_positions, Tensor pair_samples,
                                                        std::optional<Tensor> log_weight, Tensor label_offsets,
                                                        Tensor label_places, Tensor label_probabilities, double scale,
                                                        [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    const SampleActive<T> active(op, layer, {rows, offsets, pair_offsets, pair_positions, pair_samples});
    const Labels<T> labels(op, label_args(label_offsets, label_places, label_probabilities), active);
    const T* extra = numbers_of<T>(op, "log_weight", log_weight, active.pairs);
    const auto& k = real_kernels<T>();
    Tensor logits = sample_logits(active);
    Tensor log_normalizer = empty({active.batch}, input.scalar_type());
    Tensor losses = empty({active.batch}, input.scalar_type());
    T *z = mutable_data<T>(logits), *n = mutable_data<T>(log_normalizer);
    const int64_t* start = active.offsets;
    parallel_for(0, active.batch, active.grain_of_samples(4), [&](int64_t first, int64_t last) {
      for (int64_t i = start[first]; scale != 1 && i < start[last]; ++i) z[i] *= static_cast<T>(scale);
      for (int64_t i = start[first]; extra && i < start[last]; ++i) z[i] += extra[i];
      for (int64_t b = first; b < last; ++b) n[b] = k.sample_log_normalizer(z + start[b], start[b + 1] - start[b]);
    });
    losses_of(labels, z, n, mutable_data<T>(losses));
    return {losses, logits, log_normalizer};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients sample_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets,
                                        Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool has_rows, bool has_bias,
                                        std::optional<Tensor> grad_log_normalizer) {
  constexpr const char* op = "sample_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    return sample_backward(op, LayerArgs<decltype(zero)>(op, input, weight),
                           {rows, offsets, pair_offsets, pair_positions, pair_samples},
                           label_args(label_offsets, label_places, label_probabilities),
                           {.grad_loss = grad_loss,
                            .logits = logits,
                            .log_normalizer = log_normalizer,
                            .grad_log_normalizer = grad_log_normalizer,
                            .has_rows = has_rows,
                            .has_bias = has_bias});
  });
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> sample_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets,
    Tensor pair_positions, Tensor pair_samples, Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
    Tensor logits, Tensor log_normalizer, bool has_bias, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1,
    double beta2, double eps, double weight_decay, int64_t step, bool maximize,
    std::optional<Tensor> grad_log_normalizer) {
  constexpr const char* op = "sample_cross_entropy_backward_adam_";
  const AdamArgs adam{exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize};
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    const auto [grad_input, grad_rows, grad_bias] = sample_backward(
        op, LayerArgs<decltype(zero)>(op, input, weight), {rows, offsets, pair_offsets, pair_positions, pair_samples},
        label_args(label_offsets, label_places, label_probabilities),
        {.grad_loss = grad_loss,
         .logits = logits,
         .log_normalizer = log_normalizer,
         .grad_log_normalizer = grad_log_normalizer,
         .has_rows = true,
         .has_bias = has_bias,
         .adam = &adam});
    return {grad_input, grad_bias};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("shared_cross_entropy", TORCH_BOX(&shared_cross_entropy));
  m.impl("shared_cross_entropy_backward", TORCH_BOX(&shared_cross_entropy_backward));
  m.impl("shared_cross_entropy_backward_adam_", TORCH_BOX(&shared_cross_entropy_backward_adam_));
  m.impl("sample_cross_entropy", TORCH_BOX(&sample_cross_entropy));
  m.impl("sample_cross_entropy_backward", TORCH_BOX(&sample_cross_entropy_backward));
  m.impl("sample_cross_entropy_backward_adam_", TORCH_BOX(&sample_cross_entropy_backward_adam_));
}

}  // namespace slide_torch
