// The fused inner loop of one task, compiled for several instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vector.h"
#include "inner_loop/memory.h"
#include "inner_loop/plan.h"

namespace fastkfo::inner_loop {

template <class S>
struct Kernels {
  void (*forward)(const Plan&, const Blocks<S>&, const Work<S>&, S* tape, const Data<S>&,
                  const Results<S>&);
  void (*backward)(const Plan&, const Blocks<S>&, const Work<S>&, S* tape, S cotangent, S* x_s_grad,
                   S* x_q_grad);
  int (*late)(const Plan&, const Blocks<S>&, const Work<S>&, S* tape, int64_t wanted, Outer<S>* to);
  // to [rows, columns] += left right, row by row, padded
  void (*add_product)(int64_t rows, int64_t columns, int64_t inner, const S* left, int64_t ld_left,
                      const S* right, S* to, int64_t ld);
};

#define FASTKFO_DECLARE(level) \
  namespace level {            \
  Kernels<float> of_float();   \
  Kernels<double> of_double(); \
  }
FASTKFO_DECLARE(baseline)
FASTKFO_DECLARE(v3)
FASTKFO_DECLARE(v4)
#undef FASTKFO_DECLARE

// Those for this processor.
template <class S>
const Kernels<S>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

}  // namespace fastkfo::inner_loop
