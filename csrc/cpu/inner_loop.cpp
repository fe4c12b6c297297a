// The fused inner loop on the CPU: tasks are spread over threads, each runs from beginning to end
// in the cache of one core. csrc/inner_loop has the algorithm.
#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/inner_loop_kernels.h"
#include "cpu/levels.h"
#include "cpu/operand.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "inner_loop/planner.h"

namespace fastkfo::cpu {
namespace {

using namespace fastkfo::inner_loop;
using MaybeTensor = std::optional<Tensor>;

constexpr int kOperands = 5;  // theta, left, right, bias, scale: the order of the bits of Wanted
constexpr int64_t kTasksPerPart = 2;
constexpr int64_t kMostParts = 64;

template <class S>
const Kernels<S>& kernels();
template <class K, class F>
K best(F baseline, F v3, F v4) {
#ifdef FASTKFO_X86_PRAGMAS
  const int level = cpu_level();
  if (level == 4) return v4();
  if (level == 3) return v3();
#endif
  return baseline();
}
#ifdef FASTKFO_X86_PRAGMAS
#define FASTKFO_LEVELS(f) baseline::f, v3::f, v4::f
#else
#define FASTKFO_LEVELS(f) baseline::f, baseline::f, baseline::f
#endif
template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> found = best<Kernels<float>>(FASTKFO_LEVELS(of_float));
  return found;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> found = best<Kernels<double>>(FASTKFO_LEVELS(of_double));
  return found;
}

// Everything that an op is called with, as it comes from Python.
struct Call {
  std::array<MaybeTensors, kOperands> operands;
  Tensor x_s, y_s;
  MaybeTensor x_q, y_q;
  Ints layers;  // five per layer: kind, in, out, weight, bias
  Floats constants, alpha;
  int64_t steps, loss, query_loss;
  bool psd, first_order;
};

void same_dtype(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "fastkfo: dtypes differ: ", name);
}

void contiguous(Tensor& x) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
}

// A call, checked, its tensors without gaps, and its plan.
template <class S>
class Prepared {
 public:
  Planned planned;
  int64_t tasks;

  Prepared(Call& call, bool keep, const Ints& wanted, bool want_x_s, bool want_x_q)
      : call_(call) {
    read_layers();
    read_inputs();
    read_operands(wanted);
    Plan& plan = planned.plan;
    plan.steps = static_cast<int32_t>(call.steps);
    plan.loss = static_cast<int32_t>(call.loss);
    plan.query_loss = static_cast<int32_t>(call.query_loss);
    plan.first_order = call.first_order;
    plan.keep = keep;
    plan.want_x_s = want_x_s;
    plan.want_x_q = want_x_q;
    planned.pad = 64 / sizeof(S);
    planned.symmetric = call.psd;
    planned.finish(call.x_s.size(1), plan.has_query ? call.x_q->size(1) : 0);
  }

  const Plan& plan() const { return planned.plan; }

  int64_t operations() const {
    int64_t per_sample = 0;
    for (const Layer& layer : planned.layers)
      per_sample += layer.kind == kLinear ? 8ll * layer.in * layer.out : 16ll * layer.in;
    return per_sample * (plan().support.samples * (plan().steps + 1) + plan().query.samples);
  }

  Data<S> data(int64_t t) const {
    const auto row = [t](const Tensor& x) {
      const int64_t bytes = x.numel() / x.size(0) * (x.scalar_type() == ScalarType::Float ? 4 : 8);
      return static_cast<const char*>(x.data_ptr()) + t * bytes;
    };
    return {reinterpret_cast<const S*>(row(call_.x_s)), row(call_.y_s),
            plan().has_query ? reinterpret_cast<const S*>(row(*call_.x_q)) : nullptr,
            plan().has_query_targets ? row(*call_.y_q) : nullptr};
  }

