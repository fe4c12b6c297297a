// Makes the plan: sizes and places.
#pragma once

#include <algorithm>
#include <vector>

#include "inner_loop/forms.h"
#include "inner_loop/memory.h"
#include "inner_loop/plan.h"

namespace fastkfo::inner_loop {

// A plan with what it points to.
struct Planned {
  Plan plan{};
  std::vector<Layer> layers;
  std::vector<Param> params;
  std::vector<Slots> support, query;
  int64_t pad;     // numbers that rows are padded to
  bool symmetric;  // A and C equal their transposes
  int64_t forms;   // that may be chosen, as bits
  bool countable;  // whether 64 bits count a task's numbers; if not, places are not to be used

  int64_t padded(int64_t n) const { return (n + pad - 1) / pad * pad; }

  // layers and params hold what the caller knows; the plan's counts and flags are set.
  void finish(int64_t samples, int64_t query_samples) {
    Plan& p = plan;
    p.layers = static_cast<int32_t>(layers.size());
    p.params = static_cast<int32_t>(params.size());
    p.in = layers.front().in;
    p.ld_in = static_cast<int32_t>(padded(p.in));
    p.classes = layers.back().out;
    Forms{layers, params, p, samples, query_samples, forms}.choose();
    const bool gram = p.steps > 0 && layers[0].kind == kLinear && layers[0].form == kGram;
    late_ = gram ? &params[layers[0].weight] : nullptr;
    p.gram.used = gram;
    for (Param& x : params) place(x);
    place_pass(p.support, support, samples);
    place_pass(p.query, query, p.has_query ? query_samples : 0);
    countable = numbers() < double(int64_t(1) << 56);
    if (!countable) return;
    place_tape();
    if (p.gram.used) place_gram_work();
    if (p.adapt) place_adapting();
    place_work();
    p.layer = layers.data();
    p.param = params.data();
    p.support.slots = support.data();
    p.query.slots = query.data();
    for (const Layer& layer : layers)
      if (layer.kind == kBatchNorm) p.statistics += 2 * layer.in;
  }

 private:
  // The place of a piece of n numbers, at the end of what is placed already.
  int64_t take(int64_t& end, int64_t n, bool there = true) const {
    const int64_t at = end;
    if (there) end += padded(n);
    return at;
  }
  const Param* late_ = nullptr;

  // Of one task, at least: sizes of layers and samples are below 2^24, steps below 2^20.
  double numbers() const {
    const Plan& p = plan;
    const double each = double(p.support.work) + p.query.work + p.operands + p.later + p.gradients;
    const double samples = double(p.support.ld) + p.query.ld;
    return (p.steps + 2.0) * (each + samples * (samples + p.ld_in));
  }

  void place(Param& x) {
    Plan& p = plan;
    const int64_t left = x.n * padded(x.n), right = x.m * padded(x.m);
    x.ld = static_cast<int32_t>(padded(x.cols));
    x.late = &x == late_;
    const int64_t size = int64_t(x.rows) * x.ld;
    x.at = take(p.operands, size);
    x.a = take(p.operands, left, x.left);
    x.a_t = symmetric ? x.a : take(p.operands, left, x.left);
    x.c = take(p.operands, right, x.right);
    x.c_t = symmetric ? x.c : take(p.operands, right, x.right);
    const bool factors_too = p.adapt && p.psd;
    x.l = factors_too ? take(p.operands, left, x.left) : x.a;
    x.r = factors_too ? take(p.operands, right, x.right) : x.c;
    x.beta = take(p.operands, size, x.bias);
    x.s = take(p.operands, size, x.scale);
    x.next = take(p.later, size, !x.late);
    x.g = take(p.gradients, size, !x.late);
    const auto needs = [&](int64_t bit, bool there) {
      return there && (p.adapt || x.wanted & bit);
    };
    x.g_a = take(p.gradients, left, needs(kLeft, x.left));
    x.g_c = take(p.gradients, right, needs(kRight, x.right) && !x.late);
    x.g_beta = take(p.gradients, size, needs(kBias, x.bias) && !x.late);
    x.g_s = take(p.gradients, size, x.wanted & kScale);
  }

  void place_pass(Pass& pass, std::vector<Slots>& slots, int64_t samples) {
    pass.samples = static_cast<int32_t>(samples);
    pass.ld = static_cast<int32_t>(padded(samples));
    int64_t end = 0;
    const bool is_query = &pass == &plan.query;
    const int64_t ld = pass.ld;
    slots.assign(layers.size(), {});
    for (size_t l = 0; l < layers.size(); ++l) {
      const Layer& layer = layers[l];
      const bool norm = layer.kind == kBatchNorm || layer.kind == kLayerNorm;
      const bool weight = layer.kind == kLinear && !is_query;
      Slots& s = slots[l];
      s.a = take(end, layer.in * ld, l > 0 || is_query);
      s.d = take(end, layer.out * ld);
      s.hat = take(end, layer.in * ld, norm);
      s.inv = take(end, std::max<int64_t>(layer.in, ld), norm);
      s.p = take(end, layer.out * ld, weight && params[layer.weight].left);
      s.q = take(end, samples * padded(layer.in), weight && l > 0);
      const bool dense = weight && layer.form == kDense;
      s.g = take(end, layer.out * padded(layer.in), dense);
      s.g_c = dense && params[layer.weight].right ? take(end, layer.out * padded(layer.in)) : s.g;
      s.g_w = take(end, layer.in, norm);
      s.g_b = take(end, layer.out, layer.bias >= 0);
    }
    pass.out = take(end, layers.back().out * ld);
    pass.p = take(end, layers.back().out * ld);
    pass.size = end;
    for (size_t l = 1; l < layers.size(); ++l)
      slots[l].rows =
          take(end, samples * padded(layers[l].in), layers[l].kind == kLinear && !is_query);
    pass.work = end;
  }

