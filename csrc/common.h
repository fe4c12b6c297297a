// Shared by every native op: short names for the stable ABI's types, and the one
// shape convention, [T, B, n, m] = tasks, batch, rows, columns.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastkfo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<std::optional<Tensor>>;  // [] stands for "absent for every item"
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

// An uninitialised tensor with the device of `like`, and with its dtype unless another one is
// named.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t rank,
                    std::optional<ScalarType> other = std::nullopt) {
  std::vector<int64_t> strides(rank);
  int64_t step = 1;
  for (int64_t k = rank; k-- > 0;) {
    strides[k] = step;
    step *= sizes[k];
  }
  int32_t dtype = 0, device = 0, index = 0;
  aoti_torch_get_dtype(like.get(), &dtype);
  if (other == ScalarType::Bool) dtype = aoti_torch_dtype_bool();
  if (other == ScalarType::Int) dtype = aoti_torch_dtype_int32();
  if (other == ScalarType::Float) dtype = aoti_torch_dtype_float32();
  if (other == ScalarType::Double) dtype = aoti_torch_dtype_float64();
  aoti_torch_get_device_type(like.get(), &device);
  aoti_torch_get_device_index(like.get(), &index);
  AtenTensorHandle handle = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides.data(), dtype, device, index, &handle) == 0,
      "fastkfo: could not allocate an output");
  return Tensor(handle);
}

inline Tensor empty_shaped_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()));
}

}  // namespace fastkfo
