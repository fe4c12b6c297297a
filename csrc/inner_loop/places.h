// Where the numbers of one task lie, and the views of them that the passes work on.
#pragma once

#include "inner_loop/losses.h"
#include "inner_loop/parameters.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class Exec>
class Places {
 protected:
  using S = typename Exec::Number;
  Exec& ex;
  const Plan& plan;
  const Blocks<S>& blocks;
  const Work<S>& scratch;
  S* tape;

  FASTKFO_FN Places(Exec& exec, const Plan& all, const Blocks<S>& operands, const Work<S>& room,
                    S* memory)
      : ex(exec), plan(all), blocks(operands), scratch(room), tape(memory) {}

  FASTKFO_FN S* x() const { return tape + plan.x; }
  FASTKFO_FN S* support_record(int k) const {
    return tape + plan.records + (plan.keep ? k : plan.adapt ? k % 2 : 0) * plan.support.size;
  }
  FASTKFO_FN const S* block(bool own) const { return own ? blocks.own : blocks.shared; }
  FASTKFO_FN S* theta_after(int k) const {  // k >= 1
    return tape + plan.thetas + (plan.keep ? k - 1 : (k - 1) % 2) * plan.later;
  }
  FASTKFO_FN const S* theta(int k, const Param& p) const {
    return k == 0 ? block(p.own[0]) + p.at : theta_after(k) + p.next;
  }
  FASTKFO_FN const S* theta(int k, int index) const {
    return index < 0 ? nullptr : theta(k, plan.param[index]);
  }
  FASTKFO_FN S* v_of(int index) const {
    return index < 0 ? nullptr : scratch.v + plan.param[index].next;
  }
  FASTKFO_FN S* lambda_of(int index) const {
    return index < 0 ? nullptr : scratch.gradients + plan.param[index].g;
  }
  // The block of operands of an adapted transform, k >= 1
  FASTKFO_FN S* phi(int k) const {
    return tape + plan.phis + (plan.keep ? k - 1 : (k - 1) % 2) * plan.operands;
  }
  FASTKFO_FN const S* block_of(const Param& p, int which, int k) const {
    return plan.adapt && k > 0 && which < 4 ? phi(k) : block(p.own[which]);
  }
  // L or R themselves
  FASTKFO_FN const S* raw(const Param& p, int k, bool left) const {
    return left ? block_of(p, 1, k) + p.l : block_of(p, 2, k) + p.r;
  }
  FASTKFO_FN Operands<S> operands(const Param& p, int k) const {
    const int64_t pad = Exec::kPad;
    const auto at = [&](bool there, int which, int64_t place) -> const S* {
      return there ? block_of(p, which, k) + place : nullptr;
    };
    return {at(p.left, 1, p.a),          at(p.left, 1, p.a_t),       at(p.right, 2, p.c),
            at(p.right, 2, p.c_t),       at(p.bias, 3, p.beta),      at(p.scale, 4, p.s),
            (p.n + pad - 1) / pad * pad, (p.m + pad - 1) / pad * pad};
  }
  static FASTKFO_FN bool has(const Param& p, int64_t bit) {
    return bit == kLeft ? p.left : bit == kRight ? p.right : bit == kBias ? p.bias : p.scale;
  }
  FASTKFO_FN Gradients<S> gradients(const Param& p) const {
    S* g = scratch.gradients;
    const auto at = [&](bool here, int64_t bit, int64_t place) -> S* {
      return here && (p.wanted & bit || (plan.adapt && has(p, bit))) ? g + place : nullptr;
    };
    return {p.late ? nullptr : g + p.g, at(true, kLeft, p.g_a), at(!p.late, kRight, p.g_c),
            at(!p.late, kBias, p.g_beta), at(true, kScale, p.g_s)};
  }
  // keeps: what the cotangents d are in, the record itself or another one
  FASTKFO_FN Span<S> span(const Pass& pass, const S* x0, S* record, S* cotangents, int l) const {
    const Slots* s = pass.slots;
    return {pass.samples,
            pass.ld,
            l == 0 ? x0 : record + s[l].a,
            l + 1 < plan.layers ? record + s[l + 1].a : record + pass.out,
            l == 0 ? nullptr : cotangents + s[l - 1].d,
            cotangents + s[l].d,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
  }
  FASTKFO_FN Span<S> tangent_span(const S* record, int l) const {
    Span<S> at = span(plan.support, x(), const_cast<S*>(record), const_cast<S*>(record), l);
    const Slots* s = plan.support.slots;
    S* along = scratch.record;
    at.x_t = l == 0 ? nullptr : along + s[l].a;
    at.y_t = l + 1 < plan.layers ? along + s[l + 1].a : along + plan.support.out;
    at.d_x_t = l > 0            ? along + s[l - 1].d
               : !plan.want_x_s ? nullptr
               : sums_inputs()  ? scratch.x_s_grad
                                : scratch.room.cols_in;
    at.d_y_t = along + s[l].d;
    return at;
  }
  // Whether the first layer adds to the gradient of the inputs by itself.
  FASTKFO_FN bool sums_inputs() const { return plan.layer[0].kind == kLinear; }
  template <bool BATCH>
  FASTKFO_FN Norm<Exec, BATCH> norm(const Layer& layer, const Span<S>& at, const S* record,
                                    const Slots& slots, int k) const {
    S* mutable_record = const_cast<S*>(record);
    const int64_t row = scratch_row();
    return {ex,
            layer,
            at,
            mutable_record + slots.hat,
            mutable_record + slots.inv,
            theta(k, layer.weight),
            theta(k, layer.bias),
            scratch.lanes,
            scratch.lanes + row};
  }
  FASTKFO_FN int64_t scratch_row() const { return plan.lanes; }
  FASTKFO_FN WeightStep<S> weight_step(const S* record, int l) const {
    const Layer& layer = plan.layer[l];
    const Param& p = plan.param[layer.weight];
    const Slots& s = plan.support.slots[l];
    const bool dense = layer.form == kDense;
    const S* q = l == 0 ? tape + plan.q0 : record + s.q;
    return {plan.support.samples,
            plan.support.ld,
            l == 0 ? x() : record + s.a,
            l == 0              ? tape + plan.x_rows
            : p.right && !dense ? scratch.record + s.rows
                                : q,
            record + s.d,
            record + (p.left ? s.p : s.d),
            q,
            l == 0 ? tape + plan.q0_t : nullptr,
            record + s.g,
            record + s.g_c};
  }
};

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
