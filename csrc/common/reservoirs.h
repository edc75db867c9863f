// The best k of each of some samples, from several workers' reservoirs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "../kernels/dispatch.h"

namespace slide_torch {

// The order of candidates. NaN is larger than any number, as in torch.topk; equal values go by the smaller id. A total
// order: the best k are the same in whatever order, and on however many threads, candidates are met.
template <class T>
bool operator<(const Entry<T>& a, const Entry<T>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.id < b.id;
}

// A worker's best k of `count` samples; nothing before `clear`, which a worker without work never calls. A sample's
// candidates are sorted out once there are about twice as many: a few operations each, where a heap takes log k.
template <class T>
class Reservoirs {
 public:
  bool empty() const { return held_.empty(); }
  void forget() { held_.clear(); }
  void clear(int64_t count, int64_t k) { clear(count, k, k + (k <= kManyWanted ? std::max(k, kLeastRoom) : k / 4)); }
  void clear(int64_t count, int64_t k, int64_t room) {
    k_ = k;
    room_ = room;
    if (count * room_ > size_) {
      size_ = count * room_;
      entries_ = std::make_unique_for_overwrite<Entry<T>[]>(size_);
    }
    limits_.assign(count, -std::numeric_limits<T>::infinity());
    held_.assign(count, 0);
  }
  Best<T> best() {
    return {.entries = entries_.get(),
            .limits = limits_.data(),
            .held = held_.data(),
            .room = room_,
            .k = k_,
            .keep_best = keep_best};
  }

  int64_t held(int64_t b) const { return held_[b]; }

  // What sample b has is forgotten; what is below `limit` is not kept.
  void restart(int64_t b, T limit = -std::numeric_limits<T>::infinity()) {
    limits_[b] = limit;
    held_[b] = 0;
  }

  // The k-th best of sample b, or -inf where it has fewer.
  T limit(int64_t b) {
    if (held_[b] >= k_) keep_best(best(), b);
    return limits_[b];
  }

  // Appends what sample b has, fewer than there is room for.
  void append_to(std::vector<Entry<T>>& entries, int64_t b) const {
    if (empty()) return;
    const Entry<T>* own = entries_.get() + b * room_;
    entries.insert(entries.end(), own, own + held_[b]);
  }

 private:
  static constexpr int64_t kLeastRoom = 32, kManyWanted = 4096;

  static void keep_best(const Best<T>& best, int64_t sample) {
    Entry<T>* own = best.entries + sample * best.room;
    std::nth_element(own, own + best.k - 1, own + best.held[sample]);
    best.limits[sample] = own[best.k - 1].value;
    best.held[sample] = best.k;
  }

  std::unique_ptr<Entry<T>[]> entries_;
  std::vector<T> limits_;
  std::vector<int64_t> held_;
  int64_t size_ = 0, room_ = 0, k_ = 0;
};

// All workers' entries of sample b.
template <class T>
void gather(const std::vector<Reservoirs<T>>& workers, int64_t b, std::vector<Entry<T>>& entries) {
  entries.clear();
  for (const Reservoirs<T>& reservoirs : workers) reservoirs.append_to(entries, b);
}

// Writes the first k entries in order; where there are fewer, -inf and -1.
template <class T>
void write_best(std::vector<Entry<T>>& entries, int64_t k, T* values, int64_t* ids) {
  const int64_t given = std::min<int64_t>(k, entries.size());
  if (given > 0 && given < static_cast<int64_t>(entries.size()))
    std::nth_element(entries.begin(), entries.begin() + given - 1, entries.end());
  std::sort(entries.begin(), entries.begin() + given);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = i < given ? entries[i].value : -std::numeric_limits<T>::infinity();
    ids[i] = i < given ? entries[i].id : -1;
  }
}

}  // namespace slide_torch
