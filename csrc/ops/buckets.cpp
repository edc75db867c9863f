// The best of what one hash table's buckets hold, by exact logits. Bucket by bucket: a weight row is read once for all
// samples that probe its bucket.
#include <algorithm>
#include <atomic>
#include <limits>

#include "../kernels/retrieve.h"
#include "stored_rows.h"

namespace slide_torch {
namespace {

template <class T>
struct Scored {
  T score;
  int32_t id;

  // Total, so that the best are the same in whatever order candidates are met.
  bool operator<(const Scored& other) const { return score != other.score ? score > other.score : id < other.id; }
};

// The best k so far of each sample, as heaps with the worst on top.
template <class T>
class BestOfSamples {
 public:
  BestOfSamples(int64_t samples, int64_t k) : entries_(samples * k), counts_(samples), k_(k) {}

  void offer(int64_t sample, Scored<T> entry) {
    Scored<T>* heap = begin(sample);
    int64_t& count = counts_[sample];
    if (count == k_) {
      if (!(entry < heap[0])) return;
      std::pop_heap(heap, heap + count--);
    }
    heap[count++] = entry;
    std::push_heap(heap, heap + count);
  }

  Scored<T>* begin(int64_t sample) { return entries_.data() + sample * k_; }
  Scored<T>* end(int64_t sample) { return begin(sample) + counts_[sample]; }

