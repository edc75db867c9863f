// Which neurons collide with a sample in many tables: integers only, compiled once for all machines.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace slide_torch {

// Collision counts of one thread. `count` is zero everywhere between samples, so that a sample costs what it
// reads and not N.
class CollisionCounter {
 public:
  explicit CollisionCounter(int64_t neurons)
      : count_(static_cast<uint8_t*>(std::calloc(neurons + 1, 1)), std::free),
        found_(static_cast<int32_t*>(std::malloc((neurons + 1) * sizeof(int32_t))), std::free),
        repeated_(static_cast<int32_t*>(std::malloc((neurons + 1) * sizeof(int32_t))), std::free) {
    if (!count_ || !found_ || !repeated_) throw std::bad_alloc();
  }

  // Marks a neuron as taken already: it is not a candidate.
  void exclude(int32_t id) {
    if (count_[id] == kExcluded) return;
    count_[id] = kExcluded;
    excluded_.push_back(id);
  }

  bool is_excluded(int32_t id) const { return count_[id] == kExcluded; }

  // Counts the ids of one bucket. One longer than `cap` is read from `start` on, around its end.
  void read_bucket(const int32_t* ids, int64_t length, int64_t start, int64_t cap) {
    const int64_t take = std::min(length, cap);
    const int64_t head = std::min(take, length - start);
    read_ids(ids + start, head);
    read_ids(ids, take - head);
    ids_read_ += take;
  }

  // Appends the `budget` most frequent candidates to `out` (ties: first found first) and forgets all of them.
  void take_best(int64_t budget, int64_t tables, std::vector<int32_t>& out) {
    // Where enough candidates collided twice, the many that did so once need not be looked at.
    const bool twice = repeated_count_ >= budget;
    const int32_t* pool = twice ? repeated_.get() : found_.get();
    const int64_t pool_count = twice ? repeated_count_ : found_count_;
    int64_t threshold = 1, ties = pool_count;
    if (pool_count > budget) {
      for (threshold = tables; threshold > 1 && reached_[threshold] <= budget;) --threshold;
      ties = budget - reached_[threshold + 1];
    }
    const size_t before = out.size();
    out.resize(before + std::min(pool_count, budget) + 1);
    int32_t* next = out.data() + before;
    for (int64_t i = 0; i < pool_count; ++i) {  // every id is stored, and kept if it is one of the best: no branch
      const int32_t id = pool[i];
      const uint8_t c = count_[id];
      if (!twice) count_[id] = 0;
      const bool tied = c == threshold;
      *next = id;
      next += (c > threshold) | (tied & (ties > 0));
      ties -= tied;
    }
    out.resize(next - out.data());
    for (int64_t i = 0; twice && i < found_count_; ++i) count_[found_[i]] = 0;
    found_count_ = repeated_count_ = 0;
    std::fill(reached_, reached_ + kExcluded + 2, 0);
  }

  void release_excluded() {
    for (int32_t id : excluded_) count_[id] = 0;
    excluded_.clear();
  }

  int64_t ids_read() const { return ids_read_; }

 private:
  static constexpr int kExcluded = 255;  // L is at most 254

  void read_ids(const int32_t* ids, int64_t length) {
    // in registers: a store to `count` might change any member, for all the compiler knows
    uint8_t* count = count_.get();
    int32_t* found = found_.get() + found_count_;
    int32_t* repeated = repeated_.get() + repeated_count_;
    for (int64_t i = 0; i < length; ++i) {
      const int32_t id = ids[i];
      const uint8_t c = count[id];
      *found = id;  // kept only if it is new: a store is cheaper than a branch that is often wrong
      found += c == 0;
      *repeated = id;
      repeated += c == 1;
      ++reached_[c + 1];
      count[id] = c + (c != kExcluded);
    }
    found_count_ = found - found_.get();
    repeated_count_ = repeated - repeated_.get();
  }

  // calloc and malloc, not vectors: pages that no sample touches are never written.
  std::unique_ptr<uint8_t[], decltype(&std::free)> count_;
  std::unique_ptr<int32_t[], decltype(&std::free)> found_;     // distinct candidates
  std::unique_ptr<int32_t[], decltype(&std::free)> repeated_;  // those that collided at least twice
  std::vector<int32_t> excluded_;
  int64_t reached_[kExcluded + 2] = {};  // how many candidates collided at least so often
  int64_t found_count_ = 0;
  int64_t repeated_count_ = 0;
  int64_t ids_read_ = 0;
};

}  // namespace slide_torch
