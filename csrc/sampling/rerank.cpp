// Exact re-ranking: of each sample's candidates those with the largest logits are kept.
#include <algorithm>
#include <limits>
#include <utility>

#include "../common/stored_rows.h"
#include "join.h"

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

// What `retrieve` returned without a tail, the tail, and the layer that scores.
struct RerankArgs {
  const Tensor& offsets;
  const Tensor& active;
  const Tensor& label_offsets;
  const Tensor& label_positions;
  const Tensor& tail;
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  int64_t budget;

  int64_t batch() const { return input.size(0); }
  int64_t features() const { return weight.size(1); }

  void check_all(const char* op) const {
    check(weight.dim() == 2, op, "weight: expected shape (N, d), got ", shape_of(weight));
    const int64_t neurons = weight.size(0);
    check_tensor(op, "input", input, input.scalar_type(), {-1, features()});
    if (bias) check_tensor(op, "bias", *bias, input.scalar_type(), {neurons});
    check_tensor(op, "offsets", offsets, ScalarType::Long, {batch() + 1});
    check_tensor(op, "active", active, ScalarType::Int, {-1});
    check_offsets(op, "offsets", data<int64_t>(offsets), batch(), active.numel());
    check_range(op, "active", data<int32_t>(active), active.numel(), neurons);
    check_tensor(op, "tail", tail, ScalarType::Int, {-1});
    check_range(op, "tail", data<int32_t>(tail), tail.numel(), neurons);
    check(std::is_sorted(data<int32_t>(tail), data<int32_t>(tail) + tail.numel()), op, "tail: expected increasing ids");
    check(budget >= 0, op, "budget: expected at least 0, got ", budget);
    check_labels(op);
  }

  void check_labels(const char* op) const {
    check_tensor(op, "label_offsets", label_offsets, ScalarType::Long, {batch() + 1});
    check_tensor(op, "label_positions", label_positions, ScalarType::Int, {-1});
    check_offsets(op, "label_offsets", data<int64_t>(label_offsets), batch(), label_positions.numel());
    const int64_t *start = data<int64_t>(offsets), *label_start = data<int64_t>(label_offsets);
    for (int64_t i = 0, b = 0; i < label_positions.numel(); ++i) {
      while (i >= label_start[b + 1]) ++b;
      const int32_t place = data<int32_t>(label_positions)[i];
      check(place >= 0 && place < start[b + 1] - start[b], op,
            "label_positions: expected places in the sample's list of ", start[b + 1] - start[b], ", got ", place);
    }
  }

  // A sample's labels without repetition, which stand first.
  int64_t labels(int64_t b) const {
    int64_t count = 0;
    for (int64_t i = data<int64_t>(label_offsets)[b]; i < data<int64_t>(label_offsets)[b + 1]; ++i)
      count = std::max<int64_t>(count, data<int32_t>(label_positions)[i] + 1);
    return count;
  }
};

// Appends the ids of the tail that are not active already; `listed` is room for marks.
void add_tail(const int32_t* tail, int64_t count, std::vector<uint8_t>& listed, std::vector<int32_t>& active) {
  if (count == 0) return;
  listed.assign(count, 0);
  for (const int32_t id : active) {
    const int32_t* found = std::lower_bound(tail, tail + count, id);
    if (found != tail + count && *found == id) listed[found - tail] = 1;
  }
  for (int64_t i = 0; i < count; ++i)
    if (!listed[i]) active.push_back(tail[i]);
}

// Each sample's new active set.
template <class T>
std::vector<std::vector<int32_t>> rerank_all(const char* op, const RerankArgs& args, int64_t* tail_starts) {
  check_tensor(op, "weight", args.weight, stored_dtype<T>(args.weight), {-1, -1});
  const int64_t features = args.features(), batch = args.batch();
  const StoredRows<T> stored(args.weight, features);
  const T *x = data<T>(args.input), *bias = data_or_null<T>(args.bias);
  const int64_t* start = data<int64_t>(args.offsets);
  const int32_t *ids = data<int32_t>(args.active), *tail = data<int32_t>(args.tail);
  std::vector<std::vector<int32_t>> kept(batch);
  parallel_for(0, batch, grain(args.active.numel() / (batch + 1) * features), [&](int64_t first, int64_t last) {
    std::vector<int32_t> own;
    std::vector<T> scores;
    std::vector<std::pair<T, int32_t>> ranked;
    std::vector<uint8_t> listed;
    for (int64_t b = first; b < last; ++b) {
      own.assign(ids + start[b], ids + start[b + 1]);
      const int64_t labels = args.labels(b);
      keep_best<T>(own, labels, std::max<int64_t>(args.budget - labels, 0), scores, ranked, stored, bias,
                   x + b * features);
      tail_starts[b] = static_cast<int64_t>(own.size());
      add_tail(tail, args.tail.numel(), listed, own);
      kept[b] = own;
    }
  });
  return kept;
}

}  // namespace

// Returns offsets (B + 1), active (pairs) and tail_starts (B) as `retrieve` would with a tail. Labels keep their
// places.
std::tuple<Tensor, Tensor, Tensor> rerank(Tensor offsets, Tensor active, Tensor label_offsets, Tensor label_positions,
                                          Tensor tail, Tensor input, Tensor weight, std::optional<Tensor> bias,
                                          int64_t budget) {
  constexpr const char* op = "rerank";
  const RerankArgs args{offsets, active, label_offsets, label_positions, tail, input, weight, bias, budget};
  args.check_all(op);
  Tensor tail_starts = empty({args.batch()}, ScalarType::Long);
  int64_t* starts = mutable_data<int64_t>(tail_starts);
  const auto kept =
      dispatch_real(op, input.scalar_type(), [&](auto zero) { return rerank_all<decltype(zero)>(op, args, starts); });
  const auto [new_offsets, new_active] = join(op, kept);
  return {new_offsets, new_active, tail_starts};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("rerank", TORCH_BOX(&rerank));
}

}  // namespace slide_torch
