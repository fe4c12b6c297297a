// A register-blocked product: MR rows times up to three vectors of columns are held in registers
// while the inner dimension runs. The tile follows the machine: the same template is compiled
// for each instruction set, and the widest that the processor has is chosen at run time.
#include "cpu/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/levels.h"
#include "cpu/vector.h"

// Helpers must be inlined: one that is not stays compiled for the baseline processor.
#define FASTKFO_INLINE inline __attribute__((always_inline))

// PyTorch's own BLAS, where the wheel exports it; null where it does not.
extern "C" {
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const float*, const float*, const int*, const float*, const int*,
                                  const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*,
                                  const double*, const double*, const int*, const double*,
                                  const int*, const double*, double*, const int*);
}

namespace fastkfo::cpu {
namespace {

constexpr int kMaxVectors = 3;  // of columns in a tile

// Where a product goes. Rows shorter than their vectors may run over into the next row, if that is
// written later (`overlap`), up to `end`.
template <class S>
struct Target {
  S* data;
  int64_t row;
  bool accumulate, overlap;
  const S* end;
};

// C [MR, cols] (+)= A [MR, inner] B [inner, NV vectors], cols <= NV * width.
template <class S, int BYTES, int MR, int NV>
FASTKFO_INLINE void tile(int64_t inner, const S* a, int64_t a_row, int64_t a_col, const S* b,
                         int64_t b_row, const Target<S>& c, int64_t first_row, int64_t cols) {
  using V = Vector<S, BYTES>;
  typename V::type acc[MR][NV] = {};
  for (int64_t k = 0; k < inner; ++k) {
    typename V::type right[NV];
    for (int v = 0; v < NV; ++v) right[v] = V::load(b + k * b_row + v * V::width);
    for (int r = 0; r < MR; ++r) {
      const S left = a[r * a_row + k * a_col];
      for (int v = 0; v < NV; ++v) acc[r][v] += left * right[v];
    }
  }
  S* out = c.data + first_row * c.row;
  for (int r = 0; r < MR; ++r) {
    S* to = out + r * c.row;
    if (cols == NV * V::width || (c.overlap && to + NV * V::width <= c.end)) {
      for (int v = 0; v < NV; ++v) {
        S* at = to + v * V::width;
        V::store(at, c.accumulate ? V::load(at) + acc[r][v] : acc[r][v]);
      }
    } else {
      S row[NV * V::width];
      for (int v = 0; v < NV; ++v) V::store(row + v * V::width, acc[r][v]);
      for (int64_t j = 0; j < cols; ++j) to[j] = c.accumulate ? to[j] + row[j] : row[j];
    }
  }
}

// All rows of one panel of columns, in tiles of MR rows, then of MR / 2, and so on.
template <class S, int BYTES, int MR, int NV>
FASTKFO_INLINE void panel(int64_t first_row, int64_t rows, int64_t inner, Matrix<S> a, const S* b,
                          int64_t b_row, const Target<S>& c, int64_t cols) {
  int64_t i = first_row;
  for (; i + MR <= rows; i += MR)
    tile<S, BYTES, MR, NV>(inner, a.data + i * a.row, a.row, a.col, b, b_row, c, i, cols);
  if constexpr (MR > 1)
    if (i < rows) panel<S, BYTES, MR / 2, NV>(i, rows, inner, a, b, b_row, c, cols);
}

// The columns [0, cols) of B as rows of `width` numbers, the missing ones zero.
template <class S>
FASTKFO_INLINE void pack(int64_t inner, int64_t cols, int64_t width, Matrix<S> b, S* to) {
  if (b.col == 1) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < cols; ++j) to[k * width + j] = b.data[k * b.row + j];
  } else {
    // Sixteen rows at a time, so that the lines written stay in cache until they are full.
    for (int64_t k0 = 0; k0 < inner; k0 += 16)
      for (int64_t j = 0; j < cols; ++j)
        for (int64_t k = k0; k < std::min(inner, k0 + 16); ++k)
          to[k * width + j] = b.data[k * b.row + j * b.col];
  }
  for (int64_t k = 0; k < inner; ++k)
    for (int64_t j = cols; j < width; ++j) to[k * width + j] = 0;
}

template <class S, int BYTES, int MR>
FASTKFO_INLINE void small_gemm(int64_t rows, int64_t cols, int64_t inner, Matrix<S> a, Matrix<S> b,
                               S* c, int64_t c_row, bool accumulate, S* packed) {
  constexpr int width = Vector<S, BYTES>::width;
  const int64_t vectors = (cols + width - 1) / width;
  const int64_t panels = (vectors + kMaxVectors - 1) / kMaxVectors;
  const bool overlap = panels == 1 && !accumulate && c_row == cols;
  int64_t first = 0;  // vector
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t last = vectors * (p + 1) / panels;  // panels of equal size, not 3 + 3 + 1
    const int64_t nv = last - first, j = first * width;
    const int64_t n = std::min(cols - j, nv * width);
    const Target<S> to{c + j, c_row, accumulate, overlap, c + rows * c_row};
    const S* right = b.data + j * b.col;
    int64_t right_row = b.row;
    // Rows far apart share few cache sets, so a panel that is used often is worth a copy.
    if (b.col != 1 || n < nv * width || (rows > 4 * MR && b.row > 512)) {
      pack<S>(inner, n, nv * width, {right, b.row, b.col}, packed);
      right = packed;
      right_row = nv * width;
    }
    if (nv == 1)
      panel<S, BYTES, MR, 1>(0, rows, inner, a, right, right_row, to, n);
    else if (nv == 2)
      panel<S, BYTES, MR, 2>(0, rows, inner, a, right, right_row, to, n);
    else
      panel<S, BYTES, MR, 3>(0, rows, inner, a, right, right_row, to, n);
    first = last;
  }
}

