// Active sets from lists of ids: the transpose of the per-sample pattern, the union of the shared one, random tails.
// All results are the same at any number of threads.
#include <algorithm>

#include "../common/dealing.h"
#include "../common/random.h"
#include "../common/tensors.h"

namespace slide_torch {
namespace {

// Sample-major pairs sorted by neuron. Pairs are dealt into at most 256 ranges of neurons, and each range is sorted by
// counting: its counters and its part of the results stay in the cache.
class Transpose {
 public:
  Transpose(const int64_t* offsets, const int32_t* active, int64_t pairs, int64_t neurons)
      : offsets_(offsets), pairs_(pairs), neurons_(neurons) {
    while ((neurons - 1) >> shift_ > 255) ++shift_;
    ranges_ = ((neurons - 1) >> shift_) + 1;
    grain_ = grain((8 * pairs + neurons) / ranges_);
    // An id and a position go in one word, so that half as many lines and pages are written to by turns.
    dealt_tensor_ = empty({pairs}, ScalarType::Long);
    dealt_ = static_cast<uint64_t*>(dealt_tensor_.mutable_data_ptr());
    range_pairs_ = deal(
        pairs, ranges_, [&](int64_t i) { return active[i] >> shift_; },
        [&](int64_t slot, int64_t i) {
          dealt_[slot] = static_cast<uint64_t>(active[i]) << 32 | static_cast<uint64_t>(i);
        });
    count();
  }

  // Neurons with a pair.
  int64_t rows() const { return range_rows_[ranges_]; }

  void write(int64_t* rows, int64_t* pair_offsets, int32_t* positions, int32_t* samples) {
    pair_offsets[this->rows()] = pairs_;
    for_ranges([&](int64_t r, int64_t low, int64_t high) {
      write_rows(r, low, high, rows, pair_offsets);
      write_pairs(r, positions, samples);
    });
  }

 private:
  // Calls body(range, its first neuron, the end).
  template <class F>
  void for_ranges(const F& body) {
    parallel_for(0, ranges_, grain_, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        body(r, r << shift_, std::min((r << shift_) + (int64_t{1} << shift_), neurons_));
    });
  }

  // Each neuron's pairs, which `next_` counts, and the neurons of each range that have any.
  void count() {
    next_tensor_ = empty({neurons_}, ScalarType::Int);
    next_ = mutable_data<int32_t>(next_tensor_);
    range_rows_.assign(ranges_ + 1, 0);
    for_ranges([&](int64_t r, int64_t low, int64_t high) {
      std::fill(next_ + low, next_ + high, 0);
      for (int64_t e = range_pairs_[r]; e < range_pairs_[r + 1]; ++e) ++next_[dealt_[e] >> 32];
      for (int64_t n = low; n < high; ++n) range_rows_[r + 1] += next_[n] > 0;
    });
    for (int64_t r = 0; r < ranges_; ++r) range_rows_[r + 1] += range_rows_[r];
  }

  // Turns the counts of a range into the places of its neurons' next pairs. Every neuron is stored, and kept if it is
  // active: no branch that is often wrong.
  void write_rows(int64_t r, int64_t low, int64_t high, int64_t* rows, int64_t* pair_offsets) {
    int64_t u = range_rows_[r], target = range_pairs_[r];
    for (int64_t n = low; n < high && u < range_rows_[r + 1]; ++n) {
      const int32_t here = next_[n];
      rows[u] = n;
      pair_offsets[u] = target;
      u += here > 0;
      next_[n] = static_cast<int32_t>(target);
      target += here;
    }
  }

  void write_pairs(int64_t r, int32_t* positions, int32_t* samples) {
    int64_t sample = 0;
    for (int64_t e = range_pairs_[r]; e < range_pairs_[r + 1]; ++e) {
      const int32_t from = static_cast<int32_t>(dealt_[e]);
      while (from >= offsets_[sample + 1]) ++sample;
      const int32_t at = next_[dealt_[e] >> 32]++;
      positions[at] = from;
      samples[at] = static_cast<int32_t>(sample);
    }
  }

  const int64_t* offsets_;
  int64_t pairs_, neurons_, ranges_, grain_;
  int shift_ = 0;
  Tensor dealt_tensor_, next_tensor_;
  uint64_t* dealt_;
  int32_t* next_;
  std::vector<int64_t> range_pairs_, range_rows_;
};

}  // namespace

// Transposes sample-major active sets: rows (U) increasing, pair_offsets (U + 1), pair_positions and pair_samples
// (pairs).
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
  Transpose transpose(data<int64_t>(offsets), data<int32_t>(active), pairs, neurons);
  Tensor rows = empty({transpose.rows()}, ScalarType::Long);
  Tensor pair_offsets = empty({transpose.rows() + 1}, ScalarType::Long);
  Tensor pair_positions = empty({pairs}, ScalarType::Int), pair_samples = empty({pairs}, ScalarType::Int);
  transpose.write(mutable_data<int64_t>(rows), mutable_data<int64_t>(pair_offsets),
                  mutable_data<int32_t>(pair_positions), mutable_data<int32_t>(pair_samples));
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
    int64_t id = static_cast<int64_t>(static_cast<unsigned __int128>(random_of(seed, i)) * (limit + 1) >> 64);
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
  m.impl("transpose_active", TORCH_BOX(&transpose_active));
  m.impl("union_active", TORCH_BOX(&union_active));
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CompositeExplicitAutograd, m) {
  m.impl("sample_tail", TORCH_BOX(&sample_tail));
}

}  // namespace slide_torch
