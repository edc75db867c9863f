// Optimizer steps on touched rows, in place. One thread owns a row, so results are the same bit for bit at any number
// of threads. A parameter in bfloat16 has its gradient and states in bfloat16 too.
#include "adam.h"

namespace slide_torch {
namespace {

constexpr int64_t kDenseWidth = 1024;  // elements a thread updates at a time where all are

struct State {
  const char* name;
  const Tensor& tensor;
};

// param (N, ...), states like it; grad_rows (U, ...) of `rows`, or like param without them. All states are of one
// dtype, that of the computation unless `moments_dtype` says otherwise; what is bfloat16 is rounded by bits of `step`.
struct UpdateArgs {
  const char* op;
  const Tensor& param;
  std::vector<State> states;
  const std::optional<Tensor>& rows;
  const Tensor& grad_rows;
  int64_t step;
  std::optional<ScalarType> states_dtype = std::nullopt;

  // The update of param and states, its gradient still missing.
  template <class T>
  RowUpdate<T> check_states() const {
    const std::vector<int64_t> shape = sizes_of(param);
    const ScalarType dtype = stored_dtype<T>(param);
    const bool narrow = dtype == ScalarType::BFloat16;
    check_tensor(op, "param", param, dtype, shape);
    for (const State& state : states)
      check_tensor(op, state.name, state.tensor, narrow ? dtype : states_dtype.value_or(dtype), shape);
    RowUpdate<T> update{};
    if (narrow)
      update.bfloat16_param = mutable_data<uint16_t>(param);
    else
      update.param = mutable_data<T>(param);
    for (size_t i = 0; i < states.size(); ++i) set_state(update, i, states[i].tensor);
    update.step = static_cast<uint32_t>(step);
    return update;
  }

  template <class T>
  void set_gradient(RowUpdate<T>& update) const {
    if (update.bfloat16_param != nullptr)
      update.bfloat16_gradient = data<uint16_t>(grad_rows);
    else
      update.gradient = data<T>(grad_rows);
  }

  template <class T>
  RowUpdate<T> of_rows() const {
    check(param.dim() >= 1, op, "param: expected at least one dimension, got shape ()");
    RowUpdate<T> update = check_states<T>();
    const int64_t neurons = param.size(0), width = neurons > 0 ? param.numel() / neurons : 0;
    check_tensor(op, "rows", *rows, ScalarType::Long, {-1});
    const int64_t count = rows->numel();
    check_rows(op, data<int64_t>(*rows), count, neurons);
    check_tensor(op, "grad_rows", grad_rows, stored_dtype<T>(param), std::vector<int64_t>(grad_rows.dim(), -1));
    check(grad_rows.dim() >= 1 && grad_rows.size(0) == count && grad_rows.numel() == count * width, op,
          "grad_rows: expected ", count, " rows of ", width, " numbers, got shape ", shape_of(grad_rows));
    set_gradient(update);
    update.rows = data<int64_t>(*rows);
    update.count = count;
    update.width = width;
    return update;
  }