  // Of the numbers that the algorithm has, and of those that the caller has: with psd, a factor
  // may have more or fewer rows than its square.
  static int64_t rows(const Param& p, int which) {
    return which == 1 ? p.n : which == 2 ? p.m : p.rows;
  }
  static int64_t columns(const Param& p, int which) {
    return which == 1 ? p.n : which == 2 ? p.m : p.cols;
  }
  int64_t given_rows(size_t i, int which) const {
    if (!squared(which)) return rows(planned.params[i], which);
    const Tensor& x = *call_.operands[which][i];
    return x.size(x.dim() - 2);
  }
  int64_t given_size(size_t i, int which) const {
    return given_rows(i, which) * columns(planned.params[i], which);
  }
  bool squared(int which) const { return call_.psd && (which == 1 || which == 2); }

  // The operands that all tasks share (own = false), or those of task t, into a block.
  void fill(bool own, int64_t t, S* block) const {
    for (size_t i = 0; i < planned.params.size(); ++i) {
      const Param& p = planned.params[i];
      for (int which = 0; which < kOperands; ++which) {
        const S* from = of(which, i);
        if (!from || p.own[which] != own) continue;
        if (own) from += t * given_size(i, which);
        const int64_t places[] = {p.at, p.a, p.c, p.beta, p.s};
        if (squared(which)) {
          square(from, given_rows(i, which), columns(p, which), block + places[which]);
          continue;
        }
        copy(from, rows(p, which), columns(p, which), block + places[which]);
        if (which == 1 && p.a_t != p.a) transpose(from, p.n, block + p.a_t);
      }
    }
  }
  // L' L
  void square(const S* from, int64_t r, int64_t n, S* to) const {
    const int64_t ld = planned.padded(n);
    cpu::Scratch<S> own;
    gemm<S>(n, n, r, {from, 1, n}, {from, n, 1}, to, ld, false, own);
    for (int64_t k = 0; k < n; ++k) std::fill(to + k * ld + n, to + (k + 1) * ld, S(0));
  }
  // The gradient of L in place of that of A = L' L:  L (G + G')
  void through_square(size_t i, int which, int64_t t, S* g, S* to) const {
    const int64_t n = columns(planned.params[i], which), r = given_rows(i, which);
    const S* factor = of(which, i) + t * given_size(i, which);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k <= j; ++k) g[j * n + k] = g[k * n + j] = g[j * n + k] + g[k * n + j];
    cpu::Scratch<S> own;
    gemm<S>(r, n, n, {factor, n, 1}, {g, n, 1}, to, n, false, own);
  }
  bool any_own() const {
    for (const Param& p : planned.params)
      for (const bool own : p.own)
        if (own) return true;
    return false;
  }

 private:
  Call& call_;

  const S* of(int which, size_t i) const {
    const MaybeTensors& group = call_.operands[which];
    if (group.empty() || !group[i].has_value()) return nullptr;
    return static_cast<const S*>(group[i]->data_ptr());
  }
  void copy(const S* from, int64_t n_rows, int64_t n_columns, S* to) const {
    const int64_t ld = planned.padded(n_columns);
    for (int64_t r = 0; r < n_rows; ++r) {
      std::copy(from + r * n_columns, from + (r + 1) * n_columns, to + r * ld);
      std::fill(to + r * ld + n_columns, to + (r + 1) * ld, S(0));
    }
  }
  void transpose(const S* from, int64_t n, S* to) const {
    const int64_t ld = planned.padded(n);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < n; ++c) to[r * ld + c] = from[c * n + r];
      std::fill(to + r * ld + n, to + (r + 1) * ld, S(0));
    }
  }

  void read_layers() {
    const Ints& given = call_.layers;
    STD_TORCH_CHECK(!given.empty() && given.size() % 5 == 0 &&
                        call_.constants.size() == given.size() / 5,
                    "fastkfo: expected five numbers and one constant per layer");
    const int64_t count = static_cast<int64_t>(call_.operands[0].size());
    std::vector<int> seen(count, 0);
    int64_t width = given[1];
    for (size_t k = 0; k < given.size(); k += 5) {
      const int64_t kind = given[k], in = given[k + 1], out = given[k + 2];
      STD_TORCH_CHECK(kind >= 0 && kind < kKinds, "fastkfo: there is no kind of layer ", kind);
      STD_TORCH_CHECK(in == width && in >= 1 && out >= 1 && in < (1 << 24) && out < (1 << 24),
                      "fastkfo: sizes of layers do not match");
      STD_TORCH_CHECK(kind == kLinear || in == out, "fastkfo: only linear layers change the width");
      for (const int64_t index : {given[k + 3], given[k + 4]}) {
        STD_TORCH_CHECK(index >= -1 && index < count, "fastkfo: there is no parameter ", index);
        if (index >= 0) ++seen[index];
      }
      STD_TORCH_CHECK(kind != kLinear || given[k + 3] >= 0, "fastkfo: a layer without its weight");
      STD_TORCH_CHECK(kind == kLinear || kind == kBatchNorm || kind == kLayerNorm ||
                          (given[k + 3] < 0 && given[k + 4] < 0),
                      "fastkfo: a layer with parameters that it cannot have");
      width = out;
      planned.layers.push_back({static_cast<int32_t>(kind), static_cast<int32_t>(in),
                                static_cast<int32_t>(out), static_cast<int32_t>(given[k + 3]),
                                static_cast<int32_t>(given[k + 4]), call_.constants[k / 5]});
    }
    for (const int n : seen) STD_TORCH_CHECK(n == 1, "fastkfo: every parameter is of one layer");
    planned.params.resize(count);
    for (const Layer& layer : planned.layers) {
      if (layer.weight >= 0) shape(layer.weight, layer.kind == kLinear, layer.out, layer.in);
      if (layer.bias >= 0) shape(layer.bias, false, layer.out, 1);
    }
  }
  void shape(int index, bool matrix, int n, int m) {
    Param& p = planned.params[index];
    p.n = n;
    p.m = matrix ? m : 1;
    p.rows = matrix ? n : 1;
    p.cols = matrix ? m : n;
    matrix_.resize(planned.params.size());
    matrix_[index] = matrix;
  }
  std::vector<char> matrix_;

  void read_inputs() {
    Plan& plan = planned.plan;
    plan.has_query = call_.x_q.has_value();
    plan.has_query_targets = plan.has_query && call_.y_q.has_value();
    STD_TORCH_CHECK(call_.steps >= 0 && call_.steps < (1 << 20), "fastkfo: bad number of steps");
    STD_TORCH_CHECK(call_.loss >= 0 && call_.loss < kLosses && call_.query_loss >= 0 &&
                        call_.query_loss < kLosses,
                    "fastkfo: there is no such loss");
    STD_TORCH_CHECK(call_.x_s.dim() == 3, "fastkfo: expected x_s [T, S, m]");
    tasks = call_.x_s.size(0);
    take_inputs(call_.x_s, call_.y_s, call_.loss, "support");
    if (plan.has_query) {
      same_dtype(*call_.x_q, call_.x_s, "x_q");
      take_inputs(*call_.x_q, plan.has_query_targets ? *call_.y_q : call_.y_s,
                  plan.has_query_targets ? call_.query_loss : -1, "query");
    }
  }
  void take_inputs(Tensor& x, Tensor& y, int64_t loss, const char* name) {
    const int64_t classes = planned.layers.back().out;
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == tasks && x.size(1) >= 1 &&
                        x.size(2) == planned.layers.front().in && x.size(1) < (1 << 24),
                    "fastkfo: inputs of the ", name, " do not fit");
    contiguous(x);
    if (loss < 0) return;
    const bool labels = loss == kCrossEntropyMean || loss == kCrossEntropySum;
    bool fits = y.dim() == (labels ? 2 : 3) && y.size(0) == tasks && y.size(1) == x.size(1);
    fits = fits && (labels ? y.scalar_type() == ScalarType::Long
                           : y.size(2) == classes && y.scalar_type() == x.scalar_type());
    STD_TORCH_CHECK(fits, "fastkfo: targets of the ", name, " do not fit");
    contiguous(y);
  }
  void read_operands(const Ints& wanted) {
    const size_t count = planned.params.size();
    STD_TORCH_CHECK(call_.alpha.size() == count && (wanted.empty() || wanted.size() == count),
                    "fastkfo: expected one alpha and one mask per parameter");
    for (size_t i = 0; i < count; ++i) {
      Param& p = planned.params[i];
      bool* const there[] = {nullptr, &p.left, &p.right, &p.bias, &p.scale};
      p.alpha = call_.alpha[i];
      p.wanted = wanted.empty() ? 0 : static_cast<int32_t>(wanted[i]);
      for (int which = 0; which < kOperands; ++which) {
        MaybeTensors& group = call_.operands[which];
        STD_TORCH_CHECK(group.empty() || group.size() == count, "fastkfo: lists differ in length");
        const bool present = !group.empty() && group[i].has_value();
        if (there[which]) *there[which] = present;
        STD_TORCH_CHECK(present || (which > 0 && !(p.wanted & (1 << which))),
                        "fastkfo: operand ", which, " of parameter ", i, " is absent");
        if (!present) continue;
        Tensor& x = *group[i];
        same_dtype(x, call_.x_s, "operands");
        const bool factor = which == 1 || which == 2;
        STD_TORCH_CHECK(!factor || (x.dim() >= 2 && x.size(x.dim() - 1) == columns(p, which)),
                        "fastkfo: operand ", which, " of parameter ", i, " does not fit");
        const int64_t n = given_size(i, which);
        // Of one task, the two are the same.
        p.own[which] = tasks > 1 && x.numel() == n * tasks && (!factor || x.dim() == 3);
        STD_TORCH_CHECK(x.numel() == n || p.own[which], "fastkfo: operand ", which,
                        " of parameter ", i, " does not fit");
        contiguous(x);
      }
    }
  }
};

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
    own = aligned(scratch.take(operands + kept + planned.scratch[backward] + pad));
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

