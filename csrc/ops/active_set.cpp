// What makes an active set: retrieval from the tables, the transpose of the per-sample pattern, the union of the
// shared one. All results are the same at any number of threads.
#include <algorithm>

#include "../kernels/retrieve.h"
#include "common.h"

namespace slide_torch {
namespace {

struct RetrieveInput {
  TablesView tables;
  const int64_t* label_offsets;
  const int32_t* label_ids;
  const int32_t* tail;
  int64_t tail_count;
  int64_t probes;
  int64_t budget;
  int64_t bucket_cap;
  uint64_t seed;
};

// One sample: its distinct labels, then candidates by collision count up to the budget, then the tail's ids that
// are in neither. Returns where the tail part begins; label_positions get each label's place in `active`.
template <class Code>
int64_t retrieve_sample(const RetrieveInput& in, const Code* codes, int64_t batch, int64_t sample,
                        CollisionCounter& counter, std::vector<int32_t>& active, int32_t* label_positions) {
  active.clear();
  const int64_t first = in.label_offsets[sample], last = in.label_offsets[sample + 1];
  for (int64_t i = first; i < last; ++i) {
    const int32_t id = in.label_ids[i];
    if (counter.is_excluded(id)) {  // listed twice
      label_positions[i] = static_cast<int32_t>(std::find(active.begin(), active.end(), id) - active.begin());
      continue;
    }
    counter.exclude(id);
    label_positions[i] = static_cast<int32_t>(active.size());
    active.push_back(id);
  }
  const int64_t room = std::max<int64_t>(in.budget - static_cast<int64_t>(active.size()), 0);
  // Where the buckets are is looked up for all tables first, so that these cache misses overlap; then each bucket is
  // asked for two tables ahead. It is read from a random place on, around its end: where it is longer than the cap, or
  // candidates tie at the budget's edge, no id is favoured for being small.
  struct Bucket {
    const int32_t* ids;
    int64_t length, start;
  };
  Bucket bucket[kMaxTables];
  const int64_t all_reads = in.tables.tables * in.probes, reads = room > 0 ? all_reads : 0;
  for (int64_t r = 0; r < reads; ++r) {
    const int64_t t = r / in.probes;
    const Code code = codes[r * batch + sample];
    if (code < 0) {  // the input holds NaN or Inf: nothing collides with it
      bucket[r] = {in.tables.ids, 0, 0};
      continue;
    }
    const int32_t* offsets = in.tables.offsets + t * (in.tables.buckets + 1) + code;
    const int64_t length = offsets[1] - offsets[0];
    const uint64_t random = splitmix64(in.seed ^ splitmix64(static_cast<uint64_t>(sample * all_reads + r)));
    const int64_t start = static_cast<int64_t>((random >> 32) * static_cast<uint64_t>(length) >> 32);
    bucket[r] = {in.tables.ids + t * in.tables.neurons + offsets[0], length, start};
  }
  for (int64_t r = 0; r < reads; ++r) {
    const Bucket& ahead = bucket[std::min(r + 2, reads - 1)];
    for (int64_t i = 0; i < std::min<int64_t>(ahead.length, 128); i += 16)
      __builtin_prefetch(ahead.ids + ahead.start + i);
    counter.read_bucket(bucket[r].ids, bucket[r].length, bucket[r].start, in.bucket_cap);
  }
  const size_t labels = active.size();
  counter.take_best(room, all_reads, active);
  const int64_t tail_start = static_cast<int64_t>(active.size());
  if (in.tail_count > 0) {
    for (size_t i = labels; i < active.size(); ++i) counter.exclude(active[i]);
    for (int64_t i = 0; i < in.tail_count; ++i)
      if (!counter.is_excluded(in.tail[i])) active.push_back(in.tail[i]);
  }
  counter.release_excluded();
  return tail_start;
}

}  // namespace

// Returns offsets (B + 1), active (pairs), tail_starts (B), label_positions (labels; from the sample's start) and
// ids_read (1).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> retrieve(Tensor codes, Tensor table_offsets, Tensor table_ids,
                                                            Tensor label_offsets, Tensor label_ids, Tensor tail,
                                                            int64_t budget, int64_t bucket_cap, int64_t seed) {
  constexpr const char* op = "retrieve";
  check_tensor(op, "table_offsets", table_offsets, ScalarType::Int, {-1, -1});
  const int64_t tables = table_offsets.size(0), buckets = table_offsets.size(1) - 1;
  check(tables <= kMaxTables, op, "expected at most ", kMaxTables, " tables, got ", tables);
  check_tensor(op, "table_ids", table_ids, ScalarType::Int, {tables, -1});
  const int64_t neurons = table_ids.size(1);
  check(neurons <= kMaxNeurons, op, "table_ids: expected fewer than 2^31 - 1 neurons, got ", neurons);
  check_tensor(op, "codes", codes, codes.scalar_type(), {-1, -1});
  const int64_t probes = tables > 0 ? codes.size(0) / tables : 1, batch = codes.size(1);
  check(codes.size(0) == tables * probes && probes >= 1 && codes.size(0) <= kMaxTables, op,
        "codes: expected a row for each probe of the ", tables, " tables, at most ", kMaxTables, " in all, got ",
        codes.size(0));
  check_tensor(op, "label_offsets", label_offsets, ScalarType::Long, {batch + 1});
  check_tensor(op, "label_ids", label_ids, ScalarType::Int, {-1});
  check_offsets(op, "label_offsets", data<int64_t>(label_offsets), batch, label_ids.numel());
  check_range(op, "label_ids", data<int32_t>(label_ids), label_ids.numel(), neurons);
  check_tensor(op, "tail", tail, ScalarType::Int, {-1});
  check_range(op, "tail", data<int32_t>(tail), tail.numel(), neurons);
  check(budget >= 0, op, "budget: expected at least 0, got ", budget);
  check(bucket_cap >= 0, op, "bucket_cap: expected at least 0, got ", bucket_cap);
  const RetrieveInput in{{data<int32_t>(table_offsets), data<int32_t>(table_ids), tables, buckets, neurons},
                         data<int64_t>(label_offsets),
                         data<int32_t>(label_ids),
                         data<int32_t>(tail),
                         tail.numel(),
                         probes,
                         budget,
                         bucket_cap,
                         static_cast<uint64_t>(seed)};
  Tensor label_positions = empty({label_ids.numel()}, ScalarType::Int);
  Tensor tail_starts = empty({batch}, ScalarType::Long);
  std::vector<std::vector<int32_t>> found(batch);
  std::vector<int64_t> read(batch);
  const auto run = [&]<class Code>(Code) {
    parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      CollisionCounter counter(neurons);
      std::vector<int32_t> active;
      for (int64_t b = first; b < last; ++b) {
        const int64_t before = counter.ids_read();
        for (int64_t r = 0; r < tables * probes; ++r)
          check(data<Code>(codes)[r * batch + b] < buckets, op, "codes: expected values below ", buckets, ", got ",
                data<Code>(codes)[r * batch + b], " for sample ", b);
        mutable_data<int64_t>(tail_starts)[b] =
            retrieve_sample(in, data<Code>(codes), batch, b, counter, active, mutable_data<int32_t>(label_positions));
        found[b].assign(active.begin(), active.end());
        read[b] = counter.ids_read() - before;
      }
    });
  };
  if (codes.scalar_type() == ScalarType::Short) {
    run(int16_t{});
  } else {
    check_tensor(op, "codes", codes, ScalarType::Int, {tables * probes, batch});
    run(int32_t{});
  }
  Tensor offsets = empty({batch + 1}, ScalarType::Long);
  int64_t total = 0, total_read = 0;
  for (int64_t b = 0; b < batch; ++b) {
    mutable_data<int64_t>(offsets)[b] = total;
    total += static_cast<int64_t>(found[b].size());
    total_read += read[b];
  }
  mutable_data<int64_t>(offsets)[batch] = total;
  check(total < INT32_MAX, op, "the batch activates ", total,
        " neurons in all, more than 2^31 - 1: lower the budget, the tail or the batch");
  Tensor active = empty({total}, ScalarType::Int);
  parallel_for(0, batch, grain(total / (batch + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      std::copy(found[b].begin(), found[b].end(), mutable_data<int32_t>(active) + data<int64_t>(offsets)[b]);
  });
  Tensor ids_read = empty({1}, ScalarType::Long);
  *mutable_data<int64_t>(ids_read) = total_read;
  return {offsets, active, tail_starts, label_positions, ids_read};
}

