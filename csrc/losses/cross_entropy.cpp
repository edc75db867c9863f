// Softmax cross entropy over active sets: forward gives each sample's loss, backward the gradient of the input
// and of the active rows. Labels come as CSR over samples: places in the active set, and probabilities.
//
// With z the logits of the active set, n = log sum exp z and p the labels' probabilities (sum t):
//   loss = sum p (n - z),   d loss / d z = t softmax(z) - p.
// `decoupled` labels of a sample compete with its negatives only, not with each other (Gupta et al. 2024, DEXML, arXiv
// 2310.10636). With n the log sum exp of the negatives' z, log(exp z + exp n) - z is softplus(n - z), and
//   loss = sum p softplus(n - z),   d loss / d z = t exp(z - n) for a negative, -q for a label,
// where q = p sigmoid(n - z) (sum t). A sample's only label competes with negatives anyway: it keeps the bits of the
// softmax, and n is over all of z.
// `scale` multiplies the logits; backward expects it in grad_loss. `sparse` speaks to autograd only.
// Where the normaliser is the sum of several active sets' (a softmax over shards), the loss is no function of these
// results alone: backward takes the derivative by n apart, in grad_log_normalizer, and
//   d loss / d z = grad_log_normalizer softmax(z) - grad_loss p.
#include <limits>

#include "gradients.h"

namespace slide_torch {
namespace {

LabelArgs label_args(const Tensor& offsets, const Tensor& places, const Tensor& probabilities) {
  static const std::optional<Tensor> none;
  return {.offsets = offsets, .places = places, .name = "label_probabilities", .values = probabilities, .extra = none};
}

// The labels of a batch, and what they compete with.
template <class T>
struct Contest {
  const Labels<T> labels;
  const bool decoupled;

  // Whether the n of sample b leaves its labels out.
  bool leaves_out(int64_t b) const { return decoupled && labels.offsets[b + 1] - labels.offsets[b] > 1; }

  // Calls body(sample, label, place of its logit) for every label.
  template <class F>
  void each(const F& body) const {
    for (int64_t b = 0; b < labels.batch; ++b)
      for (int64_t i = labels.offsets[b]; i < labels.offsets[b + 1]; ++i) body(b, i, labels.at(b, i));
  }

  // Calls body(place of its logit) for every label that is left out of n.
  template <class F>
  void each_left_out(const F& body) const {
    if (!decoupled) return;
    each([&](int64_t b, int64_t, int64_t at) {
      if (leaves_out(b)) body(at);
    });
  }

  // Runs `normalize` while labels that n leaves out are below all other logits. Their number is the lowest, not
  // -inf: where nothing is left, differences from n are numbers too.
  template <class F>
  void normalize_without(T* logits, const F& normalize) const {
    std::vector<T> kept;
    each_left_out([&](int64_t at) { kept.push_back(logits[at]); });
    each_left_out([&](int64_t at) { logits[at] = std::numeric_limits<T>::lowest(); });
    normalize();
    const T* next = kept.data();
    each_left_out([&](int64_t at) { logits[at] = *next++; });
  }

