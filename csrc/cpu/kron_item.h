// One item of a Kronecker update, and the layouts its kernels work in.
//
// A unit is one task of an item, and a chunk of its batch. Its elements come as [b, n, m] ("batch
// first") and are multiplied as [n, b, m] ("rows first"), so that both products are single matrix
// products: P = G C is [n b, m] [m, m] and Q = A P is [n, n] [n, b m].
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/gemm.h"
#include "kron/call.h"

namespace fastkfo::cpu {

using namespace fastkfo::kron;

struct Unit {
  int64_t item, t, b0, b1;
};

// A factor of one task as a matrix of the accumulation type.
template <class S, class T>
Matrix<S> factor(const Operand<T, 3>& x, int64_t t, int64_t size, Scratch<S>& scratch) {
  const T* from = x.data + t * x.stride[0];
  if constexpr (std::is_same_v<S, T>) {
    return {from, x.stride[1], x.stride[2]};
  } else {
    S* to = scratch.take(size * size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j)
        to[i * size + j] = static_cast<S>(from[i * x.stride[1] + j * x.stride[2]]);
    return {to, size, 1};
  }
}

// [n, m] numbers of task t, without gaps, in the accumulation type.
template <class S, class T>
const S* one_matrix(const T* from, int64_t row, int64_t col, int64_t n, int64_t m,
                    Scratch<S>& scratch) {
  if constexpr (std::is_same_v<S, T>)
    if ((row == m || n == 1) && (col == 1 || m == 1)) return from;
  S* to = scratch.take(n * m);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) to[i * m + j] = static_cast<S>(from[i * row + j * col]);
  return to;
}

// A unit's elements, batch first, without gaps, in the accumulation type.
template <class S, class T>
const S* batch_first(const Operand<T, 4>& x, const Unit& u, int64_t n, int64_t m,
                     Scratch<S>& scratch) {
  const T* from = x.data + u.t * x.stride[0] + u.b0 * x.stride[1];
  const int64_t batch = u.b1 - u.b0;
  if (batch == 1) return one_matrix<S>(from, x.stride[2], x.stride[3], n, m, scratch);
  if constexpr (std::is_same_v<S, T>)
    if ((x.stride[1] == n * m) && (x.stride[2] == m || n == 1) && (x.stride[3] == 1 || m == 1))
      return from;
  S* out = scratch.take(batch * n * m);
  S* to = out;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i, to += m) {
      const T* row = from + b * x.stride[1] + i * x.stride[2];
      for (int64_t j = 0; j < m; ++j) to[j] = static_cast<S>(row[j * x.stride[3]]);
    }
  return out;
}

// [first, second, m] to [second, first, m]. Returns `from` itself where the two are one.
template <class S>
const S* swap_axes(const S* from, int64_t first, int64_t second, int64_t m, Scratch<S>& scratch) {
  if (first <= 1 || second <= 1 || m == 0) return from;
  constexpr int64_t block = 64 / sizeof(S);
  const S* end = from + first * second * m;
  S* out = scratch.take(first * second * m + block);
  S* to = out;
  for (int64_t j = 0; j < second; ++j) {
    const S* row = from + j * m;
    for (int64_t i = 0; i < first; ++i, row += second * m, to += m) {
      // Short rows are copied as whole vectors: what runs over is overwritten by the next row.
      if (m <= block && row + block <= end)
        std::memcpy(to, row, 64);
      else
        std::memcpy(to, row, m * sizeof(S));
    }
  }
  return out;
}

// A unit's elements, rows first.
template <class S, class T>
const S* rows_first(const Operand<T, 4>& x, const Unit& u, int64_t n, int64_t m,
                    Scratch<S>& scratch) {
  return swap_axes(batch_first<S>(x, u, n, m, scratch), u.b1 - u.b0, n, m, scratch);
}

}  // namespace fastkfo::cpu
