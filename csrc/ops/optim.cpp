// Optimizer steps on touched rows, in place, and the sum of duplicate rows before them. One thread owns a row, so
// results are the same bit for bit at any number of threads. A parameter in bfloat16 has its gradient and states in
// bfloat16 too.
#include <algorithm>

#include "common.h"

namespace slide_torch {
namespace {

constexpr int kDigitBits = 11;             // a digit's 2048 counters fit the first-level cache
constexpr int64_t kSerialEntries = 16384;  // below, sorting on one thread is quicker than waking the others
constexpr int64_t kBlockEntries = 8192;    // entries a thread counts or scatters at a time
constexpr int64_t kDenseWidth = 1024;      // elements a thread updates at a time where all are

using States = std::vector<std::pair<const char*, Tensor>>;

// Checks param (N, ...) and states like it; the update knows them alone.
template <class T>
RowUpdate<T> check_states(const char* op, const Tensor& param, const States& states, ScalarType state_dtype,
                          int64_t step) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < param.dim(); ++i) shape.push_back(param.size(i));
  const ScalarType dtype = stored_dtype<T>(param);
  check_tensor(op, "param", param, dtype, shape);
  if (dtype == ScalarType::BFloat16) state_dtype = dtype;
  for (const auto& [name, state] : states) check_tensor(op, name, state, state_dtype, shape);
  RowUpdate<T> update{};
  if (dtype == ScalarType::BFloat16)
    update.bfloat16_param = mutable_data<uint16_t>(param);
  else
    update.param = mutable_data<T>(param);
  for (size_t i = 0; i < states.size(); ++i) set_state(update, i, states[i].second);
  update.step = static_cast<uint32_t>(step);
  return update;
}

template <class T>
void set_gradient(RowUpdate<T>& update, const Tensor& gradient) {
  if (update.bfloat16_param != nullptr)
    update.bfloat16_gradient = data<uint16_t>(gradient);
  else
    update.gradient = data<T>(gradient);
}

// And grad_rows like it, for an update of all elements.
template <class T>
RowUpdate<T> check_every_row(const char* op, const Tensor& param, const States& states, const Tensor& grad_rows,
                             ScalarType state_dtype, int64_t step) {
  RowUpdate<T> update = check_states<T>(op, param, states, state_dtype, step);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < param.dim(); ++i) shape.push_back(param.size(i));
  check_tensor(op, "grad_rows", grad_rows, stored_dtype<T>(param), shape);
  set_gradient(update, grad_rows);
  update.count = param.numel();
  update.width = 1;
  return update;
}

// And rows (U) and grad_rows (U, numbers of a row).
template <class T>
RowUpdate<T> check_update(const char* op, const Tensor& param, const States& states, const Tensor& rows,
                          const Tensor& grad_rows, ScalarType state_dtype, int64_t step) {
  check(param.dim() >= 1, op, "param: expected at least one dimension, got shape ()");
  RowUpdate<T> update = check_states<T>(op, param, states, state_dtype, step);
  const int64_t neurons = param.size(0), width = neurons > 0 ? param.numel() / neurons : 0;
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  const int64_t count = rows.numel();
  check_rows(op, data<int64_t>(rows), count, neurons);
  std::vector<int64_t> grad_shape(grad_rows.dim(), -1);
  check_tensor(op, "grad_rows", grad_rows, stored_dtype<T>(param), grad_shape);
  check(grad_rows.dim() >= 1 && grad_rows.size(0) == count && grad_rows.numel() == count * width, op,
        "grad_rows: expected ", count, " rows of ", width, " numbers, got shape ", shape_of(grad_rows));
  update.rows = data<int64_t>(rows);
  set_gradient(update, grad_rows);
  update.count = count;
  update.width = width;
  return update;
}

