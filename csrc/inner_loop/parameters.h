// The step of one parameter, theta' = theta - alpha s o (A G C + beta), and its adjoint.
//
// A linear layer's gradient is G = D X' with no more than as many columns in D as there are
// samples. So A G C is (A D)(X' C) = P Q, and G itself need not be formed: see Form.
#pragma once

#include "inner_loop/layers.h"
#include "inner_loop/memory.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// What a parameter's step is made of; null where it is absent. _t: its transpose.
template <class S>
struct Operands {
  const S *a, *a_t, *c, *c_t, *beta, *s;
  int64_t ld_a, ld_c;
};

// Where its gradients are summed; null where none is wanted. theta's is always there.
template <class S>
struct Gradients {
  S *theta, *a, *c, *beta, *s;
};

// What a step of a weight leaves for its adjoint, and what every pass over its layer has.
template <class S>
struct WeightStep {
  int samples;
  int64_t ld;        // of features by samples
  const S* x;        // X [m, samples]
  const S* x_rows;   // X' [samples, m]
  const S* d;        // D [n, samples]
  const S* p;        // A D [n, samples]
  const S* q;        // X' C [samples, m]
  const S* q_t;      // its transpose, or null
  const S *g, *g_c;  // in the dense form: G, G C [n, m]
};

// Where an adjoint leaves what the derivatives of a pass along V begin with: V X [n, ld], and V' D
// [m, ld] added to `base`. Null where it is not wanted.
template <class S>
struct Along {
  S *v_x, *v_d;
  const S* base;
};

template <class Exec>
struct WeightUpdate {
  using S = typename Exec::Number;
  Exec& ex;
  const Param& param;
  const Operands<S>& by;
  const Room<S>& room;

  FASTKFO_FN S alpha() const { return S(param.alpha); }
  FASTKFO_FN int64_t size() const { return int64_t(param.rows) * param.ld; }

  // to = A D
  FASTKFO_FN void left(const WeightStep<S>& step, S* to) const {
    ex.product(param.rows, step.samples, param.rows, {by.a, by.ld_a, 1}, step.d, step.ld, to,
               step.ld);
  }
  // to = X' C, or X' where there is no C
  FASTKFO_FN void right(const S* x, int samples, int64_t ld, S* to) const {
    if (by.c)
      ex.product(samples, param.cols, param.cols, {x, 1, ld}, by.c, by.ld_c, to, param.ld);
    else
      ex.transpose(param.cols, samples, x, ld, to, param.ld);
  }
  // theta' = theta - alpha s o (A G C + beta)
  FASTKFO_FN void step(int form, const WeightStep<S>& step, const S* theta, S* next) const {
    const S rate = alpha();
    const S *beta = by.beta, *s = by.s;
    if (s) {
      S* u = room.square;
      update(form, step, u, S(1), beta);
      ex.each(size(), [=](int64_t i) { next[i] = theta[i] - rate * s[i] * u[i]; });
      return;
    }
    update(form, step, next, -rate, theta);
    if (beta) ex.each(size(), [=](int64_t i) { next[i] -= rate * beta[i]; });
  }
  // to = factor A G C + from
  FASTKFO_FN void update(int form, const WeightStep<S>& step, S* to, S factor,
                         const S* from) const {
    const int64_t n = param.rows, m = param.cols, ld = param.ld;
    if (form != kDense) {
      ex.product(n, m, step.samples, {step.p, step.ld, 1}, step.q, ld, to, ld, factor, from);
    } else if (by.a) {
      ex.product(n, m, n, {by.a, by.ld_a, 1}, step.g_c, ld, to, ld, factor, from);
    } else {
      const S* g = step.g_c;
      ex.each(size(), [=](int64_t i) { to[i] = factor * g[i] + (from ? from[i] : S(0)); });
    }
  }
  // The dense form: g = D X'
  FASTKFO_FN void gradient(const WeightStep<S>& step, S* g) const {
    ex.product(param.rows, param.cols, step.samples, {step.d, step.ld, 1}, step.x_rows, param.ld, g,
               param.ld);
  }
  // g_c = G C
  FASTKFO_FN void times_right(const S* g, S* g_c) const {
    const int64_t n = param.rows, m = param.cols, ld = param.ld;
    if (by.c) ex.product(n, m, m, {g, ld, 1}, by.c, by.ld_c, g_c, ld);
  }

