// One product of a warp on tensor cores (tests/cuda_on_cpu has its own).
#pragma once

#include <cstdint>

namespace fastkfo::cuda {

#if defined(__CUDACC__)
// A number rounded to TF32's 11 bits, half away from zero.
__device__ __forceinline__ uint32_t as_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// c [16, 8] += a [16, 8] b [8, 8]. With g = lane / 4 and t = lane % 4, a lane has
// a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4];  b[t][g], b[t + 4][g];
// c[g][2 t], c[g][2 t + 1], c[g + 8][2 t], c[g + 8][2 t + 1].
__device__ __forceinline__ void multiply_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace fastkfo::cuda
