// Which instruction set the fused inner loop runs on.
#include "cpu/inner_loop_kernels.h"

#include "cpu/levels.h"

namespace fastkfo::inner_loop {

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> found = cpu::of_level(FASTKFO_LEVELS(of_float));
  return found;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> found = cpu::of_level(FASTKFO_LEVELS(of_double));
  return found;
}

}  // namespace fastkfo::inner_loop
