// What the ops of layers check of an operand before they read it.
#pragma once

#include "common.h"

namespace fastkfo::cpu {

// The numbers of a tensor without gaps.
template <class T>
const T* data_of(const Tensor& x, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "fastkfo: wrong dtype of ", name);
  STD_TORCH_CHECK(x.numel() == numel, "fastkfo: ", name, " has ", x.numel(), " numbers, expected ",
                  numel);
  STD_TORCH_CHECK(x.is_contiguous(), "fastkfo: expected ", name, " without gaps");
  const T* data = static_cast<const T*>(x.data_ptr());
  STD_TORCH_CHECK(data || numel == 0, "fastkfo: operand ", name, " has no memory");
  return data;
}

// Null for a missing one.
template <class T>
const T* data_of(const std::optional<Tensor>& x, ScalarType dtype, int64_t numel,
                 const char* name) {
  return x.has_value() ? data_of<T>(*x, dtype, numel, name) : nullptr;
}

template <class F>
auto by_dtype(const Tensor& x, const F& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32 or float64");
  }
}

}  // namespace fastkfo::cpu