#define FASTKFO_SMALL_GEMM(name, target, bytes, mr)                                           \
  template <class S>                                                                          \
  target void name(int64_t rows, int64_t cols, int64_t inner, Matrix<S> a, Matrix<S> b, S* c, \
                   int64_t c_row, bool accumulate, S* packed) {                               \
    small_gemm<S, bytes, mr>(rows, cols, inner, a, b, c, c_row, accumulate, packed);          \
  }

#ifdef FASTKFO_X86_TARGETS
// 32 registers of 64 bytes hold 8 x 3 sums; 16 of 32 bytes hold 4 x 3.
FASTKFO_SMALL_GEMM(small_gemm_v4, __attribute__((target("arch=x86-64-v4"))), 64, 8)
FASTKFO_SMALL_GEMM(small_gemm_v3, __attribute__((target("arch=x86-64-v3"))), 32, 4)
#endif
FASTKFO_SMALL_GEMM(small_gemm_baseline, , 16, 4)

template <class S>
using SmallGemm = void (*)(int64_t, int64_t, int64_t, Matrix<S>, Matrix<S>, S*, int64_t, bool, S*);

const int kLevel = cpu_level();

template <class S>
SmallGemm<S> best_small_gemm() {
#ifdef FASTKFO_X86_TARGETS
  if (kLevel == 4) return small_gemm_v4<S>;
  if (kLevel == 3) return small_gemm_v3<S>;
#endif
  return small_gemm_baseline<S>;
}

bool blas_available(float) { return sgemm_ != nullptr; }
bool blas_available(double) { return dgemm_ != nullptr; }
void blas(const char* ta, const char* tb, int m, int n, int k, const float* a, int lda,
          const float* b, int ldb, float beta, float* c, int ldc) {
  const float one = 1;
  sgemm_(ta, tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
void blas(const char* ta, const char* tb, int m, int n, int k, const double* a, int lda,
          const double* b, int ldb, double beta, double* c, int ldc) {
  const double one = 1;
  dgemm_(ta, tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}

// BLAS wants one stride to be 1 and the other to be at least the row's length.
template <class S>
bool blas_takes(Matrix<S> x, int64_t rows, int64_t cols) {
  return (x.col == 1 && x.row >= cols) || (x.row == 1 && x.col >= rows);
}

template <class S>
void large_gemm(int64_t rows, int64_t cols, int64_t inner, Matrix<S> a, Matrix<S> b, S* c,
                int64_t c_row, bool accumulate) {
  // A row-major product is the column-major product of the transposes in the other order.
  const bool ta = a.col != 1, tb = b.col != 1;
  blas(tb ? "T" : "N", ta ? "T" : "N", static_cast<int>(cols), static_cast<int>(rows),
       static_cast<int>(inner), b.data, static_cast<int>(tb ? b.col : b.row), a.data,
       static_cast<int>(ta ? a.col : a.row), accumulate ? 1 : 0, c, static_cast<int>(c_row));
}

}  // namespace

bool gemm_is_large(int64_t rows, int64_t cols, int64_t inner) {
  return rows >= 32 && cols >= 32 && inner >= 32 && rows * cols * inner >= 192ll * 192 * 192;
}

template <class S>
void gemm(int64_t rows, int64_t cols, int64_t inner, Matrix<S> a, Matrix<S> b, S* c, int64_t c_row,
          bool accumulate, Scratch<S>& scratch) {
  if (rows == 0 || cols == 0) return;
  const bool large = gemm_is_large(rows, cols, inner);
  // Measured (bench/NOTES.md): the vector kernels beat or equal BLAS from 128 on, by up to two
  // times; the baseline kernel loses to it as soon as a call of BLAS pays.
  if (large && kLevel == 0 && blas_available(S{}) && blas_takes(a, rows, inner) &&
      blas_takes(b, inner, cols))
    return large_gemm(rows, cols, inner, a, b, c, c_row, accumulate);
  static const SmallGemm<S> kernel = best_small_gemm<S>();
  constexpr int64_t widest = kMaxVectors * 64 / sizeof(S);
  const auto run = [&](int64_t first, int64_t last, Scratch<S>& own) {
    kernel(last - first, cols, inner, {a.data + first * a.row, a.row, a.col}, b, c + first * c_row,
           c_row, accumulate, own.take(inner * widest));
  };
  if (!large) return run(0, rows, scratch);
  // Blocks of rows, each of whole tiles. Inside a parallel region this is one block.
  constexpr int64_t block = 64;
  torch::stable::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t first, int64_t last) {
    run(first * block, std::min(rows, last * block), Scratch<S>::of_this_thread());
  });
}

template void gemm<float>(int64_t, int64_t, int64_t, Matrix<float>, Matrix<float>, float*, int64_t,
                          bool, Scratch<float>&);
template void gemm<double>(int64_t, int64_t, int64_t, Matrix<double>, Matrix<double>, double*,
                           int64_t, bool, Scratch<double>&);

}  // namespace fastkfo::cpu
