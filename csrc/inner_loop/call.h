// What a fused inner loop is called with, on any device: checked, its tensors without gaps, with
// its plan.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "common.h"
#include "inner_loop/planner.h"

namespace fastkfo::inner_loop {

using MaybeTensor = std::optional<Tensor>;

constexpr int kOperands = 5;  // theta, left, right, bias, scale: the order of the bits of Wanted
// Everything that an op is called with, as it comes from Python.
struct Call {
  std::array<MaybeTensors, kOperands> operands;
  Tensor x_s, y_s;
  MaybeTensor x_q, y_q;
  Ints layers;  // five per layer: kind, in, out, weight, bias
  Floats constants, alpha;
  int64_t steps, loss, query_loss, forms;
  bool psd, first_order, adapt;
};

inline void same_dtype(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "fastkfo: dtypes differ: ", name);
}

// Sizes are kept in 32 bits, and a GPU has a block for every task.
inline void fewer(int64_t size, int bits, const char* name) {
  STD_TORCH_CHECK(size < (int64_t(1) << bits), "fastkfo: too large: expected fewer than 2^", bits,
                  " ", name, ", got ", size);
}

inline void contiguous(Tensor& x) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
}

template <class S>
class Checked {
 public:
  Planned planned;
  int64_t tasks;

  // alignment: bytes that rows are padded to a multiple of
  Checked(Call& call, int64_t alignment, bool keep, const Ints& wanted, bool want_x_s,
          bool want_x_q)
      : call_(call) {
    read_layers();
    read_inputs();
    read_operands(wanted);
    Plan& plan = planned.plan;
    plan.steps = static_cast<int32_t>(call.steps);
    plan.loss = static_cast<int32_t>(call.loss);
    plan.query_loss = static_cast<int32_t>(call.query_loss);
    plan.first_order = call.first_order;
    plan.psd = call.psd;
    plan.adapt = call.adapt;
    plan.keep = keep;
    plan.want_x_s = want_x_s;
    plan.want_x_q = want_x_q;
    planned.pad = alignment / static_cast<int64_t>(sizeof(S));
    planned.symmetric = call.psd;
    planned.forms = call.forms;
    planned.finish(call.x_s.size(1), plan.has_query ? call.x_q->size(1) : 0);
    STD_TORCH_CHECK(planned.countable,
                    "fastkfo: too large: 64 bits do not count the numbers of a task");
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
            plan().has_query_targets ? row(*call_.y_q) : nullptr, nullptr};
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
  // Whether the algorithm's gradient is that of the square, and not of the factor itself.
  bool gradient_squared(int which) const { return squared(which) && !call_.adapt; }
  // Whether it leaves the gradient transposed.
  bool gradient_transposed(int which) const {
    return which == 2 && !gradient_squared(which) && !call_.adapt;
  }
  bool squared(int which) const { return call_.psd && (which == 1 || which == 2); }
  // An operand's numbers, or null
  const S* of(int which, size_t i) const {
    const MaybeTensors& group = call_.operands[which];
    if (group.empty() || !group[i].has_value()) return nullptr;
    return static_cast<const S*>(group[i]->data_ptr());
  }
  bool any_own() const {
    for (const Param& p : planned.params)
      for (const bool own : p.own)
        if (own) return true;
    return false;
  }

 private:
  Call& call_;

  void read_layers() {
    const Ints& given = call_.layers;
    STD_TORCH_CHECK(
        !given.empty() && given.size() % 5 == 0 && call_.constants.size() == given.size() / 5,
        "fastkfo: expected five numbers and one constant per layer");
    const int64_t count = static_cast<int64_t>(call_.operands[0].size());
    std::vector<int> seen(count, 0);
    int64_t width = given[1];
    for (size_t k = 0; k < given.size(); k += 5) {
      const int64_t kind = given[k], in = given[k + 1], out = given[k + 2];
      STD_TORCH_CHECK(kind >= 0 && kind < kKinds, "fastkfo: there is no kind of layer ", kind);
      STD_TORCH_CHECK(in == width && in >= 1 && out >= 1, "fastkfo: sizes of layers do not match");
      fewer(std::max(in, out), 24, "features of a layer");
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
    fewer(tasks, 31, "tasks");
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
                        x.size(2) == planned.layers.front().in,
                    "fastkfo: inputs of the ", name, " do not fit");
    fewer(x.size(1), 24, "samples of a task");
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
        STD_TORCH_CHECK(present || (which > 0 && !(p.wanted & (1 << which))), "fastkfo: operand ",
                        which, " of parameter ", i, " is absent");
        if (!present) continue;
        Tensor& x = *group[i];
        same_dtype(x, call_.x_s, "operands");
        const bool factor = which == 1 || which == 2;
        STD_TORCH_CHECK(!factor || (x.dim() >= 2 && x.size(x.dim() - 1) == columns(p, which)),
                        "fastkfo: operand ", which, " of parameter ", i, " does not fit");
        if (factor) fewer(x.size(x.dim() - 2), 24, "rows of a factor");
        STD_TORCH_CHECK(!call_.adapt || (which != 4 && (!squared(which) ||
                                                        given_rows(i, which) == columns(p, which))),
                        "fastkfo: operand ", which, " of parameter ", i, " cannot be adapted");
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

}  // namespace fastkfo::inner_loop
