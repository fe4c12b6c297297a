// The ops of the fused inner loop on CUDA.
#include "cuda/inner_loop.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CUDA, m) {
  fastkfo::inner_loop::implement<fastkfo::cuda::Cuda>(m);
}
