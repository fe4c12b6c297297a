// The layers of a model, each in four passes: forward; backward; and the derivatives of both along
// a direction V of the parameters, which together are the Hessian-vector product.
#pragma once

#include "inner_loop/activations.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// A read-only matrix with any strides.
template <class S>
struct Matrix {
  const S* data;
  int64_t row, col;
};

// One pass over one layer. x, y: input and output, features by samples; d: their cotangents; _t:
// derivatives along V. Null stands for zero.
template <class S>
struct Span {
  int samples, ld;
  const S* x;
  S* y;
  S* d_x;
  const S* d_y;
  const S* x_t;
  S* y_t;
  S* d_x_t;
  const S* d_y_t;
};

template <class Exec>
struct Linear {
  using S = typename Exec::Number;
  Exec& ex;
  const Layer& layer;
  const Span<S>& at;
  int64_t ld_w;

  // y = W x
  FASTKFO_FN void forward(const S* w) const {
    ex.product(layer.out, at.samples, layer.in, {w, ld_w, 1}, at.x, at.ld, at.y, at.ld);
  }
  FASTKFO_FN void add_bias(S* y, const S* b) const {
    if (b) ex.each(layer.out, at.ld, [=](int64_t r, int64_t i) { y[i] += b[r]; });
  }
  // d_x = W' d_y
  FASTKFO_FN void backward(const S* w) const {
    ex.product(layer.in, at.samples, layer.out, {w, 1, ld_w}, at.d_y, at.ld, at.d_x, at.ld);
  }
  // y_t = V x + W x_t + v; V x is there already
  FASTKFO_FN void forward_tangent(const S* w, const S* v_bias) const {
    if (at.x_t)
      ex.product(layer.out, at.samples, layer.in, {w, ld_w, 1}, at.x_t, at.ld, at.y_t, at.ld, S(1),
                 at.y_t);
    add_bias(at.y_t, v_bias);
  }
  // d_x_t = V' d_y + W' d_y_t; V' d_y is there already
  FASTKFO_FN void backward_tangent(const S* w) const {
    ex.product(layer.in, at.samples, layer.out, {w, 1, ld_w}, at.d_y_t, at.ld, at.d_x_t, at.ld,
               S(1), at.d_x_t);
  }
};

template <class Exec>
struct Activation {
  using S = typename Exec::Number;
  Exec& ex;
  const Layer& layer;
  const Span<S>& at;

  FASTKFO_FN int64_t size() const { return int64_t(layer.out) * at.ld; }

  FASTKFO_FN void forward() const {
    const S slope = S(layer.constant);
    const S* x = at.x;
    S* y = at.y;
    Exec& exec = ex;
    const int64_t n = size();
    with_kind(layer.kind, [=, &exec](auto kind) {
      exec.each(n, [=](int64_t i) { y[i] = activate<decltype(kind)::value, Exec>(x[i], slope); });
    });
  }
  // d_x = f'(x) d_y; along V, y_t = f'(x) x_t
  FASTKFO_FN void scaled_by_derivative(const S* from, S* to) const {
    const S slope = S(layer.constant);
    const S *x = at.x, *y = at.y;
    Exec& exec = ex;
    const int64_t n = size();
    with_kind(layer.kind, [=, &exec](auto kind) {
      exec.each(n, [=](int64_t i) {
        to[i] = derivatives<decltype(kind)::value, Exec>(x[i], y[i], slope).first * from[i];
      });
    });
  }
  // d_x_t = f'(x) d_y_t + f''(x) x_t d_y
  FASTKFO_FN void backward_tangent() const {
    const S slope = S(layer.constant);
    const S *x = at.x, *y = at.y, *x_t = at.x_t, *d_y = at.d_y, *d_y_t = at.d_y_t;
    S* d_x_t = at.d_x_t;
    Exec& exec = ex;
    const int64_t n = size();
    with_kind(layer.kind, [=, &exec](auto kind) {
      exec.each(n, [=](int64_t i) {
        const auto f = derivatives<decltype(kind)::value, Exec>(x[i], y[i], slope);
        const S bend = x_t ? f.second * x_t[i] * d_y[i] : S(0);
        d_x_t[i] = f.first * d_y_t[i] + bend;
      });
    });
  }
};

