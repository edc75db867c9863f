// What the losses over active sets share: the checks of their arguments, and the gradients of input and rows once that
// of the logits is known.
#pragma once

#include <algorithm>

#include "common.h"

namespace slide_torch {

template <class T>
void check_layer(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& rows) {
  check(input.dim() == 2 && weight.dim() == 2, op, "expected input (B, d) and weight (N, d), got ", shape_of(input),
        " and ", shape_of(weight));
  check_tensor(op, "input", input, scalar_type_of<T>(), {-1, weight.size(1)});
  check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
  if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {weight.size(0)});
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  check_rows(op, data<int64_t>(rows), rows.numel(), weight.size(0));
}

// Panels of a packed copy of x: by rows (`transposed`) or by columns.
template <class T>
std::vector<T> pack(const T* x, int64_t count, int64_t width, bool transposed) {
  const auto& k = real_kernels<T>();
  const int64_t panels = ((transposed ? count : width) + k.tile_columns - 1) / k.tile_columns;
  const int64_t depth = transposed ? width : count;
  std::vector<T> packed(panels * k.tile_columns * depth);
  parallel_for(0, panels, grain(k.tile_columns * depth * 4), [&](int64_t first, int64_t last) {
    (transposed ? k.pack_transposed : k.pack_columns)(x, count, width, first, last, packed.data());
  });
  return packed;
}

// Splits [0, count) into ranges that are multiples of `multiple`.
template <class F>
void parallel_tiles(int64_t count, int64_t multiple, int64_t work_per_item, const F& body) {
  parallel_for(0, (count + multiple - 1) / multiple, grain(work_per_item * multiple), [&](int64_t first, int64_t last) {
    body(first * multiple, last * multiple < count ? last * multiple : count);
  });
}

template <class T>
SampleProblem<T> sample_problem(const char* op, const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& rows, const Tensor& offsets,
                                const Tensor& pair_offsets, const Tensor& pair_positions, const Tensor& pair_samples) {
  check_layer<T>(op, input, weight, bias, rows);
  check_tensor(op, "offsets", offsets, ScalarType::Long, {input.size(0) + 1});
  check_tensor(op, "pair_offsets", pair_offsets, ScalarType::Long, {rows.numel() + 1});
  check_tensor(op, "pair_positions", pair_positions, ScalarType::Int, {-1});
  const int64_t pairs = pair_positions.numel();
  check_tensor(op, "pair_samples", pair_samples, ScalarType::Int, {pairs});
  check_offsets(op, "offsets", data<int64_t>(offsets), input.size(0), pairs);
  check_offsets(op, "pair_offsets", data<int64_t>(pair_offsets), rows.numel(), pairs);
  check_range(op, "pair_positions", data<int32_t>(pair_positions), pairs, pairs);
  check_range(op, "pair_samples", data<int32_t>(pair_samples), pairs, input.size(0));
  return {data<T>(weight),
          data_or_null<T>(bias),
          data<T>(input),
          data<int64_t>(rows),
          data<int64_t>(pair_offsets),
          data<int32_t>(pair_positions),
          data<int32_t>(pair_samples),
          rows.numel(),
          weight.size(1)};
}

// Adam applied to the active rows inside backward, right after each row's gradient, instead of handing them over.
template <class T>
struct RowAdam {
  RowUpdate<T> states;  // of the whole parameter
  AdamScalars<T> scalars;
};

// Updates the first `count` of `active` rows from their gradients.
template <class T>
void update_rows(const RowAdam<T>& adam, const int64_t* rows, const T* gradients, int64_t active, int64_t features,
                 int64_t count) {
  RowUpdate<T> update = adam.states;
  update.rows = rows;
  update.gradient = gradients;
  update.count = active;
  update.width = features;
  real_kernels<T>().adam_rows(update, adam.scalars, 0, count);
}

// grad_input (B, d), grad_rows (U, d; empty where Adam has used them, or nobody asks), grad_bias (U, or empty
// likewise).
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
Gradients empty_gradients(const Tensor& input, int64_t active, bool has_bias, bool has_rows) {
  const ScalarType dtype = input.scalar_type();
  return {empty({input.size(0), input.size(1)}, dtype), empty({has_rows ? active : 0, input.size(1)}, dtype),
          empty({has_bias ? active : 0}, dtype)};
}

