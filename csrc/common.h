// Shared by every native op: short names for the stable ABI's types, and the one
// shape convention, [T, B, n, m] = tasks, batch, rows, columns.
#pragma once

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

}  // namespace fastkfo
