// Sums of products of bytes, as every vector width makes them, and by an emulation of the instruction that some
// processors have for them: see tests/programs/test_byte_products.py. All must equal sums in plain integers.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../../csrc/kernels/dispatch.h"

namespace slide_torch {
namespace {

// As _mm512_dpbusd_epi32 and its like: unsigned bytes times signed ones, four products to a lane, wrapping around.
template <class V>
V emulated_dpbusd(V sum, V codes, V inputs) {
  uint32_t lane[sizeof(V) / 4];
  uint8_t code[sizeof(V)];
  int8_t input[sizeof(V)];
  std::memcpy(lane, &sum, sizeof(V));
  std::memcpy(code, &codes, sizeof(V));
  std::memcpy(input, &inputs, sizeof(V));
  for (size_t i = 0; i < sizeof(V); ++i) lane[i / 4] += static_cast<uint32_t>(code[i] * input[i]);
  std::memcpy(&sum, lane, sizeof(V));
  return sum;
}

namespace plain {
#define SLIDE_VECTOR_BYTES 16
#include "../../csrc/kernels/simd-inl.h"
//
#include "../../csrc/kernels/quads-inl.h"
#undef SLIDE_VECTOR_BYTES
}  // namespace plain

#define SLIDE_DPBUSD emulated_dpbusd

namespace by_32 {
#define SLIDE_VECTOR_BYTES 32
#include "../../csrc/kernels/simd-inl.h"
//
#include "../../csrc/kernels/quads-inl.h"
#undef SLIDE_VECTOR_BYTES
}  // namespace by_32

namespace by_64 {
#define SLIDE_VECTOR_BYTES 64
#include "../../csrc/kernels/simd-inl.h"
//
#include "../../csrc/kernels/quads-inl.h"
#undef SLIDE_VECTOR_BYTES
}  // namespace by_64

template <class Ints, class Bytes, class F>
void check(const char* what, const F& add_quads) {
  constexpr int64_t lanes = sizeof(Ints) / 4;
  std::mt19937 random(0);
  for (int round = 0; round < 10000; ++round) {
    uint8_t code[2][4 * lanes];
    int8_t input[2][4 * lanes];
    int32_t sum[lanes], expected[lanes], found[lanes];
    const bool extreme = round % 3 == 0;  // every value at a limit
    const auto draw = [&](int32_t limit) {
      const int32_t value = static_cast<int32_t>(random() % (2 * limit + 1)) - limit;
      return !extreme ? value : value < 0 ? -limit : limit;
    };
    for (int64_t q = 0; q < 2; ++q)
      for (int64_t i = 0; i < 4 * lanes; ++i) {
        code[q][i] = static_cast<uint8_t>(draw(kCenterLimit) + kCenterOffset);
        input[q][i] = static_cast<int8_t>(round % 6 == 0 ? kCenterLimit : draw(kCenterLimit));
      }
    for (int64_t i = 0; i < lanes; ++i) {
      expected[i] = sum[i] = static_cast<int32_t>(random() % 2000001) - 1000000;
      for (int64_t q = 0; q < 2; ++q)
        for (int64_t p = 4 * i; p < 4 * i + 4; ++p) expected[i] += code[q][p] * input[q][p];
    }
    Bytes a, b;
    Ints start, x, y;
    std::memcpy(&a, code[0], sizeof(a));
    std::memcpy(&b, code[1], sizeof(b));
    std::memcpy(&x, input[0], sizeof(x));
    std::memcpy(&y, input[1], sizeof(y));
    std::memcpy(&start, sum, sizeof(start));
    const Ints result = add_quads(start, a, x, b, y);
    std::memcpy(found, &result, sizeof(result));
    if (std::memcmp(found, expected, sizeof(found)) == 0) continue;
    std::fprintf(stderr, "%s: round %d: other sums than in plain integers\n", what, round);
    std::exit(1);
  }
}

}  // namespace
}  // namespace slide_torch

int main() {
  using namespace slide_torch;
  check<plain::CodedInts, plain::CenterBytes>("plain", plain::add_quads);
  check<by_32::CodedInts, by_32::CenterBytes>("by 32", by_32::add_quads);
  check<by_64::CodedInts, by_64::CenterBytes>("by 64", by_64::add_quads);
  std::printf("ok\n");
}
