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
  void (*late)(const Plan&, const Blocks<S>&, const Work<S>&, S* tape, int64_t wanted, S* to);
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

}  // namespace fastkfo::inner_loop