// Transposes sample-major active sets: rows (U) increasing, pair_offsets (U + 1), pair_positions and pair_samples
// (pairs). Blocks of pairs are dealt into at most 256 ranges of neurons, and each range is sorted by counting: its
// counters and its part of the results stay in the cache.
std::tuple<Tensor, Tensor, Tensor, Tensor> transpose_active(Tensor offsets, Tensor active, int64_t neurons) {
  constexpr const char* op = "transpose_active";
  check_tensor(op, "offsets", offsets, ScalarType::Long, {-1});
  check_tensor(op, "active", active, ScalarType::Int, {-1});
  const int64_t batch = offsets.numel() - 1, pairs = active.numel();
  check(batch >= 0, op, "offsets: expected at least one, got none");
  check(pairs < INT32_MAX, op, "active: expected fewer than 2^31 - 1 ids, got ", pairs);
  check_integer(op, "neurons", neurons, 1, kMaxNeurons);
  check_offsets(op, "offsets", data<int64_t>(offsets), batch, pairs);
  check_range(op, "active", data<int32_t>(active), pairs, neurons);
  const int64_t* start = data<int64_t>(offsets);
  const int32_t* id = data<int32_t>(active);

  constexpr int64_t kBlockPairs = 8192;
  int shift = 0;
  while ((neurons - 1) >> shift > 255) ++shift;
  const int64_t ranges = ((neurons - 1) >> shift) + 1, blocks = (pairs + kBlockPairs - 1) / kBlockPairs;
  std::vector<int64_t> place(blocks * ranges, 0), range_pairs(ranges + 1, 0), range_rows(ranges + 1, 0);
  const auto for_blocks = [&](const auto& body) {
    parallel_for(0, blocks, 2, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        for (int64_t i = b * kBlockPairs; i < std::min(pairs, (b + 1) * kBlockPairs); ++i)
          body(i, place[b * ranges + (id[i] >> shift)]);
    });
  };
  for_blocks([](int64_t, int64_t& slot) { ++slot; });
  int64_t dealt = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    range_pairs[r] = dealt;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = place[b * ranges + r];
      place[b * ranges + r] = dealt;
      dealt += here;
    }
  }
  range_pairs[ranges] = pairs;
  // In each range the pairs keep their order. An id and a position go in one word, so that half as many lines and pages
  // are written to by turns. The numbers of the neurons' pairs are counted meanwhile, then become the places of their
  // next pairs.
  Tensor dealt_pairs = empty({pairs}, ScalarType::Long), counters = empty({neurons}, ScalarType::Int);
  uint64_t* dealt_to = static_cast<uint64_t*>(dealt_pairs.mutable_data_ptr());
  int32_t* next = mutable_data<int32_t>(counters);
  for_blocks([&](int64_t i, int64_t& slot) {
    dealt_to[slot++] = static_cast<uint64_t>(id[i]) << 32 | static_cast<uint64_t>(i);
  });
  const int64_t range_grain = grain((8 * pairs + neurons) / ranges);
  parallel_for(0, ranges, range_grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t low = r << shift, high = std::min(low + (int64_t{1} << shift), neurons);
      std::fill(next + low, next + high, 0);
      for (int64_t e = range_pairs[r]; e < range_pairs[r + 1]; ++e) ++next[dealt_to[e] >> 32];
      for (int64_t n = low; n < high; ++n) range_rows[r + 1] += next[n] > 0;
    }
  });
  for (int64_t r = 0; r < ranges; ++r) range_rows[r + 1] += range_rows[r];

  const int64_t count = range_rows[ranges];
  Tensor rows = empty({count}, ScalarType::Long), pair_offsets = empty({count + 1}, ScalarType::Long);
  Tensor pair_positions = empty({pairs}, ScalarType::Int), pair_samples = empty({pairs}, ScalarType::Int);
  int64_t* row = mutable_data<int64_t>(rows);
  int64_t* begins = mutable_data<int64_t>(pair_offsets);
  int32_t* positions = mutable_data<int32_t>(pair_positions);
  int32_t* samples = mutable_data<int32_t>(pair_samples);
  begins[count] = pairs;
  parallel_for(0, ranges, range_grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t low = r << shift, high = std::min(low + (int64_t{1} << shift), neurons);
      int64_t u = range_rows[r], target = range_pairs[r];
      // Every neuron is stored, and kept if it is active: no branch that is often wrong.
      for (int64_t n = low; n < high && u < range_rows[r + 1]; ++n) {
        const int32_t here = next[n];
        row[u] = n;
        begins[u] = target;
        u += here > 0;
        next[n] = static_cast<int32_t>(target);
        target += here;
      }
      int64_t sample = 0;
      for (int64_t e = range_pairs[r]; e < range_pairs[r + 1]; ++e) {
        const int32_t from = static_cast<int32_t>(dealt_to[e]);
        while (from >= start[sample + 1]) ++sample;
        const int32_t at = next[dealt_to[e] >> 32]++;
        positions[at] = from;
        samples[at] = static_cast<int32_t>(sample);
      }
    }
  });
  return {rows, pair_offsets, pair_positions, pair_samples};
}

