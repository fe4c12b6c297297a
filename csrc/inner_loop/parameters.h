// The step of one parameter, theta' = theta - alpha s o (A G C + beta), and its adjoint.
//
// A linear layer's gradient is G = D X' with no more than as many columns in D as there are
// samples. So A G C is (A D)(C' X)' = P Q, and G itself is never formed.
#pragma once

#include "inner_loop/layers.h"
#include "inner_loop/memory.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// What a parameter's step is made of; null where it is absent. a_t, c_t: the transposes.
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
  int64_t ld;       // of features by samples
  const S* x;       // X [m, samples]
  const S* d;       // D [n, samples]
  const S* p;       // A D [n, samples]
  const S* q;       // X' C [samples, m]
  const S* q_t;     // its transpose, or null
  const S* q_c;     // X' C', or null
  const S* x_rows;  // X', or null
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
  // The gradients of the operands, given lambda, the cotangent of theta'. What reaches C is
  // -alpha X (P' lambda); P' lambda [samples, m] is left in rows_in, for a layer whose X is the
  // same in every step added to what is there. Returns s o lambda.
  FASTKFO_FN const S* adjoint(const WeightStep<S>& step, const S* lambda,
                                     const Gradients<S>& to, const Room<S>& room,
                                     S* fixed) const {
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
    if (to.a) {
      const S* q_t = step.q_t;
      if (!q_t) {
        ex.transpose(step.samples, param.cols, step.q, param.ld, room.cols_in, step.ld);
        q_t = room.cols_in;
      }
      ex.product(param.rows, step.samples, param.cols, {through, param.ld, 1}, q_t, step.ld,
                 room.cols_out, step.ld);
      ex.transpose(param.rows, step.samples, step.d, step.ld, room.rows_out, by.ld_a);
      ex.product(param.rows, param.rows, step.samples, {room.cols_out, step.ld, 1}, room.rows_out,
                 by.ld_a, to.a, by.ld_a, -alpha, to.a);
    }
    if (to.c) {
      S* back = fixed ? fixed : room.rows_in;
      ex.product(step.samples, param.cols, param.rows, {step.p, 1, step.ld}, through, param.ld,
                 back, param.ld, S(1), fixed);
      if (!fixed) right_gradient(step, back, to.c);
    }
    return through;
  }
  FASTKFO_FN void right_gradient(const WeightStep<S>& step, const S* back, S* to) const {
    ex.product(param.cols, param.cols, step.samples, {step.x, step.ld, 1}, back, param.ld, to,
               by.ld_c, -S(param.alpha), to);
  }
  // v = -alpha A' (s o lambda) C', anew
  FASTKFO_FN void direction(const S* through, S* v, const Room<S>& room) const {
    const S alpha = S(param.alpha);
    const S* half = through;
    S factor = -alpha;
    if (by.c) {
      S* to = by.a ? room.square_2 : v;
      ex.product(param.rows, param.cols, param.cols, {through, param.ld, 1}, by.c_t, by.ld_c, to,
                 param.ld, factor);
      half = to;
      factor = 1;
    }
    if (by.a)
      ex.product(param.rows, param.cols, param.rows, {by.a, 1, by.ld_a}, half, param.ld, v,
                 param.ld, factor);
    if (!by.a && !by.c) {
      const int64_t n = int64_t(param.rows) * param.ld;
      ex.each(n, [=](int64_t i) { v[i] = factor * through[i]; });
    }
  }
  // v += -alpha (A' d)(x' C'): what lambda += d x' makes of it. x_c: x' C', if it is there.
  FASTKFO_FN void moved(const S* d, const S* x, const S* x_c, int samples, int64_t ld, S* v,
                               bool anew, const Room<S>& room) const {
    const S* p = d;
    if (by.a) {
      ex.product(param.rows, samples, param.rows, {by.a, 1, by.ld_a}, d, ld, room.cols_out, ld);
      p = room.cols_out;
    }
    moved_by(p, x, x_c, samples, ld, v, anew, room);
  }
  FASTKFO_FN void moved_by(const S* p, const S* x, const S* x_c, int samples, int64_t ld,
                                  S* v, bool anew, const Room<S>& room) const {
    if (!x_c) {
      if (by.c)
        ex.product(samples, param.cols, param.cols, {x, 1, ld}, by.c_t, by.ld_c, room.rows_in,
                   param.ld);
      else
        ex.transpose(param.cols, samples, x, ld, room.rows_in, param.ld);
      x_c = room.rows_in;
    }
    ex.product(param.rows, param.cols, samples, {p, ld, 1}, x_c, param.ld, v, param.ld,
               -S(param.alpha), anew ? nullptr : v);
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
  FASTKFO_FN void adjoint(const S* g, const S* lambda, const Gradients<S>& to, S* v,
                                 S* u, S* scaled) const {
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
