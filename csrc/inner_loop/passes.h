// A model's passes over the samples of one task, forward and back, and its data in and out.
#pragma once

#include "inner_loop/gram.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class Exec>
class Passes : protected Places<Exec> {
  using P = Places<Exec>;

 protected:
  using S = typename Exec::Number;
  using P::ex;
  using P::plan;
  using P::scratch;
  using P::span;
  using P::theta;

  using Places<Exec>::Places;

  FASTKFO_FN bool gram() const { return plan.gram.used; }

  // rows [samples, pad(in)] and to [in, ld], padded with zeros
  FASTKFO_FN void take_features(const S* from, const Pass& pass, S* rows, S* to) {
    const int64_t in = plan.in, ld = plan.ld_in;
    ex.each(pass.samples, ld, [=](int64_t r, int64_t i) {
      const int64_t c = i - r * ld;
      rows[i] = c < in ? from[r * in + c] : S(0);
    });
    ex.transpose(pass.samples, in, rows, ld, to, pass.ld);
  }
  FASTKFO_FN void give_features(const S* from, const Pass& pass, S* to) {
    give(from, pass, plan.in, to);
  }
  // to [samples, count], without gaps
  FASTKFO_FN void give(const S* from, const Pass& pass, int64_t count, S* to) {
    const int64_t ld = pass.ld;
    ex.each(pass.samples, count,
            [=](int64_t s, int64_t i) { to[i] = from[(i - s * count) * ld + s]; });
  }
  FASTKFO_FN void copy(const S* from, int64_t n, S* to) {
    ex.each(n, [=](int64_t i) { to[i] = from[i]; });
  }
  FASTKFO_FN void clear(S* to, const Pass& pass) {
    ex.each(int64_t(plan.in) * pass.ld, [=](int64_t i) { to[i] = 0; });
  }

  FASTKFO_FN void pass_forward(const Pass& pass, const S* x0, S* record, int k, S* statistics) {
    for (int l = 0; l < plan.layers; ++l) {
      const Layer& layer = plan.layer[l];
      const Span<S> at = span(pass, x0, record, record, l);
      if (layer.kind == kLinear) {
        const Linear<Exec> linear{ex, layer, at, plan.param[layer.weight].ld};
        if (l > 0 || !gram())
          linear.forward(theta(k, layer.weight));
        else if (&pass == &plan.support)
          GramLayer<Exec>(*this).support(k, at.y);
        else
          GramLayer<Exec>(*this).query(at.x, at.y);
        linear.add_bias(at.y, theta(k, layer.bias));
      } else if (layer.kind == kBatchNorm) {
        this->template norm<true>(layer, at, record, pass.slots[l], k).forward(statistics);
        if (statistics) statistics += 2 * layer.in;
      } else if (layer.kind == kLayerNorm) {
        this->template norm<false>(layer, at, record, pass.slots[l], k).forward(nullptr);
      } else {
        Activation<Exec>{ex, layer, at}.forward();
      }
    }
  }
  FASTKFO_FN S value(const Pass& pass, int kind, S* record, const void* y) {
    const TaskLoss<Exec> loss{ex, kind, plan.classes, pass.samples, pass.ld};
    S* d = record + pass.slots[plan.layers - 1].d;
    return loss.value(record + pass.out, y, record + pass.p, d, scratch.lanes);
  }
  FASTKFO_FN void pass_backward(const Pass& pass, const S* x0, S* record, S* cotangents, int k,
                                bool to_input) {
    for (int l = plan.layers - 1; l >= (to_input ? 0 : 1); --l) {
      const Layer& layer = plan.layer[l];
      Span<S> at = span(pass, x0, record, cotangents, l);
      if (l == 0) at.d_x = scratch.room.cols_in;
      if (layer.kind == kLinear && l == 0 && gram())
        GramLayer<Exec>(*this).query_gradient(at.d_y, at.d_x);
      else if (layer.kind == kLinear)
        Linear<Exec>{ex, layer, at, plan.param[layer.weight].ld}.backward(theta(k, layer.weight));
      else if (layer.kind == kBatchNorm)
        this->template norm<true>(layer, at, record, pass.slots[l], k).backward();
      else if (layer.kind == kLayerNorm)
        this->template norm<false>(layer, at, record, pass.slots[l], k).backward();
      else
        Activation<Exec>{ex, layer, at}.scaled_by_derivative(at.d_y, at.d_x);
    }
  }
  // g of the vectors of layer l, to g_w and g_b
  FASTKFO_FN void vector_gradients(const Pass& pass, const S* record, const Span<S>& at, int l,
                                   int k, S* g_w, S* g_b) {
    const Layer& layer = plan.layer[l];
    const S* d = at.d_y;
    if (layer.kind == kLinear) {
      if (layer.bias >= 0)
        ex.sum_rows(layer.out, pass.samples, pass.ld, g_b,
                    [=](int64_t, int64_t i) { return d[i]; });
    } else if (layer.kind == kBatchNorm) {
      this->template norm<true>(layer, at, record, pass.slots[l], k).gradients(g_w, g_b);
    } else if (layer.kind == kLayerNorm) {
      this->template norm<false>(layer, at, record, pass.slots[l], k).gradients(g_w, g_b);
    }
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
