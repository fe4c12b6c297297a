// The fused inner loop on the CPU: tasks are spread over threads, each runs from beginning to end
// in the cache of one core. csrc/inner_loop has the algorithm.
#include <algorithm>
#include <cmath>

#include "cpu/inner_loop_kernels.h"
#include "cpu/inner_loop_sums.h"
#include "cpu/scratch.h"
#include "inner_loop/ops.h"

namespace fastkfo::cpu {
namespace {

template <class S>
S* aligned(S* p) {
  return reinterpret_cast<S*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

// A thread's memory for one task after the other.
template <class S>
struct Workspace {
  S *own, *tape, *work;
  Workspace(const Prepared<S>& prepared, bool needs_tape, bool backward) {
    auto& scratch = Scratch<S>::of_this_thread();
    scratch.reset();
    const Planned& planned = prepared.planned;
    const int64_t pad = planned.pad, operands = prepared.any_own() ? planned.plan.operands : 0;
    const int64_t kept = needs_tape ? planned.plan.tape : 0;
    own = aligned(scratch.take(
        operands + kept + (backward ? planned.plan.work.all : planned.plan.work.forward) + pad));
    tape = own + operands;
    work = tape + kept;
  }
};

template <class S>
struct SharedBlock {
  std::unique_ptr<S[]> memory;
  S* data;
  explicit SharedBlock(const Prepared<S>& prepared) {
    memory.reset(new S[prepared.plan().operands + prepared.planned.pad]);
    data = aligned(memory.get());
    prepared.fill(false, 0, data);
  }
};

void check_labels(const Tensor& y, int64_t loss, int64_t classes) {
  if (loss != kCrossEntropyMean && loss != kCrossEntropySum) return;
  const int64_t* labels = static_cast<const int64_t*>(y.data_ptr());
  for (int64_t i = 0; i < y.numel(); ++i)
    STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < classes, "fastkfo: expected labels from 0 to ",
                    classes - 1, ", got ", labels[i]);
}

void check_labels(const Call& call, const Plan& plan) {
  check_labels(call.y_s, plan.loss, plan.classes);
  if (plan.has_query_targets) check_labels(*call.y_q, plan.query_loss, plan.classes);
}

template <class S>
void look(const Outputs<S>& outputs, int64_t t) {
  const Plan& plan = outputs.plan;
  const Results<S> r = outputs.of_task(t);
  bool good = is_finite(r.support_loss, 0, 1, plan.steps);
  if (r.loss)
    good = good && is_finite(r.loss, 0, 1, 1);
  else if (r.predictions)
    good = good && is_finite(r.predictions, 0, 1, int64_t(plan.query.samples) * plan.classes);
  static_cast<bool*>(outputs.finite.data_ptr())[t] = good;
}

// X' C of a first layer for all tasks at once, where C is too large for a core's cache: it would be
// read again for every task.
template <class S>
class FirstProducts {
 public:
  FirstProducts(const Prepared<S>& prepared, const Call& call, const S* shared) {
    const Plan& plan = prepared.plan();
    const Layer& first = plan.layer[0];
    if (plan.steps == 0 || first.kind != kLinear || first.form == kDense) return;
    const Param& p = plan.param[first.weight];
    if (!p.right || p.own[2] || int64_t(p.m) * p.m < kLarge) return;
    const int64_t rows = prepared.tasks * plan.support.samples, m = p.m;
    ld_ = prepared.planned.padded(m);
    size_ = plan.support.samples * ld_;
    memory_.resize(rows * ld_);
    const std::vector<int64_t> costs((rows + kRows - 1) / kRows, kRows * m * m);
    parallel_units(costs, [&](int64_t unit) {
      const int64_t begin = unit * kRows, end = std::min(rows, begin + kRows);
      cpu::Scratch<S> own;
      gemm<S>(end - begin, m, m, {data_of<S>(call.x_s) + begin * m, m, 1},
              {shared + p.c, prepared.planned.padded(m), 1}, memory_.data() + begin * ld_, ld_,
              false, own);
    });
  }
  const S* of_task(int64_t t) const { return memory_.empty() ? nullptr : &memory_[t * size_]; }

