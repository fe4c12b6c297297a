// The layers for one instruction set: included by layers_v4.cpp and its like, which say which. All
// of it lies in a namespace of that name, so that nothing that is compiled for a newer processor
// can stand in for what an older one needs.
#include "cpu/layers.h"

#define FASTKFO_INLINE inline __attribute__((always_inline))

#include "cpu/layers_transpose.h"
//
#include "cpu/conv_patches.h"
//
#include "cpu/conv_outer.h"
#include "cpu/conv_products.h"
#include "cpu/norm_batch.h"
#include "cpu/norm_rows.h"
#include "cpu/pool_windows.h"

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

template <class S>
int64_t work(int64_t taps, int64_t channels, int64_t columns) {
  return std::max(products_work<S>(taps, channels), outer_work<S>(taps, channels, columns));
}

template <class S>
LayerKernels<S> all() {
  return {kWidth<S>,
          work<S>,
          pack<S>,
          products<S>,
          outer<S>,
          unpack<S>,
          batch_norm_channels<S, Pass::forward>,
          batch_norm_channels<S, Pass::backward>,
          batch_norm_channels<S, Pass::double_backward>,
          layer_norm<S>,
          layer_norm_backward<S>,
          layer_norm_double_backward<S>,
          max_pool<S>,
          max_pool_scatter<S>,
          max_pool_gather<S>,
          avg_pool<S>,
          avg_pool_backward<S>};
}
LayerKernels<float> of_float() { return all<float>(); }
LayerKernels<double> of_double() { return all<double>(); }

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
