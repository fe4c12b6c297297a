// What one task reads, writes and works in.
#pragma once

#include <cstdint>

#include "inner_loop/plan.h"

#if defined(__CUDACC__)
#define FASTKFO_ANYWHERE __host__ __device__
#else
#define FASTKFO_ANYWHERE
#endif

namespace fastkfo::inner_loop {

// Room for one parameter at a time.
template <class S>
struct Room {
  S* rows_in;   // [samples, pad(m)]
  S* rows_out;  // [samples, pad(n)]
  S* cols_out;  // [n, ld]
  S* cols_in;   // [m, ld]
  S* square;    // [n, pad(m)]
  S* dense;     // of the dense form: A' lambda and V [n, pad(m)], (G C)' [m, pad(n)]
};

// One task's data, in the caller's memory, without gaps. Null where there is none.
template <class S>
struct Data {
  const S* x_s;
  const void* y_s;
  const S* x_q;
  const void* y_q;
  const S*
      q;  // X' C of a first layer, its rows padded, where it was computed for all tasks at once
};

template <class S>
struct Results {
  S* loss;          // one number
  S* support_loss;  // K
  S* predictions;   // [samples, classes]
  S* statistics;    // [K + 1, plan.statistics]
};

// factor left right, with left [rows, inner] and right [inner, columns] row by row, padded.
template <class S>
struct Outer {
  const S* left;
  int64_t ld, inner;
  const S* right;
  S factor;
};

// Blocks of operands: those that all tasks share, and this task's own.
template <class S>
struct Blocks {
  const S *shared, *own;
};

// Working memory; the first part is all that a forward pass needs.
template <class S>
struct Work {
  Room<S> room;
  S* lanes;   // 6 rows of means
  S* record;  // derivatives along V, a support pass
  S* query;   // cotangents of a query pass
  S* v;       // a block of later parameters, of which only vectors are used; all, if phi is adapted
  S* fixed;   // the sum of lambda' P of a first layer [in, ld]
  S* gram;    // see Gram
  S* adapt;   // see AdaptPlaces
  S* x_s_grad;   // [in, ld]
  S* gradients;  // a block of gradients
};

template <class S>
FASTKFO_ANYWHERE inline Work<S> work_at(const WorkPlaces& at, S* m) {
  return {{m + at.rows_in, m + at.rows_out, m + at.cols_out, m + at.cols_in, m + at.square,
           m + at.dense},
          m + at.lanes,
          m + at.record,
          m + at.query,
          m + at.v,
          m + at.fixed,
          m + at.gram,
          m + at.adapt,
          m + at.x_s_grad,
          m + at.gradients};
}

}  // namespace fastkfo::inner_loop
