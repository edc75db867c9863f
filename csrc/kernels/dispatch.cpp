#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace slide_torch {
namespace {

// Kernels that a processor can use, and those of them that multiply bytes where it has better ones.
struct Level {
  const char* name;
  bool supported;
  const KernelTable* kernels;
  const QuadKernels* quads;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx_vnni() {  // not every compiler's __builtin_cpu_supports knows the name
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

KernelTable choose() {
  const Level levels[] = {
#if defined(__x86_64__)
      {"avx512_vnni", has_avx512() && __builtin_cpu_supports("avx512vnni"), &avx512_kernels, &avx512_vnni_quads},
      {"avx512", has_avx512(), &avx512_kernels, nullptr},
      {"avx2_vnni", has_avx_vnni(), &avx2_kernels, &avx2_vnni_quads},
      {"avx2", has_avx2(), &avx2_kernels, nullptr},
#endif
      {"baseline", true, &baseline_kernels, nullptr},
  };
  const char* wanted = std::getenv("SLIDE_TORCH_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string usable;
  for (const Level& level : levels) {
    if (!level.supported) continue;
    if (any || std::strcmp(wanted, level.name) == 0) {
      KernelTable chosen = *level.kernels;
      chosen.name = level.name;
      if (level.quads) chosen.quads = *level.quads;
      return chosen;
    }
    usable += std::string(usable.empty() ? "" : ", ") + level.name;
  }
  throw std::runtime_error("SLIDE_TORCH_ISA: expected one of " + usable + " on this machine, got '" + wanted +
                           "'. Unset it to use the best.");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable chosen = choose();
  return chosen;
}

}  // namespace slide_torch
