// A CUDA block as the executor of a fused inner loop: its threads share every loop, and wait for
// each other after it.
#pragma once

#include <math_constants.h>

#include "cuda/block.cuh"
#include "inner_loop/layers.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

using cuda::wait_for_all;

template <class S>
struct Executor {
  using Number = S;
  static constexpr int64_t kPad = 16 / sizeof(S);  // rows begin where a vector load may
  static constexpr int kScratch = 33;              // one number per warp, and their sum

  S* scratch;  // in shared memory

  static FASTKFO_FN S exp(S x) { return ::exp(x); }
  static FASTKFO_FN S log(S x) { return ::log(x); }
  static FASTKFO_FN S sqrt(S x) { return ::sqrt(x); }
  static FASTKFO_FN S tanh(S x) { return ::tanh(x); }
  static FASTKFO_FN S erfc(S x) { return ::erfc(x); }
  static FASTKFO_FN S nan() { return S(CUDART_NAN); }

  template <class F>
  FASTKFO_FN void each(int64_t n, const F& f) {
    const int count = static_cast<int>(n);
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i);
    wait_for_all();
  }
  // f(row, i): i counts through all rows, which are ld apart.
  template <class F>
  FASTKFO_FN void each(int64_t rows, int64_t ld, const F& f) {
    const int width = static_cast<int>(ld), count = static_cast<int>(rows) * width;
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(i / width, i);
    wait_for_all();
  }
  // Every thread gets the sum, in an order that n and the block fix.
  template <class F>
  FASTKFO_FN S sum(int64_t n, const F& f) {
    S total = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) total += f(i);
    for (int k = 16; k > 0; k /= 2) total += __shfl_down_sync(0xffffffff, total, k);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
    wait_for_all();
    if (threadIdx.x == 0) {
      S all = 0;
      for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) all += scratch[w];
      scratch[kScratch - 1] = all;
    }
    wait_for_all();
    const S all = scratch[kScratch - 1];
    wait_for_all();
    return all;
  }
  template <class F>
  FASTKFO_FN void sum_rows(int64_t rows, int64_t columns, int64_t ld, S* to, const F& f) {
    each(rows, [&](int64_t r) {
      S total = 0;
      for (int64_t i = r * ld; i < r * ld + columns; ++i) total += f(r, i);
      to[r] = total;
    });
  }
  template <class F>
  FASTKFO_FN void sum_columns(int64_t rows, int64_t ld, S* to, const F& f) {
    each(ld, [&](int64_t c) {
      S total = 0;
      for (int64_t r = 0; r < rows; ++r) total += f(r, r * ld + c);
      to[c] = total;
    });
  }
  FASTKFO_FN void max_columns(int64_t rows, int64_t ld, S* to, const S* from) {
    each(ld, [&](int64_t c) {
      S highest = from[c];
      for (int64_t r = 1; r < rows; ++r) {
        const S x = from[r * ld + c];
        highest = x > highest ? x : highest;
      }
      to[c] = highest;
    });
  }
  // to [columns, to_ld] = from' ; from [rows, ld]. Beyond its rows, zeros.
  FASTKFO_FN void transpose(int64_t rows, int64_t columns, const S* from, int64_t ld, S* to,
                            int64_t to_ld) {
    each(columns, to_ld, [=](int64_t c, int64_t i) {
      const int64_t r = i - c * to_ld;
      to[i] = r < rows ? from[r * ld + c] : S(0);
    });
  }
  // c = alpha a b + from. A thread has ROWS rows of one column in registers, and neighbouring
  // threads have neighbouring columns; few results are one each.
  __device__ __noinline__ void product(int64_t rows, int64_t columns, int64_t inner, Matrix<S> a,
                                       const S* b, int64_t ld_b, S* c, int64_t ld_c, S alpha = 1,
                                       const S* from = nullptr) {
    const int64_t results = rows * columns, threads = blockDim.x;
    if (results >= 4 * threads)
      tiles<4>(rows, columns, inner, a, b, ld_b, c, ld_c, alpha, from);
    else if (results >= 2 * threads)
      tiles<2>(rows, columns, inner, a, b, ld_b, c, ld_c, alpha, from);
    else
      tiles<1>(rows, columns, inner, a, b, ld_b, c, ld_c, alpha, from);
    wait_for_all();
  }

 private:
  template <int ROWS>
  FASTKFO_FN void tiles(int64_t rows, int64_t columns, int64_t inner, Matrix<S> a, const S* b,
                        int64_t ld_b, S* c, int64_t ld_c, S alpha, const S* from) {
    const int width = static_cast<int>(columns), height = static_cast<int>(rows);
    const int depth = static_cast<int>(inner);
    const int count = (height + ROWS - 1) / ROWS * width;
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
      const int first = t / width * ROWS, column = t % width;
      S sums[ROWS] = {};
      const S* left[ROWS];  // rows beyond the last read that one
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        left[r] = a.data + (first + r < height ? first + r : height - 1) * a.row;
      const S* right = b + column;
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        const S x = right[k * ld_b];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r] += left[r][k * a.col] * x;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first + r >= height) continue;
        const int64_t at = (first + r) * ld_c + column;
        c[at] = alpha * sums[r] + (from ? from[at] : S(0));
      }
    }
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
