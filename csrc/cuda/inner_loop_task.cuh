// One task per block, from its data to its losses and gradients.
#pragma once

#include "cuda/inner_loop_executor.cuh"
#include "cuda/launch.cuh"
#include "inner_loop/task.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

constexpr int kMostLayers = 16, kMostParams = 24, kMostOutputs = 5 * kMostParams;

// A plan by value: it travels with the launch, so that a captured graph owns it.
struct Frozen {
  Plan plan;
  Layer layer[kMostLayers];
  Param param[kMostParams];
  Slots support[kMostLayers], query[kMostLayers];
};

// One gradient in a task's row of gradients.
struct Piece {
  int64_t at;
  int32_t rows, columns, ld;
  int32_t late;  // 0, or which one Task::late forms
  bool own;
};

enum Mode : int32_t { kForward = 1, kBackward = 2 };

// What the blocks of a launch are called with. Every pointer is to global memory, a stride is from
// task to task.
template <class S>
struct TaskCall {
  int32_t mode, pieces;
  // Numbers in shared memory, or 0: that lies in global memory then, the block of gradients at once
  // in the task's row of them.
  int64_t operands_here, tape_here, work_here, gradients_here;
  const S* shared;  // the block of operands that tasks share
  const S* own;     // [T, plan.operands]
  S* tape;          // [T, plan.tape], where it is not in shared memory
  const S *x_s, *x_q;
  const char *y_s, *y_q;
  int64_t x_s_size, x_q_size, y_s_bytes, y_q_bytes;
  S *loss, *support_loss, *predictions, *statistics;
  int64_t predictions_size, statistics_size;
  bool* finite;
  S* adapted[kMostParams];          // theta_K, or null
  const S* d_loss;                  // null: 1
  bool no_loss;                     // the loss has no cotangent
  const S* d_adapted[kMostParams];  // or null
  S *x_s_grad, *x_q_grad;
  S* gradients;  // [T, gradients_size]
  int64_t gradients_size;
  bool* good;  // [T], whether a task's gradients are finite
  Piece piece[kMostOutputs];
};

template <class S>
class BlockTask {
 public:
  FASTKFO_FN BlockTask(Executor<S>& exec, const TaskCall<S>& all, const Plan& its_plan, S* memory)
      : ex(exec), call(all), plan(its_plan), t(blockIdx.x) {
    S* here = memory;
    const auto take = [&here](int64_t size) {
      S* at = here;
      here += size;
      return at;
    };
    blocks = {call.shared, call.own ? call.own + t * plan.operands : nullptr};
    if (call.operands_here) {
      S* copy = take(call.operands_here);
      const S* from = call.shared;
      ex.each(plan.operands, [=](int64_t i) { copy[i] = from[i]; });
      blocks.shared = copy;
    }
    work = work_at(plan.work, take(call.work_here));
    if (call.gradients && !call.gradients_here)
      work.gradients = call.gradients + t * call.gradients_size;
    tape = call.tape_here ? take(call.tape_here) : call.tape + t * plan.tape;
  }

  FASTKFO_FN void run() {
    Task<Executor<S>> task(ex, plan, blocks, work, tape);
    if (call.mode & kForward) forward(task);
    if (call.mode & kBackward) backward(task);
  }

 private:
  Executor<S>& ex;
  const TaskCall<S>& call;
  const Plan& plan;
  const int64_t t;
  Blocks<S> blocks;
  Work<S> work;
  S* tape;

  FASTKFO_FN void forward(Task<Executor<S>>& task) {
    const Data<S> data{call.x_s + t * call.x_s_size, call.y_s + t * call.y_s_bytes,
                       call.x_q ? call.x_q + t * call.x_q_size : nullptr,
                       call.y_q ? call.y_q + t * call.y_q_bytes : nullptr, nullptr};
    const Results<S> to{call.loss ? call.loss + t : nullptr, call.support_loss + t * plan.steps,
                        call.predictions ? call.predictions + t * call.predictions_size : nullptr,
                        call.statistics ? call.statistics + t * call.statistics_size : nullptr};
    task.forward(data, to);
    look(to);
    for (int i = 0; i < plan.params; ++i)
      if (call.adapted[i]) give(plan.param[i], call.adapted[i]);
  }
  FASTKFO_FN void look(const Results<S>& to) {
    S zero = ex.sum(plan.steps, [=](int64_t k) { return to.support_loss[k] * 0; });
    if (to.loss)
      zero += to.loss[0] * 0;
    else if (to.predictions)
      zero += ex.sum(call.predictions_size, [=](int64_t k) { return to.predictions[k] * 0; });
    if (threadIdx.x == 0) call.finite[t] = zero == 0;
  }
  FASTKFO_FN void give(const Param& p, S* all) {
    const int64_t last = plan.keep ? plan.steps - 1 : (plan.steps - 1) % 2;
    const S* from = plan.steps > 0 ? tape + plan.thetas + last * plan.later + p.next
                                   : (p.own[0] ? blocks.own : blocks.shared) + p.at;
    const int64_t columns = p.cols, ld = p.ld;
    S* to = all + t * p.rows * columns;
    ex.each(p.rows, columns,
            [=](int64_t r, int64_t i) { to[i] = from[r * ld + (i - r * columns)]; });
  }

