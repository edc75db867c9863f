// Softmax cross entropy over active sets: forward gives each sample's loss, backward the gradient of the input
// and of the active rows. Labels come as CSR over samples: places in the active set, and probabilities.
//
// With z the logits of the active set, n = log sum exp z and p the labels' probabilities (sum t):
//   loss = sum p (n - z),   d loss / d z = t softmax(z) - p.
// `scale` multiplies the logits; backward expects it in grad_loss. `sparse` speaks to autograd only.
#include "loss.h"

namespace slide_torch {
namespace {

struct Labels {
  const int64_t* offsets;
  const int64_t* places;  // shared: index of the row; per sample: index of the pair
};

template <class T>
struct Targets {
  Labels labels;
  const T* probabilities;
};

template <class T>
Targets<T> check_labels(const char* op, const Tensor& offsets, const Tensor& places, const Tensor& probabilities,
                        int64_t batch, int64_t limit) {
  check_tensor(op, "label_offsets", offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "label_places", places, ScalarType::Long, {-1});
  check_tensor(op, "label_probabilities", probabilities, scalar_type_of<T>(), {places.numel()});
  check_offsets(op, "label_offsets", data<int64_t>(offsets), batch, places.numel());
  check_range(op, "label_places", data<int64_t>(places), places.numel(), limit);
  return {{data<int64_t>(offsets), data<int64_t>(places)}, data<T>(probabilities)};
}

// losses[b] = sum p (log_normalizer - logits[index(b, place)]); no label, no loss.
template <class T, class Index>
void losses_of(const Targets<T>& targets, const T* logits, const T* log_normalizer, int64_t batch, T* losses,
               const Index& index) {
  for (int64_t b = 0; b < batch; ++b) {
    T sum = T(0);
    for (int64_t i = targets.labels.offsets[b]; i < targets.labels.offsets[b + 1]; ++i)
      sum += targets.probabilities[i] * (log_normalizer[b] - logits[index(b, targets.labels.places[i])]);
    losses[b] = sum;
  }
}

// scale[b] = grad_loss[b] * sum of the sample's label probabilities; 0 for a sample without labels whatever
// grad_loss is (NaN for the mean over a batch that is ignored as a whole), as in torch.
template <class T>
std::vector<T> softmax_scale(const Targets<T>& targets, const T* grad_loss, int64_t batch) {
  std::vector<T> scale(batch);
  for (int64_t b = 0; b < batch; ++b) {
    T sum = T(0);
    for (int64_t i = targets.labels.offsets[b]; i < targets.labels.offsets[b + 1]; ++i) sum += targets.probabilities[i];
    scale[b] = targets.labels.offsets[b] == targets.labels.offsets[b + 1] ? T(0) : grad_loss[b] * sum;
  }
  return scale;
}

template <class T, class Index>
void subtract_labels(const Targets<T>& targets, const T* grad_loss, int64_t batch, T* gradient, const Index& index) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = targets.labels.offsets[b]; i < targets.labels.offsets[b + 1]; ++i)
      gradient[index(b, targets.labels.places[i])] -= grad_loss[b] * targets.probabilities[i];
}

template <class T>
SharedProblem<T> shared_problem(const char* op, const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& rows,
                                const std::optional<Tensor>& log_weight, T scale) {
  check_layer<T>(op, input, weight, bias, rows);
  if (log_weight) check_tensor(op, "log_weight", *log_weight, scalar_type_of<T>(), {rows.numel()});
  return {data<T>(weight), data_or_null<T>(bias), data<int64_t>(rows), data_or_null<T>(log_weight),
          rows.numel(),    weight.size(1),        input.size(0),       scale};
}

template <class T>
RowAdam<T> row_adam(const char* op, const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                    const AdamScalars<T>& scalars, int64_t step) {
  const std::vector<int64_t> shape = {weight.size(0), weight.size(1)};
  const ScalarType dtype = stored_dtype<T>(exp_avg);
  check_tensor(op, "exp_avg", exp_avg, dtype, shape);
  check_tensor(op, "exp_avg_sq", exp_avg_sq, dtype, shape);
  RowUpdate<T> states{};
  states.param = mutable_data<T>(weight);
  set_state(states, 0, exp_avg);
  set_state(states, 1, exp_avg_sq);
  states.step = static_cast<uint32_t>(step);
  return {states, scalars};
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
    const SharedProblem<T> s = shared_problem<T>(op, input, weight, bias, rows, log_weight, static_cast<T>(scale));
    const Targets<T> targets = check_labels<T>(op, label_offsets, label_places, label_probabilities, s.batch, s.active);
    const auto& k = real_kernels<T>();
    Tensor logits = empty({s.active, s.batch}, input.scalar_type());
    Tensor log_normalizer = empty({s.batch}, input.scalar_type()), losses = empty({s.batch}, input.scalar_type());
    const std::vector<T> packed = pack(data<T>(input), s.batch, s.features, true);
    T* z = mutable_data<T>(logits);
    T* n = mutable_data<T>(log_normalizer);
    parallel_tiles(s.active, k.tile_rows, s.batch * s.features,
                   [&](int64_t b, int64_t e) { k.shared_logits(s, packed.data(), z, b, e); });
    parallel_tiles(s.batch, 4 * k.lanes, 4 * s.active,
                   [&](int64_t b, int64_t e) { k.shared_log_normalizer(z, s.active, s.batch, n, b, e); });
    losses_of(targets, z, n, s.batch, mutable_data<T>(losses), [&](int64_t b, int64_t u) { return u * s.batch + b; });
    return {losses, logits, log_normalizer};
  });
}

