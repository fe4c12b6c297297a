// The losses of one task: their value, their derivative in the predictions, and that one's along a
// direction. Predictions lie class by class, [classes, ld].
#pragma once

#include "inner_loop/plan.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class Exec>
struct TaskLoss {
  using S = typename Exec::Number;
  Exec& ex;
  int kind, classes, samples;
  int64_t ld;

  FASTKFO_FN bool is_cross_entropy() const {
    return kind == kCrossEntropyMean || kind == kCrossEntropySum;
  }
  FASTKFO_FN S weight() const {
    if (kind == kCrossEntropyMean) return S(1) / S(samples);
    if (kind == kSquaresMean) return S(1) / (S(samples) * S(classes));
    return S(1);
  }
  // z: predictions; p: room for a softmax; d: the derivative; lanes: 2 ld numbers of scratch.
  FASTKFO_FN S value(const S* z, const void* y, S* p, S* d, S* lanes) const {
    return is_cross_entropy() ? cross_entropy(z, static_cast<const int64_t*>(y), p, d, lanes)
                              : squares(z, static_cast<const S*>(y), d, lanes);
  }
  // d_t along z_t
  FASTKFO_FN void tangent(const S* p, const S* z_t, S* d_t, S* lanes) const {
    const S w = weight();
    if (!is_cross_entropy()) {
      ex.each(int64_t(classes) * ld, [=](int64_t i) { d_t[i] = 2 * w * z_t[i]; });
      return;
    }
    ex.sum_columns(classes, ld, lanes, [=](int64_t, int64_t i) { return p[i] * z_t[i]; });
    ex.each(classes, ld, [=, stride = ld](int64_t r, int64_t i) {
      d_t[i] = w * p[i] * (z_t[i] - lanes[i - r * stride]);
    });
  }

 private:
  FASTKFO_FN S cross_entropy(const S* z, const int64_t* y, S* p, S* d, S* lanes) const {
    S *highest = lanes, *total = lanes + ld;
    const int64_t stride = ld;
    const int count = classes;
    const S w = weight();
    ex.max_columns(classes, ld, highest, z);
    ex.each(classes, ld,
            [=](int64_t r, int64_t i) { p[i] = Exec::exp(z[i] - highest[i - r * stride]); });
    ex.sum_columns(classes, ld, total, [=](int64_t, int64_t i) { return p[i]; });
    ex.each(classes, ld, [=](int64_t r, int64_t i) {
      p[i] /= total[i - r * stride];
      d[i] = w * p[i];
    });
    ex.each(samples, [=](int64_t s) {
      const int64_t label = y[s];
      if (label < 0 || label >= count) {  // where nobody looked before: the task is not finite
        highest[s] = Exec::nan();
      } else {
        d[label * stride + s] -= w;
        highest[s] = Exec::log(total[s]) + (highest[s] - z[label * stride + s]);
      }
    });
    return w * ex.sum(samples, [=](int64_t s) { return highest[s]; });
  }
  // y [samples, classes]
  FASTKFO_FN S squares(const S* z, const S* y, S* d, S* lanes) const {
    const int64_t stride = ld, n = samples, c = classes;
    const S w = weight();
    ex.each(classes, ld, [=](int64_t r, int64_t i) {
      const int64_t s = i - r * stride;
      d[i] = s < n ? z[i] - y[s * c + r] : S(0);
    });
    ex.sum_columns(classes, ld, lanes, [=](int64_t, int64_t i) { return d[i] * d[i]; });
    ex.each(int64_t(classes) * ld, [=](int64_t i) { d[i] *= 2 * w; });
    return w * ex.sum(samples, [=](int64_t s) { return lanes[s]; });
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
