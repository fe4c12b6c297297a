// A transform that is adapted too: before step k >= 1, its operands phi = (L, R, beta) take a step
// of their own on the same loss, through the last update alone,
//   phi_k = phi_{k-1} + alpha^2 (d U(G_{k-1}) / d phi)' G_k.
// U = A G C + beta is linear in each of A, G and C, so that everything here is made of three
// products (Trilinear). With psd, A = L' L, and the cotangent S of A reaches L as L (S + S').
#pragma once

#include "inner_loop/places.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

// A G C and its cotangents, for a weight [n, m], or a vector of n numbers with C one number. A or C
// may be null, which stands for 1. t, turned: scratch.
template <class Exec>
struct Trilinear {
  using S = typename Exec::Number;
  Exec& ex;
  const Param& p;
  int64_t ld_a, ld_c;
  S *t, *turned;

  FASTKFO_FN bool vector() const { return p.rows == 1 && p.m == 1; }

  // to = factor A G C + from
  FASTKFO_FN void value(const S* a, const S* c, const S* g, S* to, S factor, const S* from) const {
    if (vector()) {
      if (a) ex.transpose(p.n, p.n, a, ld_a, turned, ld_a);
      return vector_product(a ? turned : nullptr, c, g, to, factor, from);
    }
    if (c) ex.product(p.n, p.m, p.m, {g, p.ld, 1}, c, ld_c, t, p.ld);
    left_product(Matrix<S>{a, ld_a, 1}, c ? t : g, to, factor, from);
  }
  // to = factor A' H C' + from: what a cotangent H of A G C sends to G
  FASTKFO_FN void pull(const S* a, const S* c, const S* h, S* to, S factor, const S* from) const {
    if (vector()) return vector_product(a, c, h, to, factor, from);
    if (c) {
      ex.transpose(p.m, p.m, c, ld_c, turned, ld_c);
      ex.product(p.n, p.m, p.m, {h, p.ld, 1}, turned, ld_c, t, p.ld);
    }
    left_product(Matrix<S>{a, 1, ld_a}, c ? t : h, to, factor, from);
  }
  // to = H (G C)': what it sends to A
  FASTKFO_FN void to_left(const S* c, const S* g, const S* h, S* to) const {
    if (vector()) {
      ex.product(p.n, p.n, 1, {h, 1, 0}, g, 0, to, ld_a, c ? c[0] : S(1));
      return;
    }
    if (c) ex.product(p.n, p.m, p.m, {g, p.ld, 1}, c, ld_c, t, p.ld);
    ex.transpose(p.n, p.m, c ? t : g, p.ld, turned, ld_a);
    ex.product(p.n, p.n, p.m, {h, p.ld, 1}, turned, ld_a, to, ld_a);
  }
  // to = G' A' H: what it sends to C
  FASTKFO_FN void to_right(const S* a, const S* g, const S* h, S* to) const {
    if (vector()) {
      vector_product(a, nullptr, h, t, S(1), nullptr);
      const S* moved = t;
      const S along = ex.sum(p.n, [=](int64_t i) { return g[i] * moved[i]; });
      ex.each(1, [=](int64_t) { to[0] = along; });
      return;
    }
    if (a) ex.product(p.n, p.m, p.n, {a, 1, ld_a}, h, p.ld, t, p.ld);
    ex.product(p.m, p.m, p.n, {g, 1, p.ld}, a ? t : h, p.ld, to, ld_c);
  }

 private:
  // to = factor g' A c + from, one row
  FASTKFO_FN void vector_product(const S* a, const S* c, const S* g, S* to, S factor,
                                 const S* from) const {
    const S by = factor * (c ? c[0] : S(1));
    if (a)
      ex.product(1, p.n, p.n, {g, 0, 1}, a, ld_a, to, ld_a, by, from);
    else
      ex.each(p.n, [=](int64_t i) { to[i] = by * g[i] + (from ? from[i] : S(0)); });
  }
  FASTKFO_FN void left_product(Matrix<S> a, const S* right, S* to, S factor, const S* from) const {
    if (a.data)
      ex.product(p.n, p.m, p.n, a, right, p.ld, to, p.ld, factor, from);
    else
      ex.each(int64_t(p.rows) * p.ld,
              [=](int64_t i) { to[i] = factor * right[i] + (from ? from[i] : S(0)); });
  }
};