namespace {

// adam_of, which is asked after all checks, says whether the weight's active rows are updated at once.
template <class T, class Adam>
Gradients shared_backward(const char* op, const Tensor& grad_loss, const Tensor& input, const Tensor& weight,
                          const Tensor& rows, const Tensor& label_offsets, const Tensor& label_places,
                          const Tensor& label_probabilities, const Tensor& logits, const Tensor& log_normalizer,
                          bool has_rows, bool has_bias, const Adam& adam_of) {
  const SharedProblem<T> s = shared_problem<T>(op, input, weight, std::nullopt, rows, std::nullopt, T(1));
  const Targets<T> targets = check_labels<T>(op, label_offsets, label_places, label_probabilities, s.batch, s.active);
  check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {s.batch});
  check_tensor(op, "logits", logits, input.scalar_type(), {s.active, s.batch});
  check_tensor(op, "log_normalizer", log_normalizer, input.scalar_type(), {s.batch});
  const std::optional<RowAdam<T>> adam = adam_of(op);
  const auto& k = real_kernels<T>();
  Tensor gradient = empty({s.active, s.batch}, input.scalar_type());
  T* g = mutable_data<T>(gradient);
  const std::vector<T> scale = softmax_scale(targets, data<T>(grad_loss), s.batch);
  parallel_tiles(s.active, k.tile_rows, 4 * s.batch, [&](int64_t b, int64_t e) {
    k.shared_softmax_gradient(data<T>(logits), data<T>(log_normalizer), scale.data(), s.batch, g, b, e);
  });
  subtract_labels(targets, data<T>(grad_loss), s.batch, g, [&](int64_t b, int64_t u) { return u * s.batch + b; });
  return shared_gradients<T>(s, input, g, has_rows, has_bias, adam);
}

}  // namespace

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients shared_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool has_rows, bool has_bias) {
  constexpr const char* op = "shared_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return shared_backward<T>(op, grad_loss, input, weight, rows, label_offsets, label_places, label_probabilities,
                              logits, log_normalizer, has_rows, has_bias,
                              [](const char*) -> std::optional<RowAdam<T>> { return std::nullopt; });
  });
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> shared_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor label_offsets, Tensor label_places,
    Tensor label_probabilities, Tensor logits, Tensor log_normalizer, bool has_bias, Tensor exp_avg, Tensor exp_avg_sq,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, bool maximize) {
  constexpr const char* op = "shared_cross_entropy_backward_adam_";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const auto scalars = adam_scalars<T>(op, lr, beta1, beta2, eps, weight_decay, step, maximize);
    const auto found =
        shared_backward<T>(op, grad_loss, input, weight, rows, label_offsets, label_places, label_probabilities, logits,
                           log_normalizer, true, has_bias, [&](const char* name) -> std::optional<RowAdam<T>> {
                             return row_adam<T>(name, weight, exp_avg, exp_avg_sq, scalars, step);
                           });
    return {std::get<0>(found), std::get<2>(found)};
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
    const SampleProblem<T> s =
        sample_problem<T>(op, input, weight, bias, rows, offsets, pair_offsets, pair_positions, pair_samples);
    const int64_t batch = input.size(0), active = rows.numel(), pairs = pair_positions.numel();
    const Targets<T> targets = check_labels<T>(op, label_offsets, label_places, label_probabilities, batch, pairs);
    if (log_weight) check_tensor(op, "log_weight", *log_weight, input.scalar_type(), {pairs});
    const auto& k = real_kernels<T>();
    Tensor logits = empty({pairs}, input.scalar_type());
    Tensor log_normalizer = empty({batch}, input.scalar_type()), losses = empty({batch}, input.scalar_type());
    T* z = mutable_data<T>(logits);
    T* n = mutable_data<T>(log_normalizer);
    const int64_t* start = data<int64_t>(offsets);
    parallel_for(0, active, grain(s.features * (pairs / (active + 1) + 1)),
                 [&](int64_t b, int64_t e) { k.sample_logits(s, z, b, e); });
    const T* extra = data_or_null<T>(log_weight);
    parallel_for(0, batch, grain(4 * (pairs / (batch + 1) + 1)), [&](int64_t first, int64_t last) {
      for (int64_t i = start[first]; scale != 1 && i < start[last]; ++i) z[i] *= static_cast<T>(scale);
      for (int64_t i = start[first]; extra && i < start[last]; ++i) z[i] += extra[i];
      for (int64_t b = first; b < last; ++b) n[b] = k.sample_log_normalizer(z + start[b], start[b + 1] - start[b]);
    });
    losses_of(targets, z, n, batch, mutable_data<T>(losses), [](int64_t, int64_t place) { return place; });
    return {losses, logits, log_normalizer};
  });
}

