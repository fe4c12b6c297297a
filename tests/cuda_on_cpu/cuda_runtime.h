// As much of CUDA as csrc/cuda takes, on a CPU: a block's threads run one after the other, each
// until the next barrier. Between two barriers their order is shuffled, so that a missing barrier
// shows; shared memory begins as NaN, so that reading it too early does.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "common.h"

#define __device__
#define __host__
#define __global__ static
#define __shared__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kSharedBytes = 232448;  // of an H100's block
namespace fastkfo::cuda {
alignas(16) inline unsigned char shared_memory[kSharedBytes];
}

// One block's threads.
class Block {
 public:
  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }
  Block(int threads, const std::function<void()>& body)
      : places_(threads), contexts_(threads), done_(threads, false), body_(body), lanes(threads) {
    running() = this;
    for (int t = 0; t < threads; ++t) {
      if (!stacks()[t]) stacks()[t].reset(new char[kStack]);
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks()[t].get();
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = nullptr;
      makecontext(&contexts_[t], &Block::enter, 0);
    }
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    unsigned random = 1;
    for (bool any = true; any;) {
      for (int k = threads - 1; k > 0; --k) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[k], order[random % (k + 1)]);
      }
      any = false;
      int ended = 0;
      for (const int t : order) {
        now_ = t;
        threadIdx = dim3(t, 0, 0);
        if (!done_[t]) resume(t);
        ended += done_[t];
        any = any || !done_[t];
      }
      if (any && ended > 0) {  // some threads wait where others have left
        fputs("a barrier that not all threads of a block reach\n", stderr);
        abort();
      }
    }
  }
  // Jumps, once a thread has begun: swapcontext is a system call.
  void wait() {
    if (!_setjmp(places_[now_].at)) _longjmp(back_, 1);
  }

 private:
  struct Place {
    jmp_buf at;
    bool begun = false;
  };
  void resume(int t) {
    if (_setjmp(back_)) return;
    if (places_[t].begun) _longjmp(places_[t].at, 1);
    places_[t].begun = true;
    setcontext(&contexts_[t]);
  }

  static constexpr size_t kStack = 1 << 18;
  jmp_buf back_;
  std::vector<Place> places_;
  std::vector<ucontext_t> contexts_;
  std::vector<char> done_;
  std::function<void()> body_;
  int now_ = 0;

  static std::vector<std::unique_ptr<char[]>>& stacks() {
    static std::vector<std::unique_ptr<char[]>> all(256);
    return all;
  }
  static void enter() {
    running()->body_();
    running()->done_[running()->now_] = true;
    _longjmp(running()->back_, 1);
  }

 public:
  struct Lane {  // what the threads of a warp exchange
    double value;
    uint32_t a[4], b[2];
  };
  std::vector<Lane> lanes;
};

inline void __syncthreads() { Block::running()->wait(); }
inline void __syncwarp() {}

template <class S>
S __shfl_down_sync(unsigned, S value, int by) {
  Block& block = *Block::running();
  const size_t t = threadIdx.x;
  block.lanes[t].value = value;
  block.wait();
  const S other = t % 32 + by < 32 ? S(block.lanes[t + by].value) : value;
  block.wait();
  return other;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

namespace fastkfo::cuda {

inline uint32_t as_tf32(float x) { return (__float_as_uint(x) + 0x1000) & 0xffffe000; }

// csrc/cuda/tensor_cores.cuh says which lane has what.
inline void multiply_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  Block& block = *Block::running();
  const size_t t = threadIdx.x, warp = t / 32 * 32, lane = t % 32;
  memcpy(block.lanes[t].a, a, sizeof(Block::Lane::a));
  memcpy(block.lanes[t].b, b, sizeof(Block::Lane::b));
  block.wait();
  for (size_t k = 0; k < 4; ++k) {
    const size_t row = lane / 4, column = lane % 4 * 2 + k % 2;
    for (size_t i = 0; i < 8; ++i)
      c[k] += __uint_as_float(block.lanes[warp + row * 4 + i % 4].a[i / 4 * 2 + k / 2]) *
              __uint_as_float(block.lanes[warp + column * 4 + i % 4].b[i / 4]);
  }
  block.wait();
}

}  // namespace fastkfo::cuda

template <class F>
void run_on_cpu(dim3 grid, int threads, int64_t shared, const F& body) {
  STD_TORCH_CHECK(shared <= static_cast<int64_t>(kSharedBytes), "more shared memory than there is");
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      memset(fastkfo::cuda::shared_memory, 0xff, kSharedBytes);
      Block(threads, body);
    }
}

using cudaStream_t = void*;
using cudaError_t = int;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum { cudaSuccess, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  if (which == cudaDevAttrMultiProcessorCount) {
    *value = 1;  // few blocks, each with many units
    return cudaSuccess;
  }
  const char* limit = getenv("FASTKFO_SHARED_MEMORY");
  *value = limit ? atoi(limit) : static_cast<int>(kSharedBytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, "CUDA")
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() STD_CUDA_CHECK(cudaGetLastError())

namespace fastkfo::cuda {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace fastkfo::cuda
