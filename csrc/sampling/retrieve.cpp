// Candidates from the hash tables: each sample's labels, the neurons that collide with it most often, the tail. The
// same at any number of threads.
#include <algorithm>

#include "../common/random.h"
#include "../common/tensors.h"
#include "collisions.h"
#include "join.h"

namespace slide_torch {
namespace {

// L tables in packed (CSR) buckets: bucket c of table t holds ids[t * neurons + offsets[t * (buckets + 1) + c]]
// up to the next offset, in increasing order.
struct TablesView {
  const int32_t* offsets;
  const int32_t* ids;
  int64_t tables;
  int64_t buckets;
  int64_t neurons;
};

struct RetrieveArgs {
  TablesView tables;
  int64_t batch;
  int64_t probes;  // codes of a table; row t * probes + p of `codes` has a probe of table t
  const void* codes;
  const int64_t* label_offsets;
  const int32_t* label_ids;
  const int32_t* tail;
  int64_t tail_count;
  int64_t budget;
  int64_t bucket_cap;
  uint64_t seed;

  int64_t reads() const { return tables.tables * probes; }

  template <class Code>
  Code code(int64_t read, int64_t sample) const {
    return static_cast<const Code*>(codes)[read * batch + sample];
  }
};

TablesView check_tables(const char* op, const Tensor& offsets, const Tensor& ids) {
  check_tensor(op, "table_offsets", offsets, ScalarType::Int, {-1, -1});
  const int64_t tables = offsets.size(0), buckets = offsets.size(1) - 1;
  check(tables <= kMaxTables, op, "expected at most ", kMaxTables, " tables, got ", tables);
  check_tensor(op, "table_ids", ids, ScalarType::Int, {tables, -1});
  const int64_t neurons = ids.size(1);
  check(neurons <= kMaxNeurons, op, "table_ids: expected fewer than 2^31 - 1 neurons, got ", neurons);
  return {.offsets = data<int32_t>(offsets),
          .ids = data<int32_t>(ids),
          .tables = tables,
          .buckets = buckets,
          .neurons = neurons};
}

// Probes of a table, from codes (tables * probes, B) of int16 or int32.
int64_t check_codes(const char* op, const Tensor& codes, int64_t tables) {
  if (codes.scalar_type() != ScalarType::Short) check_tensor(op, "codes", codes, ScalarType::Int, {-1, -1});
  check_tensor(op, "codes", codes, codes.scalar_type(), {-1, -1});
  const int64_t probes = tables > 0 ? codes.size(0) / tables : 1;
  check(codes.size(0) == tables * probes && probes >= 1 && codes.size(0) <= kMaxTables, op,
        "codes: expected a row for each probe of the ", tables, " tables, at most ", kMaxTables, " in all, got ",
        codes.size(0));
  return probes;
}

// A sample's part of the active set.
class Sample {
 public:
  Sample(const RetrieveArgs& args, int64_t sample, CollisionCounter& counter, std::vector<int32_t>& active)
      : args_(args), sample_(sample), counter_(counter), active_(active) {
    active_.clear();
  }

  // Its distinct labels; positions get each label's place in the active set.
  void add_labels(int32_t* positions) {
    for (int64_t i = args_.label_offsets[sample_]; i < args_.label_offsets[sample_ + 1]; ++i) {
      const int32_t id = args_.label_ids[i];
      if (counter_.is_excluded(id)) {  // listed twice
        positions[i] = static_cast<int32_t>(std::find(active_.begin(), active_.end(), id) - active_.begin());
        continue;
      }
      counter_.exclude(id);
      positions[i] = static_cast<int32_t>(active_.size());
      active_.push_back(id);
    }
    labels_ = active_.size();
  }

  // Candidates by collision count up to the budget. Where the buckets are is looked up for all tables first, so that
  // these cache misses overlap; then each bucket is asked for two tables ahead.
  template <class Code>
  void add_candidates() {
    const int64_t room = std::max<int64_t>(args_.budget - static_cast<int64_t>(labels_), 0);
    const int64_t reads = room > 0 ? args_.reads() : 0;
    Bucket buckets[kMaxTables];
    for (int64_t r = 0; r < reads; ++r) buckets[r] = bucket(r, args_.code<Code>(r, sample_));
    for (int64_t r = 0; r < reads; ++r) {
      const Bucket& ahead = buckets[std::min(r + 2, reads - 1)];
      for (int64_t i = 0; i < std::min<int64_t>(ahead.length, 128); i += 16)
        __builtin_prefetch(ahead.ids + ahead.start + i);
      counter_.read_bucket(buckets[r].ids, buckets[r].length, buckets[r].start, args_.bucket_cap);
    }
    counter_.take_best(room, args_.reads(), active_);
  }

  // The tail's ids that are in neither; returns where they begin.
  int64_t add_tail() {
    const int64_t start = static_cast<int64_t>(active_.size());
    if (args_.tail_count > 0) {
      for (size_t i = labels_; i < active_.size(); ++i) counter_.exclude(active_[i]);
      for (int64_t i = 0; i < args_.tail_count; ++i)
        if (!counter_.is_excluded(args_.tail[i])) active_.push_back(args_.tail[i]);
    }
    counter_.release_excluded();
    return start;
  }

