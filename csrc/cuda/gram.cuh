// L^T L of every factor of a learner, L (V + V^T), and L^T M + M^T L: one launch each, whose blocks
// have 64 rows of one result.
#pragma once

#include "cuda/parts.cuh"
#include "cuda/product.cuh"
#include "operand.h"

namespace fastkfo::kron {

enum class Square { kGram, kVjp, kJvp };

// Matrices [count, rows, n] without gaps; the partner is V [count, n, n] or M [count, rows, n].
template <class S>
struct Factor {
  const S *data, *partner;
  S* out;
  int64_t count, first;  // the number of its first unit
  int32_t rows, n, stripes;
};

constexpr int kMostFactors = 64, kStripe = 64;

template <class S>
struct Factors {
  Factor<S> item[kMostFactors];
  Square which;
  int32_t count;
  int64_t units;
};

// Rows `first` to `first + kStripe` of the k-th result.
template <class S>
__device__ void plan(const Factor<S>& f, Square which, int64_t k, int first, Job<S>& job) {
  const int n = f.n, height = which == Square::kVjp ? f.rows : n;
  const int64_t partner = which == Square::kVjp ? int64_t(n) * n : int64_t(f.rows) * n;
  const Strided<const S> l{f.data + k * f.rows * n, Axis::single(n), Axis::single(1)};
  const Strided<const S> p{f.partner + k * partner, Axis::single(n), Axis::single(1)};
  const auto add = [&](Strided<const S> a, const Strided<const S>& b, int depth) {
    a.data += a.row.at(first);
    job.term[job.count++] = {a, b, depth};
  };
  job.count = 0;
  if (which == Square::kGram) add(l.t(), l, f.rows);
  if (which == Square::kVjp) add(l, p, n), add(l, p.t(), n);
  if (which == Square::kJvp) add(l.t(), p, f.rows), add(p.t(), l, f.rows);
  job.c = {f.out + (k * height + first) * n, Axis::single(n), Axis::single(1)};
  job.rows = height - first < kStripe ? height - first : kStripe;
  job.columns = n;
}

template <class S, Multiply HOW>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    grams(const __grid_constant__ Factors<S> all) {
  using Product = Products<S, HOW>;
  auto& job = *reinterpret_cast<Job<S>*>(shared_memory);
  for (int64_t u = blockIdx.x; u < all.units; u += gridDim.x) {
    int i = all.count - 1;
    while (all.item[i].first > u) --i;
    const Factor<S>& f = all.item[i];
    const int64_t k = (u - f.first) / f.stripes;
    if (threadIdx.x == 0)
      plan(f, all.which, k, static_cast<int>((u - f.first) % f.stripes) * kStripe, job);
    wait_for_all();
    Product::run(job, reinterpret_cast<S*>(shared_memory + Product::kJobBytes));
  }
}

template <class S, Multiply HOW>
void launch_grams(const Factors<S>& all, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const int64_t blocks =
      std::min<int64_t>(all.units, kBlocks<S> * attribute(cudaDevAttrMultiProcessorCount, device));
  if (blocks == 0) return;
  launch<true>(grams<S, HOW>, dim3(static_cast<unsigned>(blocks)), Products<S, HOW>::kBytes,
               current_stream(device), all);
}

template <class S>
void run_grams(const std::vector<Factor<S>>& given, Square which, const Tensor& like, bool tf32) {
  for (size_t first = 0; first < given.size(); first += kMostFactors) {
    Factors<S> all{};
    all.which = which;
    for (size_t i = first; i < std::min(given.size(), first + kMostFactors); ++i) {
      Factor<S>& f = all.item[all.count++] = given[i];
      f.first = all.units;
      all.units += f.count * f.stripes;
    }
    if constexpr (std::is_same_v<S, float>)
      if (tf32) {
        launch_grams<S, Multiply::kTensorCores>(all, like);
        continue;
      }
    launch_grams<S, Multiply::kExactly>(all, like);
  }
}

template <class S>
Tensors squares(Square which, Tensors& factors, Tensors* partners, bool tf32) {
  Tensors out;
  std::vector<Factor<S>> all;
  for (size_t i = 0; i < factors.size(); ++i) {
    Tensor& l = factors[i];
    const auto sizes = l.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    const size_t rank = shape.size();
    STD_TORCH_CHECK(rank >= 2, "fastkfo: factors must be matrices");
    const int64_t rows = shape[rank - 2], n = shape[rank - 1];
    STD_TORCH_CHECK(rows < (int64_t(1) << 31) - 512 && n < (int64_t(1) << 31) - 512,
                    "fastkfo: factor ", i, " is too large for its kernels: ", rows, " x ", n);
    int64_t count = 1;
    for (size_t k = 0; k + 2 < rank; ++k) count *= shape[k];
    if (which != Square::kVjp) shape[rank - 2] = n;
    const auto gapless = [&](Tensor& x, int64_t numel) {
      check_alike(x, factors[0]);
      STD_TORCH_CHECK(x.numel() == numel, "fastkfo: operand ", i, " does not match its factor");
      if (!x.is_contiguous()) x = torch::stable::contiguous(x);
      const auto* data = static_cast<const S*>(x.data_ptr());
      STD_TORCH_CHECK(data || numel == 0, "fastkfo: operand ", i, " has no memory");
      return data;
    };
    Factor<S> f{};
    f.data = gapless(l, count * rows * n);
    if (partners)
      f.partner = gapless((*partners)[i], count * n * (which == Square::kVjp ? n : rows));
    out.push_back(empty(l, shape.data(), static_cast<int64_t>(rank)));
    f.out = static_cast<S*>(out.back().data_ptr());
    f.count = count;
    f.rows = static_cast<int32_t>(rows), f.n = static_cast<int32_t>(n);
    const int64_t height = shape[rank - 2];
    f.stripes = static_cast<int32_t>(std::max<int64_t>(1, (height + kStripe - 1) / kStripe));
    all.push_back(f);
  }
  run_grams(all, which, factors[0], tf32);
  return out;
}

struct Grams {
  static Tensors gram(Tensors factors, bool tf32) {
    return on_device(factors, [&](auto t) {
      return squares<decltype(t)>(Square::kGram, factors, nullptr, tf32);
    });
  }
  static Tensors vjp(Tensors factors, Tensors cotangents, bool tf32) {
    check(factors, cotangents);
    return on_device(factors, [&](auto t) {
      return squares<decltype(t)>(Square::kVjp, factors, &cotangents, tf32);
    });
  }
  static Tensors jvp(Tensors factors, Tensors tangents, bool tf32) {
    check(factors, tangents);
    return on_device(factors, [&](auto t) {
      return squares<decltype(t)>(Square::kJvp, factors, &tangents, tf32);
    });
  }
  static void check(const Tensors& factors, const Tensors& partners) {
    STD_TORCH_CHECK(factors.size() == partners.size(), "fastkfo: list lengths differ");
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("gram", TORCH_BOX(&gram));
    m.impl("gram_vjp", TORCH_BOX(&vjp));
    m.impl("gram_jvp", TORCH_BOX(&jvp));
  }
};

}  // namespace fastkfo::kron
