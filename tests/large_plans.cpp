// Plans of fused inner loops whose numbers 32 bits do not count: every place is counted in 64, and
// what these do not count either is told. Compiled so that an integer that overflows ends it.
#include <cstdio>
#include <cstdlib>

#include "inner_loop/planner.h"

using namespace fastkfo::inner_loop;

constexpr int64_t kK = 1 << 10, kM = 1 << 20, kMost = (1 << 24) - 1;

struct Sizes {
  const char* name;
  int64_t in, hidden, out, samples, queries, steps;
  bool countable;
};

const Sizes kSizes[] = {
    {"inputs", 64 * kK, 4, 3, 64 * kK + 3, 5, 2, true},
    {"query inputs", 64 * kK, 4, 3, 5, 64 * kK + 3, 2, true},
    {"activations", 4, 64 * kK, 3, 64 * kK + 3, 7, 2, true},
    {"weights", 64 * kK, 64 * kK + 1, 3, 5, 6, 2, true},
    {"outputs", 5, 4, 64 * kK, 64 * kK + 3, 64 * kK, 2, true},
    {"samples times queries", 3, 2, 2, 64 * kK, 64 * kK + 1, 2, true},
    {"records", 128, 128, 5, 32 * kK, 5, kM - 1, true},
    {"the largest layers", kMost, 2, 2, kMost, kMost, 1, true},
    {"the most of everything", kMost, kMost, kMost, kMost, kMost, kM - 1, false},
};

Planned planned(const Sizes& s, int form, bool left, bool right, bool adapt, bool keep, bool norm) {
  Planned made{};
  const int32_t in = s.in, hidden = s.hidden, out = s.out;
  made.layers = {{kLinear, in, hidden, 0, 1, 0.0, 0}};
  if (norm) made.layers.push_back({kBatchNorm, hidden, hidden, 3, 4, 1e-5, 0});
  made.layers.push_back({kLinear, hidden, out, 2, -1, 0.0, 0});
  const auto matrix = [&](int32_t n, int32_t m) {
    Param p{};
    p.n = p.rows = n;
    p.m = p.cols = m;
    return p;
  };
  const auto vector = [&](int32_t n) {
    Param p{};
    p.n = p.cols = n;
    p.m = p.rows = 1;
    return p;
  };
  made.params = {matrix(hidden, in), vector(hidden), matrix(out, hidden)};
  if (norm) made.params.insert(made.params.end(), 2, vector(hidden));
  for (Param& p : made.params) {
    p.left = left;
    p.right = right;
    p.bias = true;
    p.scale = !adapt && form != kGram;
    p.wanted = 31;
  }
  made.plan.steps = static_cast<int32_t>(s.steps);
  made.plan.has_query = made.plan.has_query_targets = true;
  made.plan.want_x_s = made.plan.want_x_q = made.plan.keep = keep;
  made.plan.adapt = adapt;
  made.plan.psd = left;
  made.pad = 4;
  made.symmetric = left;
  made.forms = 1 << form;
  made.finish(s.samples, s.queries);
  return made;
}

void expect(bool fine, const char* what, const Sizes& s) {
  if (fine) return;
  std::printf("%s: %s\n", s.name, what);
  std::exit(1);
}

void check(const Sizes& s, const Planned& made) {
  expect(made.countable == s.countable, "countable", s);
  if (!made.countable) return;
  const Plan& p = made.plan;
  const int64_t in = s.in, samples = s.samples, queries = s.queries;
  // One behind the other, and each as large as what lies in it.
  expect(p.x_rows - p.x >= in * samples, "x", s);
  expect(p.records - p.x_rows >= in * samples, "rows of x", s);
  expect(p.query_record - p.records >= (p.keep ? s.steps : 1) * p.support.size, "records", s);
  expect(p.thetas - p.query_record >= p.query.size, "the query's record", s);
  expect(p.tape - p.thetas >= (p.keep ? s.steps - 1 : 0) * p.later, "thetas", s);
  expect(p.support.size >= (s.hidden + s.out) * samples, "a pass", s);
  expect(p.query.size >= (in + s.hidden + s.out) * queries, "a pass over the query", s);
  expect(p.operands >= s.hidden * in + s.out * s.hidden, "operands", s);
  expect(p.gradients >= s.out * s.hidden, "gradients", s);
  expect(p.work.rows_out - p.work.rows_in >= std::max(samples, queries) * in, "rows in", s);
  expect(p.work.cols_in - p.work.cols_out >= s.hidden * samples, "columns out", s);
  expect(p.work.all >= p.work.gradients + p.gradients && p.work.all > p.work.forward, "work", s);
  if (!p.gram.used) return;
  expect(p.gram.n_t - p.gram.n >= samples * queries, "N", s);
  expect(p.gram.work - p.gram.forth >= samples * queries, "P' D", s);
  expect(p.work.x_s_grad - p.work.gram >= p.gram.work, "the gram form", s);
}

int main() {
  int count = 0;
  for (const Sizes& s : kSizes)
    for (int bits = 0; bits < 96; ++bits) {
      const int form = bits / 32;
      const bool adapt = bits & 4;
      if (adapt && form != kDense) continue;
      check(s, planned(s, form, bits & 1, bits & 2, adapt, bits & 8, bits & 16));
      ++count;
    }
  std::printf("%d plans\n", count);
}
