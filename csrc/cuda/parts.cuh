// Gradients of what units share: each leaves its own part, and one launch adds them in their order.
#pragma once

#include "cuda/launch.cuh"
#include "kron/call.h"

namespace fastkfo::kron {

using namespace fastkfo::cuda;

// run(S{}) for the operands' dtype, on their device.
template <class F>
Tensors on_device(const Tensors& like, const F& run) {
  if (like.empty()) return {};
  const DeviceGuard guard(like[0].get_device_index());
  const ScalarType dtype = like[0].scalar_type();
  if (dtype == ScalarType::Float) return run(float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, "fastkfo: expected float32 or float64");
  return run(double{});
}

inline Tensor room_for(const Tensor& like, int64_t numbers) {
  const int64_t size = std::max<int64_t>(1, numbers);
  return empty(like, &size, 1);
}

template <class S>
struct Parts {
  const S* from;  // [entries, count, size]
  S* to;          // [entries, size]
  int64_t entries, count, size;
};

constexpr int kMostParts = 64;  // of a launch

template <class S>
struct AllParts {
  Parts<S> item[kMostParts];
};

// A warp has 32 neighbouring numbers; the warps share the parts, and one adds up what they have.
template <class S>
__global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ AllParts<S> all) {
  constexpr int kWarps = kThreads / 32;
  S* sums = reinterpret_cast<S*>(shared_memory);
  const Parts<S>& item = all.item[blockIdx.y];
  const int64_t numbers = item.entries * item.size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t first = blockIdx.x * int64_t(32); first < numbers;
       first += gridDim.x * int64_t(32)) {
    const int64_t i = first + lane, entry = i / item.size;
    const S* from = item.from + entry * (item.count - 1) * item.size + i;
    S sum = 0;
    if (i < numbers)
      for (int64_t k = warp; k < item.count; k += kWarps) sum += from[k * item.size];
    sums[threadIdx.x] = sum;
    wait_for_all();
    if (warp == 0 && i < numbers) {
      for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
      item.to[i] = sum;
    }
    wait_for_all();
  }
}

template <class S>
class Sums {
 public:
  // Room for the parts of a gradient that looks like a tensor of `entries` times `size` numbers;
  // where there is one part of it, that is the gradient.
  S* add(const Tensor& like, int64_t entries, int64_t count, int64_t size) {
    out_.push_back(empty_shaped_like(like));
    S* to = static_cast<S*>(out_.back().data_ptr());
    if (count == 1) return to;
    rooms_.push_back(room_for(like, entries * count * size));
    S* from = static_cast<S*>(rooms_.back().data_ptr());
    parts_.push_back({from, to, entries, count, size});
    return from;
  }
  const Tensor& last() const { return out_.back(); }

  void finish(const Tensor& like) const {
    for (size_t first = 0; first < parts_.size(); first += kMostParts) {
      AllParts<S> all{};
      int64_t count = 0, most = 0;
      for (size_t i = first; i < std::min(parts_.size(), first + kMostParts); ++i) {
        all.item[count++] = parts_[i];
        most = std::max(most, parts_[i].entries * parts_[i].size);
      }
      if (most == 0) continue;
      const int64_t blocks = std::min<int64_t>((most + 31) / 32, 1024);
      launch<true>(add_parts<S>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)),
                   kThreads * sizeof(S), current_stream(like.get_device_index()), all);
    }
  }

 private:
  Tensors out_, rooms_;
  std::vector<Parts<S>> parts_;
};

}  // namespace fastkfo::kron
