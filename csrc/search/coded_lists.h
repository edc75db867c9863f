// Rows of lists as codes of seven bits: where they stand.
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "lists.h"

namespace slide_torch {

inline void check_places_fit(const char* op, const Lists& lists) {
  check(lists.blocks[lists.count] < INT32_MAX / kBlockRows, op, "list_rows: expected fewer than 2^31 places");
}

// places[row] = where the row stands among the rows of all blocks, or -1. A part of the rows is one thread's: places
// lie in no order, and two writers of one cache line wait for each other.
inline void write_places(const Lists& lists, int64_t rows, int32_t* places) {
  parallel_for(0, rows, kGrainWork, [&](int64_t first, int64_t last) {
    std::fill(places + first, places + last, -1);
    for (int64_t l = 0; l < lists.count; ++l)
      for (int64_t i = lists.offsets[l]; i < lists.offsets[l + 1]; ++i) {
        const int32_t row = lists.rows[i];
        if (first <= row && row < last)
          places[row] = static_cast<int32_t>(lists.blocks[l] * kBlockRows + i - lists.offsets[l]);
      }
  });
}

}  // namespace slide_torch
