// gram, gram_vjp, gram_jvp: the products that make factors positive semi-definite, for every
// factor of a learner in one call. Closed under differentiation: each one's derivatives are calls
// of the others (fastkfo/functional/gram.py).
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "operand.h"

namespace fastkfo::cpu {
namespace {

// One matrix of a factor [..., rows, n]; the partner is the cotangent [..., n, n] or the tangent.
// A unit of work is the rows [first, last) of its result.
template <class T>
struct Factor {
  const T *data, *partner;
  T* out;
  int64_t rows, n, first, last;
};

template <class S, class T>
Matrix<S> load(const T* from, int64_t rows, int64_t cols, Scratch<S>& scratch) {
  if constexpr (std::is_same_v<S, T>) {
    return {from, cols, 1};
  } else {
    S* to = scratch.take(rows * cols);
    for (int64_t k = 0; k < rows * cols; ++k) to[k] = static_cast<S>(from[k]);
    return {to, cols, 1};
  }
}

template <class S, class T>
void store(const S* from, int64_t count, T* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = static_cast<T>(from[k]);
}

// The result is symmetric: a unit computes its rows from the diagonal on, and mirrors them.
template <class S, class T>
void gram_one(const Factor<T>& f, Scratch<S>& scratch) {
  const Matrix<S> l = load<S>(f.data, f.rows, f.n, scratch);
  const int64_t i0 = f.first, rows = f.last - f.first, cols = f.n - f.first;
  S* to = scratch.take(rows * cols);
  gemm<S>(rows, cols, f.rows, {l.data + i0, 1, f.n}, {l.data + i0, f.n, 1}, to, cols, false,
          scratch);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i; j < cols; ++j)
      f.out[(i0 + i) * f.n + i0 + j] = static_cast<T>(to[i * cols + j]);
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < std::min(j, rows); ++i)
      f.out[(i0 + j) * f.n + i0 + i] = static_cast<T>(to[i * cols + j]);
}

template <class S, class T>
void gram_vjp_one(const Factor<T>& f, Scratch<S>& scratch) {
  const Matrix<S> l = load<S>(f.data, f.rows, f.n, scratch);
  const Matrix<S> v = load<S>(f.partner, f.n, f.n, scratch);
  S* sum = scratch.take(f.n * f.n);
  for (int64_t i = 0; i < f.n; ++i)
    for (int64_t j = 0; j < f.n; ++j) sum[i * f.n + j] = v.data[i * f.n + j] + v.data[j * f.n + i];
  S* to = scratch.take(f.rows * f.n);
  gemm<S>(f.rows, f.n, f.n, l, {sum, f.n, 1}, to, f.n, false, scratch);
  store(to, f.rows * f.n, f.out);
}

template <class S, class T>
void gram_jvp_one(const Factor<T>& f, Scratch<S>& scratch) {
  const Matrix<S> l = load<S>(f.data, f.rows, f.n, scratch);
  const Matrix<S> d = load<S>(f.partner, f.rows, f.n, scratch);
  S* half = scratch.take(f.n * f.n);
  gemm<S>(f.n, f.n, f.rows, l.t(), d, half, f.n, false, scratch);
  for (int64_t i = 0; i < f.n; ++i)
    for (int64_t j = 0; j < f.n; ++j)
      f.out[i * f.n + j] = static_cast<T>(half[i * f.n + j] + half[j * f.n + i]);
}

