// What the operators of losses and hidden layers are given, checked where it is made.
#pragma once

#include "../common/layer.h"
#include "../kernels/dispatch.h"

namespace slide_torch {

inline void check_active_rows(const char* op, const Tensor& rows, const Tensor& weight) {
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  check_rows(op, data<int64_t>(rows), rows.numel(), weight.size(0));
}

// One active set for the batch: rows (U).
template <class T>
SharedProblem<T> shared_problem(const char* op, const LayerArgs<T>& layer, const Tensor& rows, double scale = 1) {
  check_active_rows(op, rows, layer.weight);
  return {.weight = data<T>(layer.weight),
          .bias = layer.bias,
          .rows = data<int64_t>(rows),
          .log_weight = nullptr,
          .active = rows.numel(),
          .features = layer.features(),
          .batch = layer.batch(),
          .scale = static_cast<T>(scale)};
}

// One active set a sample: `offsets` (B + 1) of the samples' pairs, and their transpose: `rows` (U), of each the pairs
// from pair_offsets (U + 1) on, with their positions among the samples' pairs and their samples.
struct SampleArgs {
  const Tensor& rows;
  const Tensor& offsets;
  const Tensor& pair_offsets;
  const Tensor& pair_positions;
  const Tensor& pair_samples;
};

template <class T>
struct SampleActive {
  SampleProblem<T> problem;
  const int64_t* offsets;
  int64_t batch;
  int64_t pairs;

  SampleActive(const char* op, const LayerArgs<T>& layer, const SampleArgs& given)
      : batch(layer.batch()), pairs(given.pair_positions.numel()) {
    const int64_t active = given.rows.numel();
    check_active_rows(op, given.rows, layer.weight);
    check_tensor(op, "offsets", given.offsets, ScalarType::Long, {batch + 1});
    check_tensor(op, "pair_offsets", given.pair_offsets, ScalarType::Long, {active + 1});
    check_tensor(op, "pair_positions", given.pair_positions, ScalarType::Int, {-1});
    check_tensor(op, "pair_samples", given.pair_samples, ScalarType::Int, {pairs});
    offsets = data<int64_t>(given.offsets);
    check_offsets(op, "offsets", offsets, batch, pairs);
    check_offsets(op, "pair_offsets", data<int64_t>(given.pair_offsets), active, pairs);
    check_range(op, "pair_positions", data<int32_t>(given.pair_positions), pairs, pairs);
    check_range(op, "pair_samples", data<int32_t>(given.pair_samples), pairs, batch);
    problem = {.weight = data<T>(layer.weight),
               .bias = layer.bias,
               .input = data<T>(layer.input),
               .rows = data<int64_t>(given.rows),
               .pair_offsets = data<int64_t>(given.pair_offsets),
               .pair_positions = data<int32_t>(given.pair_positions),
               .pair_samples = data<int32_t>(given.pair_samples),
               .active = active,
               .features = layer.features()};
  }

  // Of a loop over rows; and over samples, with so many operations a pair.
  int64_t grain_of_rows() const { return grain(problem.features * (pairs / (problem.active + 1) + 1)); }
  int64_t grain_of_samples(int64_t work) const { return grain(work * (pairs / (batch + 1) + 1)); }
};

// Numbers that belong to active rows, or to pairs; null where there are none.
template <class T>
const T* numbers_of(const char* op, const char* name, const std::optional<Tensor>& numbers, int64_t count) {
  if (numbers) check_tensor(op, name, *numbers, scalar_type_of<T>(), {count});
  return data_or_null<T>(numbers);
}

// Labels as CSR over samples, from offsets (B + 1): places in the active set, and a number or two for each.
struct LabelArgs {
  const Tensor& offsets;
  const Tensor& places;
  const char* name;  // of `values` in the schema
  const Tensor& values;
  const std::optional<Tensor>& extra;
};

template <class T>
struct Labels {
  const int64_t* offsets;
  const int64_t* places;
  const T* values;
  const T* extra;
  int64_t batch;
  int64_t place_step, sample_step;

  // Places are below `limit`; the logit of place p for sample b is at p * place_step + b * sample_step.
  Labels(const char* op, const LabelArgs& given, int64_t batch_in, int64_t limit, int64_t place_step_in,
         int64_t sample_step_in)
      : batch(batch_in), place_step(place_step_in), sample_step(sample_step_in) {
    const int64_t count = given.places.numel();
    check_tensor(op, "label_offsets", given.offsets, ScalarType::Long, {batch + 1});
    check_tensor(op, "label_places", given.places, ScalarType::Long, {-1});
    check_tensor(op, given.name, given.values, scalar_type_of<T>(), {count});
    if (given.extra) check_tensor(op, "label_extra", *given.extra, scalar_type_of<T>(), {count});
    offsets = data<int64_t>(given.offsets);
    places = data<int64_t>(given.places);
    values = data<T>(given.values);
    extra = data_or_null<T>(given.extra);
    check_offsets(op, "label_offsets", offsets, batch, count);
    check_range(op, "label_places", places, count, limit);
  }

  // Logits are (U, B); and (pairs), a place being a pair's.
  Labels(const char* op, const LabelArgs& given, const SharedProblem<T>& s)
      : Labels(op, given, s.batch, s.active, s.batch, 1) {}
  Labels(const char* op, const LabelArgs& given, const SampleActive<T>& active)
      : Labels(op, given, active.batch, active.pairs, 1, 0) {}

  // The logit of sample b's label i.
  int64_t at(int64_t b, int64_t i) const { return places[i] * place_step + b * sample_step; }
};

}  // namespace slide_torch
