// The ops of the Kronecker update on CUDA.
#include "cuda/kron.cuh"

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CUDA, m) { fastkfo::kron::Kron::implement(m); }