template <class Exec>
class Adapting : private Places<Exec> {
  using P = Places<Exec>;
  using S = typename Exec::Number;
  using P::ex;
  using P::gradients;
  using P::operands;
  using P::phi;
  using P::plan;
  using P::raw;
  using P::scratch;

  const Param& p;
  const Trilinear<Exec> u;
  const S rate;
  const AdaptPlaces& at;

 public:
  FASTKFO_FN Adapting(const P& places, const Param& param)
      : P(places),
        p(param),
        u{ex,
          p,
          operands(p, 0).ld_a,
          operands(p, 0).ld_c,
          scratch.adapt + plan.adapting.t,
          scratch.adapt + plan.adapting.turned},
        rate(S(p.alpha)),
        at(plan.adapting) {}

  // phi_k from phi_{k-1}; before, g: the gradients of the last step and of this one.
  FASTKFO_FN void step(int k, const S* before, const S* g) const {
    const Operands<S> by = operands(p, k - 1);
    if (p.left) {
      u.to_left(by.c, before, g, work(at.s_a));
      move(k, true, p.n, u.ld_a, work(at.s_a));
    }
    if (p.right) {
      u.to_right(by.a, before, g, work(at.s_c));
      move(k, false, p.m, u.ld_c, work(at.s_c));
    }
    if (!p.bias) return;
    const S *beta = by.beta, by_rate = rate * rate;
    S* to = phi(k) + p.beta;
    ex.each(size(), [=](int64_t i) { to[i] = beta[i] + by_rate * g[i]; });
  }

  // The adjoint of the step of theta, and then of that of phi. v: V of this parameter; carried:
  // what the step of phi after this one has sent to g, and what this one sends to the g before.
  FASTKFO_FN void adjoint(int k, const S* before, const S* g, const S* lambda, S* v,
                          S* carried) const {
    const Gradients<S> to = gradients(p);
    through_theta(k, g, lambda, to, v, carried);
    if (k > 0) through_phi(k, before, g, to, v, carried);
  }

 private:
  FASTKFO_FN S* work(int64_t piece) const { return scratch.adapt + piece; }
  FASTKFO_FN int64_t size() const { return int64_t(p.rows) * p.ld; }

  // s += s'
  FASTKFO_FN void symmetrise(S* s, int64_t n, int64_t ld) const {
    S* turned = u.turned;
    ex.transpose(n, n, s, ld, turned, ld);
    ex.each(n * ld, [=](int64_t i) { s[i] += turned[i]; });
  }
  // A factor's step: from s, what U sends to A or C.
  FASTKFO_FN void move(int k, bool left, int64_t n, int64_t ld, S* s) const {
    const S* from = raw(p, k - 1, left);
    S *block = phi(k), *to = block + (left ? p.l : p.r), *square = block + (left ? p.a : p.c);
    S* turned = block + (left ? p.a_t : p.c_t);
    const S by_rate = rate * rate;
    if (plan.psd) {
      symmetrise(s, n, ld);
      ex.product(n, n, n, {from, ld, 1}, s, ld, to, ld, by_rate, from);
      ex.product(n, n, n, {to, 1, ld}, to, ld, square, ld);
      return;
    }
    ex.each(n * ld, [=](int64_t i) { to[i] = from[i] + by_rate * s[i]; });
    ex.transpose(n, n, to, ld, turned, ld);
  }
  // g += factor times what s, sent to A or C, becomes in the factor itself
  FASTKFO_FN void add(const S* factor, S* s, int64_t n, int64_t ld, S by_rate, S* g) const {
    if (plan.psd) {
      symmetrise(s, n, ld);
      ex.product(n, n, n, {factor, ld, 1}, s, ld, g, ld, by_rate, g);
    } else {
      ex.each(n * ld, [=](int64_t i) { g[i] += by_rate * s[i]; });
    }
  }