  // The gradients of s and beta, given lambda, the cotangent of theta'; returns s o lambda.
  FASTKFO_FN const S* elementwise_adjoint(int form, const WeightStep<S>& step, const S* lambda,
                                          const Gradients<S>& to) const {
    const S rate = alpha();
    const S* through = lambda;
    if (const S* s = by.s) {
      S* u = room.square;
      if (S* g = to.s) {
        update(form, step, u, S(1), by.beta);
        ex.each(size(), [=](int64_t i) { g[i] -= rate * lambda[i] * u[i]; });
      }
      ex.each(size(), [=](int64_t i) { u[i] = s[i] * lambda[i]; });
      through = u;
    }
    if (S* g = to.beta) ex.each(size(), [=](int64_t i) { g[i] -= rate * through[i]; });
    return through;
  }
  // Of A, and V X, from half = lambda Q' [n, ld]. V itself, -alpha A' lambda C', is never formed:
  // V X is -alpha A' (lambda Q'), and V' D is -alpha C (lambda' P).
  FASTKFO_FN void left_adjoint(const WeightStep<S>& step, const S* half, const Gradients<S>& to,
                               S* v_x) const {
    const int64_t n = param.rows;
    const S rate = alpha();
    if (to.a) {
      ex.transpose(n, step.samples, step.d, step.ld, room.rows_out, by.ld_a);
      ex.product(n, n, step.samples, {half, step.ld, 1}, room.rows_out, by.ld_a, to.a, by.ld_a,
                 -rate, to.a);
    }
    if (!v_x) return;
    if (by.a)
      ex.product(n, step.samples, n, {by.a, 1, by.ld_a}, half, step.ld, v_x, step.ld, -rate);
    else
      ex.each(n * step.ld, [=](int64_t i) { v_x[i] = -rate * half[i]; });
  }
  FASTKFO_FN void factored_adjoint(const WeightStep<S>& step, const S* lambda,
                                   const Gradients<S>& to, S* fixed, const Along<S>& along) const {
    const S* through = elementwise_adjoint(kFactored, step, lambda, to);
    if (to.a || along.v_x) {
      const S* q_t = step.q_t;
      if (!q_t) {
        ex.transpose(step.samples, param.cols, step.q, param.ld, room.cols_in, step.ld);
        q_t = room.cols_in;
      }
      const bool at_once = !by.a && !to.a;
      S* half = at_once ? along.v_x : room.cols_out;
      ex.product(param.rows, step.samples, param.cols, {through, param.ld, 1}, q_t, step.ld, half,
                 step.ld, at_once ? -alpha() : S(1));
      if (!at_once) left_adjoint(step, half, to, along.v_x);
    }
    if (fixed) {
      right_half(step, through, fixed, S(1), fixed);
    } else if (to.c || along.v_d) {
      if (!by.c) {
        right_half(step, through, along.v_d, -alpha(), along.base);
        return;
      }
      right_half(step, through, room.cols_in, S(1), nullptr);
      if (along.v_d) right_tangent(step, room.cols_in, along);
      if (to.c) right_gradient(step, room.cols_in, to.c);
    }
  }
  // to = factor lambda' P + from [m, ld]
  FASTKFO_FN void right_half(const WeightStep<S>& step, const S* lambda, S* to, S factor,
                             const S* from) const {
    ex.product(param.cols, step.samples, param.rows, {lambda, 1, param.ld}, step.p, step.ld, to,
               step.ld, factor, from);
  }
  // V' D = -alpha C half, added to base
  FASTKFO_FN void right_tangent(const WeightStep<S>& step, const S* half,
                                const Along<S>& along) const {
    const S rate = alpha();
    S* to = along.v_d;
    const S* base = along.base;
    if (by.c)
      ex.product(param.cols, step.samples, param.cols, {by.c, by.ld_c, 1}, half, step.ld, to,
                 step.ld, -rate, base);
    else
      ex.each(param.cols * step.ld,
              [=](int64_t i) { to[i] = (base ? base[i] : S(0)) - rate * half[i]; });
  }
  // The gradient of C, transposed, from lambda' P:  -alpha (lambda' P) X'
  FASTKFO_FN void right_gradient(const WeightStep<S>& step, const S* half, S* to) const {
    ex.product(param.cols, param.cols, step.samples, {half, step.ld, 1}, step.x_rows, param.ld, to,
               by.ld_c, -alpha(), to);
  }
  FASTKFO_FN void dense_adjoint(const WeightStep<S>& step, const S* lambda, const Gradients<S>& to,
                                const Along<S>& along) const {
    const int64_t n = param.rows, m = param.cols, ld = param.ld;
    const S rate = alpha();
    const S* through = elementwise_adjoint(kDense, step, lambda, to);
    S *back = room.dense, *v = back + size(), *g_c_t = v + size();
    if (to.a) {
      ex.transpose(n, m, step.g_c, ld, g_c_t, by.ld_a);
      ex.product(n, n, m, {through, ld, 1}, g_c_t, by.ld_a, to.a, by.ld_a, -rate, to.a);
    }
    if (by.a) ex.product(n, m, n, {by.a, 1, by.ld_a}, through, ld, back, ld);
    const S* half = by.a ? back : through;
    if (to.c) ex.product(m, m, n, {half, 1, ld}, step.g, ld, to.c, by.ld_c, -rate, to.c);
    if (!along.v_x) return;
    if (by.c)
      ex.product(n, m, m, {half, ld, 1}, by.c_t, by.ld_c, v, ld, -rate);
    else
      ex.each(size(), [=](int64_t i) { v[i] = -rate * half[i]; });
    tangents(step, v, along);
  }
  // V X and V' D from V
  FASTKFO_FN void tangents(const WeightStep<S>& step, const S* v, const Along<S>& along) const {
    const int64_t n = param.rows, m = param.cols, ld = param.ld;
    ex.product(n, step.samples, m, {v, ld, 1}, step.x, step.ld, along.v_x, step.ld);
    if (along.v_d)
      ex.product(m, step.samples, n, {v, 1, ld}, step.d, step.ld, along.v_d, step.ld, S(1),
                 along.base);
  }
};

