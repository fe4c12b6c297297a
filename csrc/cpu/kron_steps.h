// The products and sums that the three Kronecker kernels are made of, for one unit.
#pragma once

#include <algorithm>

#include "cpu/kron_item.h"

namespace fastkfo::cpu {

template <class S, class T>
class UnitSteps {
 public:
  UnitSteps(const Item<T>& item, const Unit& unit, Scratch<S>& scratch)
      : it(item),
        u(unit),
        n(item.n),
        m(item.m),
        batch(unit.b1 - unit.b0),
        cols(batch * item.m),
        size(item.n * batch * item.m),
        scratch_(scratch) {}

  const Item<T>& it;
  const Unit& u;
  const int64_t n, m, batch, cols, size;

  S* take(int64_t count) { return scratch_.take(count); }
  S* zeros(int64_t count) {
    S* to = take(count);
    std::fill(to, to + count, S(0));
    return to;
  }
  Matrix<S> left(const Operand<T, 3>& x) { return factor<S>(x, u.t, n, scratch_); }
  Matrix<S> right(const Operand<T, 3>& x) { return factor<S>(x, u.t, m, scratch_); }
  const S* rows(const Operand<T, 4>& x) { return rows_first<S>(x, u, n, m, scratch_); }
  const S* flat(const Operand<T, 4>& x) { return batch_first<S>(x, u, n, m, scratch_); }
  const S* matrix(const Operand<T, 3>& x) {
    return one_matrix<S>(x.data + u.t * x.stride[0], x.stride[1], x.stride[2], n, m, scratch_);
  }
  const S* to_batch_first(const S* x) { return swap_axes(x, n, batch, m, scratch_); }
  const S* to_rows_first(const S* x) { return swap_axes(x, batch, n, m, scratch_); }
  S scalar(const Operand<T, 4>& x) { return static_cast<S>(x.data[u.t * x.stride[0]]); }

  // [n, b m] (+)= A [n, n] x [n, b m]
  void times_left(Matrix<S> a, const S* x, S* to, bool accumulate = false) {
    gemm<S>(n, cols, n, a, {x, cols, 1}, to, cols, accumulate, scratch_);
  }
  // [n b, m] (+)= x [n b, m] C [m, m]
  void times_right(const S* x, Matrix<S> c, S* to, bool accumulate = false) {
    gemm<S>(n * batch, m, m, {x, m, 1}, c, to, m, accumulate, scratch_);
  }
  const S* left_product(const Operand<T, 3>& a, const S* x, bool transposed = false) {
    if (!a) return x;
    S* to = take(size);
    times_left(transposed ? left(a).t() : left(a), x, to);
    return to;
  }
  const S* right_product(const S* x, const Operand<T, 3>& c, bool transposed = false) {
    if (!c) return x;
    S* to = take(size);
    times_right(x, transposed ? right(c).t() : right(c), to);
    return to;
  }
  // [n, n] (+)= x y^T and [m, m] (+)= x^T y, both summed over the batch
  void left_outer(const S* x, const S* y, S* to, bool accumulate = false) {
    gemm<S>(n, n, cols, {x, cols, 1}, {y, 1, cols}, to, n, accumulate, scratch_);
  }
  void right_outer(const S* x, const S* y, S* to, bool accumulate = false) {
    gemm<S>(m, m, n * batch, {x, 1, m}, {y, m, 1}, to, m, accumulate, scratch_);
  }
  // [n, m] = the sum of x [n, b, m] over the batch
  void sum_batch(const S* x, S* to) {
    std::fill(to, to + n * m, S(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t b = 0; b < batch; ++b, x += m)
        for (int64_t j = 0; j < m; ++j) to[i * m + j] += x[j];
  }
  // x [b, n, m] + bias [n, m]; either may be null
  const S* plus_bias(const S* x, const Operand<T, 3>& bias) {
    if (!bias) return x;
    const S* beta = matrix(bias);
    S* to = take(size);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t k = 0; k < n * m; ++k)
        to[b * n * m + k] = (x ? x[b * n * m + k] : S(0)) + beta[k];
    return to;
  }
  // alpha * scale o x, batch first; x itself where there is nothing to do
  const S* scaled(const S* x, const Operand<T, 4>& scale, bool with_alpha) {
    S alpha = with_alpha ? static_cast<S>(it.alpha) : S(1);
    const S* full = nullptr;
    if (scale && it.scale_is_full) full = flat(scale);
    if (scale && !it.scale_is_full) alpha *= scalar(scale);
    if (!full && alpha == S(1)) return x;
    S* to = take(size);
    if (full)
      for (int64_t k = 0; k < size; ++k) to[k] = alpha * (full[k] * x[k]);
    else
      for (int64_t k = 0; k < size; ++k) to[k] = alpha * x[k];
    return to;
  }
  // alpha * weight o x: element by element, or its sum where the scale is one number
  void scale_gradient(const S* x, const S* weight, S* to) {
    const S alpha = static_cast<S>(it.alpha);
    if (it.scale_is_full) {
      for (int64_t k = 0; k < size; ++k) to[k] = x ? alpha * (weight[k] * x[k]) : S(0);
      return;
    }
    S sum = 0;
    if (x)
      for (int64_t k = 0; k < size; ++k) sum += weight[k] * x[k];
    to[0] = alpha * sum;
  }
  // Where this unit's elements begin in an output [T, B, n, m] without gaps.
  T* place(T* out) const { return out + (u.t * it.batch + u.b0) * n * m; }
  void store(const S* x, T* out) {
    T* to = place(out);
    for (int64_t k = 0; k < size; ++k) to[k] = static_cast<T>(x[k]);
  }

 private:
  Scratch<S>& scratch_;
};

}  // namespace fastkfo::cpu