template <class S>
void take_rows(const S* from, int64_t ld, int64_t rows, int64_t columns, S* to) {
  for (int64_t r = 0; r < rows; ++r) std::copy(from + r * ld, from + r * ld + columns, to + r * columns);
}

Tensor empty_of(const Tensor& like, std::vector<int64_t> sizes) {
  return empty(like, sizes.data(), static_cast<int64_t>(sizes.size()));
}

template <class S>
S* data_of(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

void check_labels(const Call& call, bool query) {
  const int64_t kind = query ? call.query_loss : call.loss;
  if (kind != kCrossEntropyMean && kind != kCrossEntropySum) return;
  const Tensor& y = query ? *call.y_q : call.y_s;
  const int64_t classes = call.layers[call.layers.size() - 3];
  const int64_t* labels = static_cast<const int64_t*>(y.data_ptr());
  for (int64_t i = 0; i < y.numel(); ++i)
    STD_TORCH_CHECK(labels[i] >= 0 && labels[i] < classes, "fastkfo: expected labels from 0 to ",
                    classes - 1, ", got ", labels[i]);
}

// A sum of x * 0, several at a time: one would wait for every addition.
template <class S>
bool is_finite(const S* x, int64_t ld, int64_t rows, int64_t columns) {
  constexpr int64_t width = 16;
  S sums[width] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const S* row = x + r * ld;
    int64_t c = 0;
    for (; c + width <= columns; c += width)
      for (int64_t k = 0; k < width; ++k) sums[k] += row[c + k] * 0;
    for (; c < columns; ++c) sums[0] += row[c] * 0;
  }
  S sum = 0;
  for (const S x_sum : sums) sum += x_sum;
  return sum == 0;
}