// From gradient (U, B), the loss's derivative by the logits of a shared active set.
template <class T>
Gradients shared_gradients(const SharedProblem<T>& s, const Tensor& input, const T* gradient, bool has_rows,
                           bool has_bias, const std::optional<RowAdam<T>>& adam = std::nullopt) {
  const auto& k = real_kernels<T>();
  Gradients result = empty_gradients<T>(input, s.active, has_bias, has_rows && !adam);
  auto& [grad_input, grad_rows, grad_bias] = result;
  T* to_input = mutable_data<T>(grad_input);
  T* to_rows = has_rows && !adam ? mutable_data<T>(grad_rows) : nullptr;
  T* to_bias = has_bias ? mutable_data<T>(grad_bias) : nullptr;
  const std::vector<T> packed = pack(data<T>(input), s.batch, s.features, false);
  parallel_tiles(s.batch, 4 * k.tile_rows, s.active * s.features, [&](int64_t b, int64_t e) {
    std::vector<T> panel(k.depth * k.tile_columns);
    k.shared_grad_input(s, gradient, to_input, b, e, panel.data());
  });
  if (!has_rows && !has_bias) return result;
  parallel_tiles(s.active, k.tile_rows, s.batch * s.features, [&](int64_t b, int64_t e) {
    if (!adam) return k.shared_grad_rows(s, gradient, packed.data(), to_rows, to_bias, b, e);
    std::vector<T> tile(k.tile_rows * s.features);
    for (int64_t u = b; u < e; u += k.tile_rows) {
      const int64_t count = std::min(k.tile_rows, e - u);
      k.shared_grad_rows(s, gradient + u * s.batch, packed.data(), tile.data(), to_bias ? to_bias + u : nullptr, 0,
                         count);
      update_rows(*adam, s.rows + u, tile.data(), s.active - u, s.features, count);
    }
  });
  return result;
}

// output (B, width) = the sum over active rows of what body(sums, first, last) adds to `sums` for rows
// [first, last). Any row may meet any sample: rows are cut into a fixed number of chunks with equal pairs, each chunk
// has sums of its own, and these are added in order: the same result at any number of threads.
template <class T, class F>
void sum_of_chunks(const SampleProblem<T>& s, int64_t pairs, const Tensor& output, const F& body) {
  constexpr int64_t kChunks = 16, kAccumulatorBytes = int64_t{64} << 20;
  T* out = mutable_data<T>(output);
  const int64_t values = output.numel();
  int64_t chunks = kAccumulatorBytes / (values * static_cast<int64_t>(sizeof(T)) + 1);
  chunks = chunks < 2 ? 2 : chunks > kChunks ? kChunks : chunks;
  std::vector<int64_t> cut(chunks + 1, s.active);
  for (int64_t c = 0; c < chunks; ++c)
    cut[c] = std::lower_bound(s.pair_offsets, s.pair_offsets + s.active, pairs * c / chunks) - s.pair_offsets;
  Tensor sums = empty({chunks, values}, scalar_type_of<T>());
  T* accumulators = mutable_data<T>(sums);
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      std::fill(accumulators + c * values, accumulators + (c + 1) * values, T(0));
      body(accumulators + c * values, cut[c], cut[c + 1]);
    }
  });
  parallel_for(0, values, grain(chunks), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T sum = T(0);
      for (int64_t c = 0; c < chunks; ++c) sum += accumulators[c * values + i];
      out[i] = sum;
    }
  });
}

// From gradient (pairs, sample-major).
template <class T>
Gradients sample_gradients(const SampleProblem<T>& s, const Tensor& input, int64_t pairs, const T* gradient,
                           bool has_rows, bool has_bias, const std::optional<RowAdam<T>>& adam = std::nullopt) {
  const auto& k = real_kernels<T>();
  Gradients result = empty_gradients<T>(input, s.active, has_bias, has_rows && !adam);
  auto& [grad_input, grad_rows, grad_bias] = result;
  T* to_rows = has_rows && !adam ? mutable_data<T>(grad_rows) : nullptr;
  T* to_bias = has_bias ? mutable_data<T>(grad_bias) : nullptr;
  sum_of_chunks<T>(s, pairs, grad_input, [&](T* accumulator, int64_t first, int64_t last) {
    if (!adam) return k.sample_gradients(s, gradient, accumulator, to_rows, to_bias, first, last);
    k.sample_gradients_adam(s, gradient, accumulator, to_bias, adam->states, adam->scalars, first, last);
  });
  return result;
}

}  // namespace slide_torch
