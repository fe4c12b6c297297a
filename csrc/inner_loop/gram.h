// A first linear layer in the gram form. Its inputs X are the same in every step, and so are
//   M = X' C X   and, for the query,   N = X' C X_q.
// With P_k = A D_k, and P their sum over the steps so far, its outputs are
//   theta_k X = theta_0 X - alpha P M - alpha k beta X,
// and no weight but theta_0 is ever formed. Nor is lambda, the cotangent of one:
//   lambda_k = D_q X_q' + E_k X',   E_k = the sum of the derivatives of D_j along V_j, j >= k,
// of which a step needs no more than lambda Q' = D_q N' + E M'. What is left for the end is a
// product each, of matrices with as many columns as there are samples: late().
#pragma once

#include "inner_loop/places.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class Exec>
class GramLayer : private Places<Exec> {
  using P = Places<Exec>;
  using S = typename Exec::Number;
  using P::blocks;
  using P::ex;
  using P::plan;
  using P::scratch;
  using P::support_record;
  using P::tape;
  using P::theta;
  using P::weight_step;
  using P::x;

  const Layer& layer;
  const Param& param;
  const Operands<S> by;
  const int64_t n, m, samples, ld, queries, ld_q;
  const Gram& at;

 public:
  FASTKFO_FN explicit GramLayer(const P& places)
      : P(places),
        layer(plan.layer[0]),
        param(plan.param[layer.weight]),
        by(this->operands(param, 0)),
        n(layer.out),
        m(layer.in),
        samples(plan.support.samples),
        ld(plan.support.ld),
        queries(plan.query.samples),
        ld_q(plan.query.ld),
        at(plan.gram) {}

  // Once X and Q = X' C are there.
  FASTKFO_FN void begin() const {
    ex.product(samples, samples, m, {q(), param.ld, 1}, x(), ld, tape + at.m, ld);
    ex.transpose(samples, samples, tape + at.m, ld, tape + at.m_t, ld);
    ex.product(n, samples, m, {theta(0, param), param.ld, 1}, x(), ld, tape + at.y, ld);
    if (by.beta) ex.product(n, samples, m, {by.beta, param.ld, 1}, x(), ld, tape + at.y_beta, ld);
    clear(tape + at.p);
  }
  // y = theta_k X
  FASTKFO_FN void support(int k, S* y) const {
    ex.product(n, samples, samples, {tape + at.p, ld, 1}, tape + at.m, ld, y, ld, -alpha(),
               tape + at.y);
    if (!by.beta) return;
    const S moved = alpha() * S(k);
    const S* y_beta = tape + at.y_beta;
    ex.each(n * ld, [=](int64_t i) { y[i] -= moved * y_beta[i]; });
  }
  FASTKFO_FN void step(const S* p) const {
    S* sum = tape + at.p;
    ex.each(n * ld, [=](int64_t i) { sum[i] += p[i]; });
  }
  // y = theta_K X_q
  FASTKFO_FN void query(const S* x_q, S* y) const {
    S *across = tape + at.n, *rows = tape + at.x_q_rows;
    ex.transpose(m, queries, x_q, ld_q, rows, plan.ld_in);
    ex.product(samples, queries, m, {q(), param.ld, 1}, x_q, ld_q, across, ld_q);
    ex.transpose(samples, queries, across, ld_q, tape + at.n_t, ld);
    ex.product(n, queries, m, {theta(0, param), param.ld, 1}, x_q, ld_q, y, ld_q);
    if (by.beta)
      ex.product(n, queries, m, {by.beta, param.ld, 1}, x_q, ld_q, y, ld_q, -alpha() * plan.steps,
                 y);
    ex.product(n, queries, samples, {tape + at.p, ld, 1}, across, ld_q, y, ld_q, -alpha(), y);
  }

