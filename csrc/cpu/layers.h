// The layers of convolutional learners, compiled for several instruction sets. Images lie as
// [T, N, H, W, C], channels last: a pixel's channels are neighbours, and vectors run along them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/vector.h"

namespace fastkfo::cpu {

// Which pixel of a source each tap of each target pixel reads, in every sample.
struct Geometry {
  int64_t pixels, taps, row;     // of target pixels; of taps, and in one row of the window
  std::vector<int32_t> order;    // target pixels, those with the same taps together
  std::vector<int32_t> classes;  // where in `order` each such class begins, and the end
  std::vector<int32_t> source;   // [pixels][taps]: a source pixel, or -1 for padding
};

constexpr int64_t kSpan = 512;   // target pixels that one call of `products` may be given
constexpr int64_t kPatched = 8;  // channels below which the taps of a pixel are gathered first
constexpr int64_t kOuterBytes = 16 << 10;  // of cotangents that `outer` reads again and again

// A sum over taps and channels of one task and group, for one pair (x, w) or two:
//   out[p] = start + sum_tap x[source(p, tap)] w[tap]
template <class S>
struct Products {
  int pairs;
  const S* x[2];
  const S* x_end[2];          // where the memory of all tasks ends
  const S* packed[2];         // see `pack`
  int64_t x_sample, x_pixel;  // steps, in numbers
  int64_t channels, columns;  // of a source pixel and of a target pixel
  S* out;
  int64_t out_sample, out_pixel;
  const S* start;  // [columns], or null for zero
  S* work;         // LayerKernels::work numbers
};

// sums[tap * channels + c] += sum_p x[source(p, tap)][c] dy[p] and sum_of_dy += sum_p dy[p]. Rows
// of `sums`, and sum_of_dy, are padded to whole vectors.
template <class S>
struct Outer {
  const S* x;
  const S* x_end;
  int64_t x_sample, x_pixel;
  const S* dy;
  int64_t dy_sample, dy_pixel;
  int64_t channels, columns, samples;
  S* sums;
  S* sum_of_dy;  // or null
  S* work;
};

// Weights as they lie: number k of a column is at data[column * step + k], k < count.
template <class S>
struct Columns {
  S* data;
  int64_t step, count;
  const S* end;  // where their memory ends
};

// Batch norm of some channels of one task: x and what is shaped like it are [rows][step],
// everything else one number per channel. What a pass does not use is null.
template <class S>
struct BatchNorm {
  int64_t rows, step, channels;
  double eps;
  bool relu;
  const S *x, *weight, *bias;
  const S *dy, *a, *b, *c;  // the cotangents of y, dx, d_weight and d_bias
  S *mean, *var, *rstd, *y, *dx, *d_weight, *d_bias, *d_dy;  // var forwards, rstd backwards

  void skip(int64_t count) {
    channels -= count;
    for (const S** p : {&x, &weight, &bias, &dy, &a, &b, &c})
      if (*p) *p += count;
    for (S** p : {&mean, &var, &rstd, &y, &dx, &d_weight, &d_bias, &d_dy})
      if (*p) *p += count;
  }
};

// Layer norm of one task: rows of `size` numbers; mean and rstd one per row, the others per place.
template <class S>
struct LayerNorm {
  int64_t rows, size;
  double eps;
  const S *x, *weight, *bias;
  const S *dy, *a, *b, *c;  // the cotangents of y, dx, d_weight and d_bias
  S *mean, *rstd, *y, *dx, *d_weight, *d_bias, *d_dy;
};

// Windows over images [H, W, C]. The last three are of averages.
struct Pooling {
  int64_t size[2], out_size[2], channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  bool include_pad;
  int64_t divisor;  // 0: none given
};

template <class S>
struct LayerKernels {
  int64_t width;  // numbers in a vector
  int64_t (*work)(int64_t taps, int64_t channels, int64_t columns);
  // Number k of every column goes to row rows[k] + shift of the `depth` rows that `products` reads.
  void (*pack)(const Columns<const S>& from, int64_t columns, const int32_t* rows, int64_t shift,
               int64_t depth, S* to);
  // Target pixels [first, last) of one class, counted over all samples.
  void (*products)(const Geometry&, const Products<S>&, int64_t of_class, int64_t first,
                   int64_t last);
  void (*outer)(const Geometry&, const Outer<S>&);
  // Number k of every column comes from row rows[k], rows padded to whole vectors.
  void (*unpack)(const S* from, int64_t columns, const int32_t* rows, const Columns<S>& to);
  void (*batch_norm)(const BatchNorm<S>&);                  // to mean, var, y
  void (*batch_norm_backward)(const BatchNorm<S>&);         // to dx, d_weight, d_bias
  void (*batch_norm_double_backward)(const BatchNorm<S>&);  // to d_dy, dx, d_weight
  void (*layer_norm)(const LayerNorm<S>&);
  void (*layer_norm_backward)(const LayerNorm<S>&);
  void (*layer_norm_double_backward)(const LayerNorm<S>&);
  // Of one image. `where` holds the pixel of each maximum.
  void (*max_pool)(const Pooling&, const S* x, S* y, int32_t* where);
  void (*max_pool_scatter)(const Pooling&, const S* dy, const int32_t* where, S* dx);
  void (*max_pool_gather)(const Pooling&, const S* v, const int32_t* where, S* to);
  void (*avg_pool)(const Pooling&, const S* x, S* y);
  void (*avg_pool_backward)(const Pooling&, const S* dy, S* dx);
};

#define FASTKFO_DECLARE(level)      \
  namespace level {                 \
  LayerKernels<float> of_float();   \
  LayerKernels<double> of_double(); \
  }
FASTKFO_DECLARE(baseline)
FASTKFO_DECLARE(v3)
FASTKFO_DECLARE(v4)
#undef FASTKFO_DECLARE

// Those for this processor.
template <class S>
const LayerKernels<S>& layer_kernels();
template <>
const LayerKernels<float>& layer_kernels<float>();
template <>
const LayerKernels<double>& layer_kernels<double>();

}  // namespace fastkfo::cpu