 private:
  static constexpr int64_t kLarge = 1 << 17, kRows = 80;
  std::vector<S> memory_;
  int64_t ld_ = 0, size_ = 0;
};

template <class S>
Data<S> data_of_task(const Prepared<S>& prepared, const FirstProducts<S>& first, int64_t t) {
  Data<S> data = prepared.data(t);
  data.q = first.of_task(t);
  return data;
}

template <class S>
Tensors forward(Call& call, MaybeTensor& tape, bool adapted) {
  const bool keep = tape.has_value();
  const Prepared<S> prepared(call, keep, {}, false, false);
  if (keep) check_tape(*tape, prepared, call.x_s);
  const Plan& plan = prepared.plan();
  check_labels(call, plan);
  const int64_t tasks = prepared.tasks;
  const Outputs<S> outputs(prepared, call.x_s);
  Tensors results = outputs.list();
  const auto& params = prepared.planned.params;
  if (adapted) outputs.append_adapted(params, results);
  const SharedBlock<S> shared(prepared);
  const FirstProducts<S> first(prepared, call, shared.data);
  const bool any_own = prepared.any_own();
  parallel_units(std::vector<int64_t>(tasks, prepared.operations()), [&](int64_t t) {
    const Workspace<S> space(prepared, !keep, false);
    S* own_tape = keep ? data_of<S>(*tape) + t * plan.tape : space.tape;
    if (any_own) prepared.fill(true, t, space.own);
    const Blocks<S> blocks{shared.data, space.own};
    kernels<S>().forward(plan, blocks, work_at(plan.work, space.work), own_tape,
                         data_of_task(prepared, first, t), outputs.of_task(t));
    look(outputs, t);
    if (!adapted) return;
    const int64_t last = keep ? plan.steps - 1 : (plan.steps - 1) % 2;
    for (size_t i = 0; i < params.size(); ++i) {
      const Param& p = params[i];
      const S* from = plan.steps > 0 ? own_tape + plan.thetas + last * plan.later + p.next
                                     : (p.own[0] ? blocks.own : blocks.shared) + p.at;
      take_rows(from, p.ld, p.rows, p.cols, data_of<S>(results[5 + i]) + t * p.rows * p.cols);
    }
  });
  return results;
}

template <class S>
void clear(const InputGradients<S>& inputs, int64_t t) {
  if (S* to = inputs.support(t)) std::fill(to, to + inputs.size(inputs.plan.support), S(0));
  if (S* to = inputs.query(t)) std::fill(to, to + inputs.size(inputs.plan.query), S(0));
}

// Whether what `late` multiplies is finite, and its products are too: by sums of magnitudes, so
// that no product has to be formed.
template <class S>
bool late_is_finite(const Plan& plan, const Work<S>& work, const S* tape) {
  const Gram& at = plan.gram;
  const Pass &support = plan.support, &query = plan.query;
  const Layer& first = plan.layer[0];
  const auto sum = [](const S* x, int64_t ld, int64_t rows, int64_t columns) {
    S total = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) total += std::abs(x[r * ld + c]);
    return total;
  };
  const S along = sum(work.gram + at.e, support.ld, first.out, support.samples) +
                  sum(work.gram + at.sum, support.ld, first.out, support.samples) +
                  sum(work.fixed, support.ld, first.in, support.samples);
  S bound = along * sum(tape + plan.x_rows, plan.ld_in, support.samples, plan.in);
  if (plan.has_query_targets)
    bound += S(plan.steps) *
             sum(work.query + query.slots[0].d, query.ld, first.out, query.samples) *
             sum(tape + at.x_q_rows, plan.ld_in, query.samples, plan.in);
  return std::isfinite(bound);
}

// Adds what a task's backward pass has left to the sums of its part.
template <class S>
void add(Sums<S>& sums, int64_t part, int64_t t, const Prepared<S>& prepared,
         const Blocks<S>& blocks, const Work<S>& work, S* tape) {
  const Plan& plan = prepared.plan();
  const bool finite = !plan.gram.used || late_is_finite(plan, work, tape);
  sums.add(part, t, work.gradients, finite, [&](int64_t wanted, Outer<S>* to) {
    return kernels<S>().late(plan, blocks, work, tape, wanted, to);
  });
}

// Forward and backward, task by task, for a cotangent of 1 of every query loss: what a task needs
// stays in the cache of its core, and no tape is written.
template <class S>
Tensors gradient(Call& call, const Ints& wanted, bool want_x_s, bool want_x_q) {
  const Prepared<S> prepared(call, true, wanted, want_x_s, want_x_q);
  const Plan& plan = prepared.plan();
  STD_TORCH_CHECK(plan.has_query_targets, "fastkfo: a gradient of no query loss");
  check_labels(call, plan);
  const Outputs<S> outputs(prepared, call.x_s);
  const InputGradients<S> inputs(prepared, call.x_s);
  Sums<S> sums(prepared, call);
  const SharedBlock<S> shared(prepared);
  const FirstProducts<S> first(prepared, call, shared.data);
  const bool any_own = prepared.any_own();
  const int64_t cost = 3 * prepared.operations() * sums.tasks_per_part();
  parallel_units(std::vector<int64_t>(sums.parts(), cost), [&](int64_t part) {
    sums.begin(part);
    for (int64_t t = sums.first_task(part); t < sums.first_task(part + 1); ++t) {
      const Workspace<S> space(prepared, true, true);
      if (any_own) prepared.fill(true, t, space.own);
      const Blocks<S> blocks{shared.data, space.own};
      const Work<S> work = work_at(plan.work, space.work);
      kernels<S>().forward(plan, blocks, work, space.tape, data_of_task(prepared, first, t),
                           outputs.of_task(t));
      look(outputs, t);
      std::fill(work.gradients, work.gradients + plan.gradients, S(0));
      kernels<S>().backward(plan, blocks, work, space.tape, S(1), inputs.support(t),
                            inputs.query(t));
      add(sums, part, t, prepared, blocks, work, space.tape);
    }
    sums.end(part);
  });
  Tensors results = outputs.list();
  sums.finish(results);
  inputs.list(results);
  return results;
}

// The cotangents of adapted parameters to the block of gradients, which is zero. Returns whether
// any is not.
template <class S>
bool put(const Cotangents<S>& cotangents, int64_t t, S* g) {
  bool any = false;
  for (size_t i = 0; i < cotangents.adapted.size(); ++i) {
    if (!cotangents.adapted[i].has_value()) continue;
    const Param& p = cotangents.params[i];
    const S* from = data_of<S>(*cotangents.adapted[i]) + t * p.rows * p.cols;
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t k = 0; k < p.cols; ++k) {
        const S x = from[r * p.cols + k];
        any = any || x != 0;
        g[p.g + r * p.ld + k] = x;
      }
  }
  return any;
}

