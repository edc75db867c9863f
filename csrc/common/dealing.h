// Dealing items into ranges, in parallel and in order: the first step of sorting many of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace slide_torch {

// Calls put(slot, i) for items [0, count): those of range_of(i) = 0 get the first slots, and so on; within a range they
// keep their order. Returns where each of the `ranges` begins, and the end. Blocks of items are counted, then written:
// a block's counters fit the first-level cache.
template <class RangeOf, class Put>
std::vector<int64_t> deal(int64_t count, int64_t ranges, const RangeOf& range_of, const Put& put) {
  constexpr int64_t kBlock = 8192;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<int64_t> place(blocks * ranges, 0), starts(ranges + 1, 0);
  const auto for_items = [&](const auto& body) {
    parallel_for(0, blocks, 2, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int64_t* own = place.data() + b * ranges;
        const int64_t end = std::min(count, (b + 1) * kBlock);
        for (int64_t i = b * kBlock; i < end; ++i) body(i, own[range_of(i)]);
      }
    });
  };
  for_items([](int64_t, int64_t& slot) { ++slot; });
  int64_t dealt = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    starts[r] = dealt;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = place[b * ranges + r];
      place[b * ranges + r] = dealt;
      dealt += here;
    }
  }
  starts[ranges] = dealt;
  for_items([&](int64_t i, int64_t& slot) { put(slot++, i); });
  return starts;
}

}  // namespace slide_torch