 private:
  struct Bucket {
    const int32_t* ids;
    int64_t length, start;
  };

  // It is read from a random place on, around its end: where it is longer than the cap, or candidates tie at the
  // budget's edge, no id is favoured for being small.
  Bucket bucket(int64_t read, int64_t code) const {
    const TablesView& tables = args_.tables;
    if (code < 0) return {tables.ids, 0, 0};  // the input holds NaN or Inf: nothing collides with it
    const int64_t t = read / args_.probes;
    const int32_t* offsets = tables.offsets + t * (tables.buckets + 1) + code;
    const int64_t length = offsets[1] - offsets[0];
    const uint64_t random = random_for(args_.seed, sample_ * args_.reads() + read);
    const int64_t start = static_cast<int64_t>((random >> 32) * static_cast<uint64_t>(length) >> 32);
    return {tables.ids + t * tables.neurons + offsets[0], length, start};
  }

  const RetrieveArgs& args_;
  const int64_t sample_;
  CollisionCounter& counter_;
  std::vector<int32_t>& active_;
  size_t labels_ = 0;
};

// Each sample's active set, and how many ids its buckets gave.
struct Found {
  std::vector<std::vector<int32_t>> active;
  std::vector<int64_t> read;
};

template <class Code>
Found search(const char* op, const RetrieveArgs& args, int64_t* tail_starts, int32_t* label_positions) {
  Found found{std::vector<std::vector<int32_t>>(args.batch), std::vector<int64_t>(args.batch)};
  parallel_for(0, args.batch, 1, [&](int64_t first, int64_t last) {
    CollisionCounter counter(args.tables.neurons);
    std::vector<int32_t> active;
    for (int64_t b = first; b < last; ++b) {
      const int64_t before = counter.ids_read();
      for (int64_t r = 0; r < args.reads(); ++r)
        check(args.code<Code>(r, b) < args.tables.buckets, op, "codes: expected values below ", args.tables.buckets,
              ", got ", args.code<Code>(r, b), " for sample ", b);
      Sample sample(args, b, counter, active);
      sample.add_labels(label_positions);
      sample.add_candidates<Code>();
      tail_starts[b] = sample.add_tail();
      found.active[b].assign(active.begin(), active.end());
      found.read[b] = counter.ids_read() - before;
    }
  });
  return found;
}

}  // namespace

// Returns offsets (B + 1), active (pairs), tail_starts (B), label_positions (labels; from the sample's start) and
// ids_read (1).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> retrieve(Tensor codes, Tensor table_offsets, Tensor table_ids,
                                                            Tensor label_offsets, Tensor label_ids, Tensor tail,
                                                            int64_t budget, int64_t bucket_cap, int64_t seed) {
  constexpr const char* op = "retrieve";
  const TablesView tables = check_tables(op, table_offsets, table_ids);
  const int64_t probes = check_codes(op, codes, tables.tables), batch = codes.size(1);
  check_tensor(op, "label_offsets", label_offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "label_ids", label_ids, ScalarType::Int, {-1});
  check_offsets(op, "label_offsets", data<int64_t>(label_offsets), batch, label_ids.numel());
  check_range(op, "label_ids", data<int32_t>(label_ids), label_ids.numel(), tables.neurons);
  check_tensor(op, "tail", tail, ScalarType::Int, {-1});
  check_range(op, "tail", data<int32_t>(tail), tail.numel(), tables.neurons);
  check(budget >= 0, op, "budget: expected at least 0, got ", budget);
  check(bucket_cap >= 0, op, "bucket_cap: expected at least 0, got ", bucket_cap);
  const RetrieveArgs args{.tables = tables,
                          .batch = batch,
                          .probes = probes,
                          .codes = codes.const_data_ptr(),
                          .label_offsets = data<int64_t>(label_offsets),
                          .label_ids = data<int32_t>(label_ids),
                          .tail = data<int32_t>(tail),
                          .tail_count = tail.numel(),
                          .budget = budget,
                          .bucket_cap = bucket_cap,
                          .seed = static_cast<uint64_t>(seed)};
  Tensor label_positions = empty({label_ids.numel()}, ScalarType::Int);
  Tensor tail_starts = empty({batch}, ScalarType::Long), ids_read = empty({1}, ScalarType::Long);
  const bool narrow = codes.scalar_type() == ScalarType::Short;
  const Found found = (narrow ? search<int16_t> : search<int32_t>)(op, args, mutable_data<int64_t>(tail_starts),
                                                                   mutable_data<int32_t>(label_positions));
  int64_t total_read = 0;
  for (const int64_t read : found.read) total_read += read;
  *mutable_data<int64_t>(ids_read) = total_read;
  const auto [offsets, active] = join(op, found.active);
  return {offsets, active, tail_starts, label_positions, ids_read};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("retrieve", TORCH_BOX(&retrieve));
}

}  // namespace slide_torch
