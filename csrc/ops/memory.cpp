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

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("advise_hugepages_", TORCH_BOX(&advise_hugepages_));
}

}  // namespace slide_torch
