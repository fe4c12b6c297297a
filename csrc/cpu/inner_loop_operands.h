// A call on the CPU: its operands in the blocks that the algorithm reads.
#pragma once

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "inner_loop/call.h"

namespace fastkfo::cpu {

using namespace fastkfo::inner_loop;

template <class S>
class Prepared : public Checked<S> {
 public:
  using Checked<S>::columns;
  using Checked<S>::given_rows;
  using Checked<S>::given_size;
  using Checked<S>::of;
  using Checked<S>::planned;
  using Checked<S>::rows;
  using Checked<S>::squared;

  Prepared(Call& call, bool keep, const Ints& wanted, bool want_x_s, bool want_x_q)
      : Checked<S>(call, 64, keep, wanted, want_x_s, want_x_q) {}

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
          const int64_t factor = which == 1 ? p.l : p.r;
          if (factor != places[which])
            copy(from, rows(p, which), columns(p, which), block + factor);
          continue;
        }
        copy(from, rows(p, which), columns(p, which), block + places[which]);
        if (which == 1 && p.a_t != p.a) transpose(from, p.n, block + p.a_t);
        if (which == 2 && p.c_t != p.c) transpose(from, p.m, block + p.c_t);
      }
    }
  }
  // L' L: it is symmetric, so that a unit computes its rows from the diagonal on, and mirrors them.
  void square(const S* from, int64_t r, int64_t n, S* to) const {
    const int64_t ld = planned.padded(n);
    by_rows(n, n * r, [&](int64_t first, int64_t last, Scratch<S>& own) {
      S* rows = to + first * ld;
      gemm<S>(last - first, n - first, r, {from + first, 1, n}, {from + first, n, 1}, rows + first,
              ld, false, own);
      for (int64_t k = first; k < last; ++k) {
        for (int64_t c = last; c < n; ++c) to[c * ld + k] = to[k * ld + c];
        std::fill(to + k * ld + n, to + (k + 1) * ld, S(0));
      }
    });
  }
  // The gradient of L in place of that of A = L' L:  L (G + G')
  void through_square(size_t i, int which, int64_t t, S* g, int64_t ld, S* to) const {
    const int64_t n = columns(planned.params[i], which), r = given_rows(i, which);
    const S* factor = of(which, i) + t * given_size(i, which);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k <= j; ++k)
        g[j * ld + k] = g[k * ld + j] = g[j * ld + k] + g[k * ld + j];
    by_rows(r, 2 * n * n, [&](int64_t first, int64_t last, Scratch<S>& own) {
      gemm<S>(last - first, n, n, {factor + first * n, n, 1}, {g, ld, 1}, to + first * n, n, false,
              own);
    });
  }

 private:
  // run(first row, last row, scratch), over threads where it is worth it.
  template <class F>
  static void by_rows(int64_t rows, int64_t cost, const F& run) {
    const int64_t each = std::max<int64_t>(48, (rows + 7) / 8);
    const std::vector<int64_t> costs((rows + each - 1) / each, cost * each);
    parallel_units(costs, [&](int64_t unit) {
      Scratch<S> own;
      run(unit * each, std::min(rows, (unit + 1) * each), own);
    });
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
};

}  // namespace fastkfo::cpu