// Batch norm has its statistics in a row (one feature, all samples), layer norm in a column.
template <class Exec, bool BATCH>
struct Norm {
  using S = typename Exec::Number;
  Exec& ex;
  const Layer& layer;
  const Span<S>& at;
  S *hat, *inv;        // (x - mean) / std, 1 / std
  const S *w, *b;      // null: 1, 0
  S *sum, *other_sum;  // scratch, one number per mean

  static FASTKFO_FN int64_t place(int64_t row, int64_t column) { return BATCH ? row : column; }
  FASTKFO_FN S count() const { return S(BATCH ? at.samples : layer.in); }
  template <class F>
  FASTKFO_FN void total(S* to, const F& f) const {
    if constexpr (BATCH)
      ex.sum_rows(layer.in, at.samples, at.ld, to, f);
    else
      ex.sum_columns(layer.in, at.ld, to, f);
  }
  FASTKFO_FN int64_t means() const { return BATCH ? layer.in : at.ld; }

  // Also leaves mean and biased variance in `statistics`, if that is not null.
  FASTKFO_FN void forward(S* statistics) const {
    const int64_t ld = at.ld, features = layer.in;
    const S n = count(), eps = S(layer.constant);
    const S *x = at.x, *weight = w, *bias = b;
    S *mean = sum, *var = other_sum, *to_inv = inv, *to_hat = hat, *y = at.y;
    total(mean, [=](int64_t, int64_t i) { return x[i]; });
    ex.each(means(), [=](int64_t k) { mean[k] /= n; });
    total(var, [=](int64_t r, int64_t i) {
      const S centred = x[i] - mean[place(r, i - r * ld)];
      return centred * centred;
    });
    ex.each(means(), [=](int64_t k) {
      var[k] /= n;
      to_inv[k] = 1 / Exec::sqrt(var[k] + eps);
    });
    if (statistics)
      ex.each(features, [=](int64_t k) {
        statistics[k] = mean[k];
        statistics[features + k] = var[k];
      });
    ex.each(layer.in, ld, [=](int64_t r, int64_t i) {
      const int64_t k = place(r, i - r * ld);
      to_hat[i] = (x[i] - mean[k]) * to_inv[k];
      y[i] = (weight ? weight[r] : S(1)) * to_hat[i] + (bias ? bias[r] : S(0));
    });
  }
  // g_w = sum d_y hat, g_b = sum d_y
  FASTKFO_FN void gradients(S* g_w, S* g_b) const {
    const S *d_y = at.d_y, *h = hat;
    if (w)
      ex.sum_rows(layer.in, at.samples, at.ld, g_w,
                  [=](int64_t, int64_t i) { return d_y[i] * h[i]; });
    if (b)
      ex.sum_rows(layer.in, at.samples, at.ld, g_b, [=](int64_t, int64_t i) { return d_y[i]; });
  }
  // d_x = (g - mean g - hat mean(g hat)) / std, g = w d_y
  FASTKFO_FN void backward() const {
    const int64_t ld = at.ld;
    const S n = count();
    const S *weight = w, *d_y = at.d_y, *h = hat, *r_std = inv;
    S *s = sum, *s_hat = other_sum, *d_x = at.d_x;
    const auto g = [=](int64_t r, int64_t i) { return weight ? weight[r] * d_y[i] : d_y[i]; };
    total(s, g);
    total(s_hat, [=](int64_t r, int64_t i) { return g(r, i) * h[i]; });
    ex.each(layer.in, ld, [=](int64_t r, int64_t i) {
      const int64_t k = place(r, i - r * ld);
      d_x[i] = r_std[k] * (g(r, i) - (s[k] + h[i] * s_hat[k]) / n);
    });
  }
  // hat_t = (x_t - mean x_t - hat mean(hat x_t)) / std;  y_t = w hat_t + v_w hat + v_b
  FASTKFO_FN void forward_tangent(const S* v_w, const S* v_b, S* hat_t) const {
    const int64_t ld = at.ld;
    const S n = count();
    const S *weight = w, *h = hat, *r_std = inv, *x_t = at.x_t;
    S *s = sum, *s_hat = other_sum, *y_t = at.y_t;
    if (x_t) {
      total(s, [=](int64_t, int64_t i) { return x_t[i]; });
      total(s_hat, [=](int64_t, int64_t i) { return h[i] * x_t[i]; });
    }
    ex.each(layer.in, ld, [=](int64_t r, int64_t i) {
      const int64_t k = place(r, i - r * ld);
      hat_t[i] = x_t ? r_std[k] * (x_t[i] - (s[k] + h[i] * s_hat[k]) / n) : S(0);
      y_t[i] = (weight ? weight[r] : S(1)) * hat_t[i] + (v_w ? v_w[r] * h[i] : S(0)) +
               (v_b ? v_b[r] : S(0));
    });
  }
  // With N = g - mean g - hat mean(g hat) and inv_t = -inv^2 mean(hat x_t):
  //   d_x_t = inv_t N + inv N_t
  // which needs six sums. scratch: four more rows of means.
  FASTKFO_FN void backward_tangent(const S* v_w, const S* hat_t, S* scratch) const {
    const int64_t ld = at.ld, size = means();
    const S n = count();
    const S *weight = w, *h = hat, *r_std = inv, *x_t = at.x_t, *d_y = at.d_y, *d_y_t = at.d_y_t;
    S *s = sum, *s_hat = other_sum, *d_x_t = at.d_x_t;
    S *s_t = scratch, *s_hat_t = s_t + size, *s_cross = s_hat_t + size, *s_x = s_cross + size;
    const auto g = [=](int64_t r, int64_t i) { return weight ? weight[r] * d_y[i] : d_y[i]; };
    const auto g_t = [=](int64_t r, int64_t i) {
      return (weight ? weight[r] * d_y_t[i] : d_y_t[i]) + (v_w ? v_w[r] * d_y[i] : S(0));
    };
    total(s, g);
    total(s_hat, [=](int64_t r, int64_t i) { return g(r, i) * h[i]; });
    total(s_t, g_t);
    total(s_hat_t, [=](int64_t r, int64_t i) { return g_t(r, i) * h[i]; });
    total(s_cross, [=](int64_t r, int64_t i) { return g(r, i) * hat_t[i]; });
    if (x_t)
      total(s_x, [=](int64_t, int64_t i) { return h[i] * x_t[i]; });
    else
      ex.each(size, [=](int64_t k) { s_x[k] = 0; });
    ex.each(layer.in, ld, [=](int64_t r, int64_t i) {
      const int64_t k = place(r, i - r * ld);
      const S rest = g(r, i) - (s[k] + h[i] * s_hat[k]) / n;
      const S rest_t =
          g_t(r, i) - (s_t[k] + hat_t[i] * s_hat[k] + h[i] * (s_hat_t[k] + s_cross[k])) / n;
      d_x_t[i] = r_std[k] * (rest_t - r_std[k] * s_x[k] / n * rest);
    });
  }
  // Added: g_w += sum d_y_t hat + d_y hat_t, g_b += sum d_y_t
  FASTKFO_FN void gradients_tangent(const S* hat_t, S* g_w, S* g_b, S* scratch) const {
    const S *d_y = at.d_y, *d_y_t = at.d_y_t, *h = hat;
    if (w) {
      ex.sum_rows(layer.in, at.samples, at.ld, scratch,
                  [=](int64_t, int64_t i) { return d_y_t[i] * h[i] + d_y[i] * hat_t[i]; });
      ex.each(layer.in, [=](int64_t k) { g_w[k] += scratch[k]; });
    }
    if (b) {
      ex.sum_rows(layer.in, at.samples, at.ld, scratch,
                  [=](int64_t, int64_t i) { return d_y_t[i]; });
      ex.each(layer.in, [=](int64_t k) { g_b[k] += scratch[k]; });
    }
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