 private:
  std::vector<Scored<T>> entries_;
  std::vector<int64_t> counts_;
  int64_t k_;
};

// The samples that probe each bucket, CSR.
struct Probers {
  std::vector<int64_t> offsets;
  std::vector<int32_t> samples;
};

template <class Code>
Probers probers_of(const char* op, const Tensor& codes, int64_t buckets) {
  const int64_t probes = codes.size(0), batch = codes.size(1);
  const Code* code = data<Code>(codes);
  Probers found{std::vector<int64_t>(buckets + 1), {}};
  for (int64_t i = 0; i < probes * batch; ++i) {
    check(code[i] < buckets, op, "codes: expected values below ", buckets, ", got ", code[i]);
    if (code[i] >= 0) ++found.offsets[code[i] + 1];
  }
  for (int64_t c = 0; c < buckets; ++c) found.offsets[c + 1] += found.offsets[c];
  found.samples.resize(found.offsets[buckets]);
  std::vector<int64_t> next(found.offsets.begin(), found.offsets.end() - 1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t p = 0; p < probes; ++p)
      if (const Code c = code[p * batch + b]; c >= 0) found.samples[next[c]++] = static_cast<int32_t>(b);
  return found;
}

}  // namespace

// Returns offsets (B + 1) into ids, those of each sample's k best rows, best first (fewer where its buckets hold
// fewer), and ids_read (1). Codes of -1 are no bucket. Scores that are NaN rank last.
std::tuple<Tensor, Tensor, Tensor> best_in_buckets(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                                   Tensor codes, Tensor table_offsets, Tensor table_ids, int64_t k,
                                                   int64_t bucket_cap, int64_t seed) {
  constexpr const char* op = "best_in_buckets";
  check(weight.dim() == 2, op, "weight: expected shape (N, d), got ", shape_of(weight));
  const int64_t neurons = weight.size(0), d = weight.size(1);
  check_tensor(op, "input", input, input.scalar_type(), {-1, d});
  if (bias) check_tensor(op, "bias", *bias, input.scalar_type(), {neurons});
  const int64_t batch = input.size(0);
  check_tensor(op, "codes", codes, codes.scalar_type() == ScalarType::Int ? ScalarType::Int : ScalarType::Short,
               {-1, batch});
  check_tensor(op, "table_offsets", table_offsets, ScalarType::Int, {1, -1});
  check_tensor(op, "table_ids", table_ids, ScalarType::Int, {1, neurons});
  check(k >= 1 && bucket_cap >= 1, op, "k and bucket_cap must be positive, got ", k, " and ", bucket_cap);
  const int64_t buckets = table_offsets.size(1) - 1;
  const int32_t *start = data<int32_t>(table_offsets), *ids = data<int32_t>(table_ids);
  bool rising = buckets >= 0 && start[0] == 0 && start[buckets] == neurons;
  for (int64_t c = 0; c < buckets; ++c) rising = rising && start[c] <= start[c + 1];
  check(rising, op, "table_offsets: expected non-decreasing offsets from 0 to ", neurons);
  check_range(op, "table_ids", ids, neurons, neurons);
  const Probers probers = codes.scalar_type() == ScalarType::Int ? probers_of<int32_t>(op, codes, buckets)
                                                                 : probers_of<int16_t>(op, codes, buckets);
  int64_t read = 0;
  for (int64_t c = 0; c < buckets; ++c)
    read += (probers.offsets[c + 1] - probers.offsets[c]) * std::min<int64_t>(start[c + 1] - start[c], bucket_cap);

  Tensor offsets = empty({batch + 1}, ScalarType::Long), ids_read = empty({1}, ScalarType::Long);
  mutable_data<int64_t>(ids_read)[0] = read;
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, stored_dtype<T>(weight), {neurons, d});
    const StoredRows<T> rows(weight, d);
    const T *x = data<T>(input), *shift = data_or_null<T>(bias);
    const int64_t workers = std::clamp<int64_t>(read * d / kGrainWork, 1, torch::stable::get_num_threads());
    std::vector<BestOfSamples<T>> best(workers, BestOfSamples<T>(batch, k));
    // Whichever worker is free takes the next bucket: they differ much in size.
    std::atomic<int64_t> next{0};
    parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      std::vector<T> scores(batch), wide(d);
      for (int64_t worker = first; worker < last; ++worker)
        for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < buckets;) {
          const int32_t* samples = probers.samples.data() + probers.offsets[c];
          const int64_t count = probers.offsets[c + 1] - probers.offsets[c], length = start[c + 1] - start[c];
          if (count == 0 || length == 0) continue;
          const int64_t take = std::min(length, bucket_cap);
          // From a random place on, around the end, so that a cap favours no id for being small.
          const uint64_t random = splitmix64(static_cast<uint64_t>(seed) ^ splitmix64(static_cast<uint64_t>(c)));
          const int64_t begin = take < length ? static_cast<int64_t>(random % static_cast<uint64_t>(length)) : 0;
          const auto row_of = [&](int64_t i) {
            const int64_t place = begin + i;
            return ids[start[c] + (place < length ? place : place - length)];
          };
          constexpr int64_t ahead = 6;
          for (int64_t i = 0; i < take; ++i) {
            if (i + ahead < take)
              for (int64_t p = 0; p < rows.bytes(); p += 64) __builtin_prefetch(rows.address(row_of(i + ahead)) + p);
            const int32_t id = row_of(i);
            // the kernel that scores many rows for an input scores many inputs for a row
            real_kernels<T>().score_rows(x, nullptr, rows.row(id, wide.data()), d, samples, count, scores.data());
            for (int64_t j = 0; j < count; ++j) {
              const T score = scores[j] + (shift ? shift[id] : T(0));
              best[worker].offer(samples[j], {score == score ? score : -std::numeric_limits<T>::infinity(), id});
            }
          }
        }
    });

    std::vector<std::vector<int32_t>> found(batch);
    parallel_for(0, batch, grain(64 * k * workers), [&](int64_t first, int64_t last) {
      std::vector<Scored<T>> all;
      for (int64_t b = first; b < last; ++b) {
        all.clear();
        for (BestOfSamples<T>& own : best) all.insert(all.end(), own.begin(b), own.end(b));
        const int64_t count = std::min<int64_t>(k, static_cast<int64_t>(all.size()));
        std::partial_sort(all.begin(), all.begin() + count, all.end());
        for (int64_t i = 0; i < count; ++i) found[b].push_back(all[i].id);
      }
    });
    int64_t* offset = mutable_data<int64_t>(offsets);
    offset[0] = 0;
    for (int64_t b = 0; b < batch; ++b) offset[b + 1] = offset[b] + static_cast<int64_t>(found[b].size());
    Tensor all_ids = empty({offset[batch]}, ScalarType::Int);
    for (int64_t b = 0; b < batch; ++b)
      std::copy(found[b].begin(), found[b].end(), mutable_data<int32_t>(all_ids) + offset[b]);
    return {offsets, all_ids, ids_read};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("best_in_buckets", TORCH_BOX(&best_in_buckets));
}

}  // namespace slide_torch
