// Exact re-ranking: of each sample's candidates those with the largest logits are kept.
#include <algorithm>
#include <limits>
#include <utility>

#include "stored_rows.h"

namespace slide_torch {
namespace {

// Replaces `active` by its first `labels` ids, then the `room` best-scored of the others (best first; the smaller id
// where scores are equal; NaN last).
template <class T>
void keep_best(std::vector<int32_t>& active, int64_t labels, int64_t room, std::vector<T>& scores,
               std::vector<std::pair<T, int32_t>>& ranked, const StoredRows<T>& weight, const T* bias, const T* x) {
  const int64_t candidates = static_cast<int64_t>(active.size()) - labels;
  scores.resize(candidates);
  weight.score(bias, x, active.data() + labels, candidates, scores.data());
  ranked.clear();
  for (int64_t i = 0; i < candidates; ++i) {
    const T score = scores[i] == scores[i] ? scores[i] : -std::numeric_limits<T>::infinity();
    ranked.emplace_back(-score, active[labels + i]);
  }
  const auto end = ranked.begin() + std::min(room, candidates);
  std::partial_sort(ranked.begin(), end, ranked.end());
  active.resize(labels);
  for (auto it = ranked.begin(); it != end; ++it) active.push_back(it->second);
}

}  // namespace

// Takes what `retrieve` returned without a tail; returns offsets (B + 1), active (pairs) and tail_starts (B) as it
// would with one. Labels keep their places.
std::tuple<Tensor, Tensor, Tensor> rerank(Tensor offsets, Tensor active, Tensor label_offsets, Tensor label_positions,
                                          Tensor tail, Tensor input, Tensor weight, std::optional<Tensor> bias,
                                          int64_t budget) {
  constexpr const char* op = "rerank";
  check(weight.dim() == 2, op, "weight: expected shape (N, d), got ", shape_of(weight));
  const int64_t neurons = weight.size(0), features = weight.size(1);
  check_tensor(op, "input", input, input.scalar_type(), {-1, features});
  if (bias) check_tensor(op, "bias", *bias, input.scalar_type(), {neurons});
  const int64_t batch = input.size(0);
  check_tensor(op, "offsets", offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "active", active, ScalarType::Int, {-1});
  check_offsets(op, "offsets", data<int64_t>(offsets), batch, active.numel());
  check_range(op, "active", data<int32_t>(active), active.numel(), neurons);
  check_tensor(op, "label_offsets", label_offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "label_positions", label_positions, ScalarType::Int, {-1});
  check_offsets(op, "label_offsets", data<int64_t>(label_offsets), batch, label_positions.numel());
  check_tensor(op, "tail", tail, ScalarType::Int, {-1});
  check_range(op, "tail", data<int32_t>(tail), tail.numel(), neurons);
  const int32_t *tail_first = data<int32_t>(tail), *tail_last = tail_first + tail.numel();
  check(std::is_sorted(tail_first, tail_last), op, "tail: expected increasing ids");
  check(budget >= 0, op, "budget: expected at least 0, got ", budget);
  const int64_t *start = data<int64_t>(offsets), *label_start = data<int64_t>(label_offsets);
  for (int64_t i = 0, b = 0; i < label_positions.numel(); ++i) {
    while (i >= label_start[b + 1]) ++b;
    const int32_t place = data<int32_t>(label_positions)[i];
    check(place >= 0 && place < start[b + 1] - start[b], op,
          "label_positions: expected places in the sample's list of ", start[b + 1] - start[b], ", got ", place);
  }

  Tensor new_offsets = empty({batch + 1}, ScalarType::Long), tail_starts = empty({batch}, ScalarType::Long);
  std::vector<std::vector<int32_t>> kept(batch);
  dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, stored_dtype<T>(weight), {neurons, features});
    const StoredRows<T> stored(weight, features);
    parallel_for(0, batch, grain(active.numel() / (batch + 1) * features), [&](int64_t first, int64_t last) {
      std::vector<int32_t> own;
      std::vector<T> scores;
      std::vector<std::pair<T, int32_t>> ranked;
      std::vector<uint8_t> listed(tail.numel());
      for (int64_t b = first; b < last; ++b) {
        own.assign(data<int32_t>(active) + start[b], data<int32_t>(active) + start[b + 1]);
        int64_t labels = 0;  // those without repetition, which stand first
        for (int64_t i = label_start[b]; i < label_start[b + 1]; ++i)
          labels = std::max<int64_t>(labels, data<int32_t>(label_positions)[i] + 1);
        keep_best<T>(own, labels, std::max<int64_t>(budget - labels, 0), scores, ranked, stored, data_or_null<T>(bias),
                     data<T>(input) + b * features);
        mutable_data<int64_t>(tail_starts)[b] = static_cast<int64_t>(own.size());
        if (tail.numel() > 0) {
          std::fill(listed.begin(), listed.end(), 0);
          for (const int32_t id : own) {
            const int32_t* found = std::lower_bound(tail_first, tail_last, id);
            if (found != tail_last && *found == id) listed[found - tail_first] = 1;
          }
          for (int64_t i = 0; i < tail.numel(); ++i)
            if (!listed[i]) own.push_back(tail_first[i]);
        }
        kept[b] = own;
      }
    });
  });
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    mutable_data<int64_t>(new_offsets)[b] = total;
    total += static_cast<int64_t>(kept[b].size());
  }
  mutable_data<int64_t>(new_offsets)[batch] = total;
  check(total < INT32_MAX, op, "the batch activates ", total,
        " neurons in all, more than 2^31 - 1: lower the budget, the tail or the batch");
  Tensor new_active = empty({total}, ScalarType::Int);
  for (int64_t b = 0; b < batch; ++b)
    std::copy(kept[b].begin(), kept[b].end(), mutable_data<int32_t>(new_active) + data<int64_t>(new_offsets)[b]);
  return {new_offsets, new_active, tail_starts};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("rerank", TORCH_BOX(&rerank));
}

}  // namespace slide_torch