  FASTKFO_FN void clear_backward() const {
    clear(work(at.base));
    clear(work(at.e));
    clear(work(at.sum));
    S* cross = work(at.cross);
    ex.each(samples * ld, [=](int64_t i) { cross[i] = 0; });
  }
  // d_q [n, queries], the cotangent of theta_K X_q
  FASTKFO_FN void begin_backward(const S* d_q) const {
    ex.product(n, samples, queries, {d_q, ld_q, 1}, tape + at.n_t, ld, work(at.base), ld);
  }
  FASTKFO_FN void adjoint(const WeightStep<S>& step, const Gradients<S>& to, S* v_x) const {
    const S* e = work(at.e);
    S *half = scratch.room.cols_out, *sum = work(at.sum), *cross = work(at.cross);
    ex.product(n, samples, samples, {e, ld, 1}, tape + at.m_t, ld, half, ld, S(1), work(at.base));
    WeightUpdate<Exec>{ex, param, by, scratch.room}.left_adjoint(step, half, to, v_x);
    ex.product(samples, samples, n, {e, 1, ld}, step.p, ld, cross, ld, S(1), cross);
    ex.each(n * ld, [=](int64_t i) { sum[i] += e[i]; });
  }
  // lambda += d_t X'
  FASTKFO_FN void add(const S* d_t) const {
    S* e = work(at.e);
    ex.each(n * ld, [=](int64_t i) { e[i] += d_t[i]; });
  }

  // The sum over the steps of lambda' P [m, ld], and of D_q' P [queries, ld]
  FASTKFO_FN void end_backward(const S* x_q, const S* d_q) const {
    S *fixed = scratch.fixed, *back = work(at.back);
    ex.product(m, samples, samples, {x(), ld, 1}, work(at.cross), ld, fixed, ld);
    if (!d_q) return;
    ex.product(queries, samples, n, {d_q, 1, ld_q}, tape + at.p, ld, back, ld);
    ex.product(m, samples, queries, {x_q, ld_q, 1}, back, ld, fixed, ld, S(1), fixed);
  }
  // Added to `to` [m, ld]
  FASTKFO_FN void support_gradient(S* to) const {
    const S rate = alpha();
    S* cross_t = work(at.cross_t);
    ex.transpose(samples, samples, work(at.cross), ld, cross_t, ld);
    ex.product(m, samples, n, {theta(0, param), 1, param.ld}, work(at.e), ld, to, ld, S(1), to);
    ex.product(m, samples, samples, {q(), 1, param.ld}, cross_t, ld, to, ld, -rate, to);
    if (by.c)
      ex.product(m, samples, m, {by.c, by.ld_c, 1}, scratch.fixed, ld, to, ld, -rate, to);
    else
      ex.each(m * ld, [=, fixed = scratch.fixed](int64_t i) { to[i] -= rate * fixed[i]; });
    if (by.beta)
      ex.product(m, samples, n, {by.beta, 1, param.ld}, work(at.sum), ld, to, ld, -rate, to);
  }
  FASTKFO_FN void query_gradient(const S* d_q, S* to) const {
    const S rate = alpha();
    S* forth = work(at.forth);
    ex.product(m, queries, n, {theta(0, param), 1, param.ld}, d_q, ld_q, to, ld_q);
    ex.product(samples, queries, n, {tape + at.p, 1, ld}, d_q, ld_q, forth, ld_q);
    ex.product(m, queries, samples, {q(), 1, param.ld}, forth, ld_q, to, ld_q, -rate, to);
    if (by.beta)
      ex.product(m, queries, n, {by.beta, 1, param.ld}, d_q, ld_q, to, ld_q, -rate * plan.steps,
                 to);
  }
  // The gradient of theta, C (transposed) or beta is a sum of products; returns of how many.
  FASTKFO_FN int late(int64_t wanted, const S* d_q, Outer<S>* to) const {
    const S rate = alpha();
    const S *x_rows = tape + plan.x_rows, *x_q_rows = tape + at.x_q_rows;
    if (wanted == kRight) {
      to[0] = {scratch.fixed, ld, samples, x_rows, -rate};
      return 1;
    }
    const bool of_theta = wanted == kTheta;
    to[0] = {work(of_theta ? at.e : at.sum), ld, samples, x_rows, of_theta ? S(1) : -rate};
    if (!d_q) return 1;
    to[1] = {d_q, ld_q, queries, x_q_rows, of_theta ? S(1) : -rate * plan.steps};
    return 2;
  }

 private:
  FASTKFO_FN S alpha() const { return S(param.alpha); }
  FASTKFO_FN S* q() const { return tape + plan.q0; }
  FASTKFO_FN S* work(int64_t piece) const { return scratch.gram + piece; }
  FASTKFO_FN void clear(S* to) const {
    ex.each(n * ld, [=](int64_t i) { to[i] = 0; });
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
