// From torch's dtypes to C++ types and back.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"

namespace slide_torch {

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

// Calls f(float{}) or f(double{}).
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

// What a tensor of a computation in T is to be: bfloat16 where it is that and T is float, else T.
template <class T>
ScalarType stored_dtype(const Tensor& t) {
  const bool narrow = sizeof(T) == sizeof(float) && t.scalar_type() == ScalarType::BFloat16;
  return narrow ? ScalarType::BFloat16 : scalar_type_of<T>();
}

}  // namespace slide_torch
