// Which instruction set the layers run on.
#include "cpu/layers.h"

#include "cpu/levels.h"

namespace fastkfo::cpu {
namespace {

template <class K>
K best(K (*plain)(), K (*newer)(), K (*newest)()) {
  const int level = cpu_level();
  return level == 4 ? newest() : level == 3 ? newer() : plain();
}

#ifdef FASTKFO_X86_PRAGMAS
#define FASTKFO_LEVELS(f) baseline::f, v3::f, v4::f
#else
#define FASTKFO_LEVELS(f) baseline::f, baseline::f, baseline::f
#endif

}  // namespace

template <>
const LayerKernels<float>& layer_kernels<float>() {
  static const LayerKernels<float> found = best(FASTKFO_LEVELS(of_float));
  return found;
}
template <>
const LayerKernels<double>& layer_kernels<double>() {
  static const LayerKernels<double> found = best(FASTKFO_LEVELS(of_double));
  return found;
}

}  // namespace fastkfo::cpu
