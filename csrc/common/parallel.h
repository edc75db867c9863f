// Loops on torch's threads. Results must not depend on how many there are: work is cut by the data.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace slide_torch {

// At least this many scalar operations for a thread to be worth waking.
constexpr int64_t kGrainWork = 32768;

inline int64_t grain(int64_t work_per_item) {
  return work_per_item >= kGrainWork ? 1 : kGrainWork / (work_per_item > 0 ? work_per_item : 1) + 1;
}

// Calls body(first, last) for ranges of [begin, end), at least `grain` long, on torch's threads. What a range throws is
// thrown to the caller once all have ended, that of the first range if several do: the same at any number of threads
// where a range stops at its first fault. (torch would replace the message by the name of a macro.)
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  std::mutex mutex;
  std::exception_ptr failure;
  int64_t failed_at = 0;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (failure && failed_at < first) return;
      failure = std::current_exception();
      failed_at = first;
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Splits [0, count) into ranges that are multiples of `multiple`.
template <class F>
void parallel_tiles(int64_t count, int64_t multiple, int64_t work_per_item, const F& body) {
  parallel_for(0, (count + multiple - 1) / multiple, grain(work_per_item * multiple), [&](int64_t first, int64_t last) {
    body(first * multiple, last * multiple < count ? last * multiple : count);
  });
}

// Whether right(first, last) holds for all parts of [0, count): the checks of a batch's indices read megabytes.
template <class F>
bool all_parts(int64_t count, const F& right) {
  std::atomic<bool> all{true};
  parallel_for(0, count, kGrainWork, [&](int64_t first, int64_t last) {
    if (!right(first, last)) all.store(false, std::memory_order_relaxed);
  });
  return all;
}

inline int64_t workers_for(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), items));
}

// Calls body(worker, item) for all items, each by whichever worker is free.
template <class F>
void share_out(int64_t items, int64_t workers, const F& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(worker, item);
  });
}

}  // namespace slide_torch
