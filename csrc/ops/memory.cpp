#include <atomic>

#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace slide_torch {
namespace {

[[maybe_unused]] constexpr int64_t kMinAdvisedBytes = int64_t{4} << 20;

}  // namespace

// Scattered rows otherwise miss the TLB, and new memory costs a page fault every 4 KiB. Worth most before the memory
// is first touched. It is advice: what fails, or does not exist on this system, is ignored.
void advise_hugepages(const void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kMinAdvisedBytes) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

void advise_hugepages_(Tensor t) {
  constexpr const char* op = "advise_hugepages_";
  check(t.is_cpu(), op, "t must be a CPU tensor");
  check(t.is_contiguous(), op, "t must be contiguous");
  advise_hugepages(t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
}

// Reads `rows` of t and nothing more, or inverts every bit of them: what memory can do for operators that read, or read
// and write, the same rows (benchmarks/). Returns the exclusive or of all words read, (1), so that they are read
// indeed.
Tensor touch_rows_(Tensor t, Tensor rows, bool write) {
  constexpr const char* op = "touch_rows_";
  check(t.is_cpu() && t.is_contiguous() && t.dim() == 2, op, "t: expected a contiguous CPU tensor with two dimensions");
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  check_rows(op, data<int64_t>(rows), rows.numel(), t.size(0));
  const int64_t bytes = t.size(1) * static_cast<int64_t>(t.element_size()), words = bytes / 8;
  check(bytes % 8 == 0, op, "t: expected rows of a multiple of 8 bytes, got ", bytes);
  constexpr int64_t kAhead = 8, kLine = 8;  // rows asked for ahead; words of a cache line
  const int64_t* row = data<int64_t>(rows);
  uint64_t* const memory = static_cast<uint64_t*>(write ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()));
  std::atomic<uint64_t> all{0};
  parallel_for(0, rows.numel(), grain(words), [&](int64_t first, int64_t last) {
    uint64_t seen = 0;
    for (int64_t u = first; u < last; ++u) {
      const uint64_t* ahead = memory + row[u + kAhead < last ? u + kAhead : u] * words;
      for (int64_t i = 0; i < words; i += kLine) __builtin_prefetch(ahead + i);
      uint64_t* word = memory + row[u] * words;
      for (int64_t i = 0; i < words; ++i) seen ^= word[i];
      for (int64_t i = 0; write && i < words; ++i) word[i] = ~word[i];
    }
    all ^= seen;
  });
  Tensor result = empty({1}, ScalarType::Long);
  *mutable_data<int64_t>(result) = static_cast<int64_t>(all.load());
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("touch_rows_", TORCH_BOX(&touch_rows_));
  m.impl("advise_hugepages_", TORCH_BOX(&advise_hugepages_));
}

}  // namespace slide_torch