// The shared pattern: rows (U) = the distinct ids of `certain` and `tail`, increasing; from_tail (U) says which
// of them are in `tail` alone.
std::tuple<Tensor, Tensor> union_active(Tensor certain, Tensor tail, int64_t neurons) {
  constexpr const char* op = "union_active";
  check_tensor(op, "certain", certain, ScalarType::Int, {-1});
  check_tensor(op, "tail", tail, ScalarType::Int, {-1});
  check_integer(op, "neurons", neurons, 1, kMaxNeurons);
  check_range(op, "certain", data<int32_t>(certain), certain.numel(), neurons);
  check_range(op, "tail", data<int32_t>(tail), tail.numel(), neurons);
  const int64_t words = (neurons + 63) / 64;
  std::vector<uint64_t> all(words, 0), sure(words, 0);
  const auto mark = [](std::vector<uint64_t>& bits, const Tensor& ids) {
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const int32_t id = data<int32_t>(ids)[i];
      bits[id >> 6] |= uint64_t{1} << (id & 63);
    }
  };
  mark(sure, certain);
  mark(all, tail);
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(all[w] |= sure[w]);
  Tensor rows = empty({count}, ScalarType::Long), from_tail = empty({count}, ScalarType::Bool);
  int64_t u = 0;
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t rest = all[w]; rest != 0; rest &= rest - 1, ++u) {
      const int bit = __builtin_ctzll(rest);
      mutable_data<int64_t>(rows)[u] = w * 64 + bit;
      mutable_data<bool>(from_tail)[u] = !(sure[w] >> bit & 1);
    }
  return {rows, from_tail};
}

