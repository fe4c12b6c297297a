// What a fused inner loop returns, and the cotangents that come back, on any device.
#pragma once

#include "inner_loop/call.h"

namespace fastkfo::inner_loop {

inline Tensor empty_of(const Tensor& like, std::vector<int64_t> sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

template <class S>
S* data_of(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

template <class S>
void check_tape(const Tensor& tape, const Checked<S>& prepared, const Tensor& like) {
  STD_TORCH_CHECK(tape.dim() == 2 && tape.size(0) == prepared.tasks &&
                      tape.size(1) == prepared.plan().tape && tape.is_contiguous(),
                  "fastkfo: not the tape of this call");
  same_dtype(tape, like, "tape");
}

// What a pass forwards returns: query losses, support losses, predictions, statistics, whether a
// task's losses are finite.
template <class S>
struct Outputs {
  const Plan& plan;
  Tensor loss, support_loss, predictions, statistics, finite;
  int64_t passes;

  Outputs(const Checked<S>& prepared, const Tensor& like) : plan(prepared.plan()) {
    const int64_t tasks = prepared.tasks;
    passes = plan.steps + (plan.has_query ? 1 : 0);
    loss = empty_of(like, {plan.has_query_targets ? tasks : 0});
    support_loss = empty_of(like, {tasks, plan.steps});
    predictions = empty_of(like, {plan.has_query ? tasks : 0, plan.query.samples, plan.classes});
    statistics = empty_of(like, {tasks, passes, plan.statistics});
    finite = empty_of(like, {tasks}, ScalarType::Bool);
  }
  Results<S> of_task(int64_t t) const {
    const int64_t predicted = int64_t(plan.query.samples) * plan.classes;
    return {plan.has_query_targets ? data_of<S>(loss) + t : nullptr,
            data_of<S>(support_loss) + t * plan.steps,
            plan.has_query ? data_of<S>(predictions) + t * predicted : nullptr,
            plan.statistics ? data_of<S>(statistics) + t * passes * plan.statistics : nullptr};
  }
  // theta_K of every task
  void append_adapted(const std::vector<Param>& params, Tensors& results) const {
    STD_TORCH_CHECK(!plan.gram.used, "fastkfo: the gram form has no theta_K");
    const int64_t tasks = finite.size(0);
    for (const Param& p : params)
      results.push_back(p.rows == 1 && p.m == 1 ? empty_of(support_loss, {tasks, p.cols})
                                                : empty_of(support_loss, {tasks, p.rows, p.cols}));
  }
  Tensors list() const { return {loss, support_loss, predictions, statistics, finite}; }
};

// Where a task's gradients in its inputs go.
template <class S>
struct InputGradients {
  const Plan& plan;
  Tensor x_s, x_q;
  InputGradients(const Checked<S>& prepared, const Tensor& like) : plan(prepared.plan()) {
    const int64_t tasks = prepared.tasks;
    x_s = empty_of(like, {plan.want_x_s ? tasks : 0, plan.support.samples, plan.in});
    x_q = empty_of(like, {plan.want_x_q ? tasks : 0, plan.query.samples, plan.in});
  }
  int64_t size(const Pass& pass) const { return int64_t(pass.samples) * plan.in; }
  S* support(int64_t t) const {
    return plan.want_x_s ? data_of<S>(x_s) + t * size(plan.support) : nullptr;
  }
  S* query(int64_t t) const {
    return plan.want_x_q ? data_of<S>(x_q) + t * size(plan.query) : nullptr;
  }
  void list(Tensors& results) const {
    if (plan.want_x_s) results.push_back(x_s);
    if (plan.want_x_q) results.push_back(x_q);
  }
};

// The cotangents that a backward pass begins with.
template <class S>
struct Cotangents {
  const std::vector<Param>& params;
  MaybeTensor& loss;
  MaybeTensors& adapted;

  Cotangents(const Checked<S>& prepared, MaybeTensor& d_loss, MaybeTensors& d_adapted,
             const Tensor& like)
      : params(prepared.planned.params), loss(d_loss), adapted(d_adapted) {
    if (loss.has_value()) {
      STD_TORCH_CHECK(loss->numel() == prepared.tasks && prepared.plan().has_query_targets,
                      "fastkfo: bad d_loss");
      same_dtype(*loss, like, "d_loss");
      contiguous(*loss);
    }
    STD_TORCH_CHECK(
        adapted.empty() || (adapted.size() == params.size() && !prepared.plan().gram.used),
        "fastkfo: bad d_adapted");
    for (size_t i = 0; i < adapted.size(); ++i) {
      if (!adapted[i].has_value()) continue;
      same_dtype(*adapted[i], like, "d_adapted");
      STD_TORCH_CHECK(adapted[i]->numel() == prepared.tasks * params[i].rows * params[i].cols,
                      "fastkfo: bad d_adapted");
      contiguous(*adapted[i]);
    }
  }
};

// One gradient that is returned.
template <class S>
struct Output {
  int64_t rows, columns, ld, at;  // where a task leaves it
  bool own, late;                 // of every task; formed from what a task leaves
  size_t param;
  int which;
  Tensor tensor;  // of the operand's shape
  int64_t part;   // where it lies in a part's sums, its rows padded
  int64_t size() const { return rows * ld; }
};

template <class S>
std::vector<Output<S>> outputs_of(const Checked<S>& prepared, const Call& call) {
  std::vector<Output<S>> outputs;
  for (size_t i = 0; i < prepared.planned.params.size(); ++i) {
    const Param& p = prepared.planned.params[i];
    const int64_t at[] = {p.g, p.g_a, p.g_c, p.g_beta, p.g_s};
    for (int which = 0; which < kOperands; ++which) {
      if (!(p.wanted & (1 << which))) continue;
      const int64_t rows = prepared.rows(p, which), columns = prepared.columns(p, which);
      outputs.push_back({rows, columns, prepared.planned.padded(columns), at[which], p.own[which],
                         p.late && which != 1, i, which,
                         empty_shaped_like(*call.operands[which][i]), 0});
    }
  }
  return outputs;
}

}  // namespace fastkfo::inner_loop
