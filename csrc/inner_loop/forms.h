// Chooses the form in which each linear layer is computed, by counting multiplications.
//
// All steps and the meta-gradient of all its operands are counted, whatever a call asks for: a tape
// must be read in the form in which it was written.
#pragma once

#include <vector>

#include "inner_loop/plan.h"

namespace fastkfo::inner_loop {

class Forms {
 public:
  Forms(std::vector<Layer>& layers, const std::vector<Param>& params, const Plan& plan,
        int64_t samples, int64_t queries, int64_t allowed)
      : layers_(layers), params_(params), plan_(plan), s_(samples), q_(queries), may_(allowed) {}

  void choose() const {
    for (size_t l = 0; l < layers_.size(); ++l)
      if (layers_[l].kind == kLinear) layers_[l].form = cheapest(l);
  }

 private:
  std::vector<Layer>& layers_;
  const std::vector<Param>& params_;
  const Plan& plan_;
  int64_t s_, q_, may_;

  bool may(Form form) const { return may_ & (1 << form); }

  // The factored form fits every layer, and is taken where none that is allowed does.
  Form cheapest(size_t l) const {
    const Layer& layer = layers_[l];
    const Param& p = params_[layer.weight];
    if (plan_.adapt) return kDense;  // its steps take G itself
    const bool first = l == 0;
    Form best = kFactored;
    double least = may(kFactored) ? factored(layer, p, first) : -1;
    const auto consider = [&](Form form, bool fits, double count) {
      if (!fits || !may(form) || (least >= 0 && count >= least)) return;
      best = form;
      least = count;
    };
    consider(kDense, p.left || p.right, dense(layer, p, first));
    consider(kGram, first && plan_.steps > 0 && !p.scale, gram(layer, p));
    return best;
  }

  // What the two forms with weights have in common: passes, their derivatives along V, lambda.
  double passes(const Layer& layer, bool first) const {
    const double product = double(layer.out) * layer.in * s_;
    const double per_step = plan_.keep ? (first ? 2 : 6) : (first ? 1 : 2);
    return plan_.steps * per_step * product + queries(layer);
  }
  double queries(const Layer& layer) const {
    return (plan_.keep ? 2.0 : 1.0) * layer.out * layer.in * q_;
  }
  double factored(const Layer& layer, const Param& p, bool first) const {
    const double n = layer.out, m = layer.in, s = s_, steps = plan_.steps;
    const double left = p.left * n * n * s, right = p.right * m * m * s;
    const double forwards = left + n * m * s, back = 2 * left + 2 * n * m * s;
    const double turns = first ? 1 : steps;  // how often X' C and what it leads to are computed
    return passes(layer, first) + steps * (forwards + plan_.keep * back) +
           turns * right * (1 + plan_.keep * (first ? 1 : 2));
  }
  double dense(const Layer& layer, const Param& p, bool first) const {
    const double n = layer.out, m = layer.in, s = s_;
    const double left = p.left * n * n * m, right = p.right * n * m * m;
    const double back = 2 * left + 2 * right + (first ? 1 : 2) * n * m * s;
    return passes(layer, first) + plan_.steps * (n * m * s + left + right + plan_.keep * back);
  }
  double gram(const Layer& layer, const Param& p) const {
    const double n = layer.out, m = layer.in, s = s_, q = q_;
    const double right = p.right * m * m * s, left = p.left * n * n * s;
    const double once = right + s * s * m + s * q * m + n * m * s + n * s * q + queries(layer);
    const double late = right + m * s * (s + q) + n * m * s;
    return once + plan_.steps * (left + n * s * s + plan_.keep * (2 * left + 2 * n * s * s)) +
           plan_.keep * late;
  }
};

}  // namespace fastkfo::inner_loop