// A vector of n numbers g, with A [n, n] and C one number.
template <class Exec>
struct VectorUpdate {
  using S = typename Exec::Number;
  Exec& ex;
  const Param& param;
  const Operands<S>& by;

  FASTKFO_FN S c() const { return by.c ? by.c[0] : S(1); }

  // u = A g c, one row
  FASTKFO_FN void update(const S* g, S* u) const {
    const S factor = c();
    if (by.a)
      ex.product(1, param.n, param.n, {g, 0, 1}, by.a_t, by.ld_a, u, by.ld_a, factor);
    else
      ex.each(param.n, [=](int64_t i) { u[i] = factor * g[i]; });
  }
  FASTKFO_FN void step(const S* g, const S* theta, S* next, S* u) const {
    const S alpha = S(param.alpha);
    const S *beta = by.beta, *s = by.s;
    update(g, u);
    ex.each(param.n, [=](int64_t i) {
      const S moved = u[i] + (beta ? beta[i] : S(0));
      next[i] = theta[i] - alpha * (s ? s[i] * moved : moved);
    });
  }
  // The gradients of the operands, and v = -alpha A' (s o lambda) c. u: two rows of scratch.
  FASTKFO_FN void adjoint(const S* g, const S* lambda, const Gradients<S>& to, S* v, S* u,
                          S* scaled) const {
    const S alpha = S(param.alpha), factor = c();
    const S* through = lambda;
    if (by.s) update(g, u);
    if (const S* s = by.s) {
      const S* beta = by.beta;
      S* g_s = to.s;
      ex.each(param.n, [=](int64_t i) {
        if (g_s) g_s[i] -= alpha * lambda[i] * (u[i] + (beta ? beta[i] : S(0)));
        scaled[i] = s[i] * lambda[i];
      });
      through = scaled;
    }
    if (S* g_beta = to.beta) ex.each(param.n, [=](int64_t i) { g_beta[i] -= alpha * through[i]; });
    if (to.c) {
      if (by.a)
        ex.product(1, param.n, param.n, {g, 0, 1}, by.a_t, by.ld_a, u, by.ld_a);
      else
        ex.each(param.n, [=](int64_t i) { u[i] = g[i]; });
      const S along = ex.sum(param.n, [=](int64_t i) { return through[i] * u[i]; });
      S* g_c = to.c;
      ex.each(1, [=](int64_t) { g_c[0] -= alpha * along; });
    }
    if (to.a)
      ex.product(param.n, param.n, 1, {through, 1, 0}, g, 0, to.a, by.ld_a, -alpha * factor, to.a);
    if (!v) return;
    if (by.a)
      ex.product(1, param.n, param.n, {through, 0, 1}, by.a, by.ld_a, v, by.ld_a, -alpha * factor);
    else
      ex.each(param.n, [=](int64_t i) { v[i] = -alpha * factor * through[i]; });
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
