// C (+)= A B for the small matrices of a learner's parameters.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"

namespace fastkfo::cpu {

// A read-only matrix with any strides, in elements.
template <class S>
struct Matrix {
  const S* data;
  int64_t row, col;
  Matrix t() const { return {data, col, row}; }
};

// C [rows, cols] (+)= A [rows, inner] B [inner, cols]; C is row-major, its rows c_row apart.
// float and double; small products run on registers, large ones in BLAS.
template <class S>
void gemm(int64_t rows, int64_t cols, int64_t inner, Matrix<S> a, Matrix<S> b, S* c, int64_t c_row,
          bool accumulate, Scratch<S>& scratch);

// Whether gemm leaves a product of this size to BLAS, which brings its own threads.
bool gemm_is_large(int64_t rows, int64_t cols, int64_t inner);

}  // namespace fastkfo::cpu
