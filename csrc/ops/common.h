// What every operator file needs: stable-ABI tensors, checks at the boundary, the parallel loop.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/dispatch.h"

namespace slide_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type_of();
template <>
constexpr ScalarType scalar_type_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type_of<uint16_t>() {  // its bits
  return ScalarType::BFloat16;
}
template <>
constexpr ScalarType scalar_type_of<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type_of<int32_t>() {
  return ScalarType::Int;
}
template <>
constexpr ScalarType scalar_type_of<int16_t>() {
  return ScalarType::Short;
}
template <>
constexpr ScalarType scalar_type_of<int8_t>() {
  return ScalarType::Char;
}
template <>
constexpr ScalarType scalar_type_of<bool>() {
  return ScalarType::Bool;
}

// As MAX_CODE_BITS and MAX_TABLES in slide_torch/options.py.
constexpr int kMaxCodeBits = 24;
constexpr int64_t kMaxTables = 254;
// Ids of neurons are int32, and so are places among as many.
constexpr int64_t kMaxNeurons = INT32_MAX - 1;
// A tensor without elements takes no memory, so nothing but this bounds its other sizes: products of two of them, and
// buffers for one row, stay small.
constexpr int64_t kMaxEmptySize = int64_t{1} << 24;

// Throws "operator: message" when the condition fails. User errors are caught in Python with more to say; these
// checks are for direct calls of an operator. (The contents of what build_tables made are trusted.)
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

// At least this many scalar operations for a thread to be worth waking.
constexpr int64_t kGrainWork = 32768;

inline int64_t grain(int64_t work_per_item) {
  return work_per_item >= kGrainWork ? 1 : kGrainWork / (work_per_item > 0 ? work_per_item : 1) + 1;
}

// Calls body(first, last) for ranges of [begin, end), at least `grain` long, on torch's threads. What a range throws is
// thrown to the caller once all have ended, that of the first range if several do: the same at any number of threads
// where a range stops at its first fault. (torch would replace the message by the name of a macro.)
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  std::mutex mutex;
  std::exception_ptr failure;
  int64_t failed_at = 0;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (failure && failed_at < first) return;
      failure = std::current_exception();
      failed_at = first;
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// Whether right(first, last) holds for all parts of [0, count): the checks of a batch's indices read megabytes.
template <class F>
bool all_parts(int64_t count, const F& right) {
  std::atomic<bool> all{true};
  parallel_for(0, count, kGrainWork, [&](int64_t first, int64_t last) {
    if (!right(first, last)) all.store(false, std::memory_order_relaxed);
  });
  return all;
}

// Checks that offsets (count + 1) start at 0, never fall and end at `total`.
inline void check_offsets(const char* op, const char* name, const int64_t* offsets, int64_t count, int64_t total) {
  const bool rising = all_parts(count, [&](int64_t first, int64_t last) {
    bool right = true;  // without a branch in the loop, so that it vectorises
    for (int64_t i = first; i < last; ++i) right &= offsets[i] <= offsets[i + 1];
    return right;
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

// Calls f.template operator()<float>() or <double>().
template <class F>
auto dispatch_real(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double) return f(double{});
  check(dtype == ScalarType::Float, op, "expected dtype Float or Double, got ", torch::headeronly::toString(dtype));
  return f(float{});
}

// Likewise; what is stored in bfloat16 is computed in float.
template <class F>
auto dispatch_stored(const char* op, ScalarType dtype, F&& f) {
  return dispatch_real(op, dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype, f);
}

// Adam's numbers at one step, from its options.
template <class T>
AdamScalars<T> adam_scalars(const char* op, double lr, double beta1, double beta2, double eps, double weight_decay,
                            int64_t step, bool maximize) {
  check(step >= 1, op, "step: expected at least 1, got ", step);
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  return {static_cast<T>(maximize ? -1 : 1),
          static_cast<T>(1 - lr * weight_decay),
          static_cast<T>(1 - beta1),
          static_cast<T>(1 - beta2),
          static_cast<T>(lr * std::sqrt(correction2) / correction1),
          static_cast<T>(eps)};
}

// What a tensor of a computation in T is to be: bfloat16 where it is that and T is float, else T.
template <class T>
ScalarType stored_dtype(const Tensor& t) {
  const bool narrow = sizeof(T) == sizeof(float) && t.scalar_type() == ScalarType::BFloat16;
  return narrow ? ScalarType::BFloat16 : scalar_type_of<T>();
}

template <class T>
void set_state(RowUpdate<T>& update, size_t index, const Tensor& state) {
  if (state.scalar_type() == scalar_type_of<T>())
    update.state[index] = mutable_data<T>(state);
  else
    update.bfloat16_state[index] = mutable_data<uint16_t>(state);
}

}  // namespace slide_torch
