// Tensors as the kernels see them: a typed pointer with one stride per canonical axis.
#pragma once

#include <array>
#include <string>

#include "common.h"

namespace fastkfo {

template <size_t RANK>
using Strides = std::array<int64_t, RANK>;

// Strides of `tensor` seen as `shape`, whose first axis is the task axis. Accepted are: that very
// shape with any strides, 1 for any axis that is shared; a trailing part of it (shared over the
// rest); or any shape that has as many elements, or as many as one task, which is copied if it has
// gaps.
template <size_t RANK>
Strides<RANK> strides_as(Tensor& tensor, const Strides<RANK>& shape, const char* name,
                         int64_t item) {
  Strides<RANK> strides{};
  const auto sizes = tensor.sizes();
  const auto given = tensor.strides();
  const size_t rank = sizes.size();
  bool fits = rank <= RANK;
  for (size_t k = 0; fits && k < rank; ++k) {
    const size_t axis = RANK - rank + k;
    fits = sizes[k] == shape[axis] || sizes[k] == 1;
    strides[axis] = sizes[k] == 1 ? 0 : given[k];
  }
  if (fits) return strides;

  int64_t one_task = 1;
  for (size_t k = RANK; k-- > 1;) {
    strides[k] = one_task;
    one_task *= shape[k];
  }
  const int64_t numel = tensor.numel();
  STD_TORCH_CHECK(numel == one_task || numel == one_task * shape[0], "fastkfo: operand ", name,
                  " of item ", item, " has ", numel, " elements, expected ", one_task * shape[0],
                  " or ", one_task);
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  strides[0] = numel == one_task * shape[0] ? one_task : 0;
  return strides;
}

// An operand of one item, or nothing.
template <class T, size_t RANK>
struct Operand {
  const T* data = nullptr;
  Strides<RANK> stride{};
  explicit operator bool() const { return data != nullptr; }
};

// `tensor` may be exchanged for a copy without gaps; it must outlive the operand.
template <class T, size_t RANK>
Operand<T, RANK> operand(Tensor& tensor, const Strides<RANK>& shape, const char* name,
                         int64_t item) {
  static const T nothing{};  // so that an empty tensor is still a present operand
  const auto strides = strides_as(tensor, shape, name, item);
  const T* data = static_cast<const T*>(tensor.data_ptr());
  STD_TORCH_CHECK(data || tensor.numel() == 0, "fastkfo: operand ", name, " of item ", item,
                  " has no memory");
  return {data ? data : &nothing, strides};
}

template <class T, size_t RANK>
Operand<T, RANK> operand(MaybeTensors& tensors, int64_t item, const Strides<RANK>& shape,
                         const char* name) {
  if (tensors.empty() || !tensors[item].has_value()) return {};
  return operand<T>(*tensors[item], shape, name, item);
}

}  // namespace fastkfo
