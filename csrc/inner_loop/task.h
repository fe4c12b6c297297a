// The inner loop of one task, and its exact meta-gradient: one algorithm for every machine. An
// executor runs the loops, a CPU thread or the threads of a CUDA block, and has the product.
//
//   forward   K times: pass over the support, backward, theta' = theta - alpha U(g); then the query
//   backward  lambda = cotangent of theta_K; then for k = K - 1 ... 0
//               V = cotangent of g_k, gradients of the operands,
//               lambda += H V, which is the derivative of the backward pass along V
//
// docs/inner_loop.md has the derivation.
#pragma once

#include "inner_loop/adapting.h"
#include "inner_loop/passes.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class Exec>
class Task : private Passes<Exec> {
  using P = Passes<Exec>;
  using S = typename Exec::Number;
  using P::clear;
  using P::copy;
  using P::ex;
  using P::give;
  using P::give_features;
  using P::gradients;
  using P::gram;
  using P::lambda_of;
  using P::norm;
  using P::operands;
  using P::pass_backward;
  using P::pass_forward;
  using P::plan;
  using P::scratch;
  using P::scratch_row;
  using P::span;
  using P::support_record;
  using P::take_features;
  using P::tangent_span;
  using P::tape;
  using P::theta;
  using P::theta_after;
  using P::v_of;
  using P::value;
  using P::vector_gradients;
  using P::weight_step;
  using P::x;

 public:
  FASTKFO_FN Task(Exec& exec, const Plan& all, const Blocks<S>& operands, const Work<S>& room,
                  S* memory)
      : P(exec, all, operands, room, memory) {}

  FASTKFO_FN void forward(const Data<S>& data, const Results<S>& to) {
    take_support(data);
    for (int k = 0; k < plan.steps; ++k) {
      S* record = support_record(k);
      S* stats = to.statistics ? to.statistics + k * plan.statistics : nullptr;
      pass_forward(plan.support, x(), record, k, stats);
      const S loss = value(plan.support, plan.loss, record, data.y_s);
      ex.each(1, [=](int64_t) { to.support_loss[k] = loss; });
      pass_backward(plan.support, x(), record, record, k, false);
      step(record, k);
    }
    if (!plan.has_query) return;
    S* record = tape + plan.query_record;
    S* x_q = record + plan.query.slots[0].a;
    take_features(data.x_q, plan.query, scratch.room.rows_in, x_q);
    S* stats = to.statistics ? to.statistics + plan.steps * plan.statistics : nullptr;
    pass_forward(plan.query, x_q, record, plan.steps, stats);
    give(record + plan.query.out, plan.query, plan.classes, to.predictions);
    if (!plan.has_query_targets) return;
    const S loss = value(plan.query, plan.query_loss, record, data.y_q);
    ex.each(1, [=](int64_t) { to.loss[0] = loss; });
  }

  // The gradients, for the cotangent of the query loss, and those that lambda begins with, which
  // the caller has put into the block of gradients (zeros if there are none).
  FASTKFO_FN void backward(S cotangent, S* x_s_grad, S* x_q_grad) {
    if (gram()) GramLayer<Exec>(*this).clear_backward();
    if (plan.has_query_targets)
      query_backward(cotangent, x_q_grad);
    else if (plan.want_x_q)
      ex.each(int64_t(plan.query.samples) * plan.in, [=](int64_t i) { x_q_grad[i] = 0; });
    if (plan.want_x_s) clear(scratch.x_s_grad, plan.support);
    if (sums_lambda_p()) clear(scratch.fixed, plan.support);
    if (plan.adapt) {
      S* carried = scratch.adapt + plan.adapting.carried;
      ex.each(plan.later, [=](int64_t i) { carried[i] = 0; });
    }
    for (int k = plan.steps - 1; k >= 0; --k) {
      const S* record = support_record(k);
      adjoint(record, k);
      if (plan.first_order) continue;
      tangent_forward(record, k);
      tangent_backward(record, k);
    }
    first_layer_backward();
    if (plan.want_x_s) give_features(scratch.x_s_grad, plan.support, x_s_grad);
  }

  // After that: what a gradient that is not in the block of gradients is the sum of, that of theta,
  // C (transposed) or beta of a first layer in the gram form. Returns how many products.
  FASTKFO_FN int late(int64_t wanted, Outer<S>* to) {
    return GramLayer<Exec>(*this).late(wanted, d_q(), to);
  }