// `count` distinct ids from [0, neurons), each subset equally likely, in increasing order; Floyd's algorithm.
Tensor sample_tail(int64_t count, int64_t neurons, int64_t seed) {
  constexpr const char* op = "sample_tail";
  check_integer(op, "neurons", neurons, 1, kMaxNeurons);
  check_integer(op, "count", count, 0, neurons);
  std::vector<uint64_t> taken((neurons + 63) / 64, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t limit = neurons - count + i;  // uniform on [0, limit] by multiplication (bias below 2^-32)
    const uint64_t random = splitmix64(splitmix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(i));
    int64_t id = static_cast<int64_t>(static_cast<unsigned __int128>(random) * (limit + 1) >> 64);
    if (taken[id >> 6] >> (id & 63) & 1) id = limit;
    taken[id >> 6] |= uint64_t{1} << (id & 63);
  }
  Tensor ids = empty({count}, ScalarType::Int);
  int64_t u = 0;
  for (size_t w = 0; w < taken.size(); ++w)
    for (uint64_t rest = taken[w]; rest != 0; rest &= rest - 1)
      mutable_data<int32_t>(ids)[u++] = static_cast<int32_t>(w * 64 + __builtin_ctzll(rest));
  return ids;
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("retrieve", TORCH_BOX(&retrieve));
  m.impl("transpose_active", TORCH_BOX(&transpose_active));
  m.impl("union_active", TORCH_BOX(&union_active));
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CompositeExplicitAutograd, m) {
  m.impl("sample_tail", TORCH_BOX(&sample_tail));
}

}  // namespace slide_torch
