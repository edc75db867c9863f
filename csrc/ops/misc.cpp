#include "common.h"

namespace slide_torch {

// The instruction-set level in use: baseline, avx2 or avx512.
std::string instruction_set() {
  return kernels().name;
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace slide_torch
