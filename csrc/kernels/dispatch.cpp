#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace slide_torch {
namespace {

bool supported(const KernelTable& table) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (&table == &avx2_kernels) return avx2;
  if (&table == &avx512_kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && avx2;
#endif
  return &table == &baseline_kernels;
}

const KernelTable& choose() {
  const KernelTable* const levels[] = {
#if defined(__x86_64__)
      &avx512_kernels,
      &avx2_kernels,
#endif
      &baseline_kernels,
  };
  const char* wanted = std::getenv("SLIDE_TORCH_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string usable;
  for (const KernelTable* level : levels) {
    if (!supported(*level)) continue;
    if (any || std::strcmp(wanted, level->name) == 0) return *level;
    usable += std::string(usable.empty() ? "" : ", ") + level->name;
  }
  throw std::runtime_error("SLIDE_TORCH_ISA: expected one of " + usable + " on this machine, got '" + wanted +
                           "'. Unset it to use the best.");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace slide_torch
