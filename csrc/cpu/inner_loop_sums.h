// The gradients of a fused inner loop: each task's own, and the sums over tasks. The tasks are
// dealt out to parts that do not depend on the number of threads, and so is the order of all
// additions.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/inner_loop_call.h"

namespace fastkfo::cpu {

constexpr int64_t kTasksPerPart = 2;
constexpr int64_t kMostParts = 64, kMostLargeParts = 8;
constexpr int64_t kLarge = 1 << 18;  // numbers; many parts of that size would leave the cache

template <class S>
void take_rows(const S* from, int64_t ld, int64_t rows, int64_t columns, S* to) {
  for (int64_t r = 0; r < rows; ++r)
    std::copy(from + r * ld, from + r * ld + columns, to + r * columns);
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
class Sums {
 public:
  Sums(const Prepared<S>& prepared, const Call& call)
      : prepared_(prepared), outputs_(outputs_of(prepared, call)) {
    for (Output<S>& out : outputs_)
      if (!out.own) {
        out.part = part_size_;
        part_size_ += out.size();
      }
    const int64_t most = part_size_ > kLarge ? kMostLargeParts : kMostParts;
    parts_ = std::clamp<int64_t>((prepared.tasks + kTasksPerPart - 1) / kTasksPerPart, 1, most);
    memory_.reset(new S[std::max<int64_t>(1, parts_ * part_size_)]);
  }
  int64_t parts() const { return parts_; }
  int64_t first_task(int64_t part) const { return prepared_.tasks * part / parts_; }
  int64_t tasks_per_part() const { return (prepared_.tasks + parts_ - 1) / parts_; }

  void begin(int64_t part) {
    S* sum = memory_.get() + part * part_size_;
    std::fill(sum, sum + part_size_, S(0));
  }
  // Add the gradients of task t, a block of them: to what tasks share, only if all are finite.
  void add(int64_t part, int64_t t, const S* g) {
    bool good = true;
    for (const Output<S>& out : outputs_) {
      if (out.own) {
        std::vector<S> dense(out.size());
        take_rows(g + out.at, out.ld, out.rows, out.columns, dense.data());
        deliver(prepared_, out, t, dense.data());
      } else {
        good = good && is_finite(g + out.at, out.ld, out.rows, out.columns);
      }
    }
    if (!good) return;
    for (const Output<S>& out : outputs_) {
      if (out.own) continue;
      S* to = memory_.get() + part * part_size_ + out.part;
      for (int64_t r = 0; r < out.rows; ++r) {
        const S* from = g + out.at + r * out.ld;
        for (int64_t k = 0; k < out.columns; ++k) to[r * out.columns + k] += from[k];
      }
    }
  }
  // The gradients, in the order of the bits of Wanted, parameter by parameter.
  void finish(Tensors& results) {
    for (const Output<S>& out : outputs_) {
      results.push_back(out.tensor);
      if (out.own) continue;
      S* to = memory_.get() + out.part;
      for (int64_t part = 1; part < parts_; ++part) {
        const S* from = to + part * part_size_;
        for (int64_t k = 0; k < out.size(); ++k) to[k] += from[k];
      }
      deliver(prepared_, out, 0, to);
    }
  }

 private:
  const Prepared<S>& prepared_;
  std::vector<Output<S>> outputs_;
  int64_t part_size_ = 0, parts_ = 1;
  std::unique_ptr<S[]> memory_;
};

}  // namespace fastkfo::cpu
