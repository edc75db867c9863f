// Huge pages for large tensors, and what memory can do.
#include <atomic>

#include "common/tensors.h"
#include "kernels/dispatch.h"

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

// Reads `rows` of t (N, d) and nothing more, or inverts every bit of them: what memory can do for operators that read,
// or read and write, the same rows (benchmarks/). Returns the exclusive or of all numbers' bits, (1).
Tensor touch_rows_(Tensor t, Tensor rows, bool write) {
  constexpr const char* op = "touch_rows_";
  return dispatch_real(op, t.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "t", t, scalar_type_of<T>(), {-1, -1});
    check_tensor(op, "rows", rows, ScalarType::Long, {-1});
    const int64_t count = rows.numel(), width = t.size(1);
    check_rows(op, data<int64_t>(rows), count, t.size(0));
    std::atomic<int64_t> seen{0};
    parallel_for(0, count, grain(width), [&](int64_t first, int64_t last) {
      seen ^= real_kernels<T>().touch_rows(mutable_data<T>(t), data<int64_t>(rows), width, write, first, last);
    });
    Tensor result = empty({1}, ScalarType::Long);
    *mutable_data<int64_t>(result) = seen.load();
    return result;
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("touch_rows_", TORCH_BOX(&touch_rows_));
  m.impl("advise_hugepages_", TORCH_BOX(&advise_hugepages_));
}

}  // namespace slide_torch
