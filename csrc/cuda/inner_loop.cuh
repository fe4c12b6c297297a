// The fused inner loop on CUDA: one block per task, in shared memory from beginning to end; before
// it a launch that packs the operands, after it one that sums gradients over tasks (and one for the
// gradients of squared factors). csrc/inner_loop has the algorithm.
#pragma once

#include <algorithm>
#include <utility>

#define FASTKFO_FN __device__ __forceinline__
#define FASTKFO_LEVEL device  // a namespace

#include "cuda/inner_loop_blocks.cuh"
#include "cuda/inner_loop_task.cuh"
#include "cuda/launch.cuh"
#include "inner_loop/ops.h"
#include "inner_loop/results.h"

namespace fastkfo::cuda {

using namespace fastkfo::inner_loop;
using namespace fastkfo::inner_loop::device;

constexpr int kMostPacked = 7 * kMostParams;

// A call on a CUDA device.
template <class S>
class Prepared : public Checked<S> {
 public:
  using Checked<S>::planned;
  using Checked<S>::tasks;
  int32_t device;
  cudaStream_t stream;

  Prepared(Call& call, bool keep, const Ints& wanted, bool want_x_s, bool want_x_q)
      : Checked<S>(call, 16, keep, wanted, want_x_s, want_x_q),
        device(call.x_s.get_device_index()),
        stream(current_stream(device)) {
    STD_TORCH_CHECK(planned.layers.size() <= kMostLayers && planned.params.size() <= kMostParams,
                    "fastkfo: shared memory holds no plan of more than ", kMostLayers,
                    " layers and ", kMostParams, " parameters");
    for (const MaybeTensors& group : call.operands)
      for (const MaybeTensor& x : group)
        STD_TORCH_CHECK(!x.has_value() || x->get_device_index() == device,
                        "fastkfo: tensors are on two devices");
  }
  Frozen frozen() const {
    Frozen f{};
    f.plan = planned.plan;
    std::copy(planned.layers.begin(), planned.layers.end(), f.layer);
    std::copy(planned.params.begin(), planned.params.end(), f.param);
    std::copy(planned.support.begin(), planned.support.end(), f.support);
    std::copy(planned.query.begin(), planned.query.end(), f.query);
    return f;
  }
};

// The blocks of operands, packed by one launch.
template <class S>
struct PackedOperands {
  Tensor shared, own;

  PackedOperands(const Prepared<S>& prepared, const Tensor& like) {
    const int64_t size = prepared.plan().operands, tasks = prepared.tasks;
    shared = empty_of(like, {std::max<int64_t>(size, 1)});
    own = empty_of(like, {prepared.any_own() ? tasks : 0, size});
    Packings<S, kMostPacked> all{};
    all.shared = data_of<S>(shared);
    all.own = prepared.any_own() ? data_of<S>(own) : nullptr;
    all.size = size;
    all.tasks = tasks;
    int64_t count = 0, most = 0;
    const auto add = [&](size_t i, int which, int64_t to, Packing how) {
      const Param& p = prepared.planned.params[i];
      const int64_t rows = prepared.rows(p, which), columns = prepared.columns(p, which);
      const int64_t ld = prepared.planned.padded(columns);
      all.item[count++] = {prepared.of(which, i),
                           to,
                           static_cast<int32_t>(prepared.given_rows(i, which)),
                           static_cast<int32_t>(rows),
                           static_cast<int32_t>(columns),
                           static_cast<int32_t>(ld),
                           how,
                           p.own[which]};
      most = std::max(most, rows * ld * (p.own[which] ? tasks : 1));
    };
    for (size_t i = 0; i < prepared.planned.params.size(); ++i) {
      const Param& p = prepared.planned.params[i];
      const int64_t places[] = {p.at, p.a, p.c, p.beta, p.s};
      for (int which = 0; which < kOperands; ++which) {
        if (!prepared.of(which, i)) continue;
        add(i, which, places[which], prepared.squared(which) ? kSquared : kAsItIs);
        if (which == 1 && p.a_t != p.a) add(i, which, p.a_t, kTransposed);
        if (which == 2 && p.c_t != p.c) add(i, which, p.c_t, kTransposed);
        if (which == 1 && p.l != p.a) add(i, which, p.l, kAsItIs);
        if (which == 2 && p.r != p.c) add(i, which, p.r, kAsItIs);
      }
    }
    cuda::launch(pack<S, kMostPacked>, grid_of(most, count), 0, prepared.stream, all);
  }
};

// What fits into a block's shared memory: operands, tape, gradients and working memory, or all but
// some of the first three.
template <class S>
struct Placement {
  int64_t operands = 0, tape = 0, gradients = 0, work = 0, bytes = 0;