// kernel(update, first, last) on parts of `rows`, or of all.
template <class T, class Kernel>
void update_rows(const char* op, const Tensor& param, const States& states, const std::optional<Tensor>& rows,
                 const Tensor& grad_rows, ScalarType state_dtype, int64_t step, const Kernel& kernel) {
  if (rows) {
    const auto update = check_update<T>(op, param, states, *rows, grad_rows, state_dtype, step);
    parallel_for(0, update.count, grain(update.width * 4),
                 [&](int64_t first, int64_t last) { kernel(update, first, last); });
    return;
  }
  // Every element, in rows of kDenseWidth whatever the shape; what is left over in rows of one.
  auto update = check_every_row<T>(op, param, states, grad_rows, state_dtype, step);
  const int64_t count = update.count, wide = count / kDenseWidth, left = count - wide * kDenseWidth;
  std::vector<int64_t> numbers(wide + left);
  for (int64_t i = 0; i < wide; ++i) numbers[i] = i;
  for (int64_t i = 0; i < left; ++i) numbers[wide + i] = wide * kDenseWidth + i;
  auto rest = update;
  update.rows = numbers.data(), update.count = wide, update.width = kDenseWidth;
  rest.rows = numbers.data() + wide, rest.count = left;
  if (rest.gradient != nullptr) rest.gradient += wide * kDenseWidth;
  if (rest.bfloat16_gradient != nullptr) rest.bfloat16_gradient += wide * kDenseWidth;
  parallel_for(0, wide, grain(kDenseWidth * 4), [&](int64_t first, int64_t last) { kernel(update, first, last); });
  kernel(rest, 0, left);
}

// Sorts entries by the low `bits` of their row, keeping the order of equals: least significant digit first.
void sort_entries(RowEntry* entries, RowEntry* scratch, int64_t count, int bits) {
  RowEntry* source = entries;
  RowEntry* target = scratch;
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * bits / passes, digit_bits = (pass + 1) * bits / passes - shift;
    const uint32_t mask = (uint32_t{1} << digit_bits) - 1;
    uint32_t slot[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) ++slot[source[i].row >> shift & mask];
    uint32_t total = 0;
    for (uint32_t digit = 0; digit <= mask; ++digit) {
      const uint32_t here = slot[digit];
      slot[digit] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) target[slot[source[i].row >> shift & mask]++] = source[i];
    std::swap(source, target);
  }
  if (source != entries) std::copy(source, source + count, entries);
}

int bit_width(int64_t limit) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < limit) ++bits;
  return bits;
}

// The entries in order of (row, position). Many of them are first dealt, by blocks, into up to 256 ranges of rows,
// which threads then sort apart; the sorted order is unique, so the way there does not show.
std::vector<RowEntry> sorted_entries(const int64_t* indices, int64_t count, int64_t num_rows) {
  std::vector<RowEntry> sorted(count), scratch(count);
  const int bits = bit_width(num_rows);
  if (count < kSerialEntries || bits <= 8) {
    for (int64_t i = 0; i < count; ++i) sorted[i] = {static_cast<uint32_t>(indices[i]), static_cast<uint32_t>(i)};
    sort_entries(sorted.data(), scratch.data(), count, bits);
    return sorted;
  }
  const int shift = bits - 8;
  const int64_t blocks = (count + kBlockEntries - 1) / kBlockEntries, ranges = 256;
  std::vector<int64_t> place(blocks * ranges, 0);
  const auto for_blocks = [&](const auto& body) {
    parallel_for(0, blocks, 2, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        for (int64_t i = b * kBlockEntries; i < std::min(count, (b + 1) * kBlockEntries); ++i)
          body(i, place[b * ranges + (indices[i] >> shift)]);
    });
  };
  for_blocks([](int64_t, int64_t& slot) { ++slot; });
  std::vector<int64_t> range_start(ranges + 1, 0);
  int64_t total = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    range_start[r] = total;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = place[b * ranges + r];
      place[b * ranges + r] = total;
      total += here;
    }
  }
  range_start[ranges] = total;
  for_blocks([&](int64_t i, int64_t& slot) {
    sorted[slot++] = {static_cast<uint32_t>(indices[i]), static_cast<uint32_t>(i)};
  });
  parallel_for(0, ranges, grain(8 * (count / ranges)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      sort_entries(sorted.data() + range_start[r], scratch.data() + range_start[r], range_start[r + 1] - range_start[r],
                   shift);
  });
  return sorted;
}

// Where each distinct row's entries begin, and the end.
std::vector<int64_t> starts_of(const std::vector<RowEntry>& sorted) {
  const int64_t count = static_cast<int64_t>(sorted.size());
  int64_t distinct = count > 0;
  for (int64_t i = 1; i < count; ++i) distinct += sorted[i].row != sorted[i - 1].row;
  std::vector<int64_t> starts(distinct + 1);
  int64_t u = 0;
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || sorted[i].row != sorted[i - 1].row) starts[u++] = i;
  starts[u] = count;
  return starts;
}

}  // namespace

