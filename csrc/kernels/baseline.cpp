// Kernels for any machine: 16-byte vectors (SSE2 on x86-64, NEON on aarch64).
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dispatch.h"

#define SLIDE_VECTOR_BYTES 16
#define SLIDE_TILE_ROWS 4

namespace slide_torch {
namespace {
#include "all-inl.h"
}  // namespace

extern const KernelTable baseline_kernels = table_named("baseline");

}  // namespace slide_torch
