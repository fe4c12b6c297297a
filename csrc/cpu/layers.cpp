// Which instruction set the layers run on.
#include "cpu/layers.h"

#include "cpu/levels.h"

namespace fastkfo::cpu {

template <>
const LayerKernels<float>& layer_kernels<float>() {
  static const LayerKernels<float> found = of_level(FASTKFO_LEVELS(of_float));
  return found;
}
template <>
const LayerKernels<double>& layer_kernels<double>() {
  static const LayerKernels<double> found = of_level(FASTKFO_LEVELS(of_double));
  return found;
}

}  // namespace fastkfo::cpu
