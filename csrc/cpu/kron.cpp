// kron_forward, kron_backward, kron_double_backward: every parameter of a learner in one call.
// The formulas are those of fastkfo/reference/kron.py; docs/kron.md derives them.
#include <string>

#include "cpu/kron_steps.h"
#include "cpu/parallel.h"
#include "cpu/partial_sums.h"

namespace fastkfo::cpu {
namespace {

// Y = param + alpha scale o (A G C + bias)
template <class S, class T>
void forward_unit(UnitSteps<S, T>& s, T* out) {
  const auto& x = s.it.x;
  const S* q = s.left_product(x.left, s.right_product(s.rows(x.grad), x.right));
  const S* y = s.plus_bias(s.to_batch_first(q), x.bias);
  if (!s.it.param) return s.store(s.scaled(y, x.scale, true), out);
  const bool full = x.scale && s.it.scale_is_full;
  if (full) y = s.scaled(y, x.scale, false);
  const S alpha = static_cast<S>(s.it.alpha) * (x.scale && !full ? s.scalar(x.scale) : S(1));
  const S* param = s.flat(s.it.param);
  T* to = s.place(out);
  for (int64_t k = 0; k < s.size; ++k) to[k] = static_cast<T>(param[k] + alpha * y[k]);
}

// Where a unit leaves what it computed: null for what is not wanted.
template <class S, class T>
struct Results {
  T *grad = nullptr, *cotangent = nullptr;                                 // whole tensors
  S *left = nullptr, *right = nullptr, *bias = nullptr, *scale = nullptr;  // this unit's part
};

// With W = alpha scale o V, P = G C, Z = A^T W:
//   G: Z C^T    A: W P^T    C: G^T Z    bias: sum of W    scale: alpha V o (A P + bias)
template <class S, class T>
void backward_unit(UnitSteps<S, T>& s, const Results<S, T>& to) {
  const auto& x = s.it.x;
  const S* v = s.flat(s.it.cotangent);
  const S* w = s.to_rows_first(s.scaled(v, x.scale, true));
  const S* g = to.left || to.right || to.scale ? s.rows(x.grad) : nullptr;
  if (to.grad || to.right) {
    const S* z = s.left_product(x.left, w, true);
    if (to.grad) s.store(s.to_batch_first(s.right_product(z, x.right, true)), to.grad);
    if (to.right) s.right_outer(g, z, to.right);
  }
  if (to.bias) s.sum_batch(w, to.bias);
  if (!to.left && !to.scale) return;
  const S* p = s.right_product(g, x.right);
  if (to.left) s.left_outer(w, p, to.left);
  if (to.scale) {
    const S* q = s.to_batch_first(s.left_product(x.left, p));
    s.scale_gradient(s.plus_bias(q, x.bias), v, to.scale);
  }
}

// The tangent of backward_unit along d, and of forward_unit (into to.cotangent). A dot marks a
// tangent: P' = G' C + G C', Q' = A' P + A P', W' = alpha scale' o V, Z' = A'^T W + A^T W'.
template <class S, class T>
void double_backward_unit(UnitSteps<S, T>& s, const Results<S, T>& to) {
  const auto& x = s.it.x;
  const auto& d = s.it.d;
  const int64_t size = s.size;
  const S* v = s.flat(s.it.cotangent);
  const S* w = s.to_rows_first(s.scaled(v, x.scale, true));
  const S* dw = d.scale ? s.to_rows_first(s.scaled(v, d.scale, true)) : nullptr;
  const S* g = s.rows(x.grad);
  const S* dg = d.grad ? s.rows(d.grad) : nullptr;

  // P' and Q' are null where they are zero.
  const S* p = s.right_product(g, x.right);
  const S* dp = dg ? s.right_product(dg, x.right) : nullptr;
  if (d.right) {
    S* sum = s.take(size);
    if (dp) std::copy(dp, dp + size, sum);
    s.times_right(g, s.right(d.right), sum, dp != nullptr);
    dp = sum;
  }
  if (to.cotangent || to.scale) {
    const S* dq = dp ? s.left_product(x.left, dp) : nullptr;
    if (d.left) {
      S* sum = s.take(size);
      if (dq) std::copy(dq, dq + size, sum);
      s.times_left(s.left(d.left), p, sum, dq != nullptr);
      dq = sum;
    }
    const S* dy = dq ? s.to_batch_first(dq) : nullptr;  // A'GC + AG'C + AGC' + bias'
    dy = s.plus_bias(dy, d.bias);
    if (to.scale) s.scale_gradient(dy, v, to.scale);
    if (to.cotangent) {
      const S* sum = dy ? s.scaled(dy, x.scale, true) : s.zeros(size);
      if (d.scale) {
        const S* q = s.to_batch_first(s.left_product(x.left, p));
        const S* more = s.scaled(s.plus_bias(q, x.bias), d.scale, true);
        S* both = s.take(size);
        for (int64_t k = 0; k < size; ++k) both[k] = sum[k] + more[k];
        sum = both;
      }
      s.store(sum, to.cotangent);
    }
  }
  if (to.bias) s.sum_batch(dw ? dw : s.zeros(size), to.bias);
  if (to.left) {
    if (dp) s.left_outer(w, dp, to.left);
    if (dw) s.left_outer(dw, p, to.left, dp != nullptr);
    if (!dp && !dw) std::fill(to.left, to.left + s.n * s.n, S(0));
  }
  if (!to.grad && !to.right) return;

  const S* z = s.left_product(x.left, w, true);
  const S* dz = dw ? s.left_product(x.left, dw, true) : nullptr;
  if (d.left) {
    S* sum = s.take(size);
    if (dz) std::copy(dz, dz + size, sum);
    s.times_left(s.left(d.left).t(), w, sum, dz != nullptr);
    dz = sum;
  }
  if (to.right) {
    if (dg) s.right_outer(dg, z, to.right);
    if (dz) s.right_outer(g, dz, to.right, dg != nullptr);
    if (!dg && !dz) std::fill(to.right, to.right + s.m * s.m, S(0));
  }
  if (to.grad) {
    const S* sum = dz ? s.right_product(dz, x.right, true) : nullptr;
    if (d.right) {
      S* both = s.take(size);
      if (sum) std::copy(sum, sum + size, both);
      s.times_right(z, s.right(d.right).t(), both, sum != nullptr);
      sum = both;
    }
    s.store(s.to_batch_first(sum ? sum : s.zeros(size)), to.grad);
  }
}

// Runs body(steps) for every unit. Units with large products come one by one, since those bring
// their own threads, unless there are enough of them to keep every thread busy.
template <class T, class F>
void for_each_unit(const std::vector<Item<T>>& items, const F& body) {
  using S = Accumulated<T>;
  std::vector<Unit> units, large;
  std::vector<int64_t> costs, large_costs;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& it = items[i];
    const bool is_large = gemm_is_large(it.n, it.n, it.m) || gemm_is_large(it.n, it.m, it.m);
    for (int64_t t = 0; t < it.tasks; ++t)
      for (int64_t c = 0; c < it.chunks(); ++c) {
        const Unit u{static_cast<int64_t>(i), t, c * it.chunk,
                     std::min(it.batch, (c + 1) * it.chunk)};
        const int64_t elements = (u.b1 - u.b0) * it.n * it.m;
        const int64_t cost =
            elements * (4 + (it.x.left ? 2 * it.n : 0) + (it.x.right ? 2 * it.m : 0));
        (is_large ? large : units).push_back(u);
        (is_large ? large_costs : costs).push_back(cost);
      }
  }
  const auto run = [&](const Unit& u) {
    auto& scratch = Scratch<S>::of_this_thread();
    scratch.reset();
    UnitSteps<S, T> steps(items[u.item], u, scratch);
    body(steps);
  };
  if (large.size() < torch::stable::get_num_threads())
    for (const auto& u : large) run(u);
  else
    parallel_units(large_costs, [&](int64_t k) { run(large[k]); });
  parallel_units(costs, [&](int64_t k) { run(units[k]); });
}

template <class T>
Tensors forward(const Arguments& a) {
  const auto items = make_items<T>(a);
  Tensors out;
  std::vector<T*> data;
  for (const auto& grad : a.grads) {
    out.push_back(empty_shaped_like(grad));
    data.push_back(static_cast<T*>(out.back().data_ptr()));
  }
  for_each_unit<T>(items, [&](auto& s) { forward_unit(s, data[s.u.item]); });
  return out;
}

// The outputs of one item's backward or double backward.
template <class S, class T>
struct Gradients {
  std::optional<Tensor> grad, cotangent;
  std::optional<PartialSums<S, T>> left, right, bias, scale;
};

template <class S, class T>
std::optional<PartialSums<S, T>> partial_sums(const Item<T>& it, const Tensor& like, int64_t size,
                                              int64_t chunks) {
  const int64_t numel = like.numel();
  STD_TORCH_CHECK(numel == size || numel == it.tasks * size,
                  "fastkfo: an operand whose gradient is wanted has ", numel,
                  " elements, expected ", size, " or ", it.tasks * size);
  const bool shared = numel != it.tasks * size;  // over tasks
  return PartialSums<S, T>(empty_shaped_like(like), shared ? 1 : it.tasks,
                           shared ? it.tasks * chunks : chunks, size);
}

template <class T, class F>
Tensors gradients(const Arguments& a, const F& unit) {
  using S = Accumulated<T>;
  const auto items = make_items<T>(a);
  std::vector<Gradients<S, T>> all(items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& it = items[i];
    auto& to = all[i];
    if (it.wanted & kGrad) to.grad = empty_shaped_like(a.grads[i]);
    if (it.wanted & kLeft) to.left = partial_sums<S>(it, *a.left[i], it.n * it.n, it.chunks());
    if (it.wanted & kRight) to.right = partial_sums<S>(it, *a.right[i], it.m * it.m, it.chunks());
    if (it.wanted & kBias) to.bias = partial_sums<S>(it, *a.bias[i], it.n * it.m, it.chunks());
    if (it.wanted & kScale)
      to.scale = it.scale_is_full ? partial_sums<S>(it, *a.scale[i], it.batch * it.n * it.m, 1)
                                  : partial_sums<S>(it, *a.scale[i], 1, it.chunks());
    if (it.wanted & kCotangent) to.cotangent = empty_shaped_like((*a.cotangents)[i]);
  }
  for_each_unit<T>(items, [&](auto& s) {
    auto& to = all[s.u.item];
    const int64_t chunk = s.u.b0 / s.it.chunk;
    const auto part = [&](auto& sums, const Tensor& like, int64_t size, int64_t chunks,
                          int64_t index) -> S* {
      const bool shared = like.numel() != s.it.tasks * size;
      return shared ? sums->part(0, s.u.t * chunks + index) : sums->part(s.u.t, index);
    };
    const int64_t i = s.u.item, n = s.n, m = s.m, chunks = s.it.chunks();
    Results<S, T> results;
    if (to.grad) results.grad = static_cast<T*>(to.grad->data_ptr());
    if (to.cotangent) results.cotangent = static_cast<T*>(to.cotangent->data_ptr());
    if (to.left) results.left = part(to.left, *a.left[i], n * n, chunks, chunk);
    if (to.right) results.right = part(to.right, *a.right[i], m * m, chunks, chunk);
    if (to.bias) results.bias = part(to.bias, *a.bias[i], n * m, chunks, chunk);
    if (to.scale)
      results.scale = s.it.scale_is_full
                          ? part(to.scale, *a.scale[i], s.it.batch * n * m, 1, 0) + s.u.b0 * n * m
                          : part(to.scale, *a.scale[i], 1, chunks, chunk);
    unit(s, results);
  });
  Tensors out;
  for (auto& to : all) {
    if (to.grad) out.push_back(*to.grad);
    for (auto* sums : {&to.left, &to.right, &to.bias, &to.scale})
      if (*sums) {
        (*sums)->finish();
        out.push_back((*sums)->tensor());
      }
    if (to.cotangent) out.push_back(*to.cotangent);
  }
  return out;
}

}  // namespace