template <class S>
int64_t tape_of(Call& call) {
  return Prepared<S>(call, true, {}, false, false).plan().tape;
}

template <class S>
void check_tape(const Tensor& tape, const Prepared<S>& prepared, const Tensor& like) {
  STD_TORCH_CHECK(tape.dim() == 2 && tape.size(0) == prepared.tasks &&
                      tape.size(1) == prepared.plan().tape && tape.is_contiguous(),
                  "fastkfo: not the tape of this call");
  same_dtype(tape, like, "tape");
}

template <class S>
Tensors forward(Call& call, MaybeTensor& tape, bool adapted) {
  const bool keep = tape.has_value();
  const Prepared<S> prepared(call, keep, {}, false, false);
  if (keep) check_tape(*tape, prepared, call.x_s);
  const Plan& plan = prepared.plan();
  check_labels(call, false);
  if (plan.has_query_targets) check_labels(call, true);
  const int64_t tasks = prepared.tasks, passes = plan.steps + (plan.has_query ? 1 : 0);
  const Tensor& like = call.x_s;
  Tensor loss = empty_of(like, {plan.has_query_targets ? tasks : 0});
  Tensor support_loss = empty_of(like, {tasks, plan.steps});
  Tensor predictions =
      empty_of(like, {plan.has_query ? tasks : 0, plan.query.samples, plan.classes});
  Tensor statistics = empty_of(like, {tasks, passes, plan.statistics});
  Tensor finite = torch::stable::empty({tasks}, ScalarType::Bool);
  Tensors results{loss, support_loss, predictions, statistics, finite};
  if (adapted)
    for (const Param& p : prepared.planned.params)
      results.push_back(p.rows == 1 && p.m == 1 ? empty_of(like, {tasks, p.cols})
                                                : empty_of(like, {tasks, p.rows, p.cols}));
  const SharedBlock<S> shared(prepared);
  const bool any_own = prepared.any_own();
  parallel_units(std::vector<int64_t>(tasks, prepared.operations()), [&](int64_t t) {
    const Workspace<S> space(prepared, !keep, false);
    S* own_tape = keep ? data_of<S>(*tape) + t * plan.tape : space.tape;
    if (any_own) prepared.fill(true, t, space.own);
    const Blocks<S> blocks{shared.data, space.own};
    const Results<S> to{
        plan.has_query_targets ? data_of<S>(loss) + t : nullptr,
        data_of<S>(support_loss) + t * plan.steps,
        plan.has_query ? data_of<S>(predictions) + t * plan.query.samples * plan.classes : nullptr,
        plan.statistics ? data_of<S>(statistics) + t * passes * plan.statistics : nullptr};
    kernels<S>().forward(plan, blocks, prepared.planned.template carve<S>(space.work), own_tape,
                         prepared.data(t), to);
    bool good = is_finite(to.support_loss, 0, 1, plan.steps);
    if (to.loss)
      good = good && is_finite(to.loss, 0, 1, 1);
    else if (to.predictions)
      good = good && is_finite(to.predictions, 0, 1, plan.query.samples * plan.classes);
    static_cast<bool*>(finite.data_ptr())[t] = good;
    if (!adapted) return;
    const int64_t last = keep ? plan.steps - 1 : plan.steps % 2;
    for (size_t i = 0; i < prepared.planned.params.size(); ++i) {
      const Param& p = prepared.planned.params[i];
      const S* from = (plan.steps > 0  ? own_tape + plan.thetas + last * plan.theta
                       : p.own[0] ? blocks.own
                                  : blocks.shared) +
                      p.at;
      take_rows(from, p.ld, p.rows, p.cols, data_of<S>(results[5 + i]) + t * p.rows * p.cols);
    }
  });
  return results;
}

