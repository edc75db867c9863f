// Kernels that multiply bytes, for x86-64 with AVX-512 (F, BW, DQ, VL, VNNI). The target is set after the includes, so
// that nothing from a shared header is compiled for it.
#include "dispatch.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define SLIDE_VECTOR_BYTES 64
#define SLIDE_DPBUSD _mm512_dpbusd_epi32

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,bmi2")
#endif

namespace slide_torch {
namespace {
#include "quads-only-inl.h"
}  // namespace

extern const QuadKernels avx512_vnni_quads = quad_kernels();

}  // namespace slide_torch

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