Tensors kron_forward(Tensors grads, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                     MaybeTensors scale, MaybeTensors params, Ints dims, Floats alpha, bool) {
  Arguments a{nullptr, grads,   left,    right,   bias, scale, &params, nullptr,
              nullptr, nullptr, nullptr, nullptr, dims, alpha, nullptr};
  return by_dtype(grads, [&](auto t) { return forward<decltype(t)>(a); });
}

Tensors kron_backward(Tensors cotangents, Tensors grads, MaybeTensors left, MaybeTensors right,
                      MaybeTensors bias, MaybeTensors scale, Ints dims, Floats alpha, Ints wanted,
                      bool) {
  Arguments a{&cotangents, grads,   left,    right,   bias, scale, nullptr, nullptr,
              nullptr,     nullptr, nullptr, nullptr, dims, alpha, &wanted};
  return by_dtype(grads, [&](auto t) {
    return gradients<decltype(t)>(a, [](auto& s, auto& to) { backward_unit(s, to); });
  });
}

Tensors kron_double_backward(Tensors cotangents, Tensors grads, MaybeTensors left,
                             MaybeTensors right, MaybeTensors bias, MaybeTensors scale,
                             MaybeTensors d_grads, MaybeTensors d_left, MaybeTensors d_right,
                             MaybeTensors d_bias, MaybeTensors d_scale, Ints dims, Floats alpha,
                             Ints wanted, bool) {
  Arguments a{&cotangents, grads,    left,    right,    bias, scale, nullptr, &d_grads,
              &d_left,     &d_right, &d_bias, &d_scale, dims, alpha, &wanted};
  return by_dtype(grads, [&](auto t) {
    return gradients<decltype(t)>(a, [](auto& s, auto& to) { double_backward_unit(s, to); });
  });
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("kron_forward", TORCH_BOX(&fastkfo::cpu::kron_forward));
  m.impl("kron_backward", TORCH_BOX(&fastkfo::cpu::kron_backward));
  m.impl("kron_double_backward", TORCH_BOX(&fastkfo::cpu::kron_double_backward));
}