// square: the output is [..., n, n], otherwise [..., rows, n]. block: rows of a unit, or 0 for all.
template <class T, class F>
Tensors for_each_factor(const Tensors& factors, const Tensors* partners, bool square, int64_t block,
                        const F& body) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Tensors out, kept;  // kept: factors without gaps
  std::vector<Factor<T>> all;
  std::vector<int64_t> costs;
  for (size_t i = 0; i < factors.size(); ++i) {
    const auto sizes = factors[i].sizes();
    const int64_t rank = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(
        rank >= 2 && factors[i].is_cpu() && factors[i].scalar_type() == factors[0].scalar_type(),
        "fastkfo: factors must be matrices of one dtype on the CPU");
    const int64_t rows = sizes[rank - 2], n = sizes[rank - 1];
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    int64_t count = 1;
    for (int64_t k = 0; k + 2 < rank; ++k) count *= sizes[k];
    if (square) shape[rank - 2] = n;
    const auto gapless = [&](const Tensor& x) {
      kept.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
      const auto* from = static_cast<const T*>(kept.back().data_ptr());
      STD_TORCH_CHECK(from || x.numel() == 0, "fastkfo: operand ", i, " has no memory");
      return from;
    };
    const T* data = gapless(factors[i]);
    const T* partner = nullptr;
    const int64_t partner_rows = square ? rows : n;
    if (partners) {
      STD_TORCH_CHECK((*partners)[i].numel() == count * partner_rows * n &&
                          (*partners)[i].is_cpu() &&
                          (*partners)[i].scalar_type() == factors[0].scalar_type(),
                      "fastkfo: operand ", i, " does not match its factor");
      partner = gapless((*partners)[i]);
    }
    T* to = static_cast<T*>(out.emplace_back(empty(factors[i], shape.data(), rank)).data_ptr());
    const int64_t out_rows = shape[rank - 2];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t step = block ? block : std::max<int64_t>(1, out_rows);
      for (int64_t first = 0; first < out_rows; first += step) {
        const int64_t last = std::min(out_rows, first + step);
        all.push_back({data + t * rows * n, partner ? partner + t * partner_rows * n : nullptr,
                       to + t * out_rows * n, rows, n, first, last});
        costs.push_back((last - first) * (block ? n - first : n) * (2 * rows + 4));
      }
    }
  }
  const auto run = [&](int64_t k) {
    auto& scratch = Scratch<S>::of_this_thread();
    scratch.reset();
    body(all[k], scratch);
  };
  // Large products bring their own threads, unless there are enough of them for every thread.
  const bool many = all.size() >= torch::stable::get_num_threads();
  std::vector<int64_t> shared, shared_costs;
  for (size_t k = 0; k < all.size(); ++k)
    if (!many && gemm_is_large(all[k].n, all[k].n, all[k].rows)) {
      run(static_cast<int64_t>(k));
    } else {
      shared.push_back(static_cast<int64_t>(k));
      shared_costs.push_back(costs[k]);
    }
  parallel_units(shared_costs, [&](int64_t k) { run(shared[k]); });
  return out;
}

template <class F>
Tensors by_dtype(const Tensors& factors, const Tensors* partners, bool square, int64_t block,
                 const F& body) {
  if (factors.empty()) return {};
  STD_TORCH_CHECK(!partners || partners->size() == factors.size(), "fastkfo: list lengths differ");
  switch (factors[0].scalar_type()) {
    case ScalarType::Float:
      return for_each_factor<float>(factors, partners, square, block, body);
    case ScalarType::Double:
      return for_each_factor<double>(factors, partners, square, block, body);
    case ScalarType::BFloat16:
      return for_each_factor<torch::headeronly::BFloat16>(factors, partners, square, block, body);
    case ScalarType::Half:
      return for_each_factor<torch::headeronly::Half>(factors, partners, square, block, body);
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace

Tensors gram(Tensors factors, bool) {
  return by_dtype(factors, nullptr, true, 32, [](auto& f, auto& scratch) { gram_one(f, scratch); });
}

Tensors gram_vjp(Tensors factors, Tensors cotangents, bool) {
  return by_dtype(factors, &cotangents, false, 0,
                  [](auto& f, auto& scratch) { gram_vjp_one(f, scratch); });
}

Tensors gram_jvp(Tensors factors, Tensors tangents, bool) {
  return by_dtype(factors, &tangents, true, 0,
                  [](auto& f, auto& scratch) { gram_jvp_one(f, scratch); });
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("gram", TORCH_BOX(&fastkfo::cpu::gram));
  m.impl("gram_vjp", TORCH_BOX(&fastkfo::cpu::gram_vjp));
  m.impl("gram_jvp", TORCH_BOX(&fastkfo::cpu::gram_jvp));
}