  Placement(const Prepared<S>& prepared, bool own_tape, bool backward) {
    const Plan& plan = prepared.plan();
    const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, prepared.device);
    constexpr bool kChoices[][3] = {{true, true, true},
                                    {false, true, true},
                                    {false, true, false},
                                    {false, false, true},
                                    {false, false, false}};
    for (const auto& [with_operands, with_tape, with_gradients] : kChoices) {
      operands = with_operands ? plan.operands : 0;
      tape = with_tape && own_tape ? plan.tape : 0;
      gradients = with_gradients && backward ? plan.gradients : 0;
      work = !backward ? plan.work.forward : gradients ? plan.work.all : plan.work.gradients;
      bytes = head_bytes<S>() + (operands + tape + work) * static_cast<int64_t>(sizeof(S));
      if (bytes <= most) return;
    }
    STD_TORCH_CHECK(false, "fastkfo: a task takes ", bytes,
                    " bytes of shared memory, and this GPU has ", most);
  }
};

template <class S>
void point_to_data(TaskCall<S>& to, const Call& call, const Plan& plan) {
  const auto bytes = [](const Tensor& y) {
    const int64_t each = y.scalar_type() == ScalarType::Float ? 4 : 8;
    return y.numel() / std::max<int64_t>(y.size(0), 1) * each;
  };
  to.x_s = data_of<S>(call.x_s);
  to.x_s_size = int64_t(plan.support.samples) * plan.in;
  to.y_s = data_of<char>(call.y_s);
  to.y_s_bytes = bytes(call.y_s);
  if (!plan.has_query) return;
  to.x_q = data_of<S>(*call.x_q);
  to.x_q_size = int64_t(plan.query.samples) * plan.in;
  if (!plan.has_query_targets) return;
  to.y_q = data_of<char>(*call.y_q);
  to.y_q_bytes = bytes(*call.y_q);
}

template <class S>
void point_to_outputs(TaskCall<S>& to, const Outputs<S>& outputs) {
  const Plan& plan = outputs.plan;
  const Results<S> first = outputs.of_task(0);
  to.loss = first.loss;
  to.support_loss = first.support_loss;
  to.predictions = first.predictions;
  to.predictions_size = int64_t(plan.query.samples) * plan.classes;
  to.statistics = first.statistics;
  to.statistics_size = outputs.passes * plan.statistics;
  to.finite = data_of<bool>(outputs.finite);
}

// One launch for all tasks. What does not fit into shared memory is allocated here.
template <class S>
void run(const Prepared<S>& prepared, const PackedOperands<S>& operands, TaskCall<S>& call,
         const Tensor& like) {
  const bool backward = call.mode & kBackward;
  const Placement<S> here(prepared, call.tape == nullptr, backward);
  call.shared = data_of<S>(operands.shared);
  call.own = prepared.any_own() ? data_of<S>(operands.own) : nullptr;
  call.operands_here = here.operands;
  call.tape_here = here.tape;
  call.work_here = here.work;
  call.gradients_here = here.gradients;
  Tensor tape;
  if (!call.tape && !here.tape) {
    tape = empty_of(like, {prepared.tasks, prepared.plan().tape});
    call.tape = data_of<S>(tape);
  }
  cuda::launch(run_tasks<S>, dim3(static_cast<unsigned>(prepared.tasks)), here.bytes,
               prepared.stream, prepared.frozen(), call);
}

