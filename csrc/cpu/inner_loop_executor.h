// A CPU thread as the executor of a fused inner loop: its loops vectorise, and its product keeps a
// tile of the result in registers. Compiled once per instruction set, see inner_loop_v4.cpp.
// No template of the standard library in here: the linker would keep one copy of it for all
// processors, and it might be the one for the newest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vector.h"
#include "inner_loop/layers.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// exp in a form that vectorises: 2^k exp(r), |r| <= ln 2 / 2, without a branch or a table. The
// polynomial is Taylor's, whose next term is 5e-9. Below -87 it is 0, above 88 infinite.
FASTKFO_FN float exponential(float x) {
  constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float clamped = x < -87.0f ? -87.0f : x;
  clamped = clamped > 88.0f ? 88.0f : clamped;
  const float shifted = clamped * 1.44269504088896341f + rounder;
  const float k = shifted - rounder;
  const float r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits + 127) << 23);  // its low bits are k
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  float y = p * scale;
  y = x < -87.0f ? 0.0f : y;
  y = x > 88.0f ? __builtin_inff() : y;
  return x != x ? x : y;
}
FASTKFO_FN double exponential(double x) { return ::exp(x); }

FASTKFO_FN float logarithm(float x) { return ::logf(x); }
FASTKFO_FN double logarithm(double x) { return ::log(x); }
FASTKFO_FN float hyperbolic_tangent(float x) { return ::tanhf(x); }
FASTKFO_FN double hyperbolic_tangent(double x) { return ::tanh(x); }
FASTKFO_FN float complementary_error(float x) { return ::erfcf(x); }
FASTKFO_FN double complementary_error(double x) { return ::erfc(x); }
FASTKFO_FN float square_root(float x) { return __builtin_sqrtf(x); }
FASTKFO_FN double square_root(double x) { return __builtin_sqrt(x); }

template <class S>
struct Executor {
  using Number = S;
  static constexpr int64_t kPad = 64 / sizeof(S);

  static S exp(S x) { return exponential(x); }
  static S log(S x) { return logarithm(x); }
  static S sqrt(S x) { return square_root(x); }
  static S tanh(S x) { return hyperbolic_tangent(x); }
  static S erfc(S x) { return complementary_error(x); }
  static S nan() { return S(__builtin_nan("")); }

