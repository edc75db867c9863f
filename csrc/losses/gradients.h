// What the losses over active sets and hidden layers share: logits, and the gradients of input and rows once that of
// the logits is known.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/parallel.h"
#include "../optim/adam.h"
#include "arguments.h"

namespace slide_torch {

// log(1 + exp x), and its derivative.
template <class T>
T softplus(T x) {
  return (x > T(0) ? x : T(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <class T>
T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
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

// Logits (U, B) of a shared active set, of the rows of x (B, d).
template <class T>
Tensor shared_logits(const SharedProblem<T>& s, const Tensor& x) {
  const auto& k = real_kernels<T>();
  Tensor logits = empty({s.active, s.batch}, scalar_type_of<T>());
  T* z = mutable_data<T>(logits);
  const std::vector<T> packed = pack(data<T>(x), s.batch, s.features, true);
  parallel_tiles(s.active, k.tile_rows, s.batch * s.features,
                 [&](int64_t b, int64_t e) { k.shared_logits(s, packed.data(), z, b, e); });
  return logits;
}

// Logits (pairs, sample-major), before scale and log weights.
template <class T>
Tensor sample_logits(const SampleActive<T>& active) {
  Tensor logits = empty({active.pairs}, scalar_type_of<T>());
  T* z = mutable_data<T>(logits);
  parallel_for(0, active.problem.active, active.grain_of_rows(),
               [&](int64_t b, int64_t e) { real_kernels<T>().sample_logits(active.problem, z, b, e); });
  return logits;
}

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

// grad_input (B, d), grad_rows (U, d), grad_bias (U); the last two are empty where nobody wants them.
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Which gradients are wanted, and whether Adam uses those of rows at once: then nobody else does.
template <class T>
struct Wanted {
  bool rows;
  bool bias;
  std::optional<RowAdam<T>> adam = std::nullopt;

  bool keeps_rows() const { return rows && !adam; }
};

template <class T>
struct GradientMemory {
  Gradients tensors;
  T* input;
  T* rows;  // null where not wanted, as `bias`
  T* bias;

  GradientMemory(const Tensor& of, int64_t active, const Wanted<T>& wanted)
      : tensors{empty({of.size(0), of.size(1)}, of.scalar_type()),
                empty({wanted.keeps_rows() ? active : 0, of.size(1)}, of.scalar_type()),
                empty({wanted.bias ? active : 0}, of.scalar_type())},
        input(mutable_data<T>(std::get<0>(tensors))),
        rows(wanted.keeps_rows() ? mutable_data<T>(std::get<1>(tensors)) : nullptr),
        bias(wanted.bias ? mutable_data<T>(std::get<2>(tensors)) : nullptr) {}
};

// y (B, d) = the sum over rows of values (U, B) times the row.
template <class T>
void shared_sums(const SharedProblem<T>& s, const T* values, T* y) {
  const auto& k = real_kernels<T>();
  parallel_tiles(s.batch, 4 * k.tile_rows, s.active * s.features, [&](int64_t b, int64_t e) {
    std::vector<T> panel(k.depth * k.tile_columns);
    k.shared_grad_input(s, values, y, b, e, panel.data());
  });
}

// From gradient (U, B), the loss's derivative by the logits of a shared active set.
template <class T>
Gradients shared_gradients(const SharedProblem<T>& s, const Tensor& input, const T* gradient, const Wanted<T>& wanted) {
  const auto& k = real_kernels<T>();
  const GradientMemory<T> to(input, s.active, wanted);
  shared_sums(s, gradient, to.input);
  if (!wanted.rows && !wanted.bias) return to.tensors;
  const std::vector<T> packed = pack(data<T>(input), s.batch, s.features, false);
  parallel_tiles(s.active, k.tile_rows, s.batch * s.features, [&](int64_t b, int64_t e) {
    if (!wanted.adam) return k.shared_grad_rows(s, gradient, packed.data(), to.rows, to.bias, b, e);
    std::vector<T> tile(k.tile_rows * s.features);
    for (int64_t u = b; u < e; u += k.tile_rows) {
      const int64_t count = std::min(k.tile_rows, e - u);
      k.shared_grad_rows(s, gradient + u * s.batch, packed.data(), tile.data(), to.bias ? to.bias + u : nullptr, 0,
                         count);
      update_rows(*wanted.adam, s.rows + u, tile.data(), s.active - u, s.features, count);
    }
  });
  return to.tensors;
}

// output (B, width) = the sum over active rows of what body(sums, first, last) adds to `sums` for rows [first, last).
// Any row may meet any sample: rows are cut into a fixed number of chunks with equal pairs, each chunk has sums of its
// own, and these are added in order: the same result at any number of threads.
template <class T, class F>
void sum_of_chunks(const SampleActive<T>& active, const Tensor& output, const F& body) {
  constexpr int64_t kChunks = 16, kAccumulatorBytes = int64_t{64} << 20;
  const SampleProblem<T>& s = active.problem;
  T* out = mutable_data<T>(output);
  const int64_t values = output.numel();
  const int64_t fitting = kAccumulatorBytes / (values * static_cast<int64_t>(sizeof(T)) + 1);
  const int64_t chunks = std::clamp<int64_t>(fitting, 2, kChunks);
  std::vector<int64_t> cut(chunks + 1, s.active);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t pairs_before = active.pairs * c / chunks;
    cut[c] = std::lower_bound(s.pair_offsets, s.pair_offsets + s.active, pairs_before) - s.pair_offsets;
  }
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
Gradients sample_gradients(const SampleActive<T>& active, const Tensor& input, const T* gradient,
                           const Wanted<T>& wanted) {
  const auto& k = real_kernels<T>();
  const SampleProblem<T>& s = active.problem;
  const GradientMemory<T> to(input, s.active, wanted);
  sum_of_chunks<T>(active, std::get<0>(to.tensors), [&](T* accumulator, int64_t first, int64_t last) {
    if (!wanted.adam) return k.sample_gradients(s, gradient, accumulator, to.rows, to.bias, first, last);
    k.sample_gradients_adam(s, gradient, accumulator, to.bias, wanted.adam->states, wanted.adam->scalars, first, last);
  });
  return to.tensors;
}

}  // namespace slide_torch