template <class S>
Tensors backward(Call& call, MaybeTensor& d_loss, MaybeTensors& d_adapted, Tensor& tape,
                 const Ints& wanted, bool want_x_s, bool want_x_q) {
  const Prepared<S> prepared(call, true, wanted, want_x_s, want_x_q);
  const Plan& plan = prepared.plan();
  check_tape(tape, prepared, call.x_s);
  const Cotangents<S> cotangents(prepared, d_loss, d_adapted, call.x_s);
  const InputGradients<S> inputs(prepared, call.x_s);
  Sums<S> sums(prepared, call);
  const SharedBlock<S> shared(prepared);
  const bool any_own = prepared.any_own();
  const int64_t cost = 2 * prepared.operations() * sums.tasks_per_part();
  parallel_units(std::vector<int64_t>(sums.parts(), cost), [&](int64_t part) {
    sums.begin(part);
    for (int64_t t = sums.first_task(part); t < sums.first_task(part + 1); ++t) {
      const Workspace<S> space(prepared, false, true);
      if (any_own) prepared.fill(true, t, space.own);
      const Work<S> work = work_at(plan.work, space.work);
      std::fill(work.gradients, work.gradients + plan.gradients, S(0));
      const bool adapted = put(cotangents, t, work.gradients);
      const S c = d_loss.has_value() ? data_of<S>(*d_loss)[t] : S(0);
      const Blocks<S> blocks{shared.data, space.own};
      S* own_tape = data_of<S>(tape) + t * plan.tape;
      if (c == 0 && !adapted) {  // contributes exactly nothing, whatever its numbers are
        clear(inputs, t);
        sums.add(part, t, work.gradients, true, [](int64_t, Outer<S>*) { return 0; });
        continue;
      }
      kernels<S>().backward(plan, blocks, work, own_tape, c, inputs.support(t), inputs.query(t));
      add(sums, part, t, prepared, blocks, work, own_tape);
    }
    sums.end(part);
  });
  Tensors results;
  sums.finish(results);
  inputs.list(results);
  return results;
}

template <class S>
int64_t tape_of(Call& call) {
  return Prepared<S>(call, true, {}, false, false).plan().tape;
}

struct Cpu {
  static Tensors forward(Call& call, MaybeTensor& tape, bool adapted) {
    return by_dtype(call.x_s,
                    [&](auto s) { return cpu::forward<decltype(s)>(call, tape, adapted); });
  }
  static int64_t tape(Call& call) {
    return by_dtype(call.x_s, [&](auto s) { return tape_of<decltype(s)>(call); });
  }
  static Tensors gradient(Call& call, const Ints& wanted, bool x_s, bool x_q) {
    return by_dtype(call.x_s,
                    [&](auto s) { return cpu::gradient<decltype(s)>(call, wanted, x_s, x_q); });
  }
  static Tensors backward(Call& call, MaybeTensor& d_loss, MaybeTensors& d_adapted, Tensor& tape,
                          const Ints& wanted, bool x_s, bool x_q) {
    return by_dtype(call.x_s, [&](auto s) {
      return cpu::backward<decltype(s)>(call, d_loss, d_adapted, tape, wanted, x_s, x_q);
    });
  }
};

}  // namespace
}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) { fastkfo::inner_loop::implement<fastkfo::cpu::Cpu>(m); }
