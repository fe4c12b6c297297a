// Launches of kernels, checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common.h"
#include "cuda/block.cuh"

namespace fastkfo::cuda {

#if defined(__CUDACC__)
using DeviceGuard = torch::stable::accelerator::DeviceGuard;
#endif

inline cudaStream_t current_stream(int32_t index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                  "fastkfo: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline int64_t attribute(cudaDeviceAttr which, int32_t index) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

// Blocks enough for the elements of the largest item; one row of them per item.
inline dim3 grid_of(int64_t most_elements, int64_t items) {
  const int64_t blocks = std::clamp<int64_t>((most_elements + kThreads - 1) / kThreads, 1, 1024);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(items));
}

// shared: bytes of a block's shared memory; more than 48 KiB are asked for. EVERY_THREAD: whether
// the kernel counts on kThreads (the emulation of the others has fewer).
template <bool EVERY_THREAD = false, class Argument, class... More>
void launch(void (*kernel)(Argument, More...), dim3 grid, int64_t shared, cudaStream_t stream,
            const Argument& argument, const More&... more) {
  if (shared > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
#if defined(__CUDACC__)
  kernel<<<grid, kThreads, shared, stream>>>(argument, more...);
#else  // tests/cuda_on_cpu: the same kernels, a block's threads one after the other
  run_on_cpu(grid, EVERY_THREAD ? kThreads : kThreads / 4, shared,
             [&] { kernel(argument, more...); });
#endif
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastkfo::cuda
