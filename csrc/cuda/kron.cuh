// The Kronecker update of every parameter of a learner for all tasks: one launch, and for gradients
// one more that adds the units' parts. csrc/library.cpp has the schemas.
#pragma once

#include <optional>

#include "cuda/kron_unit.cuh"
#include "cuda/parts.cuh"

namespace fastkfo::kron {

template <class S, size_t RANK>
View<S> view(const Operand<S, RANK>& x) {
  const auto& s = x.stride;
  if constexpr (RANK == 4)
    return {x.data, s[0], s[1], s[2], s[3]};
  else
    return {x.data, s[0], 0, s[1], s[2]};
}

// A unit has about 64 columns [n, b m], so that there are many units; or more, so that its parts of
// the factors' gradients are no larger than its elements. At most 2^20 numbers.
template <class S>
int64_t chunk_of(const Item<S>& it) {
  const int64_t n = std::max<int64_t>(1, it.n), m = std::max<int64_t>(1, it.m);
  const int64_t chunk = std::max({int64_t(1), 64 / m, n / m, m / n});
  return std::max<int64_t>(1, std::min(chunk, (int64_t(1) << 20) / (n * m)));
}

template <class S>
Work<S> work_of(Item<S>& it, int64_t i) {
  it.chunk = chunk_of(it);
  // What Divisor and 32-bit counters need.
  const int64_t size = it.n * it.m * it.chunk, most = (int64_t(1) << 32) - 1;
  STD_TORCH_CHECK(std::max(it.n, it.m) <= 1 << 15 && size < int64_t(1) << 30 &&
                      it.m * size <= most && it.n * it.n * it.chunk <= most &&
                      it.chunks() < int64_t(1) << 31,
                  "fastkfo: item ", i, " is too large for its kernels: ", it.n, " x ", it.m);
  STD_TORCH_CHECK(!(it.d.left && !it.x.left) && !(it.d.right && !it.x.right), "fastkfo: item ", i,
                  " has a tangent of an absent factor");
  Work<S> w{};
  w.tasks = it.tasks, w.batch = it.batch;
  w.n = static_cast<int32_t>(it.n), w.m = static_cast<int32_t>(it.m);
  w.chunk = static_cast<int32_t>(it.chunk), w.chunks = static_cast<int32_t>(it.chunks());
  w.alpha = static_cast<S>(it.alpha);
  w.scale_is_full = it.scale_is_full;
  w.wanted = static_cast<int32_t>(it.wanted);
  const auto set = [&](Which which, const auto& x) { w.view[which] = view(x); };
  set(kG, it.x.grad), set(kA, it.x.left), set(kC, it.x.right);
  set(kBeta, it.x.bias), set(kS, it.x.scale);
  set(kDotG, it.d.grad), set(kDotA, it.d.left), set(kDotC, it.d.right);
  set(kDotBeta, it.d.bias), set(kDotS, it.d.scale);
  set(kV, it.cotangent), set(kTheta, it.param);
  return w;
}

template <class S, Multiply HOW, Pass PASS>
void launch_works(Works<S>& works, const Tensor& like, cudaStream_t stream) {
  if (works.units == 0) return;
  const int32_t device = like.get_device_index();
  const int64_t blocks = std::min<int64_t>(
      works.units, kBlocks<S> * attribute(cudaDevAttrMultiProcessorCount, device));
  const int64_t numbers = kArrays<PASS> * works.size;
  int64_t bytes = Products<S, HOW>::kBytes;
  std::optional<Tensor> arrays;
  if (bytes + numbers * static_cast<int64_t>(sizeof(S)) <=
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    bytes += numbers * sizeof(S);
  } else {
    arrays = room_for(like, blocks * numbers);
    works.arrays = static_cast<S*>(arrays->data_ptr());
  }
  launch<true>(kron_units<S, HOW, PASS>, dim3(static_cast<unsigned>(blocks)), bytes, stream, works);
}

// All items, as many at a time as a launch holds.
template <class S, Pass PASS>
void run(const std::vector<Work<S>>& all, const Tensor& like, bool tf32) {
  const cudaStream_t stream = current_stream(like.get_device_index());
  for (size_t first = 0; first < all.size(); first += kMostItems) {
    Works<S> works{};
    for (size_t i = first; i < std::min(all.size(), first + kMostItems); ++i) {
      Work<S>& w = works.item[works.count++] = all[i];
      w.first = works.units;
      works.units += w.tasks * w.chunks;
      works.size = std::max<int64_t>(works.size, int64_t(w.chunk) * w.n * w.m);
    }
    if constexpr (std::is_same_v<S, float>)
      if (tf32) {
        launch_works<S, Multiply::kTensorCores, PASS>(works, like, stream);
        continue;
      }
    launch_works<S, Multiply::kExactly, PASS>(works, like, stream);
  }
}

template <class S>
Tensors kron_forward(const Arguments& a, bool tf32) {
  auto items = make_items<S>(a);
  std::vector<Work<S>> works;
  Tensors out;
  for (size_t i = 0; i < items.size(); ++i) {
    works.push_back(work_of(items[i], i));
    out.push_back(empty_shaped_like(a.grads[i]));
    works.back().out = static_cast<S*>(out.back().data_ptr());
  }
  run<S, Pass::kForward>(works, a.grads[0], tf32);
  return out;
}

// The parts of the gradient of one operand, which has `size` numbers per task.
template <class S>
S* parts_of(const Item<S>& it, int64_t bit, const MaybeTensors& operands, int64_t i, int64_t size,
            int64_t chunks, Sums<S>& sums) {
  if (!(it.wanted & bit)) return nullptr;
  const Tensor& like = *operands[i];
  const int64_t numel = like.numel();
  STD_TORCH_CHECK(numel == size || numel == it.tasks * size,
                  "fastkfo: an operand whose gradient is wanted has ", numel,
                  " elements, expected ", size, " or ", it.tasks * size);
  const bool shared = numel != it.tasks * size;  // over tasks
  return sums.add(like, shared ? 1 : it.tasks, shared ? it.tasks * chunks : chunks, size);
}

template <class S, Pass PASS>
Tensors kron_gradients(const Arguments& a, bool tf32) {
  auto items = make_items<S>(a);
  std::vector<Work<S>> works;
  Sums<S> sums;
  Tensors out;
  for (size_t k = 0; k < items.size(); ++k) {
    Item<S>& it = items[k];
    const int64_t i = static_cast<int64_t>(k);
    Work<S> w = work_of(it, i);
    const auto parts = [&](int64_t bit, const MaybeTensors& x, int64_t size, int64_t chunks) {
      auto* to = parts_of(it, bit, x, i, size, chunks, sums);
      if (it.wanted & bit) out.push_back(sums.last());
      return to;
    };
    if (it.wanted & kGrad) {
      out.push_back(empty_shaped_like(a.grads[i]));
      w.out = static_cast<S*>(out.back().data_ptr());
    }
    w.to_left = parts(kLeft, a.left, it.n * it.n, w.chunks);
    w.to_right = parts(kRight, a.right, it.m * it.m, w.chunks);
    w.to_bias = parts(kBias, a.bias, it.n * it.m, w.chunks);
    const bool full = it.scale_is_full;
    w.to_scale = parts(kScale, a.scale, full ? it.batch * it.n * it.m : 1, full ? 1 : w.chunks);
    if (it.wanted & kCotangent) {
      out.push_back(empty_shaped_like((*a.cotangents)[i]));
      w.to_cotangent = static_cast<S*>(out.back().data_ptr());
    }
    works.push_back(w);
  }
  run<S, PASS>(works, a.grads[0], tf32);
  sums.finish(a.grads[0]);
  return out;
}

struct Kron {
  static Tensors forward(Tensors grads, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                         MaybeTensors scale, MaybeTensors params, Ints dims, Floats alpha,
                         bool tf32) {
    const Arguments a{nullptr, grads,   left,    right,   bias, scale, &params, nullptr,
                      nullptr, nullptr, nullptr, nullptr, dims, alpha, nullptr};
    return on_device(grads, [&](auto t) { return kron_forward<decltype(t)>(a, tf32); });
  }
  static Tensors backward(Tensors cotangents, Tensors grads, MaybeTensors left, MaybeTensors right,
                          MaybeTensors bias, MaybeTensors scale, Ints dims, Floats alpha,
                          Ints wanted, bool tf32) {
    const Arguments a{&cotangents, grads,   left,    right,   bias, scale, nullptr, nullptr,
                      nullptr,     nullptr, nullptr, nullptr, dims, alpha, &wanted};
    return on_device(grads,
                     [&](auto t) { return kron_gradients<decltype(t), Pass::kBackward>(a, tf32); });
  }
  static Tensors double_backward(Tensors cotangents, Tensors grads, MaybeTensors left,
                                 MaybeTensors right, MaybeTensors bias, MaybeTensors scale,
                                 MaybeTensors d_grads, MaybeTensors d_left, MaybeTensors d_right,
                                 MaybeTensors d_bias, MaybeTensors d_scale, Ints dims, Floats alpha,
                                 Ints wanted, bool tf32) {
    const Arguments a{&cotangents, grads,    left,    right,    bias, scale, nullptr, &d_grads,
                      &d_left,     &d_right, &d_bias, &d_scale, dims, alpha, &wanted};
    return on_device(
        grads, [&](auto t) { return kron_gradients<decltype(t), Pass::kDoubleBackward>(a, tf32); });
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("kron_forward", TORCH_BOX(&forward));
    m.impl("kron_backward", TORCH_BOX(&backward));
    m.impl("kron_double_backward", TORCH_BOX(&double_backward));
  }
};

}  // namespace fastkfo::kron
