// The gradients of a fused inner loop: each task's own, and the sums over tasks. The tasks are
// dealt out to parts that do not depend on the number of threads, and so is the order of all
// additions.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/inner_loop_operands.h"
#include "inner_loop/results.h"

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

// The sums of one gradient, or those of one task, to where they are returned. g: as a task leaves
// it; it is overwritten.
template <class S>
void deliver(const Prepared<S>& prepared, const Output<S>& out, int64_t t, S* g) {
  S* to = data_of<S>(out.tensor) + t * prepared.given_size(out.param, out.which);
  if (out.which == 2 && !prepared.squared(2)) {  // the algorithm leaves it transposed
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.columns; ++c) to[r * out.columns + c] = g[c * out.ld + r];
    return;
  }
  if (prepared.squared(out.which))
    prepared.through_square(out.param, out.which, t, g, out.ld, to);
  else
    take_rows(g, out.ld, out.rows, out.columns, to);
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
  // Adds the gradients of task t, a block of them and those that `late` adds to where it is told:
  // to what tasks share, only if all are finite.
  template <class Late>
  void add(int64_t part, int64_t t, const S* g, bool finite, const Late& late) {
    bool good = finite;
    for (const Output<S>& out : outputs_) {
      if (out.own) {
        std::vector<S> whole(out.size(), S(0));
        if (out.late)
          late(1 << out.which, whole.data());
        else
          std::copy(g + out.at, g + out.at + out.size(), whole.data());
        deliver(prepared_, out, t, whole.data());
      } else if (!out.late) {
        good = good && is_finite(g + out.at, out.ld, out.rows, out.columns);
      }
    }
    if (!good) return;
    for (const Output<S>& out : outputs_) {
      if (out.own) continue;
      S* to = memory_.get() + part * part_size_ + out.part;
      if (out.late) {
        late(1 << out.which, to);
        continue;
      }
      const S* from = g + out.at;
      for (int64_t k = 0; k < out.size(); ++k) to[k] += from[k];
    }
  }
  // The gradients, in the order of the bits of Wanted, parameter by parameter.
  void finish(Tensors& results) {
    const int64_t pieces = (part_size_ + kPiece - 1) / kPiece;
    if (parts_ > 1)
      parallel_units(std::vector<int64_t>(pieces, kPiece * parts_), [&](int64_t piece) {
        S* to = memory_.get() + piece * kPiece;
        const int64_t n = std::min(kPiece, part_size_ - piece * kPiece);
        for (int64_t part = 1; part < parts_; ++part) {
          const S* from = to + part * part_size_;
          for (int64_t k = 0; k < n; ++k) to[k] += from[k];
        }
      });
    for (const Output<S>& out : outputs_) {
      results.push_back(out.tensor);
      if (!out.own) deliver(prepared_, out, 0, memory_.get() + out.part);
    }
  }

 private:
  static constexpr int64_t kPiece = 1 << 14;
  const Prepared<S>& prepared_;
  std::vector<Output<S>> outputs_;
  int64_t part_size_ = 0, parts_ = 1;
  std::unique_ptr<S[]> memory_;
};

}  // namespace fastkfo::cpu