namespace {

// As shared_backward.
template <class T, class Adam>
Gradients sample_backward(const char* op, const Tensor& grad_loss, const Tensor& input, const Tensor& weight,
                          const Tensor& rows, const Tensor& offsets, const Tensor& pair_offsets,
                          const Tensor& pair_positions, const Tensor& pair_samples, const Tensor& label_offsets,
                          const Tensor& label_places, const Tensor& label_probabilities, const Tensor& logits,
                          const Tensor& log_normalizer, bool has_rows, bool has_bias, const Adam& adam_of) {
  const SampleProblem<T> s =
      sample_problem<T>(op, input, weight, std::nullopt, rows, offsets, pair_offsets, pair_positions, pair_samples);
  const int64_t batch = input.size(0), pairs = pair_positions.numel();
  const Targets<T> targets = check_labels<T>(op, label_offsets, label_places, label_probabilities, batch, pairs);
  check_tensor(op, "grad_loss", grad_loss, input.scalar_type(), {batch});
  check_tensor(op, "logits", logits, input.scalar_type(), {pairs});
  check_tensor(op, "log_normalizer", log_normalizer, input.scalar_type(), {batch});
  const std::optional<RowAdam<T>> adam = adam_of(op);
  const auto& k = real_kernels<T>();
  Tensor gradients = empty({pairs}, input.scalar_type());
  T* gradient = mutable_data<T>(gradients);
  const std::vector<T> scale = softmax_scale(targets, data<T>(grad_loss), batch);
  const int64_t* start = data<int64_t>(offsets);
  parallel_for(0, batch, grain(4 * (pairs / (batch + 1) + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      k.sample_softmax_gradient(data<T>(logits) + start[b], start[b + 1] - start[b], data<T>(log_normalizer)[b],
                                scale[b], gradient + start[b]);
  });
  subtract_labels(targets, data<T>(grad_loss), batch, gradient, [](int64_t, int64_t place) { return place; });
  return sample_gradients<T>(s, input, pairs, gradient, has_rows, has_bias, adam);
}

}  // namespace

// Returns grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where not asked for.
Gradients sample_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets,
                                        Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples,
                                        Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
                                        Tensor logits, Tensor log_normalizer, bool has_rows, bool has_bias) {
  constexpr const char* op = "sample_cross_entropy_backward";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return sample_backward<T>(op, grad_loss, input, weight, rows, offsets, pair_offsets, pair_positions, pair_samples,
                              label_offsets, label_places, label_probabilities, logits, log_normalizer, has_rows,
                              has_bias, [](const char*) -> std::optional<RowAdam<T>> { return std::nullopt; });
  });
}

// The same, and adam_rows_ on the weight's active rows; returns grad_input and grad_bias.
std::tuple<Tensor, Tensor> sample_cross_entropy_backward_adam_(
    Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets,
    Tensor pair_positions, Tensor pair_samples, Tensor label_offsets, Tensor label_places, Tensor label_probabilities,
    Tensor logits, Tensor log_normalizer, bool has_bias, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1,
    double beta2, double eps, double weight_decay, int64_t step, bool maximize) {
  constexpr const char* op = "sample_cross_entropy_backward_adam_";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const auto scalars = adam_scalars<T>(op, lr, beta1, beta2, eps, weight_decay, step, maximize);
    const auto found =
        sample_backward<T>(op, grad_loss, input, weight, rows, offsets, pair_offsets, pair_positions, pair_samples,
                           label_offsets, label_places, label_probabilities, logits, log_normalizer, true, has_bias,
                           [&](const char* name) -> std::optional<RowAdam<T>> {
                             return row_adam<T>(name, weight, exp_avg, exp_avg_sq, scalars, step);
                           });
    return {std::get<0>(found), std::get<2>(found)};
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