// One gradient that is returned.
template <class S>
struct Output {
  int64_t rows, columns, ld, at;  // where a task leaves it
  bool own;
  size_t param;
  int which;
  Tensor tensor;  // of the operand's shape
  int64_t part;   // where it lies in a part's sums
  int64_t size() const { return rows * columns; }
};

template <class S>
std::vector<Output<S>> outputs_of(const Prepared<S>& prepared, const Call& call) {
  std::vector<Output<S>> outputs;
  for (size_t i = 0; i < prepared.planned.params.size(); ++i) {
    const Param& p = prepared.planned.params[i];
    const int64_t at[] = {p.at, p.g_a, p.g_c, p.g_beta, p.g_s};
    for (int which = 0; which < kOperands; ++which) {
      if (!(p.wanted & (1 << which))) continue;
      const int64_t rows = prepared.rows(p, which), columns = prepared.columns(p, which);
      outputs.push_back({rows, columns, prepared.planned.padded(columns), at[which], p.own[which],
                         i, which, empty_shaped_like(*call.operands[which][i]), 0});
    }
  }
  return outputs;
}

// The sums of one gradient, or those of one task, to where they are returned.
template <class S>
void deliver(const Prepared<S>& prepared, const Output<S>& out, int64_t t, S* g) {
  S* to = data_of<S>(out.tensor) + t * prepared.given_size(out.param, out.which);
  if (out.which == 2 && !prepared.squared(2)) {  // the algorithm leaves it transposed
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.columns; ++c) to[r * out.columns + c] = g[c * out.columns + r];
    return;
  }
  if (prepared.squared(out.which))
    prepared.through_square(out.param, out.which, t, g, to);
  else
    std::copy(g, g + out.size(), to);
}