// Without `rows` every row has a gradient.
void adam_rows_(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> rows, Tensor grad_rows,
                double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, bool maximize) {
  constexpr const char* op = "adam_rows_";
  dispatch_stored(op, param.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto scalars = adam_scalars<T>(op, lr, beta1, beta2, eps, weight_decay, step, maximize);
    const States moments = {{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}};
    update_rows<T>(op, param, moments, rows, grad_rows, stored_dtype<T>(exp_avg), step,
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
    States states;
    if (momentum_buffer) states.emplace_back("momentum_buffer", *momentum_buffer);
    check(momentum_buffer || momentum == 0, op, "momentum_buffer: expected a tensor for momentum ", momentum,
          ", got None");
    const SgdScalars<T> scalars{static_cast<T>(maximize ? -1 : 1),
                                static_cast<T>(lr),
                                static_cast<T>(weight_decay),
                                static_cast<T>(momentum),
                                static_cast<T>(nesterov ? momentum : 1),
                                static_cast<T>(nesterov ? 1 : 0)};
    update_rows<T>(op, param, states, rows, grad_rows, scalar_type_of<T>(), step,
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
    update_rows<T>(op, param, {{"sum", sum}}, rows, grad_rows, scalar_type_of<T>(), step,
                   [&](const RowUpdate<T>& update, int64_t first, int64_t last) {
                     real_kernels<T>().adagrad_rows(update, static_cast<T>(lr), static_cast<T>(eps),
                                                    static_cast<T>(maximize ? -1 : 1), first, last);
                   });
  });
}

// Row-sparse entries indices (n), values (n, ...) -> distinct rows, increasing, and their summed values; each sum
// is taken in the order of the entries.
std::tuple<Tensor, Tensor> coalesce_rows(Tensor indices, Tensor values, int64_t num_rows) {
  constexpr const char* op = "coalesce_rows";
  check_tensor(op, "indices", indices, ScalarType::Long, {-1});
  const int64_t count = indices.numel();
  check(values.dim() >= 1, op, "values: expected shape (n, ...), got ()");
  std::vector<int64_t> shape(values.dim(), -1);
  shape[0] = count;
  check_integer(op, "num_rows", num_rows, 0, INT32_MAX);
  check(count <= INT32_MAX, op, "indices: expected at most 2^31 - 1 entries, got ", count);
  check_range(op, "indices", data<int64_t>(indices), count, num_rows);
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "values", values, scalar_type_of<T>(), shape);
    const int64_t width = count > 0 ? values.numel() / count : 0;
    const auto entries = sorted_entries(data<int64_t>(indices), count, num_rows);
    const auto starts = starts_of(entries);
    const int64_t distinct = static_cast<int64_t>(starts.size()) - 1;
    for (int64_t i = 1; i < values.dim(); ++i) shape[i] = values.size(i);
    shape[0] = distinct;
    Tensor rows = empty({distinct}, ScalarType::Long), summed = empty(shape, scalar_type_of<T>());
    int64_t* row = mutable_data<int64_t>(rows);
    T* target = mutable_data<T>(summed);
    const RowSum<T> sum{data<T>(values), entries.data(), starts.data(), width};
    // Cut by entries, not by rows: a few rows may hold most of them.
    parallel_for(0, count, grain(width), [&](int64_t first_entry, int64_t last_entry) {
      const int64_t first = std::lower_bound(starts.begin(), starts.end() - 1, first_entry) - starts.begin();
      const int64_t last = std::lower_bound(starts.begin(), starts.end() - 1, last_entry) - starts.begin();
      for (int64_t u = first; u < last; ++u) row[u] = entries[starts[u]].row;
      real_kernels<T>().sum_rows(sum, target, first, last);
    });
    return {rows, summed};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("adam_rows_", TORCH_BOX(&adam_rows_));
  m.impl("sgd_rows_", TORCH_BOX(&sgd_rows_));
  m.impl("adagrad_rows_", TORCH_BOX(&adagrad_rows_));
  m.impl("coalesce_rows", TORCH_BOX(&coalesce_rows));
}

}  // namespace slide_torch