  template <class F>
  FASTKFO_FN void each(int64_t n, const F& f) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  // f(row, i): i counts through all rows, which are ld apart.
  template <class F>
  FASTKFO_FN void each(int64_t rows, int64_t ld, const F& f) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
      for (int64_t i = r * ld; i < (r + 1) * ld; ++i) f(r, i);
    }
  }
  template <class F>
  FASTKFO_FN S sum(int64_t n, const F& f) {
    S total = 0;
    for (int64_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  template <class F>
  FASTKFO_FN void sum_rows(int64_t rows, int64_t columns, int64_t ld, S* to, const F& f) {
    for (int64_t r = 0; r < rows; ++r) {
      S total = 0;
      for (int64_t i = r * ld; i < r * ld + columns; ++i) total += f(r, i);
      to[r] = total;
    }
  }
  template <class F>
  FASTKFO_FN void sum_columns(int64_t rows, int64_t ld, S* to, const F& f) {
    each(ld, [=](int64_t c) { to[c] = 0; });
    for (int64_t r = 0; r < rows; ++r) each(ld, [=](int64_t c) { to[c] += f(r, r * ld + c); });
  }
  FASTKFO_FN void max_columns(int64_t rows, int64_t ld, S* to, const S* from) {
    each(ld, [=](int64_t c) { to[c] = from[c]; });
    for (int64_t r = 1; r < rows; ++r)
      each(ld, [=](int64_t c) {
        const S x = from[r * ld + c];
        to[c] = x > to[c] ? x : to[c];
      });
  }
  // to [columns, to_ld] = from' ; from [rows, ld]. Beyond its rows, zeros. Rows are padded.
  FASTKFO_FN void transpose(int64_t rows, int64_t columns, const S* from, int64_t ld, S* to,
                            int64_t to_ld) {
    constexpr int width = Vector<FASTKFO_VECTOR_BYTES>::width;
    for (int64_t r = 0; r < to_ld; r += width)
      for (int64_t c = 0; c < columns; c += width)
        block(smaller(rows - r, width), smaller(columns - c, width), from + r * ld + c, ld,
              to + c * to_ld + r, to_ld);
  }

  // c = alpha a b + from; c, b and from lie row by row, and rows are padded.
  FASTKFO_FN void product(int64_t rows, int64_t columns, int64_t inner, Matrix<S> a, const S* b,
                          int64_t ld_b, S* c, int64_t ld_c, S alpha = 1, const S* from = nullptr) {
    multiply(rows, columns, inner, a, b, ld_b, c, ld_c, alpha, from);
  }

 private:
  template <int BYTES>
  using Vector = cpu::Vector<S, BYTES>;

  static FASTKFO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // A square of the transpose, of as many rows as a vector is wide, in registers.
  static FASTKFO_INLINE void block(int64_t rows, int64_t columns, const S* from, int64_t ld, S* to,
                                   int64_t to_ld) {
    using V = Vector<FASTKFO_VECTOR_BYTES>;
    typename V::type v[V::width];
    for (int i = 0; i < V::width; ++i)
      v[i] = i < rows ? V::load(from + i * ld) : typename V::type{};
    exchange<1>(v);
    for (int i = 0; i < V::width; ++i)
      if (i < columns) V::store(to + i * to_ld, v[i]);
  }
  // Rows i and i + STEP exchange the columns in which they differ in that bit.
  template <int STEP, class V>
  static FASTKFO_INLINE void exchange(V* v) {
    constexpr int width = sizeof(V) / sizeof(S);
    if constexpr (STEP < width) {
      for (int i = 0; i < width; ++i) {
        if (i & STEP) continue;
        const V a = v[i], b = v[i + STEP];
        v[i] = mixed<STEP, false>(a, b);
        v[i + STEP] = mixed<STEP, true>(a, b);
      }
      exchange<2 * STEP>(v);
    }
  }
  template <int STEP, bool HIGH, class V>
  static FASTKFO_INLINE V mixed(V a, V b) {
    constexpr int width = sizeof(V) / sizeof(S);
#if defined(__clang__)
    V out;
    for (int j = 0; j < width; ++j)
      out[j] = HIGH ? (j & STEP ? b[j] : a[j + STEP]) : (j & STEP ? b[j - STEP] : a[j]);
    return out;
#else
    using Index = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
    typedef Index Mask __attribute__((vector_size(sizeof(V))));
    Mask mask{};
    for (int j = 0; j < width; ++j)
      mask[j] = HIGH ? (j & STEP ? width + j : j + STEP) : (j & STEP ? width + j - STEP : j);
    return __builtin_shuffle(a, b, mask);
#endif
  }

  template <int BYTES, int MR, int NV>
  static FASTKFO_INLINE void tile(int64_t inner, Matrix<S> a, const S* b, int64_t ld_b, S* c,
                                  int64_t ld_c, S alpha, const S* from) {
    using V = Vector<BYTES>;
    typename V::type sums[MR][NV] = {};
    for (int64_t k = 0; k < inner; ++k) {
      typename V::type right[NV];
      for (int v = 0; v < NV; ++v) right[v] = V::load(b + k * ld_b + v * V::width);
      for (int r = 0; r < MR; ++r) {
        const S left = a.data[r * a.row + k * a.col];
        for (int v = 0; v < NV; ++v) sums[r][v] += left * right[v];
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) {
        const int64_t at = r * ld_c + v * V::width;
        typename V::type sum = alpha * sums[r][v];
        if (from) sum += V::load(from + at);
        V::store(c + at, sum);
      }
  }
  template <int BYTES, int MR, int NV>
  static FASTKFO_INLINE void panel(int64_t rows, int64_t inner, Matrix<S> a, const S* b,
                                   int64_t ld_b, S* c, int64_t ld_c, S alpha, const S* from) {
    for (; rows >= MR; rows -= MR) {
      tile<BYTES, MR, NV>(inner, a, b, ld_b, c, ld_c, alpha, from);
      a.data += MR * a.row;
      c += MR * ld_c;
      if (from) from += MR * ld_c;
    }
    if constexpr (MR > 1)
      if (rows > 0) panel<BYTES, MR / 2, NV>(rows, inner, a, b, ld_b, c, ld_c, alpha, from);
  }
  static __attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t inner,
                                                 Matrix<S> a, const S* b, int64_t ld_b, S* c,
                                                 int64_t ld_c, S alpha, const S* from) {
    constexpr int bytes = FASTKFO_VECTOR_BYTES, mr = FASTKFO_TILE_ROWS;
    constexpr int width = Vector<bytes>::width;
    if constexpr (bytes > 16)  // a few samples: half a vector takes half the time
      if (2 * columns <= width)
        return panel<bytes / 2, mr, 1>(rows, inner, a, b, ld_b, c, ld_c, alpha, from);
    int64_t vectors = (columns + width - 1) / width;
    while (vectors > 0) {  // panels of equal size: 4 vectors are 2 + 2, not 3 + 1
      const int64_t panels = (vectors + 2) / 3, now = (vectors + panels - 1) / panels;
      if (now == 3)
        panel<bytes, mr, 3>(rows, inner, a, b, ld_b, c, ld_c, alpha, from);
      else if (now == 2)
        panel<bytes, mr, 2>(rows, inner, a, b, ld_b, c, ld_c, alpha, from);
      else
        panel<bytes, mr, 1>(rows, inner, a, b, ld_b, c, ld_c, alpha, from);
      b += now * width;
      c += now * width;
      if (from) from += now * width;
      vectors -= now;
    }
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
