// The ops of squared factors on CUDA.
#include "cuda/gram.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CUDA, m) { fastkfo::kron::Grams::implement(m); }