  FASTKFO_FN void backward(Task<Executor<S>>& task) {
    S* g = work.gradients;
    ex.each(plan.gradients, [=](int64_t i) { g[i] = 0; });
    const S cotangent = call.no_loss ? S(0) : call.d_loss ? call.d_loss[t] : S(1);
    bool any = cotangent != 0;
    for (int i = 0; i < plan.params; ++i)
      if (call.d_adapted[i]) any = put(plan.param[i], call.d_adapted[i]) || any;
    S* x_s_grad = call.x_s_grad ? call.x_s_grad + t * call.x_s_size : nullptr;
    S* x_q_grad = call.x_q_grad ? call.x_q_grad + t * call.x_q_size : nullptr;
    if (!any) {  // contributes exactly nothing, whatever its numbers are
      if (x_s_grad) ex.each(call.x_s_size, [=](int64_t i) { x_s_grad[i] = 0; });
      if (x_q_grad) ex.each(call.x_q_size, [=](int64_t i) { x_q_grad[i] = 0; });
    } else {
      task.backward(cotangent, x_s_grad, x_q_grad);
    }
    leave(task, any);
  }
  // Returns whether any of them is not zero.
  FASTKFO_FN bool put(const Param& p, const S* all) {
    const int64_t columns = p.cols, ld = p.ld;
    const S* from = all + t * p.rows * columns;
    S* to = work.gradients + p.g;
    ex.each(p.rows, columns,
            [=](int64_t r, int64_t i) { to[r * ld + (i - r * columns)] = from[i]; });
    return ex.sum(p.rows * columns, [=](int64_t i) { return from[i] != 0 ? S(1) : S(0); }) != 0;
  }
  FASTKFO_FN void add(Task<Executor<S>>& task, const Piece& piece, S* to) {
    Outer<S> outer[2];
    const int count = task.late(piece.late, outer);
    for (int k = 0; k < count; ++k)
      ex.product(piece.rows, piece.columns, outer[k].inner, {outer[k].left, outer[k].ld, 1},
                 outer[k].right, piece.ld, to, piece.ld, outer[k].factor, to);
  }
  // The gradients to the task's row, and whether those that tasks share are finite.
  FASTKFO_FN void leave(Task<Executor<S>>& task, bool any) {
    S* row = call.gradients + t * call.gradients_size;
    S zero = 0;
    for (int k = 0; k < call.pieces; ++k) {
      const Piece piece = call.piece[k];
      const int64_t columns = piece.columns, ld = piece.ld;
      S* to = row + piece.at;
      if (piece.late) {
        ex.each(piece.rows * ld, [=](int64_t i) { to[i] = 0; });
        if (any) add(task, piece, to);
      } else if (call.gradients_here) {
        const S* from = work.gradients + piece.at;
        ex.each(piece.rows * ld, [=](int64_t i) { to[i] = from[i]; });
      }
      if (piece.own) continue;
      zero += ex.sum(piece.rows * columns, [=](int64_t i) {
        const int64_t r = i / columns;
        return to[r * ld + (i - r * columns)] * 0;
      });
    }
    if (threadIdx.x == 0) call.good[t] = zero == 0;
  }
};

// Shared memory: the plan, the executor's scratch, then what the call says is here.
template <class S>
__host__ __device__ constexpr int64_t head_bytes() {
  return (sizeof(Frozen) + 15) / 16 * 16 + (Executor<S>::kScratch * sizeof(S) + 15) / 16 * 16;
}

template <class S>
__global__ void __launch_bounds__(cuda::kThreads)
    run_tasks(const __grid_constant__ Frozen given, const __grid_constant__ TaskCall<S> call) {
  using cuda::shared_memory;
  Frozen& frozen = *reinterpret_cast<Frozen*>(shared_memory);
  const int* from = reinterpret_cast<const int*>(&given);
  int* to = reinterpret_cast<int*>(shared_memory);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(Frozen) / sizeof(int)); i += blockDim.x)
    to[i] = from[i];
  wait_for_all();
  if (threadIdx.x == 0) {
    frozen.plan.layer = frozen.layer;
    frozen.plan.param = frozen.param;
    frozen.plan.support.slots = frozen.support;
    frozen.plan.query.slots = frozen.query;
  }
  wait_for_all();
  Executor<S> executor{reinterpret_cast<S*>(shared_memory + (sizeof(Frozen) + 15) / 16 * 16)};
  BlockTask<S>(executor, call, frozen.plan, reinterpret_cast<S*>(shared_memory + head_bytes<S>()))
      .run();
}

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