  FASTKFO_FN void through_theta(int k, const S* g, const S* lambda, const Gradients<S>& to, S* v,
                                const S* carried) const {
    const Operands<S> by = operands(p, k);
    if (p.left) {
      u.to_left(by.c, g, lambda, work(at.s_a));
      add(raw(p, k, true), work(at.s_a), p.n, u.ld_a, -rate, to.a);
    }
    if (p.right) {
      u.to_right(by.a, g, lambda, work(at.s_c));
      add(raw(p, k, false), work(at.s_c), p.m, u.ld_c, -rate, to.c);
    }
    const S by_rate = rate;
    if (S* beta = to.beta) ex.each(size(), [=](int64_t i) { beta[i] -= by_rate * lambda[i]; });
    if (!plan.first_order) u.pull(by.a, by.c, lambda, v, -rate, carried);
  }

  // The change of A or C along that of its factor, d; where the factor is A itself, d.
  FASTKFO_FN const S* along(const S* factor, const S* d, int64_t n, int64_t ld, S* to) const {
    if (!plan.psd) return d;
    ex.product(n, n, n, {d, 1, ld}, factor, ld, to, ld);
    symmetrise(to, n, ld);
    return to;
  }
  FASTKFO_FN void through_phi(int k, const S* before, const S* g, const Gradients<S>& to, S* v,
                              S* carried) const {
    const Operands<S> by = operands(p, k - 1);
    const S *l = p.left ? raw(p, k - 1, true) : nullptr,
            *r = p.right ? raw(p, k - 1, false) : nullptr;
    const S* d_a = p.left ? along(l, to.a, p.n, u.ld_a, work(at.d_a)) : nullptr;
    const S* d_c = p.right ? along(r, to.c, p.m, u.ld_c, work(at.d_c)) : nullptr;
    const S by_rate = rate * rate;
    if (!plan.first_order) {
      const int64_t n = size();
      ex.each(n, [=](int64_t i) { carried[i] = 0; });
      if (d_a) {
        u.value(d_a, by.c, before, v, by_rate, v);
        u.pull(d_a, by.c, g, carried, by_rate, carried);
      }
      if (d_c) {
        u.value(by.a, d_c, before, v, by_rate, v);
        u.pull(by.a, d_c, g, carried, by_rate, carried);
      }
      if (const S* beta = to.beta) ex.each(n, [=](int64_t i) { v[i] += by_rate * beta[i]; });
    }
    // Both sides before either gradient changes: d_a and d_c may be these gradients.
    if (d_a && plan.psd) u.to_left(by.c, before, g, work(at.s_a));
    if (d_c && plan.psd) u.to_right(by.a, before, g, work(at.s_c));
    if (d_a && d_c) {
      u.to_left(d_c, before, g, work(at.cross_a));
      u.to_right(d_a, before, g, work(at.cross_c));
    }
    if (d_a) change(l, p.n, u.ld_a, work(at.s_a), d_c ? work(at.cross_a) : nullptr, to.a);
    if (d_c) change(r, p.m, u.ld_c, work(at.s_c), d_a ? work(at.cross_c) : nullptr, to.c);
  }
  // A factor's gradient from that after its step: with psd, g + alpha^2 g (s + s'), and what came
  // across from the other factor.
  FASTKFO_FN void change(const S* factor, int64_t n, int64_t ld, S* s, S* cross, S* g) const {
    const S by_rate = rate * rate;
    if (plan.psd) {
      S* copy = work(at.copy);
      ex.each(n * ld, [=](int64_t i) { copy[i] = g[i]; });
      add(copy, s, n, ld, by_rate, g);
    }
    if (cross) add(factor, cross, n, ld, by_rate, g);
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
