// Tensors through torch's stable ABI, their memory as typed pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dtypes.h"

namespace slide_torch {

// Asks for huge pages under 4 MiB of memory or more (memory.cpp).
void advise_hugepages(const void* memory, int64_t bytes);

// Large results are new memory at every call: with huge pages a few hundred page faults instead of tens of thousands.
inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  try {
    Tensor t = torch::stable::empty(sizes, dtype);
    advise_hugepages(t.const_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
    return t;
  } catch (const std::exception&) {  // its message names a macro, not the reason
    throw std::runtime_error("slide_torch: not enough memory for a tensor of shape " + text_of(sizes) + " and dtype " +
                             torch::headeronly::toString(dtype));
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

}  // namespace slide_torch