// Every task's gradients, and then their sums.
template <class S>
class Sums {
 public:
  Sums(const Prepared<S>& prepared, const Call& call)
      : prepared_(prepared), outputs_(outputs_of(prepared, call)) {
    size_ = prepared.plan().gradients;
    for (Output<S>& out : outputs_)
      if (out.late) {
        out.at = size_;
        size_ += out.size();
      }
    rows_ = empty_of(call.x_s, {prepared.tasks, size_});
    good_ = empty_of(call.x_s, {prepared.tasks}, ScalarType::Bool);
  }
  void point_to(TaskCall<S>& to) const {
    to.gradients = data_of<S>(rows_);
    to.gradients_size = size_;
    to.good = data_of<bool>(good_);
    to.pieces = 0;
    for (const Output<S>& out : outputs_)
      to.piece[to.pieces++] = {out.at,
                               static_cast<int32_t>(out.rows),
                               static_cast<int32_t>(out.columns),
                               static_cast<int32_t>(out.ld),
                               out.late ? 1 << out.which : 0,
                               out.own};
  }
  void finish(Tensors& results) const {
    Deliveries<S, kMostOutputs> all{};
    Squares<S, 2 * kMostParams> squares{};
    all.rows = data_of<S>(rows_);
    all.good = data_of<bool>(good_);
    all.size = size_;
    all.tasks = prepared_.tasks;
    std::vector<Tensor> rooms;
    int64_t count = 0, squared = 0, most = 1, most_squared = 1;
    for (const Output<S>& out : outputs_) {
      results.push_back(out.tensor);
      S* to = data_of<S>(out.tensor);
      const int64_t copies = out.own ? prepared_.tasks : 1;
      if (prepared_.gradient_squared(out.which)) {
        rooms.push_back(empty_of(out.tensor, {copies, out.rows, out.columns}));
        S* room = data_of<S>(rooms.back());
        squares.item[squared++] = {prepared_.of(out.which, out.param),
                                   room,
                                   to,
                                   static_cast<int32_t>(prepared_.given_rows(out.param, out.which)),
                                   static_cast<int32_t>(out.columns),
                                   copies};
        most_squared = std::max(most_squared, out.tensor.numel());
        to = room;
      }
      const bool transposed = prepared_.gradient_transposed(out.which);
      all.item[count++] = {to,
                           out.at,
                           static_cast<int32_t>(out.rows),
                           static_cast<int32_t>(out.columns),
                           static_cast<int32_t>(out.ld),
                           out.own,
                           transposed};
      most = std::max(most, copies * out.rows * out.columns);
    }
    if (count > 0) {
      cuda::launch(deliver<S, kMostOutputs>, grid_of(most, count), 0, prepared_.stream, all);
    }
    if (squared > 0) {
      cuda::launch(through_squares<S, 2 * kMostParams>, grid_of(most_squared, squared), 0,
                   prepared_.stream, squares);
    }
  }

 private:
  const Prepared<S>& prepared_;
  std::vector<Output<S>> outputs_;
  int64_t size_ = 0;
  Tensor rows_, good_;
};

template <class S>
void point_to_inputs(TaskCall<S>& to, const InputGradients<S>& inputs) {
  to.x_s_grad = inputs.support(0);
  to.x_q_grad = inputs.query(0);
}

template <class S>
Tensors forward(Call& call, MaybeTensor& tape, bool adapted) {
  const Prepared<S> prepared(call, tape.has_value(), {}, false, false);
  if (tape.has_value()) {
    check_tape(*tape, prepared, call.x_s);
    Placement<S>(prepared, false, true);  // a backward pass that does not fit is refused now
  }
  const Outputs<S> outputs(prepared, call.x_s);
  Tensors results = outputs.list();
  if (adapted) outputs.append_adapted(prepared.planned.params, results);
  if (prepared.tasks == 0) return results;
  TaskCall<S> tasks{};
  tasks.mode = kForward;
  point_to_data(tasks, call, prepared.plan());
  point_to_outputs(tasks, outputs);
  for (size_t i = 5; i < results.size(); ++i) tasks.adapted[i - 5] = data_of<S>(results[i]);
  if (tape.has_value()) tasks.tape = data_of<S>(*tape);
  run(prepared, PackedOperands<S>(prepared, call.x_s), tasks, call.x_s);
  return results;
}

