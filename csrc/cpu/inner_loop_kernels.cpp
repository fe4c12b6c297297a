// Which instruction set the fused inner loop runs on.
#include "cpu/inner_loop_kernels.h"

#include "cpu/levels.h"

namespace fastkfo::inner_loop {
namespace {

template <class K>
K best(K (*plain)(), K (*newer)(), K (*newest)()) {
  const int level = cpu::cpu_level();
  return level == 4 ? newest() : level == 3 ? newer() : plain();
}

#ifdef FASTKFO_X86_PRAGMAS
#define FASTKFO_LEVELS(f) baseline::f, v3::f, v4::f
#else
#define FASTKFO_LEVELS(f) baseline::f, baseline::f, baseline::f
#endif

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> found = best(FASTKFO_LEVELS(of_float));
  return found;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> found = best(FASTKFO_LEVELS(of_double));
  return found;
}

}  // namespace fastkfo::inner_loop
