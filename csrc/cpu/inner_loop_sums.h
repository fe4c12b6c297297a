// The gradients of a fused inner loop: each task's own, and the sums over tasks. The tasks are
// dealt out to parts that do not depend on the number of threads, and so is the order of all
// additions.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/inner_loop_kernels.h"
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
  if (prepared.gradient_transposed(out.which)) {
    for (int64_t r = 0; r < out.rows; ++r)
      for (int64_t c = 0; c < out.columns; ++c) to[r * out.columns + c] = g[c * out.ld + r];
    return;
  }
  if (prepared.gradient_squared(out.which))
    prepared.through_square(out.param, out.which, t, g, out.ld, to);
  else
    take_rows(g, out.ld, out.rows, out.columns, to);
}

// The products that late gradients are sums of, side by side: one product of them reads and writes
// the sum once, and not once per task.
template <class S>
class Gathered {
 public:
  Gathered() = default;
  Gathered(int64_t rows, int64_t ld, int64_t most) : rows_(rows), ld_(ld), most_(most) {
    left_.resize(rows * most);
    right_.resize(most * ld);
  }
  void add(const Outer<S>& outer) {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t k = 0; k < outer.inner; ++k)
        left_[r * most_ + used_ + k] = outer.factor * outer.left[r * outer.ld + k];
    std::copy(outer.right, outer.right + outer.inner * ld_, right_.data() + used_ * ld_);
    used_ += outer.inner;
  }
  // to [rows, columns] += their sum
  void add_to(S* to, int64_t columns) {
    kernels<S>().add_product(rows_, columns, used_, left_.data(), most_, right_.data(), to, ld_);
    used_ = 0;
  }

 private:
  int64_t rows_ = 0, ld_ = 0, most_ = 0, used_ = 0;
  std::vector<S> left_, right_;
};

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
    take_memory(parts_ * part_size_);
    gathered_.resize(parts_);
  }
  // Back to the thread, for the next call: new pages cost as much as the sums.
  ~Sums() {
    if (size_ <= kKept && size_ >= kept().size) kept() = {std::move(memory_), size_};
  }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  int64_t parts() const { return parts_; }
  int64_t first_task(int64_t part) const { return prepared_.tasks * part / parts_; }
  int64_t tasks_per_part() const { return (prepared_.tasks + parts_ - 1) / parts_; }

  void begin(int64_t part) {
    S* sum = memory_.get() + part * part_size_;
    std::fill(sum, sum + part_size_, S(0));
    for (const Output<S>& out : outputs_)
      if (out.late && !out.own) gathered_[part].push_back(room_for(out, tasks_per_part()));
  }
  // Adds the gradients of task t, a block of them and those that `late` says the products of: to
  // what tasks share, only if all are finite.
  template <class Late>
  void add(int64_t part, int64_t t, const S* g, bool finite, const Late& late) {
    bool good = finite;
    for (const Output<S>& out : outputs_) {
      if (out.own)
        deliver_own(out, t, g, late);
      else if (!out.late)
        good = good && is_finite(g + out.at, out.ld, out.rows, out.columns);
    }
    if (!good) return;
    size_t k = 0;
    for (const Output<S>& out : outputs_) {
      if (out.own) continue;
      if (out.late) {
        gather(out, late, gathered_[part][k++]);
        continue;
      }
      S* to = memory_.get() + part * part_size_ + out.part;
      const S* from = g + out.at;
      for (int64_t i = 0; i < out.size(); ++i) to[i] += from[i];
    }
  }
  void end(int64_t part) {
    size_t k = 0;
    for (const Output<S>& out : outputs_)
      if (out.late && !out.own)
        gathered_[part][k++].add_to(memory_.get() + part * part_size_ + out.part, out.columns);
    gathered_[part].clear();
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
  static constexpr int64_t kKept = 1 << 24;  // numbers
  struct Kept {
    std::unique_ptr<S[]> memory;
    int64_t size = 0;
  };
  static Kept& kept() {
    static thread_local Kept of_this_thread;
    return of_this_thread;
  }
  void take_memory(int64_t size) {
    Kept last = std::move(kept());
    kept() = {};
    if (last.size >= size) {
      memory_ = std::move(last.memory);
      size_ = last.size;
    } else {
      last.memory.reset();
      size_ = std::max<int64_t>(size, 1);
      memory_.reset(new S[size_]);
    }
  }
  const Prepared<S>& prepared_;
  std::vector<Output<S>> outputs_;
  int64_t part_size_ = 0, parts_ = 1;
  std::unique_ptr<S[]> memory_;
  int64_t size_ = 0;
  std::vector<std::vector<Gathered<S>>> gathered_;

  Gathered<S> room_for(const Output<S>& out, int64_t tasks) const {
    const Plan& plan = prepared_.plan();
    return {out.rows, out.ld, tasks * (plan.support.samples + plan.query.samples)};
  }
  template <class Late>
  void gather(const Output<S>& out, const Late& late, Gathered<S>& to) const {
    Outer<S> outer[2];
    const int count = late(1 << out.which, outer);
    for (int k = 0; k < count; ++k) to.add(outer[k]);
  }
  template <class Late>
  void deliver_own(const Output<S>& out, int64_t t, const S* g, const Late& late) const {
    std::vector<S> whole(out.size(), S(0));
    if (out.late) {
      Gathered<S> own = room_for(out, 1);
      gather(out, late, own);
      own.add_to(whole.data(), out.columns);
    } else {
      std::copy(g + out.at, g + out.at + out.size(), whole.data());
    }
    deliver(prepared_, out, t, whole.data());
  }
};

}  // namespace fastkfo::cpu