  // Elements count as rows of one number, whose numbers are still missing.
  template <class T>
  RowUpdate<T> of_elements() const {
    RowUpdate<T> update = check_states<T>();
    check_tensor(op, "grad_rows", grad_rows, stored_dtype<T>(param), sizes_of(param));
    set_gradient(update);
    update.count = param.numel();
    update.width = 1;
    return update;
  }
};

// kernel(update, first, last) on parts of all elements, in rows of kDenseWidth whatever the shape; what is left over in
// rows of one.
template <class T, class Kernel>
void update_elements(RowUpdate<T> update, const Kernel& kernel) {
  const int64_t count = update.count, wide = count / kDenseWidth, left = count - wide * kDenseWidth;
  std::vector<int64_t> numbers(wide + left);
  for (int64_t i = 0; i < wide; ++i) numbers[i] = i;
  for (int64_t i = 0; i < left; ++i) numbers[wide + i] = wide * kDenseWidth + i;
  RowUpdate<T> rest = update;
  update.rows = numbers.data(), update.count = wide, update.width = kDenseWidth;
  rest.rows = numbers.data() + wide, rest.count = left;
  if (rest.gradient != nullptr) rest.gradient += wide * kDenseWidth;
  if (rest.bfloat16_gradient != nullptr) rest.bfloat16_gradient += wide * kDenseWidth;
  parallel_for(0, wide, grain(kDenseWidth * 4), [&](int64_t first, int64_t last) { kernel(update, first, last); });
  kernel(rest, 0, left);
}

// kernel(update, first, last) on parts of the rows, or of everything where none are given.
template <class T, class Kernel>
void update_rows(const UpdateArgs& args, const Kernel& kernel) {
  if (!args.rows) return update_elements(args.of_elements<T>(), kernel);
  const RowUpdate<T> update = args.of_rows<T>();
  parallel_for(0, update.count, grain(update.width * 4),
               [&](int64_t first, int64_t last) { kernel(update, first, last); });
}

}  // namespace

// Without `rows` every row has a gradient.
void adam_rows_(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> rows, Tensor grad_rows,
                double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, bool maximize) {
  constexpr const char* op = "adam_rows_";
  dispatch_stored(op, param.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto scalars =
        AdamArgs{exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize}.scalars<T>(op);
    update_rows<T>({.op = op,
                    .param = param,
                    .states = {{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}},
                    .rows = rows,
                    .grad_rows = grad_rows,
                    .step = step,
                    .states_dtype = stored_dtype<T>(exp_avg)},
                   [&](const RowUpdate<T>& update, int64_t first, int64_t last) {
                     real_kernels<T>().adam_rows(update, scalars, first, last);
                   });
  });
}

void sgd_rows_(Tensor param, std::optional<Tensor> momentum_buffer, std::optional<Tensor> rows, Tensor grad_rows,
               double lr, double momentum, double weight_decay, bool nesterov, bool maximize, int64_t step) {
  constexpr const char* op = "sgd_rows_";
  dispatch_stored(op, param.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<State> states;
    if (momentum_buffer) states.push_back({"momentum_buffer", *momentum_buffer});
    check(momentum_buffer || momentum == 0, op, "momentum_buffer: expected a tensor for momentum ", momentum,
          ", got None");
    const SgdScalars<T> scalars{.sign = static_cast<T>(maximize ? -1 : 1),
                                .lr = static_cast<T>(lr),
                                .weight_decay = static_cast<T>(weight_decay),
                                .momentum = static_cast<T>(momentum),
                                .from_buffer = static_cast<T>(nesterov ? momentum : 1),
                                .from_gradient = static_cast<T>(nesterov ? 1 : 0)};
    update_rows<T>({.op = op, .param = param, .states = states, .rows = rows, .grad_rows = grad_rows, .step = step},
                   [&](const RowUpdate<T>& update, int64_t first, int64_t last) {
                     real_kernels<T>().sgd_rows(update, scalars, first, last);
                   });
  });
}

void adagrad_rows_(Tensor param, Tensor sum, std::optional<Tensor> rows, Tensor grad_rows, double lr, double eps,
                   bool maximize, int64_t step) {
  constexpr const char* op = "adagrad_rows_";
  dispatch_stored(op, param.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    update_rows<T>(
        {.op = op, .param = param, .states = {{"sum", sum}}, .rows = rows, .grad_rows = grad_rows, .step = step},
        [&](const RowUpdate<T>& update, int64_t first, int64_t last) {
          real_kernels<T>().adagrad_rows(update, static_cast<T>(lr), static_cast<T>(eps),
                                         static_cast<T>(maximize ? -1 : 1), first, last);
        });
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("adam_rows_", TORCH_BOX(&adam_rows_));
  m.impl("sgd_rows_", TORCH_BOX(&sgd_rows_));
  m.impl("adagrad_rows_", TORCH_BOX(&adagrad_rows_));
}

}  // namespace slide_torch