template <class S>
Tensors backward(Call& call, MaybeTensor& d_loss, MaybeTensors& d_adapted, Tensor& tape,
                 const Ints& wanted, bool want_x_s, bool want_x_q) {
  const Prepared<S> prepared(call, true, wanted, want_x_s, want_x_q);
  const Plan& plan = prepared.plan();
  const int64_t tasks = prepared.tasks;
  check_tape(tape, prepared, call.x_s);
  if (d_loss.has_value()) {
    STD_TORCH_CHECK(d_loss->numel() == tasks && plan.has_query_targets, "fastkfo: bad d_loss");
    same_dtype(*d_loss, call.x_s, "d_loss");
    contiguous(*d_loss);
  }
  const auto& params = prepared.planned.params;
  STD_TORCH_CHECK(d_adapted.empty() || d_adapted.size() == params.size(), "fastkfo: bad d_adapted");
  bool any_adapted = false;
  for (size_t i = 0; i < d_adapted.size(); ++i)
    if (d_adapted[i].has_value()) {
      same_dtype(*d_adapted[i], call.x_s, "d_adapted");
      STD_TORCH_CHECK(d_adapted[i]->numel() == tasks * params[i].rows * params[i].cols,
                      "fastkfo: bad d_adapted");
      contiguous(*d_adapted[i]);
      any_adapted = true;
    }
  std::vector<Output<S>> outputs = outputs_of(prepared, call);
  Tensor x_s_grad = empty_of(call.x_s, {want_x_s ? tasks : 0, plan.support.samples, plan.in});
  Tensor x_q_grad = empty_of(call.x_s, {want_x_q ? tasks : 0, plan.query.samples, plan.in});

  // Sums over tasks: the parts do not depend on the number of threads, nor does their order.
  int64_t part_size = 0;
  for (Output<S>& out : outputs)
    if (!out.own) {
      out.part = part_size;
      part_size += out.size();
    }
  const int64_t parts =
      std::clamp<int64_t>((tasks + kTasksPerPart - 1) / kTasksPerPart, 1, kMostParts);
  std::vector<S> sums(parts * part_size);
  const auto first_task = [&](int64_t part) { return tasks * part / parts; };
  const SharedBlock<S> shared(prepared);
  const bool any_own = prepared.any_own();
  const int64_t cost = 2 * prepared.operations() * ((tasks + parts - 1) / std::max<int64_t>(parts, 1));

  const auto run_task = [&](int64_t t, S* sum) {
    const Workspace<S> space(prepared, false, true);
    if (any_own) prepared.fill(true, t, space.own);
    const Work<S> scratch = prepared.planned.template carve<S>(space.work);
    S* g = scratch.gradients;
    std::fill(g, g + plan.gradients, S(0));
    const S c = d_loss.has_value() ? data_of<S>(*d_loss)[t] : S(0);
    bool silent = c == 0;
    if (any_adapted)
      for (size_t i = 0; i < params.size(); ++i) {
        if (!d_adapted[i].has_value()) continue;
        const Param& p = params[i];
        const S* from = data_of<S>(*d_adapted[i]) + t * p.rows * p.cols;
        for (int64_t r = 0; r < p.rows; ++r)
          for (int64_t k = 0; k < p.cols; ++k) {
            const S x = from[r * p.cols + k];
            silent = silent && x == 0;
            g[p.at + r * p.ld + k] = x;
          }
      }
    S* to_x_s = want_x_s ? data_of<S>(x_s_grad) + t * plan.support.samples * plan.in : nullptr;
    S* to_x_q = want_x_q ? data_of<S>(x_q_grad) + t * plan.query.samples * plan.in : nullptr;
    if (silent) {  // contributes exactly nothing, whatever its numbers are
      if (to_x_s) std::fill(to_x_s, to_x_s + plan.support.samples * plan.in, S(0));
      if (to_x_q) std::fill(to_x_q, to_x_q + plan.query.samples * plan.in, S(0));
    } else {
      kernels<S>().backward(plan, {shared.data, space.own}, scratch,
                            data_of<S>(tape) + t * plan.tape, c, to_x_s, to_x_q);
    }
    bool good = true;
    for (const Output<S>& out : outputs) {
      if (out.own) {
        std::vector<S> dense(out.size());
        take_rows(g + out.at, out.ld, out.rows, out.columns, dense.data());
        deliver(prepared, out, t, dense.data());
      } else {
        good = good && is_finite(g + out.at, out.ld, out.rows, out.columns);
      }
    }
    if (!good || silent) return;
    for (const Output<S>& out : outputs) {
      if (out.own) continue;
      S* to = sum + out.part;
      for (int64_t r = 0; r < out.rows; ++r)
        for (int64_t k = 0; k < out.columns; ++k) to[r * out.columns + k] += g[out.at + r * out.ld + k];
    }
  };
  parallel_units(std::vector<int64_t>(parts, cost), [&](int64_t part) {
    S* sum = sums.data() + part * part_size;
    for (int64_t t = first_task(part); t < first_task(part + 1); ++t) run_task(t, sum);
  });

  Tensors results;
  for (const Output<S>& out : outputs) {
    results.push_back(out.tensor);
    if (out.own) continue;
    S* to = sums.data() + out.part;
    for (int64_t part = 1; part < parts; ++part) {
      const S* from = to + part * part_size;
      for (int64_t k = 0; k < out.size(); ++k) to[k] += from[k];
    }
    deliver(prepared, out, 0, to);
  }
  if (want_x_s) results.push_back(x_s_grad);
  if (want_x_q) results.push_back(x_q_grad);
  return results;
}