  // losses[b] = sum p (n - z), or sum p softplus(n - z); no label, no loss.
  void losses(const T* logits, const T* log_normalizer, T* losses) const {
    std::fill(losses, losses + labels.batch, T(0));
    each([&](int64_t b, int64_t i, int64_t at) {
      const T behind = log_normalizer[b] - logits[at];
      losses[b] += labels.values[i] * (leaves_out(b) ? softplus(behind) : behind);
    });
  }
};

// What forward saved and what comes back, and what is wanted of it.
struct BackwardArgs {
  const Tensor& grad_loss;
  const Tensor& logits;
  const Tensor& log_normalizer;
  const std::optional<Tensor>& grad_log_normalizer;
  bool decoupled;
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
    if (grad_log_normalizer) {
      check(!decoupled, op, "decoupled: expected false with grad_log_normalizer, got true");
      check_tensor(op, "grad_log_normalizer", *grad_log_normalizer, scalar_type_of<T>(), {batch});
    }
    Wanted<T> wanted{.rows = has_rows, .bias = has_bias};
    if (adam) wanted.adam.emplace(op, weight, *adam);
    return wanted;
  }
};

// The loss's derivative by the logits, of which softmax_gradient(z, n, scale, g) computes g = scale[b] exp(z - n).
template <class T, class F>
Tensor logits_gradient(const Labels<T>& labels, const BackwardArgs& args, const F& softmax_gradient) {
  const Contest<T> contest{labels, args.decoupled};
  const T *z = data<T>(args.logits), *n = data<T>(args.log_normalizer), *grad_loss = data<T>(args.grad_loss);
  const T* grad_log_normalizer = data_or_null<T>(args.grad_log_normalizer);
  const int64_t batch = labels.batch;
  std::vector<T> pull(labels.values, labels.values + labels.offsets[batch]);  // q, and p where n is over all of z
  std::vector<T> scale(batch);
  contest.each([&](int64_t b, int64_t i, int64_t at) {
    if (contest.leaves_out(b)) pull[i] *= sigmoid(n[b] - z[at]);
    scale[b] += pull[i];
  });
  // 0 for a sample without labels whatever grad_loss is (NaN for the mean over a batch that is ignored as a whole), as
  // in torch.
  for (int64_t b = 0; b < batch; ++b)
    scale[b] = labels.offsets[b] == labels.offsets[b + 1] ? T(0) : grad_loss[b] * scale[b];
  if (grad_log_normalizer) scale.assign(grad_log_normalizer, grad_log_normalizer + batch);
  Tensor gradient = empty({args.logits.numel()}, scalar_type_of<T>());
  T* g = mutable_data<T>(gradient);
  softmax_gradient(z, n, scale.data(), g);
  contest.each_left_out([&](int64_t at) { g[at] = T(0); });
  contest.each([&](int64_t b, int64_t i, int64_t at) { g[at] -= grad_loss[b] * pull[i]; });
  return gradient;
}

Gradients shared_backward(const char* op, const Tensor& input, const Tensor& weight, const Tensor& rows,
                          const LabelArgs& label_args, const BackwardArgs& args) {
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SharedProblem<T> s = shared_problem(op, LayerArgs<T>(op, input, weight), rows);
    const Labels<T> labels(op, label_args, s);
    const Wanted<T> wanted = args.check_for<T>(op, weight, s.batch, {s.active, s.batch});
    const auto& k = real_kernels<T>();
    const Tensor gradient = logits_gradient(labels, args, [&](const T* z, const T* n, const T* scale, T* g) {
      parallel_tiles(s.active, k.tile_rows, 4 * s.batch,
                     [&](int64_t b, int64_t e) { k.shared_softmax_gradient(z, n, scale, s.batch, g, b, e); });
    });
    return shared_gradients(s, input, data<T>(gradient), wanted);
  });
}

Gradients sample_backward(const char* op, const Tensor& input, const Tensor& weight, const SampleArgs& sample_args,
                          const LabelArgs& label_args, const BackwardArgs& args) {
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SampleActive<T> active(op, LayerArgs<T>(op, input, weight), sample_args);
    const Labels<T> labels(op, label_args, active);
    const Wanted<T> wanted = args.check_for<T>(op, weight, active.batch, {active.pairs});
    const int64_t* start = active.offsets;
    const Tensor gradient = logits_gradient(labels, args, [&](const T* z, const T* n, const T* scale, T* g) {
      parallel_for(0, active.batch, active.grain_of_samples(4), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b)
          real_kernels<T>().sample_softmax_gradient(z + start[b], start[b + 1] - start[b], n[b], scale[b],
                                                    g + start[b]);
      });
    });
    return sample_gradients(active, input, data<T>(gradient), wanted);
  });
}

// Without the gradient of rows, which Adam has used.
std::tuple<Tensor, Tensor> input_and_bias(const Gradients& gradients) {
  return {std::get<0>(gradients), std::get<2>(gradients)};
}

}  // namespace