template <class S>
Tensors gradient(Call& call, const Ints& wanted, bool want_x_s, bool want_x_q) {
  const Prepared<S> prepared(call, true, wanted, want_x_s, want_x_q);
  STD_TORCH_CHECK(prepared.plan().has_query_targets, "fastkfo: a gradient of no query loss");
  const Outputs<S> outputs(prepared, call.x_s);
  const InputGradients<S> inputs(prepared, call.x_s);
  const Sums<S> sums(prepared, call);
  Tensors results = outputs.list();
  if (prepared.tasks > 0) {
    TaskCall<S> tasks{};
    tasks.mode = kForward | kBackward;
    point_to_data(tasks, call, prepared.plan());
    point_to_outputs(tasks, outputs);
    point_to_inputs(tasks, inputs);
    sums.point_to(tasks);
    run(prepared, PackedOperands<S>(prepared, call.x_s), tasks, call.x_s);
  }
  sums.finish(results);
  inputs.list(results);
  return results;
}

template <class S>
Tensors backward(Call& call, MaybeTensor& d_loss, MaybeTensors& d_adapted, Tensor& tape,
                 const Ints& wanted, bool want_x_s, bool want_x_q) {
  const Prepared<S> prepared(call, true, wanted, want_x_s, want_x_q);
  check_tape(tape, prepared, call.x_s);
  const Cotangents<S> cotangents(prepared, d_loss, d_adapted, call.x_s);
  const InputGradients<S> inputs(prepared, call.x_s);
  const Sums<S> sums(prepared, call);
  if (prepared.tasks > 0) {
    TaskCall<S> tasks{};
    tasks.mode = kBackward;
    tasks.tape = data_of<S>(tape);
    tasks.no_loss = !d_loss.has_value();
    if (d_loss.has_value()) tasks.d_loss = data_of<S>(*d_loss);
    for (size_t i = 0; i < d_adapted.size(); ++i)
      if (d_adapted[i].has_value()) tasks.d_adapted[i] = data_of<S>(*d_adapted[i]);
    point_to_data(tasks, call, prepared.plan());
    point_to_inputs(tasks, inputs);
    sums.point_to(tasks);
    run(prepared, PackedOperands<S>(prepared, call.x_s), tasks, call.x_s);
  }
  Tensors results;
  sums.finish(results);
  inputs.list(results);
  return results;
}

struct Cuda {
  static Tensors forward(Call& call, MaybeTensor& tape, bool adapted) {
    const DeviceGuard guard(call.x_s.get_device_index());
    return by_dtype(call.x_s,
                    [&](auto s) { return cuda::forward<decltype(s)>(call, tape, adapted); });
  }
  static int64_t tape(Call& call) {
    return by_dtype(call.x_s, [&](auto s) {
      return Prepared<decltype(s)>(call, true, {}, false, false).plan().tape;
    });
  }
  static Tensors gradient(Call& call, const Ints& wanted, bool x_s, bool x_q) {
    const DeviceGuard guard(call.x_s.get_device_index());
    return by_dtype(call.x_s,
                    [&](auto s) { return cuda::gradient<decltype(s)>(call, wanted, x_s, x_q); });
  }
  static Tensors backward(Call& call, MaybeTensor& d_loss, MaybeTensors& d_adapted, Tensor& tape,
                          const Ints& wanted, bool x_s, bool x_q) {
    const DeviceGuard guard(call.x_s.get_device_index());
    return by_dtype(call.x_s, [&](auto s) {
      return cuda::backward<decltype(s)>(call, d_loss, d_adapted, tape, wanted, x_s, x_q);
    });
  }
};

}  // namespace fastkfo::cuda