template <class F>
auto by_dtype(const Tensor& x, const F& run) -> decltype(run(float{})) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32 or float64");
  }
}

MaybeTensors optional(Tensors tensors) { return MaybeTensors(tensors.begin(), tensors.end()); }

}  // namespace

Tensors inner_loop_forward(Tensors theta, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                           MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q,
                           MaybeTensor y_q, MaybeTensor tape, Ints layers, Floats constants,
                           Floats alpha, int64_t steps, int64_t loss, int64_t query_loss, bool psd,
                           bool adapted) {
  Call call{{optional(theta), left, right, bias, scale}, x_s, y_s, x_q, y_q, layers, constants,
            alpha, steps, loss, query_loss, psd, false};
  return by_dtype(x_s, [&](auto s) { return forward<decltype(s)>(call, tape, adapted); });
}

int64_t inner_loop_tape(Tensors theta, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                        MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q,
                        MaybeTensor y_q, Ints layers, Floats constants, Floats alpha,
                        int64_t steps, int64_t loss, int64_t query_loss, bool psd) {
  Call call{{optional(theta), left, right, bias, scale}, x_s, y_s, x_q, y_q, layers, constants,
            alpha, steps, loss, query_loss, psd, false};
  return by_dtype(x_s, [&](auto s) { return tape_of<decltype(s)>(call); });
}

Tensors inner_loop_backward(MaybeTensor d_loss, MaybeTensors d_adapted, Tensors theta,
                            MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                            MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q,
                            MaybeTensor y_q, Tensor tape, Ints layers, Floats constants,
                            Floats alpha, int64_t steps, int64_t loss, int64_t query_loss,
                            bool psd, bool first_order, Ints wanted, bool want_x_s,
                            bool want_x_q) {
  Call call{{optional(theta), left, right, bias, scale}, x_s, y_s, x_q, y_q, layers, constants,
            alpha, steps, loss, query_loss, psd, first_order};
  return by_dtype(x_s, [&](auto s) {
    return backward<decltype(s)>(call, d_loss, d_adapted, tape, wanted, want_x_s, want_x_q);
  });
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("inner_loop_forward", TORCH_BOX(&fastkfo::cpu::inner_loop_forward));
  m.impl("inner_loop_tape", TORCH_BOX(&fastkfo::cpu::inner_loop_tape));
  m.impl("inner_loop_backward", TORCH_BOX(&fastkfo::cpu::inner_loop_backward));
}
