// Kernels for x86-64 with AVX2 and FMA. The target is set after the includes, so that nothing from a shared
// header is compiled for it.
#include "dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define SLIDE_VECTOR_BYTES 32
#define SLIDE_TILE_ROWS 6

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif

namespace slide_torch {
namespace {
#include "all-inl.h"
}  // namespace

extern const KernelTable avx2_kernels = table_named("avx2");

}  // namespace slide_torch

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
