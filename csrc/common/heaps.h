// The best k of each of some samples, from several workers' heaps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../kernels/dispatch.h"
#include "parallel.h"

namespace slide_torch {

// In heaps that are not full.
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

template <class T>
struct Entry {
  T value;
  int64_t id;

  // The order of kernels/heap-inl.h, which may share no template with this file.
  bool operator<(const Entry& other) const {
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return nan;
    if (!nan && value != other.value) return value > other.value;
    return id < other.id;
  }
};

// A worker's best k of `count` samples; nothing before `clear`, which a worker without work never calls.
template <class T>
class Heaps {
 public:
  bool empty() const { return ids_.empty(); }
  void forget() { ids_.clear(); }
  void clear(int64_t count, int64_t k) {
    k_ = k;
    values_.assign(count * k, -std::numeric_limits<T>::infinity());
    ids_.assign(count * k, kNoRow);
  }
  Best<T> best() { return {values_.data(), ids_.data(), k_}; }

  // Appends what sample b has.
  void append_to(std::vector<Entry<T>>& entries, int64_t b) const {
    for (int64_t i = b * k_; i < (b + 1) * k_ && !empty(); ++i)
      if (ids_[i] != kNoRow) entries.push_back({values_[i], ids_[i]});
  }

 private:
  std::vector<T> values_;
  std::vector<int64_t> ids_;
  int64_t k_ = 0;
};

// All workers' entries of sample b.
template <class T>
void gather(const std::vector<Heaps<T>>& workers, int64_t b, std::vector<Entry<T>>& entries) {
  entries.clear();
  for (const Heaps<T>& heaps : workers) heaps.append_to(entries, b);
}

// Writes the first k entries in order; where there are fewer, -inf and -1.
template <class T>
void write_best(std::vector<Entry<T>>& entries, int64_t k, T* values, int64_t* ids) {
  const int64_t given = std::min<int64_t>(k, entries.size());
  std::partial_sort(entries.begin(), entries.begin() + given, entries.end());
  for (int64_t i = 0; i < k; ++i) {
    values[i] = i < given ? entries[i].value : -std::numeric_limits<T>::infinity();
    ids[i] = i < given ? entries[i].id : -1;
  }
}

// The best k of `count` samples, to values and ids (count, k).
template <class T>
void merge(const std::vector<Heaps<T>>& workers, int64_t count, int64_t k, T* values, int64_t* ids) {
  parallel_for(0, count, grain(64 * k), [&](int64_t first, int64_t last) {
    std::vector<Entry<T>> entries;
    for (int64_t b = first; b < last; ++b) {
      gather(workers, b, entries);
      write_best(entries, k, values + b * k, ids + b * k);
    }
  });
}

}  // namespace slide_torch