  void place_tape() {
    Plan& p = plan;
    int64_t end = 0;
    const bool steps = p.steps > 0;
    p.x = take(end, int64_t(p.in) * p.support.ld, steps);
    const bool fixed = steps && layers[0].kind == kLinear;
    const int64_t rows = p.support.samples * padded(p.in);
    const Param* first = fixed ? &params[layers[0].weight] : nullptr;
    p.x_rows = take(end, rows, steps);
    p.q0 = fixed && first->right ? take(end, rows) : p.x_rows;
    p.q0_t = fixed && first->right ? take(end, int64_t(p.in) * p.support.ld) : p.x;
    if (p.gram.used) place_gram(end);
    const int64_t kept = p.keep ? p.steps : std::min<int64_t>(p.steps, p.adapt ? 2 : 1);
    p.records = take(end, kept * p.support.size);
    p.query_record = take(end, p.query.size);
    p.thetas = take(end, (p.keep ? p.steps : std::min<int64_t>(p.steps, 2)) * p.later);
    const int64_t phis = p.adapt ? std::max<int64_t>(p.steps - 1, 0) : 0;
    p.phis = take(end, (p.keep ? phis : std::min<int64_t>(phis, 2)) * p.operands);
    p.tape = end;
  }

  void place_adapting() {
    AdaptPlaces& a = plan.adapting;
    int64_t value = 0, turned = 0, left = 0, right = 0;
    for (const Param& x : params) {
      value = std::max(value, int64_t(x.rows) * x.ld);
      left = std::max(left, x.n * padded(x.n));
      right = std::max(right, x.m * padded(x.m));
      turned = std::max({turned, left, right, x.m * padded(x.n)});
    }
    a.t = take(a.work, value);
    a.turned = take(a.work, turned);
    a.s_a = take(a.work, left);
    a.s_c = take(a.work, right);
    a.cross_a = take(a.work, left);
    a.cross_c = take(a.work, right);
    a.d_a = take(a.work, left);
    a.d_c = take(a.work, right);
    a.copy = take(a.work, std::max(left, right));
    a.carried = take(a.work, plan.later);
  }

  void place_gram(int64_t& end) {
    const Plan& p = plan;
    Gram& g = plan.gram;
    const int64_t ld = p.support.ld, samples = p.support.samples, n = layers[0].out;
    g.m = take(end, samples * ld);
    g.m_t = take(end, samples * ld);
    g.n = take(end, samples * p.query.ld, p.has_query);
    g.n_t = take(end, p.query.samples * ld, p.has_query);
    g.y = take(end, n * ld);
    g.y_beta = take(end, n * ld, params[layers[0].weight].bias);
    g.p = take(end, n * ld);
    g.x_q_rows = take(end, p.query.samples * padded(p.in), p.has_query);
  }
  void place_gram_work() {
    const Plan& p = plan;
    Gram& g = plan.gram;
    const int64_t ld = p.support.ld, n = layers[0].out;
    g.base = take(g.work, n * ld);
    g.e = take(g.work, n * ld);
    g.sum = take(g.work, n * ld);
    g.cross = take(g.work, p.support.samples * ld);
    g.cross_t = take(g.work, p.support.samples * ld);
    g.back = take(g.work, p.query.samples * ld);
    g.forth = take(g.work, int64_t(p.support.samples) * p.query.ld);
  }

  void place_work() {
    Plan& p = plan;
    const int64_t samples = std::max(p.support.samples, p.query.samples);
    const int64_t ld = std::max(p.support.ld, p.query.ld);
    int64_t rows_in = samples * p.ld_in, rows_out = 0, cols_out = 0, cols_in = 0, square = 0;
    int64_t dense = 0, lanes = std::max<int64_t>(ld, padded(samples));
    for (const Param& x : params) {
      lanes = std::max({lanes, padded(x.rows), padded(x.cols), padded(x.n)});
      rows_in = std::max(rows_in, samples * x.ld);
      rows_out = std::max(rows_out, samples * padded(x.n));
      if (x.scale) square = std::max(square, int64_t(x.rows) * x.ld);
    }
    for (const Layer& layer : layers) {
      if (layer.kind == kLinear && layer.form == kDense)
        dense = std::max(dense, 2 * layer.out * padded(layer.in) + layer.in * padded(layer.out));
      lanes = std::max({lanes, padded(layer.in), padded(layer.out)});
      cols_out = std::max(cols_out, layer.out * ld);
      cols_in = std::max(cols_in, layer.in * ld);
    }
    p.lanes = lanes;
    int64_t end = 0;
    WorkPlaces& w = p.work;
    w.rows_in = take(end, rows_in);
    w.rows_out = take(end, rows_out);
    w.cols_out = take(end, cols_out);
    w.cols_in = take(end, cols_in);
    w.square = take(end, square);
    w.dense = take(end, dense);
    w.lanes = take(end, 6 * lanes);
    w.adapt = take(end, p.adapting.work);
    w.forward = end;
    w.record = take(end, p.support.work);
    w.query = take(end, p.query.size);
    w.v = take(end, p.later);
    w.fixed = take(end, cols_in);
    w.gram = take(end, p.gram.work);
    w.x_s_grad = take(end, cols_in);
    w.gradients = take(end, p.gradients);  // the last one: it may lie elsewhere
    w.all = end;
  }
};

}  // namespace fastkfo::inner_loop