 private:
  FASTKFO_FN void take_support(const Data<S>& data) {
    if (plan.steps == 0) return;
    const Pass& pass = plan.support;
    take_features(data.x_s, pass, tape + plan.x_rows, x());
    if (plan.layer[0].kind != kLinear) return;
    const Param& p = plan.param[plan.layer[0].weight];
    const Operands<S> by = operands(p, 0);
    const WeightUpdate<Exec> update{ex, p, by, scratch.room};
    const int64_t ld = p.ld;
    if (p.right && plan.layer[0].form != kDense) {
      if (data.q)
        copy(data.q, pass.samples * ld, tape + plan.q0);
      else
        update.right(x(), pass.samples, pass.ld, tape + plan.q0);
      if (plan.keep && !gram())
        ex.transpose(pass.samples, p.cols, tape + plan.q0, ld, tape + plan.q0_t, pass.ld);
    }
    if (gram()) GramLayer<Exec>(*this).begin();
  }
  // Whether the sum of lambda' P over the steps is what the gradients of C, and those of the
  // inputs, are made of in the end.
  FASTKFO_FN bool sums_lambda_p() const {
    const Layer& first = plan.layer[0];
    if (plan.steps == 0 || first.kind != kLinear || first.form != kFactored) return false;
    const Param& p = plan.param[first.weight];
    return (p.right && p.wanted & kRight) || (plan.want_x_s && !plan.first_order);
  }
  // The cotangent of the first layer's outputs in the query, or null
  FASTKFO_FN const S* d_q() const {
    return plan.has_query_targets ? scratch.query + plan.query.slots[0].d : nullptr;
  }

  // theta_{k+1}
  FASTKFO_FN void step(S* record, int k) {
    S* next = theta_after(k + 1);
    for (int l = 0; l < plan.layers; ++l) {
      const Layer& layer = plan.layer[l];
      const Slots& s = plan.support.slots[l];
      const Span<S> at = span(plan.support, x(), record, record, l);
      vector_gradients(plan.support, record, at, l, k, record + s.g_w, record + s.g_b);
      if (layer.kind == kLinear) {
        const Param& p = plan.param[layer.weight];
        const Operands<S> by = operands(p, k);
        const WeightUpdate<Exec> update{ex, p, by, scratch.room};
        const WeightStep<S> w = weight_step(record, l);
        if (layer.form == kDense) {
          if (l > 0) ex.transpose(p.cols, w.samples, w.x, w.ld, record + s.q, p.ld);
          update.gradient(w, record + s.g);
          adapt(layer.weight, k, s.g);
          update.times_right(record + s.g, record + s.g_c);
        } else {
          if (p.left) update.left(w, record + s.p);
          if (l > 0) update.right(w.x, w.samples, w.ld, record + s.q);
        }
        if (layer.form == kGram)
          GramLayer<Exec>(*this).step(w.p);
        else
          update.step(layer.form, w, theta(k, p), next + p.next);
      } else {
        vector_step(layer.weight, s.g_w, k);
      }
      vector_step(layer.bias, s.g_b, k);
    }
  }
  // phi_k of one parameter, whose gradient lies at `at` in a record
  FASTKFO_FN void adapt(int index, int k, int64_t at) {
    if (plan.adapt && k > 0)
      Adapting<Exec>(*this, plan.param[index])
          .step(k, support_record(k - 1) + at, support_record(k) + at);
  }
  FASTKFO_FN void vector_step(int index, int64_t at, int k) {
    if (index < 0) return;
    adapt(index, k, at);
    const S* g = support_record(k) + at;
    const Param& p = plan.param[index];
    const Operands<S> by = operands(p, k);
    VectorUpdate<Exec>{ex, p, by}.step(g, theta(k, p), theta_after(k + 1) + p.next, scratch.lanes);
  }

  // lambda_K
  FASTKFO_FN void query_backward(S cotangent, S* x_q_grad) {
    const Pass& pass = plan.query;
    S* record = tape + plan.query_record;
    S* cotangents = scratch.query;
    const S* x_q = record + pass.slots[0].a;
    const S* d = record + pass.slots[plan.layers - 1].d;
    S* scaled = cotangents + pass.slots[plan.layers - 1].d;
    ex.each(int64_t(plan.classes) * pass.ld, [=](int64_t i) { scaled[i] = cotangent * d[i]; });
    pass_backward(pass, x_q, record, cotangents, plan.steps, plan.want_x_q);
    if (plan.want_x_q) give_features(scratch.room.cols_in, pass, x_q_grad);
    for (int l = 0; l < plan.layers; ++l) {
      const Layer& layer = plan.layer[l];
      const Span<S> at = span(pass, x_q, record, cotangents, l);
      S *g_w = cotangents + pass.slots[l].g_w, *g_b = cotangents + pass.slots[l].g_b;
      vector_gradients(pass, record, at, l, plan.steps, g_w, g_b);
      add_vector(layer.bias, g_b);
      if (layer.kind != kLinear) {
        add_vector(layer.weight, g_w);
        continue;
      }
      if (l == 0 && gram()) {
        GramLayer<Exec>(*this).begin_backward(at.d_y);
        continue;
      }
      const Param& p = plan.param[layer.weight];
      S *rows = scratch.room.rows_in, *lambda = lambda_of(layer.weight);
      ex.transpose(p.cols, pass.samples, at.x, pass.ld, rows, p.ld);
      ex.product(p.rows, p.cols, pass.samples, {at.d_y, pass.ld, 1}, rows, p.ld, lambda, p.ld, S(1),
                 lambda);
    }
  }
  FASTKFO_FN void add_vector(int index, const S* g) {
    if (index < 0) return;
    S* to = lambda_of(index);
    ex.each(plan.param[index].n, [=](int64_t i) { to[i] += g[i]; });
  }

