// What a block has: shared memory, and a barrier.
#pragma once

#include <cuda_runtime.h>

namespace fastkfo::cuda {

#if defined(__CUDACC__)
extern __shared__ __align__(16) unsigned char shared_memory[];
#endif

constexpr int kThreads = 256;

// nvcc takes for granted that a warp's threads have met again after a loop that some of them did
// not run, and they had not, always: such a warp was counted twice, and others went on too early
// (synccheck showed it, and sums that were wrong).
__device__ __forceinline__ void wait_for_all() {
  __syncwarp();
  __syncthreads();
}

}  // namespace fastkfo::cuda