// Returns losses (B), logits (U, B), log_normalizer (B).
std::tuple<Tensor, Tensor, Tensor> shared_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                        Tensor rows, std::optional<Tensor> log_weight,
                                                        Tensor label_offsets, Tensor label_places,
                                                        Tensor label_probabilities, double scale, bool decoupled,
                                                        [[maybe_unused]] bool sparse) {
  constexpr const char* op = "shared_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    SharedProblem<T> s = shared_problem(op, layer, rows, scale);
    s.log_weight = numbers_of<T>(op, "log_weight", log_weight, s.active);
    const Contest<T> contest{Labels<T>(op, label_args(label_offsets, label_places, label_probabilities), s), decoupled};
    const auto& k = real_kernels<T>();
    Tensor logits = shared_logits(s, input);
    Tensor log_normalizer = empty({s.batch}, input.scalar_type()), losses = empty({s.batch}, input.scalar_type());
    T *z = mutable_data<T>(logits), *n = mutable_data<T>(log_normalizer);
    contest.normalize_without(z, [&] {
      parallel_tiles(s.batch, 4 * k.lanes, 4 * s.active,
                     [&](int64_t b, int64_t e) { k.shared_log_normalizer(z, s.active, s.batch, n, b, e); });
    });
    contest.losses(z, n, mutable_data<T>(losses));
    return {losses, logits, log_normalizer};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients shared_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool decoupled, bool has_rows,
                                        bool has_bias, std::optional<Tensor> grad_log_normalizer) {
  return shared_backward("shared_cross_entropy_backward", input, weight, rows,
                         label_args(label_offsets, label_places, label_probabilities),
                         {grad_loss, logits, log_normalizer, grad_log_normalizer, decoupled, has_rows, has_bias});
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> shared_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor label_offsets, Tensor label_places,
    Tensor label_probabilities, Tensor logits, Tensor log_normalizer, bool decoupled, bool has_bias, Tensor exp_avg,
    Tensor exp_avg_sq, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
    bool maximize, std::optional<Tensor> grad_log_normalizer) {
  const AdamArgs adam{exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize};
  return input_and_bias(
      shared_backward("shared_cross_entropy_backward_adam_", input, weight, rows,
                      label_args(label_offsets, label_places, label_probabilities),
                      {grad_loss, logits, log_normalizer, grad_log_normalizer, decoupled, true, has_bias, &adam}));
}

// Returns losses (B), logits (pairs, sample-major), log_normalizer (B).
std::tuple<Tensor, Tensor, Tensor> sample_cross_entropy(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                        Tensor rows, Tensor offsets, Tensor pair_offsets,
                                                        Tensor pair_positions, Tensor pair_samples,
                                                        std::optional<Tensor> log_weight, Tensor label_offsets,
                                                        Tensor label_places, Tensor label_probabilities, double scale,
                                                        bool decoupled, [[maybe_unused]] bool sparse) {
  constexpr const char* op = "sample_cross_entropy";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    const SampleActive<T> active(op, layer, {rows, offsets, pair_offsets, pair_positions, pair_samples});
    const Contest<T> contest{Labels<T>(op, label_args(label_offsets, label_places, label_probabilities), active),
                             decoupled};
    const T* extra = numbers_of<T>(op, "log_weight", log_weight, active.pairs);
    const auto& k = real_kernels<T>();
    Tensor logits = sample_logits(active);
    Tensor log_normalizer = empty({active.batch}, input.scalar_type());
    Tensor losses = empty({active.batch}, input.scalar_type());
    T *z = mutable_data<T>(logits), *n = mutable_data<T>(log_normalizer);
    const int64_t* start = active.offsets;
    parallel_for(0, active.batch, active.grain_of_samples(1), [&](int64_t first, int64_t last) {
      for (int64_t i = start[first]; scale != 1 && i < start[last]; ++i) z[i] *= static_cast<T>(scale);
      for (int64_t i = start[first]; extra && i < start[last]; ++i) z[i] += extra[i];
    });
    contest.normalize_without(z, [&] {
      parallel_for(0, active.batch, active.grain_of_samples(4), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) n[b] = k.sample_log_normalizer(z + start[b], start[b + 1] - start[b]);
      });
    });
    contest.losses(z, n, mutable_data<T>(losses));
    return {losses, logits, log_normalizer};
  });
}

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients sample_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets,
                                        Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool decoupled, bool has_rows,
                                        bool has_bias, std::optional<Tensor> grad_log_normalizer) {
  return sample_backward("sample_cross_entropy_backward", input, weight,
                         {rows, offsets, pair_offsets, pair_positions, pair_samples},
                         label_args(label_offsets, label_places, label_probabilities),
                         {grad_loss, logits, log_normalizer, grad_log_normalizer, decoupled, has_rows, has_bias});
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> sample_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets,
    Tensor pair_positions, Tensor pair_samples, Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
    Tensor logits, Tensor log_normalizer, bool decoupled, bool has_bias, Tensor exp_avg, Tensor exp_avg_sq, double lr,
    double beta1, double beta2, double eps, double weight_decay, int64_t step, bool maximize,
    std::optional<Tensor> grad_log_normalizer) {
  const AdamArgs adam{exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize};
  return input_and_bias(sample_backward(
      "sample_cross_entropy_backward_adam_", input, weight, {rows, offsets, pair_offsets, pair_positions, pair_samples},
      label_args(label_offsets, label_places, label_probabilities),
      {grad_loss, logits, log_normalizer, grad_log_normalizer, decoupled, true, has_bias, &adam}));
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