  // The gradients of the operands in step k, and what the derivatives along V begin with
  FASTKFO_FN void adjoint(const S* record, int k) {
    for (int l = 0; l < plan.layers; ++l) {
      const Layer& layer = plan.layer[l];
      if (layer.kind == kLinear)
        weight_adjoint(record, l, k);
      else
        vector_adjoint(layer.weight, plan.support.slots[l].g_w, k);
      vector_adjoint(layer.bias, plan.support.slots[l].g_b, k);
    }
  }
  FASTKFO_FN void weight_adjoint(const S* record, int l, int k) {
    const Layer& layer = plan.layer[l];
    const Param& p = plan.param[layer.weight];
    const Operands<S> by = operands(p, 0);
    const WeightStep<S> step = weight_step(record, l);
    const WeightUpdate<Exec> update{ex, p, by, scratch.room};
    const Span<S> at = tangent_span(record, l);
    const S* lambda = lambda_of(layer.weight);
    const bool tangents = !plan.first_order;
    Along<S> along{tangents ? at.y_t : nullptr, tangents ? at.d_x_t : nullptr,
                   l == 0 ? at.d_x_t : nullptr};
    if (plan.adapt) {
      adapted_adjoint(layer.weight, plan.support.slots[l].g, k);
      if (tangents) update.tangents(step, v_of(layer.weight), along);
      return;
    }
    if (layer.form == kDense) return update.dense_adjoint(step, lambda, gradients(p), along);
    if (layer.form == kGram) return GramLayer<Exec>(*this).adjoint(step, gradients(p), along.v_x);
    if (l == 0) along.v_d = nullptr;  // from their sum in the end
    if (l > 0 && p.right && (tangents || p.wanted & kRight))
      ex.transpose(p.cols, at.samples, step.x, at.ld, scratch.record + plan.support.slots[l].rows,
                   p.ld);
    update.factored_adjoint(step, lambda, gradients(p),
                            l == 0 && sums_lambda_p() ? scratch.fixed : nullptr, along);
  }
  // What the first layer does once for all steps
  FASTKFO_FN void first_layer_backward() {
    const bool to_inputs = plan.want_x_s && !plan.first_order;
    const S* query_d = d_q();
    if (gram()) {
      const GramLayer<Exec> first(*this);
      first.end_backward(query_d ? tape + plan.query_record + plan.query.slots[0].a : nullptr,
                         query_d);
      if (to_inputs) first.support_gradient(scratch.x_s_grad);
    }
    if (!sums_lambda_p()) return;
    const Param& p = plan.param[plan.layer[0].weight];
    const Operands<S> by = operands(p, 0);
    const WeightUpdate<Exec> update{ex, p, by, scratch.room};
    const WeightStep<S> step = weight_step(support_record(0), 0);
    if (S* to = gradients(p).c) update.right_gradient(step, scratch.fixed, to);
    S* inputs = scratch.x_s_grad;
    if (to_inputs) update.right_tangent(step, scratch.fixed, {nullptr, inputs, inputs});
  }
  FASTKFO_FN void adapted_adjoint(int index, int64_t at, int k) {
    const Param& p = plan.param[index];
    const S* before = k > 0 ? support_record(k - 1) + at : nullptr;
    Adapting<Exec>(*this, p).adjoint(k, before, support_record(k) + at, lambda_of(index),
                                     v_of(index), scratch.adapt + plan.adapting.carried + p.next);
  }
  FASTKFO_FN void vector_adjoint(int index, int64_t at, int k) {
    if (index < 0) return;
    if (plan.adapt) return adapted_adjoint(index, at, k);
    const Param& p = plan.param[index];
    const Operands<S> by = operands(p, k);
    VectorUpdate<Exec>{ex, p, by}.adjoint(support_record(k) + at, lambda_of(index), gradients(p),
                                          plan.first_order ? nullptr : v_of(index), scratch.lanes,
                                          scratch.lanes + scratch_row());
  }

