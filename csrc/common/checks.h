// Checks at the boundary of operators. User errors are caught in Python with more to say; these are for direct calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace slide_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As MAX_CODE_BITS and MAX_TABLES in slide_torch/options.py.
constexpr int kMaxCodeBits = 24;
constexpr int64_t kMaxTables = 254;
// Ids of neurons are int32, and so are places among as many.
constexpr int64_t kMaxNeurons = INT32_MAX - 1;
// A tensor without elements takes no memory, so nothing but this bounds its other sizes: products of two of them, and
// buffers for one row, stay small.
constexpr int64_t kMaxEmptySize = int64_t{1} << 24;

// Throws "operator: message" when the condition fails. (The contents of what build_tables made are trusted.)
template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  message << "slide_torch::" << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// Checks an integer argument before anything is multiplied by it.
inline void check_integer(const char* op, const char* name, int64_t value, int64_t least, int64_t most) {
  check(least <= value && value <= most, op, name, ": expected ", least, " to ", most, ", got ", value);
}

inline std::string text_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

inline std::string shape_of(const Tensor& t) {
  return text_of(sizes_of(t));
}

// Checks dtype, contiguity, device, that there is memory and, where `sizes` says so (-1: anything), the shape.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         const std::vector<int64_t>& sizes) {
  check(t.is_cpu(), op, name, " must be a CPU tensor");
  check(t.scalar_type() == dtype, op, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  bool right = t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; right && i < t.dim(); ++i) right = sizes[i] < 0 || t.size(i) == sizes[i];
  if (!right) {
    std::ostringstream wanted;
    for (size_t i = 0; i < sizes.size(); ++i) {
      wanted << (i ? ", " : "");
      sizes[i] < 0 ? wanted << "*" : wanted << sizes[i];
    }
    check(false, op, name, ": expected shape (", wanted.str(), "), got ", shape_of(t));
  }
  check(t.is_contiguous(), op, name, " must be contiguous");
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  check(bytes > 0 || t.numel() == 0, op, name, ": its memory has been freed (a parameter that is sharded now?)");
  for (int64_t i = 0; t.numel() == 0 && i < t.dim(); ++i)
    check(t.size(i) <= kMaxEmptySize, op, name, ": expected sizes up to ", kMaxEmptySize,
          " of a tensor without elements, got ", shape_of(t));
}

// Checks that offsets (count + 1) start at 0, never fall and end at `total`.
inline void check_offsets(const char* op, const char* name, const int64_t* offsets, int64_t count, int64_t total) {
  const bool rising = all_parts(count, [&](int64_t first, int64_t last) {
    uint64_t signs = 0;  // no comparison of int64 in the loop, so that it vectorises well at any level
    for (int64_t i = first; i < last; ++i) {
      const uint64_t from = static_cast<uint64_t>(offsets[i]), to = static_cast<uint64_t>(offsets[i + 1]);
      signs |= from | to | (to - from);
    }
    return signs >> 63 == 0;
  });
  check(rising && offsets[0] == 0 && offsets[count] == total, op, name, ": expected non-decreasing offsets from 0 to ",
        total);
}

template <class Int>
void check_range(const char* op, const char* name, const Int* values, int64_t count, int64_t limit) {
  const bool inside = all_parts(count, [&](int64_t first, int64_t last) {
    bool right = true;
    for (int64_t i = first; i < last; ++i) right &= (values[i] >= 0) & (values[i] < limit);
    return right;
  });
  for (int64_t i = 0; !inside && i < count; ++i)
    check(values[i] >= 0 && values[i] < limit, op, name, ": expected values in [0, ", limit, "), got ", values[i],
          " at position ", i);
}

// Rows must be strictly increasing: one thread owns one gradient row.
inline void check_rows(const char* op, const int64_t* rows, int64_t count, int64_t limit) {
  check_range(op, "rows", rows, count, limit);
  const bool increasing = all_parts(count > 0 ? count - 1 : 0, [&](int64_t first, int64_t last) {
    bool right = true;
    for (int64_t i = first; i < last; ++i) right &= rows[i] < rows[i + 1];
    return right;
  });
  check(increasing, op, "rows must be strictly increasing");
}

}  // namespace slide_torch
