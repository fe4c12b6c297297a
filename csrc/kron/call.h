// A call of the Kronecker ops: its items, checked. csrc/library.cpp has the schemas.
#pragma once

#include <algorithm>
#include <type_traits>

#include "operand.h"

namespace fastkfo::kron {

enum Wanted : int64_t {
  kGrad = 1,
  kLeft = 2,
  kRight = 4,
  kBias = 8,
  kScale = 16,
  kCotangent = 32,
};

// float16 and bfloat16 are computed in float32.
template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Operands {
  Operand<T, 4> grad, scale;
  Operand<T, 3> left, right, bias;
};

template <class T>
struct Item {
  int64_t tasks, batch, n, m;
  int64_t chunk;  // batch entries per unit
  double alpha;
  bool scale_is_full;  // one number per element, rather than one per task
  Operands<T> x, d;    // d: tangents of x, in the double backward only
  Operand<T, 4> cotangent, param;
  int64_t wanted = 0;
  int64_t chunks() const { return batch == 0 ? 1 : (batch + chunk - 1) / chunk; }
};

struct Arguments {
  Tensors* cotangents = nullptr;
  Tensors& grads;
  MaybeTensors &left, &right, &bias, &scale;
  MaybeTensors *params = nullptr, *d_grads = nullptr, *d_left = nullptr, *d_right = nullptr,
               *d_bias = nullptr, *d_scale = nullptr;
  const Ints& dims;
  const Floats& alpha;
  const Ints* wanted = nullptr;
};

inline bool one_number_per_task(const Tensor& scale) {
  const auto sizes = scale.sizes();
  return scale.numel() == 1 ||
         (sizes.size() == 4 && sizes[1] == 1 && sizes[2] == 1 && sizes[3] == 1);
}

// Whether sizes that a caller made up can be multiplied: none negative, no overflow.
inline bool sizes_are_sound(std::initializer_list<int64_t> sizes) {
  int64_t room = int64_t(1) << 62;
  for (const int64_t size : sizes) {
    if (size < 0 || size > room) return false;
    room /= std::max<int64_t>(1, size);
  }
  return true;
}

inline void check_alike(const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.scalar_type() == first.scalar_type() && x.is_cpu() == first.is_cpu() &&
                      x.get_device_index() == first.get_device_index(),
                  "fastkfo: operands must share one dtype and one device");
}

// What a unit writes must be there: every operand whose gradient is wanted, in its full size.
template <class T>
void check_wanted(const Item<T>& it, const Tensor& cotangent, int64_t i) {
  const auto& x = it.x;
  STD_TORCH_CHECK(!(it.wanted & kLeft && !x.left) && !(it.wanted & kRight && !x.right) &&
                      !(it.wanted & kBias && !x.bias) && !(it.wanted & kScale && !x.scale),
                  "fastkfo: item ", i, " wants the gradient of an absent operand");
  STD_TORCH_CHECK(cotangent.numel() == it.tasks * it.batch * it.n * it.m, "fastkfo: cotangents[", i,
                  "] has ", cotangent.numel(), " elements, expected ",
                  it.tasks * it.batch * it.n * it.m);
}

template <class T>
Item<T> make_item(const Arguments& a, int64_t i) {
  const int64_t t = a.dims[4 * i], b = a.dims[4 * i + 1], n = a.dims[4 * i + 2],
                m = a.dims[4 * i + 3];
  STD_TORCH_CHECK(
      sizes_are_sound({t, b, n, m}) && sizes_are_sound({t, n, n}) && sizes_are_sound({t, m, m}),
      "fastkfo: item ", i, " has impossible dims ", t, " ", b, " ", n, " ", m);
  // A chunk is about two million operations; it depends on the shape alone.
  const int64_t per_entry = std::max<int64_t>(1, 2 * n * m * (n + m));
  Item<T> it{t, b, n, m, std::max<int64_t>(1, 2'000'000 / per_entry), a.alpha[i]};
  const Strides<4> elements{t, b, n, m}, one{t, 1, 1, 1};
  const Strides<3> left{t, n, n}, right{t, m, m}, bias{t, n, m};
  STD_TORCH_CHECK(a.grads[i].numel() == t * b * n * m, "fastkfo: grads[", i, "] has ",
                  a.grads[i].numel(), " elements, expected ", t * b * n * m);
  it.x.grad = operand<T>(a.grads[i], elements, "grads", i);
  it.x.left = operand<T>(a.left, i, left, "left");
  it.x.right = operand<T>(a.right, i, right, "right");
  it.x.bias = operand<T>(a.bias, i, bias, "bias");
  it.scale_is_full = !a.scale.empty() && a.scale[i] && !one_number_per_task(*a.scale[i]);
  const auto& scale = it.scale_is_full ? elements : one;
  it.x.scale = operand<T>(a.scale, i, scale, "scale");
  if (a.params) it.param = operand<T>(*a.params, i, elements, "params");
  if (a.cotangents) it.cotangent = operand<T>((*a.cotangents)[i], elements, "cotangents", i);
  if (a.d_grads) {
    it.d.grad = operand<T>(*a.d_grads, i, elements, "d_grads");
    it.d.left = operand<T>(*a.d_left, i, left, "d_left");
    it.d.right = operand<T>(*a.d_right, i, right, "d_right");
    it.d.bias = operand<T>(*a.d_bias, i, bias, "d_bias");
    it.d.scale = operand<T>(*a.d_scale, i, scale, "d_scale");
  }
  if (a.wanted) {
    it.wanted = (*a.wanted)[i];
    check_wanted(it, (*a.cotangents)[i], i);
  }
  return it;
}

template <class T>
std::vector<Item<T>> make_items(const Arguments& a) {
  const int64_t count = static_cast<int64_t>(a.grads.size());
  STD_TORCH_CHECK(static_cast<int64_t>(a.dims.size()) == 4 * count &&
                      static_cast<int64_t>(a.alpha.size()) == count &&
                      (!a.wanted || static_cast<int64_t>(a.wanted->size()) == count),
                  "fastkfo: expected four dims, one alpha and one wanted for each of ", count,
                  " items");
  const auto check = [&](const Tensor& x) { check_alike(x, a.grads[0]); };
  for (const Tensors* list : {a.cotangents, &a.grads})
    if (list) {
      STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == count, "fastkfo: list lengths differ");
      for (const auto& x : *list) check(x);
    }
  for (const MaybeTensors* list : {&a.left, &a.right, &a.bias, &a.scale, a.params, a.d_grads,
                                   a.d_left, a.d_right, a.d_bias, a.d_scale})
    if (list && !list->empty()) {
      STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == count, "fastkfo: list lengths differ");
      for (const auto& x : *list)
        if (x) check(*x);
    }
  std::vector<Item<T>> items;
  items.reserve(count);
  for (int64_t i = 0; i < count; ++i) items.push_back(make_item<T>(a, i));
  return items;
}

template <class F>
Tensors by_dtype(const Tensors& like, const F& run) {
  if (like.empty()) return {};
  switch (like[0].scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    case ScalarType::BFloat16:
      return run(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return run(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastkfo::kron
