// Row-sparse gradients: the sum of duplicate rows, and dense tensors of them.
#include <algorithm>
#include <cstring>

#include "../common/dealing.h"
#include "../common/tensors.h"
#include "../kernels/dispatch.h"

namespace slide_torch {
namespace {

constexpr int kDigitBits = 11;             // a digit's 2048 counters fit the first-level cache
constexpr int64_t kSerialEntries = 16384;  // below, sorting on one thread is quicker than waking the others

// Sorts entries by the low `bits` of their row, keeping the order of equals: least significant digit first.
void sort_entries(RowEntry* entries, RowEntry* scratch, int64_t count, int bits) {
  RowEntry* source = entries;
  RowEntry* target = scratch;
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * bits / passes, digit_bits = (pass + 1) * bits / passes - shift;
    const uint32_t mask = (uint32_t{1} << digit_bits) - 1;
    uint32_t slot[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) ++slot[source[i].row >> shift & mask];
    uint32_t total = 0;
    for (uint32_t digit = 0; digit <= mask; ++digit) {
      const uint32_t here = slot[digit];
      slot[digit] = total;
      total += here;
    }
    for (int64_t i = 0; i < count; ++i) target[slot[source[i].row >> shift & mask]++] = source[i];
    std::swap(source, target);
  }
  if (source != entries) std::copy(source, source + count, entries);
}

int bit_width(int64_t limit) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < limit) ++bits;
  return bits;
}

// The entries in order of (row, position). Many of them are first dealt, by blocks, into up to 256 ranges of rows,
// which threads then sort apart; the sorted order is unique, so the way there does not show.
std::vector<RowEntry> sorted_entries(const int64_t* indices, int64_t count, int64_t num_rows) {
  std::vector<RowEntry> sorted(count), scratch(count);
  const int bits = bit_width(num_rows);
  if (count < kSerialEntries || bits <= 8) {
    for (int64_t i = 0; i < count; ++i) sorted[i] = {static_cast<uint32_t>(indices[i]), static_cast<uint32_t>(i)};
    sort_entries(sorted.data(), scratch.data(), count, bits);
    return sorted;
  }
  const int shift = bits - 8;
  constexpr int64_t ranges = 256;
  const std::vector<int64_t> range_start = deal(
      count, ranges, [&](int64_t i) { return indices[i] >> shift; },
      [&](int64_t slot, int64_t i) { sorted[slot] = {static_cast<uint32_t>(indices[i]), static_cast<uint32_t>(i)}; });
  parallel_for(0, ranges, grain(8 * (count / ranges)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      sort_entries(sorted.data() + range_start[r], scratch.data() + range_start[r], range_start[r + 1] - range_start[r],
                   shift);
  });
  return sorted;
}

// Where each distinct row's entries begin, and the end.
std::vector<int64_t> starts_of(const std::vector<RowEntry>& sorted) {
  const int64_t count = static_cast<int64_t>(sorted.size());
  int64_t distinct = count > 0;
  for (int64_t i = 1; i < count; ++i) distinct += sorted[i].row != sorted[i - 1].row;
  std::vector<int64_t> starts(distinct + 1);
  int64_t u = 0;
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || sorted[i].row != sorted[i - 1].row) starts[u++] = i;
  starts[u] = count;
  return starts;
}

}  // namespace

// Row-sparse entries indices (n), values (n, ...) -> distinct rows, increasing, and their summed values; each sum
// is taken in the order of the entries.
std::tuple<Tensor, Tensor> coalesce_rows(Tensor indices, Tensor values, int64_t num_rows) {
  constexpr const char* op = "coalesce_rows";
  check_tensor(op, "indices", indices, ScalarType::Long, {-1});
  const int64_t count = indices.numel();
  check(values.dim() >= 1, op, "values: expected shape (n, ...), got ()");
  std::vector<int64_t> shape(values.dim(), -1);
  shape[0] = count;
  check_integer(op, "num_rows", num_rows, 0, INT32_MAX);
  check(count <= INT32_MAX, op, "indices: expected at most 2^31 - 1 entries, got ", count);
  check_range(op, "indices", data<int64_t>(indices), count, num_rows);
  return dispatch_real(op, values.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "values", values, scalar_type_of<T>(), shape);
    const int64_t width = count > 0 ? values.numel() / count : 0;
    const auto entries = sorted_entries(data<int64_t>(indices), count, num_rows);
    const auto starts = starts_of(entries);
    const int64_t distinct = static_cast<int64_t>(starts.size()) - 1;
    for (int64_t i = 1; i < values.dim(); ++i) shape[i] = values.size(i);
    shape[0] = distinct;
    Tensor rows = empty({distinct}, ScalarType::Long), summed = empty(shape, scalar_type_of<T>());
    int64_t* row = mutable_data<int64_t>(rows);
    T* target = mutable_data<T>(summed);
    const RowSum<T> sum{data<T>(values), entries.data(), starts.data(), width};
    // Cut by entries, not by rows: a few rows may hold most of them.
    parallel_for(0, count, grain(width), [&](int64_t first_entry, int64_t last_entry) {
      const int64_t first = std::lower_bound(starts.begin(), starts.end() - 1, first_entry) - starts.begin();
      const int64_t last = std::lower_bound(starts.begin(), starts.end() - 1, last_entry) - starts.begin();
      for (int64_t u = first; u < last; ++u) row[u] = entries[starts[u]].row;
      real_kernels<T>().sum_rows(sum, target, first, last);
    });
    return {rows, summed};
  });
}

// Zeros but for `rows` (U), strictly increasing, which have the values (U, ...).
Tensor rows_to_dense(Tensor rows, Tensor values, int64_t neurons) {
  constexpr const char* op = "rows_to_dense";
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  const int64_t count = rows.numel();
  check(neurons >= 0, op, "neurons: expected at least 0, got ", neurons);
  check_rows(op, data<int64_t>(rows), count, neurons);
  check(values.dim() >= 1 && values.size(0) == count && values.is_contiguous() && values.is_cpu(), op,
        "values: expected a contiguous CPU tensor with ", count, " rows, got shape ", shape_of(values));
  std::vector<int64_t> sizes = sizes_of(values);
  sizes[0] = neurons;
  const auto copy = [&](auto zero) {
    using T = decltype(zero);
    Tensor dense = empty(sizes, values.scalar_type());
    const int64_t width = neurons > 0 ? dense.numel() / neurons : 0;
    T* target = mutable_data<T>(dense);
    const T* source = data<T>(values);
    const int64_t* row = data<int64_t>(rows);
    if (width == 0) return dense;
    parallel_for(0, neurons, grain(width), [&](int64_t first, int64_t last) {
      int64_t u = std::lower_bound(row, row + count, first) - row;
      for (int64_t next = first; next < last; ++u) {
        const int64_t stop = u < count && row[u] < last ? row[u] : last;
        std::memset(target + next * width, 0, (stop - next) * width * sizeof(T));
        if (stop < last) std::memcpy(target + stop * width, source + u * width, width * sizeof(T));
        next = stop + 1;
      }
    });
    return dense;
  };
  if (values.scalar_type() == ScalarType::BFloat16) return copy(uint16_t{});
  return dispatch_real(op, values.scalar_type(), copy);
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("coalesce_rows", TORCH_BOX(&coalesce_rows));
  m.impl("rows_to_dense", TORCH_BOX(&rows_to_dense));
}

}  // namespace slide_torch
