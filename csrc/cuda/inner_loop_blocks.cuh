// Operands into the blocks that tasks read, and tasks' gradients out of theirs.
#pragma once

#include <cstdint>

namespace fastkfo::cuda {

// One operand, or its transpose, or its square, in a block: rows are padded with zeros.
enum Packing : int32_t { kAsItIs, kTransposed, kSquared };
template <class S>
struct Packed {
  const S* from;
  int64_t to;  // in a block
  int32_t given_rows, rows, columns, ld;
  Packing how;
  bool own;
};

template <class S, int MOST>
struct Packings {
  S *shared, *own;  // own [tasks, size]
  int64_t size, tasks;
  Packed<S> item[MOST];
};

template <class S, int MOST>
__global__ void pack(const __grid_constant__ Packings<S, MOST> all) {
  const Packed<S> item = all.item[blockIdx.y];
  const int64_t each = int64_t(item.rows) * item.ld, tasks = item.own ? all.tasks : 1;
  const int64_t given =
      int64_t(item.given_rows) * (item.how == kTransposed ? item.rows : item.columns);
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < tasks * each;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t t = i / each, r = i % each / item.ld, c = i % item.ld;
    const S* from = item.from + t * given;
    S x = 0;
    if (c < item.columns) {
      if (item.how == kAsItIs) x = from[r * item.columns + c];
      if (item.how == kTransposed) x = from[c * item.rows + r];
      if (item.how == kSquared)
        for (int k = 0; k < item.given_rows; ++k)
          x += from[k * int64_t(item.columns) + r] * from[k * int64_t(item.columns) + c];
    }
    (item.own ? all.own + t * all.size : all.shared)[item.to + i % each] = x;
  }
}

// One gradient that is returned: the sum over the tasks whose gradients are finite, in their order,
// or every task's own.
template <class S>
struct Delivery {
  S* to;  // of the operand's shape, or room for the gradient of a square
  int64_t at;
  int32_t rows, columns, ld;
  bool own, transposed;
};

template <class S, int MOST>
struct Deliveries {
  const S* rows;  // [tasks, size]
  const bool* good;
  int64_t size, tasks;
  Delivery<S> item[MOST];
};

template <class S, int MOST>
__global__ void deliver(const __grid_constant__ Deliveries<S, MOST> all) {
  const Delivery<S> item = all.item[blockIdx.y];
  const int64_t each = int64_t(item.rows) * item.columns, copies = item.own ? all.tasks : 1;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < copies * each;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t k = i % each, r = k / item.columns, c = k % item.columns;
    const S* from = all.rows + item.at + r * item.ld + c;
    S x = 0;
    if (item.own)
      x = from[i / each * all.size];
    else
      for (int64_t t = 0; t < all.tasks; ++t)
        if (all.good[t]) x += from[t * all.size];
    item.to[i - k + (item.transposed ? c * item.rows + r : k)] = x;
  }
}

// The gradient of L from that of A = L' L:  L (G + G')
template <class S>
struct Square {
  const S *factor, *g;
  S* to;
  int32_t rows, n;  // of the factor [rows, n]
  int64_t tasks;
};

template <class S, int MOST>
struct Squares {
  Square<S> item[MOST];
};

template <class S, int MOST>
__global__ void through_squares(const __grid_constant__ Squares<S, MOST> all) {
  const Square<S> item = all.item[blockIdx.y];
  const int64_t n = item.n, each = item.rows * n;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < item.tasks * each;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t t = i / each, r = i % each / n, c = i % n;
    const S *factor = item.factor + t * each + r * n, *g = item.g + t * n * n;
    S x = 0;
    for (int64_t k = 0; k < n; ++k) x += factor[k] * (g[k * n + c] + g[c * n + k]);
    item.to[i] = x;
  }
}

}  // namespace fastkfo::cuda