  FASTKFO_FN void tangent_forward(const S* record, int k) {
    S* along = scratch.record;
    for (int l = 0; l < plan.layers; ++l) {
      const Layer& layer = plan.layer[l];
      const Span<S> at = tangent_span(record, l);
      const Slots& s = plan.support.slots[l];
      if (layer.kind == kLinear) {
        const Param& p = plan.param[layer.weight];
        Linear<Exec>{ex, layer, at, p.ld}.forward_tangent(theta(k, p), v_of(layer.bias));
      } else if (layer.kind == kBatchNorm) {
        this->template norm<true>(layer, at, record, s, k)
            .forward_tangent(v_of(layer.weight), v_of(layer.bias), along + s.hat);
      } else if (layer.kind == kLayerNorm) {
        this->template norm<false>(layer, at, record, s, k)
            .forward_tangent(v_of(layer.weight), v_of(layer.bias), along + s.hat);
      } else if (at.x_t) {
        Activation<Exec>{ex, layer, at}.scaled_by_derivative(at.x_t, at.y_t);
      } else {
        S* to = at.y_t;
        ex.each(int64_t(layer.out) * at.ld, [=](int64_t i) { to[i] = 0; });
      }
    }
  }

  // lambda_k = lambda_{k+1} + H V; what comes to the inputs goes to x_s_grad.
  FASTKFO_FN void tangent_backward(const S* record, int k) {
    const Pass& pass = plan.support;
    S* along = scratch.record;
    const TaskLoss<Exec> loss{ex, plan.loss, plan.classes, pass.samples, pass.ld};
    loss.tangent(record + pass.p, along + pass.out, along + pass.slots[plan.layers - 1].d,
                 scratch.lanes);
    for (int l = plan.layers - 1; l >= 0; --l) {
      const Layer& layer = plan.layer[l];
      const Slots& s = pass.slots[l];
      const Span<S> at = tangent_span(record, l);
      if (layer.kind == kLinear) {
        const Param& p = plan.param[layer.weight];
        const bool in_the_end = l == 0 && gram();
        if (at.d_x_t && !in_the_end)
          Linear<Exec>{ex, layer, at, p.ld}.backward_tangent(theta(k, p));
        if (in_the_end)
          GramLayer<Exec>(*this).add(at.d_y_t);
        else
          weight_tangent(record, at, l);
        if (layer.bias >= 0) {
          const S* d_t = at.d_y_t;
          S* g = along + s.g_b;
          ex.sum_rows(layer.out, at.samples, at.ld, g, [=](int64_t, int64_t i) { return d_t[i]; });
          add_vector(layer.bias, g);
        }
        continue;
      }
      if (layer.kind == kBatchNorm)
        norm_tangent<true>(record, at, l, k);
      else if (layer.kind == kLayerNorm)
        norm_tangent<false>(record, at, l, k);
      else if (at.d_x_t)
        Activation<Exec>{ex, layer, at}.backward_tangent();
      if (l == 0) add_input_gradient(at);
    }
  }
  FASTKFO_FN void add_input_gradient(const Span<S>& at) {
    if (!plan.want_x_s) return;
    const S* from = at.d_x_t;
    S* to = scratch.x_s_grad;
    ex.each(int64_t(plan.in) * at.ld, [=](int64_t i) { to[i] += from[i]; });
  }
  template <bool BATCH>
  FASTKFO_FN void norm_tangent(const S* record, const Span<S>& at, int l, int k) {
    const Layer& layer = plan.layer[l];
    const Slots& s = plan.support.slots[l];
    const auto layer_norm = this->template norm<BATCH>(layer, at, record, s, k);
    S* hat_t = scratch.record + s.hat;
    S* more = scratch.lanes + 2 * scratch_row();
    if (at.d_x_t) layer_norm.backward_tangent(v_of(layer.weight), hat_t, more);
    layer_norm.gradients_tangent(hat_t, lambda_of(layer.weight), lambda_of(layer.bias), more);
  }
  // lambda += d_t X' + d X_t'
  FASTKFO_FN void weight_tangent(const S* record, const Span<S>& at, int l) {
    const int index = plan.layer[l].weight;
    const Param& p = plan.param[index];
    const WeightStep<S> step = weight_step(record, l);
    S *lambda = lambda_of(index), *x_t_rows = scratch.room.rows_in;
    ex.product(p.rows, p.cols, at.samples, {at.d_y_t, at.ld, 1}, step.x_rows, p.ld, lambda, p.ld,
               S(1), lambda);
    if (!at.x_t) return;
    ex.transpose(p.cols, at.samples, at.x_t, at.ld, x_t_rows, p.ld);
    ex.product(p.rows, p.cols, at.samples, {at.d_y, at.ld, 1}, x_t_rows, p.ld, lambda, p.ld, S(1),
               lambda);
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
