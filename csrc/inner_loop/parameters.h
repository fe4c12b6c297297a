// The step of one parameter, theta' = theta - alpha s o (A G C + beta), and its adjoint.
//
// A linear layer's gradient is G = D X' with no more than as many columns in D as there are
// samples. So A G C is (A D)(C' X)' = P Q, and G itself is never formed.
#pragma once

#include "inner_loop/layers.h"
#include "inner_loop/memory.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// What a parameter's step is made of; null where it is absent. a_t: the transpose of A.
template <class S>
struct Operands {
  const S *a, *a_t, *c, *beta, *s;
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
  int64_t ld;       // of features by samples
  const S* x;       // X [m, samples]
  const S* x_rows;  // X' [samples, m]
  const S* d;       // D [n, samples]
  const S* p;       // A D [n, samples]
  const S* q;       // X' C [samples, m]
  const S* q_t;     // its transpose, or null
};

template <class Exec>
struct WeightUpdate {
  using S = typename Exec::Number;
  Exec& ex;
  const Param& param;
  const Operands<S>& by;

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
  // theta' = theta - alpha s o (P Q + beta)
  FASTKFO_FN void step(const WeightStep<S>& step, const S* theta, S* next,
                       const Room<S>& room) const {
    const S alpha = S(param.alpha);
    const S *beta = by.beta, *s = by.s;
    const int64_t n = int64_t(param.rows) * param.ld;
    if (s) {
      S* u = room.square;
      update(step, u);
      ex.each(n, [=](int64_t i) { next[i] = theta[i] - alpha * s[i] * u[i]; });
      return;
    }
    ex.product(param.rows, param.cols, step.samples, {step.p, step.ld, 1}, step.q, param.ld, next,
               param.ld, -alpha, theta);
    if (beta) ex.each(n, [=](int64_t i) { next[i] -= alpha * beta[i]; });
  }
  // u = P Q + beta
  FASTKFO_FN void update(const WeightStep<S>& step, S* u) const {
    ex.product(param.rows, param.cols, step.samples, {step.p, step.ld, 1}, step.q, param.ld, u,
               param.ld, S(1), by.beta);
  }
  // The adjoint, given lambda, the cotangent of theta'. With V = -alpha A' (s o lambda) C' the
  // cotangent of G, what the derivative of a pass along V needs is no more than
  //   V X  = -alpha A' ((s o lambda) Q')     and     V' D = -alpha C ((s o lambda)' P),
  // and the products in brackets are those that the gradients of A and C are made of. They go to
  // v_x [n, ld] and, added to `base`, to v_d [m, ld], where these are not null.
  // lambda' P is added to `fixed`, for a layer whose X is the same in every step, if there is one.
  FASTKFO_FN void adjoint(const WeightStep<S>& step, const S* lambda, const Gradients<S>& to,
                          const Room<S>& room, S* fixed, S* v_x, S* v_d, const S* base) const {
    const S alpha = S(param.alpha);
    const int64_t n = int64_t(param.rows) * param.ld;
    const S* through = lambda;
    if (by.s) {
      if (S* g = to.s) {
        S* u = room.square;
        update(step, u);
        ex.each(n, [=](int64_t i) { g[i] -= alpha * lambda[i] * u[i]; });
      }
      const S* s = by.s;
      S* scaled = room.square;
      ex.each(n, [=](int64_t i) { scaled[i] = s[i] * lambda[i]; });
      through = scaled;
    }
    if (S* g = to.beta) ex.each(n, [=](int64_t i) { g[i] -= alpha * through[i]; });
    if (to.a || v_x) {
      const S* q_t = step.q_t;
      if (!q_t) {
        ex.transpose(step.samples, param.cols, step.q, param.ld, room.cols_in, step.ld);
        q_t = room.cols_in;
      }
      S* half = room.cols_out;
      if (v_x && !by.a && !to.a) half = v_x;
      ex.product(param.rows, step.samples, param.cols, {through, param.ld, 1}, q_t, step.ld, half,
                 step.ld, by.a ? S(1) : -alpha);
      if (v_x && by.a)
        ex.product(param.rows, step.samples, param.rows, {by.a, 1, by.ld_a}, half, step.ld, v_x,
                   step.ld, -alpha);
      if (to.a) {
        ex.transpose(param.rows, step.samples, step.d, step.ld, room.rows_out, by.ld_a);
        ex.product(param.rows, param.rows, step.samples, {half, step.ld, 1}, room.rows_out, by.ld_a,
                   to.a, by.ld_a, -alpha, to.a);
      }
    }
    if (to.c || v_d) {
      S* half = fixed ? fixed : room.cols_in;
      if (!by.c && v_d) {
        ex.product(param.cols, step.samples, param.rows, {through, 1, param.ld}, step.p, step.ld,
                   v_d, step.ld, -alpha, base);
      } else if (fixed && !v_d) {
        ex.product(param.cols, step.samples, param.rows, {through, 1, param.ld}, step.p, step.ld,
                   fixed, step.ld, S(1), fixed);
      } else {
        S* now = room.cols_in;
        ex.product(param.cols, step.samples, param.rows, {through, 1, param.ld}, step.p, step.ld,
                   now, step.ld);
        if (fixed) {
          const int64_t size = int64_t(param.cols) * step.ld;
          ex.each(size, [=](int64_t i) { fixed[i] += now[i]; });
        }
        if (v_d)
          ex.product(param.cols, step.samples, param.cols, {by.c, by.ld_c, 1}, now, step.ld, v_d,
                     step.ld, -alpha, base);
        half = now;
      }
      if (to.c && !fixed) right_gradient(step, half, to.c);
    }
  }
  // The gradient of C, transposed, from lambda' P [m, ld]:  -alpha (lambda' P) X'
  FASTKFO_FN void right_gradient(const WeightStep<S>& step, const S* half, S* to) const {
    ex.product(param.cols, param.cols, step.samples, {half, step.ld, 1}, step.x_rows, param.ld, to,
               by.ld_c, -S(param.alpha), to);
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
    if (by.s || to.c) update(g, u);
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
