// The kernels that multiply bytes, and the table of them: included once per instruction set that has only better
// products of bytes than another.

#include "simd-inl.h"
//
#include "offer-inl.h"
#include "quads-inl.h"
//
#include "coded-inl.h"
#include "groups-inl.h"

constexpr QuadKernels quad_kernels() {
  return {.offer_coded = offer_coded, .score_coded = score_coded, .nearest_in_groups = nearest_in_groups};
}
