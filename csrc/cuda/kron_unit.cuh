// What a block computes of a Kronecker update: one task of an item, and a chunk of its batch. The
// formulas are those of fastkfo/reference/kron.py, the steps those of csrc/cpu/kron.cpp. What lies
// between the steps is in shared memory, or in global memory of the block's own where it is more.
#pragma once

#include "cuda/product.cuh"
#include "kron/call.h"

namespace fastkfo::kron {

using namespace fastkfo::cuda;

template <class S>
struct View {
  const S* data;  // null: absent
  int64_t task, batch, row, column;
};

// What an item has, and what is computed of it, [batch, n, m] but for A, C and the biases.
enum Which : int {
  kNone = -1,  // zero
  kG,
  kA,
  kC,
  kBeta,
  kS,
  kDotG,
  kDotA,
  kDotC,
  kDotBeta,
  kDotS,
  kV,
  kTheta,
  kOperands,
  kFirstArray = kOperands,
};

// An item as the kernels see it.
template <class S>
struct Work {
  int64_t tasks, batch, first;  // the number of its first unit
  int32_t n, m, chunk, chunks;
  S alpha;
  bool scale_is_full;
  int32_t wanted;
  View<S> view[kOperands];
  S *out, *to_cotangent;                       // [tasks, batch, n, m]
  S *to_left, *to_right, *to_bias, *to_scale;  // every unit's part
};

template <class S, Multiply HOW>
class Unit {
 public:
  using Product = Products<S, HOW>;

  __device__ Unit(const Work<S>& item, int64_t index, S* arrays, int64_t size, Job<S>& job, S* room)
      : it(item),
        t_(index / item.chunks),
        part_(index),
        b0_(index % item.chunks * item.chunk),
        n_(item.n),
        m_(item.m),
        batch_(static_cast<int>(item.batch - b0_ < item.chunk ? item.batch - b0_ : item.chunk)),
        arrays_(arrays),
        each_(size),
        job_(job),
        room_(room) {}

  // Y = param + alpha scale o (A G C + bias)
  __device__ void forward() {
    const int q = left_product(kA, right_product(kG, kC, array(0)), array(1));
    each([&](int k, int b, int i, int j) {
      S y = it.alpha * scale(kS, b, i, j) * (read(q, b, i, j) + bias(kBeta, i, j));
      if (has(kTheta)) y += read(kTheta, b, i, j);
      (it.out + first())[k] = y;
    });
  }

  // With W = alpha scale o V, P = G C, Z = A^T W:
  //   G: Z C^T    A: W P^T    C: G^T Z    bias: sum of W    scale: alpha V o (A P + bias)
  __device__ void backward() {
    const int w = scaled(kS, array(0));
    if (it.wanted & (kGrad | kRight)) {
      const int z = left_product(kA, w, array(1), true);
      if (it.wanted & kGrad) to_grad(z, kNone, kNone);
      if (it.wanted & kRight) right_outer(kG, z, kNone, kNone);
    }
    if (it.wanted & kBias) sum_batch(w);
    if (!(it.wanted & (kLeft | kScale))) return;
    const int p = right_product(kG, kC, array(2));
    if (it.wanted & kLeft) left_outer(w, p, kNone, kNone);
    if (it.wanted & kScale) scale_gradient(left_product(kA, p, array(1)), kBeta);
  }

  // The tangent of backward along d, and of forward (to_cotangent). A dot marks a tangent:
  // P' = G' C + G C', Q' = A' P + A P', W' = alpha scale' o V, Z' = A'^T W + A^T W'.
  __device__ void double_backward() {
    const int dg = has(kDotG) ? kDotG : kNone;
    const int w = scaled(kS, array(0)), dw = has(kDotS) ? scaled(kDotS, array(1)) : kNone;
    const int p = right_product(kG, kC, array(2));
    const int dp = right_products(dg, kC, kG, kDotC, array(3));
    if (it.wanted & (kCotangent | kScale)) {
      const int dq = left_products(kA, dp, kDotA, p, array(4));
      if (it.wanted & kScale) scale_gradient(dq, kDotBeta);
      if (it.wanted & kCotangent) tangent(dq, has(kDotS) ? left_product(kA, p, array(5)) : kNone);
    }
    if (it.wanted & kBias) sum_batch(dw);
    if (it.wanted & kLeft) left_outer(w, dp, dw, p);
    if (!(it.wanted & (kGrad | kRight))) return;
    const int z = left_product(kA, w, array(4), true);
    const int dz = left_products(kA, dw, kDotA, w, array(5), true);
    if (it.wanted & kRight) right_outer(dg, z, kG, dz);
    if (it.wanted & kGrad) to_grad(dz, z, kDotC);
  }

 private:
  const Work<S>& it;
  const int64_t t_, part_, b0_;
  const int n_, m_, batch_;
  S* arrays_;
  const int64_t each_;
  Job<S>& job_;
  S* room_;

  __device__ static int array(int k) { return kFirstArray + k; }
  __device__ bool has(int x) const { return it.view[x].data; }
  __device__ int64_t first() const { return (t_ * it.batch + b0_) * n_ * m_; }

  // An operand, or an array, from this unit's first element on.
  __device__ View<S> elements(int x) const {
    if (x >= kFirstArray) return {arrays_ + (x - kFirstArray) * each_, 0, int64_t(n_) * m_, m_, 1};
    const View<S>& v = it.view[x];
    return {v.data + t_ * v.task + b0_ * v.batch, 0, v.batch, v.row, v.column};
  }
  __device__ S read(int which, int b, int i, int j) const {
    if (which == kNone) return 0;
    const View<S> x = elements(which);
    return x.data[b * x.batch + i * x.row + j * x.column];
  }
  __device__ S bias(int x, int i, int j) const { return has(x) ? read_one(x, 0, i, j) : S(0); }
  // One where there is none; a single number of the task, or one per element.
  __device__ S scale(int x, int b, int i, int j) const {
    if (!has(x)) return 1;
    return it.scale_is_full ? read(x, b, i, j) : read_one(x, 0, 0, 0);
  }
  __device__ S read_one(int x, int64_t b, int i, int j) const {
    const View<S>& v = it.view[x];
    return v.data[t_ * v.task + b * v.batch + i * v.row + j * v.column];
  }
  // f(k, b, i, j) for the k-th element.
  template <class F>
  __device__ void each(const F& f) const {
    const int size = batch_ * n_ * m_;
    const Divisor m = Divisor::of(m_), n = Divisor::of(n_);
    for (int k = threadIdx.x; k < size; k += kThreads) {
      const int row = m.quotient(k), b = n.quotient(row);
      f(k, b, row - b * n_, k - row * m_);
    }
    wait_for_all();
  }

  // alpha scale o V
  __device__ int scaled(int scale_or_tangent, int to) const {
    S* data = arrays_ + (to - kFirstArray) * each_;
    each([&](int k, int b, int i, int j) {
      data[k] = it.alpha * scale(scale_or_tangent, b, i, j) * read(kV, b, i, j);
    });
    return to;
  }

  // As matrices [n b, m] and [n, b m]; and a factor of this task.
  __device__ Strided<const S> tall(int which) const {
    const View<S> x = elements(which);
    return {x.data, Axis::pair(n_, x.batch, x.row), Axis::single(x.column)};
  }
  __device__ Strided<const S> wide(int which) const {
    const View<S> x = elements(which);
    return {x.data, Axis::single(x.row), Axis::pair(m_, x.batch, x.column)};
  }
  __device__ Strided<const S> factor(int x, bool transposed = false) const {
    const View<S>& v = it.view[x];
    const Strided<const S> f{v.data + t_ * v.task, Axis::single(v.row), Axis::single(v.column)};
    return transposed ? f.t() : f;
  }

  __device__ static Strided<S> writable(const Strided<const S>& x) {
    return {const_cast<S*>(x.data), x.row, x.column};
  }

  // A product that one thread describes: plan(job) fills in terms and where the results go.
  template <class F>
  __device__ void multiply(const F& plan) const {
    if (threadIdx.x == 0) {
      job_.count = 0;
      plan(job_);
    }
    wait_for_all();
    Product::run(job_, room_);
  }
  __device__ static void add_term(Job<S>& job, const Strided<const S>& a, const Strided<const S>& b,
                                  int depth) {
    job.term[job.count++] = {a, b, depth};
  }
  __device__ static void into(Job<S>& job, const Strided<S>& c, int rows, int columns) {
    job.c = c;
    job.rows = rows, job.columns = columns;
  }

  __device__ int left_product(int a, int x, int to, bool transposed = false) const {
    return left_products(a, x, kNone, kNone, to, transposed);
  }
  // A x + A' y, A being the identity where it is absent (there is no A' then)
  __device__ int left_products(int a, int x, int da, int y, int to, bool transposed = false) const {
    if (!has(a)) return x;
    const bool second = da != kNone && has(da) && y != kNone;
    if (x == kNone && !second) return kNone;
    multiply([&](Job<S>& job) {
      if (x != kNone) add_term(job, factor(a, transposed), wide(x), n_);
      if (second) add_term(job, factor(da, transposed), wide(y), n_);
      into(job, writable(wide(to)), n_, m_ * batch_);
    });
    return to;
  }
  __device__ int right_product(int x, int c, int to) const {
    return right_products(x, c, kNone, kNone, to);
  }
  // x C + y C'
  __device__ int right_products(int x, int c, int y, int dc, int to) const {
    if (!has(c)) return x;
    const bool second = dc != kNone && has(dc) && y != kNone;
    if (x == kNone && !second) return kNone;
    multiply([&](Job<S>& job) {
      if (x != kNone) add_term(job, tall(x), factor(c), m_);
      if (second) add_term(job, tall(y), factor(dc), m_);
      into(job, writable(tall(to)), n_ * batch_, m_);
    });
    return to;
  }
  // The gradient of G: x C^T + y C'^T
  __device__ void to_grad(int x, int y, int dc) const {
    if (!has(kC))
      return each([&](int k, int b, int i, int j) { (it.out + first())[k] = read(x, b, i, j); });
    multiply([&](Job<S>& job) {
      if (x != kNone) add_term(job, tall(x), factor(kC, true), m_);
      if (dc != kNone && has(dc)) add_term(job, tall(y), factor(dc, true), m_);
      into(job, {it.out + first(), Axis::single(m_), Axis::single(1)}, n_ * batch_, m_);
    });
  }
  // The gradient of A: x y^T + z u^T, [n, n]; of C: x^T y + z^T u, [m, m]; both summed over the
  // batch. The rows of `out` are [b, i].
  __device__ void left_outer(int x, int y, int z, int u) const {
    multiply([&](Job<S>& job) {
      if (x != kNone && y != kNone) add_term(job, wide(x), wide(y).t(), m_ * batch_);
      if (z != kNone && u != kNone) add_term(job, wide(z), wide(u).t(), m_ * batch_);
      outer_into(job, it.to_left, n_);
    });
  }
  __device__ void right_outer(int x, int y, int z, int u) const {
    multiply([&](Job<S>& job) {
      if (x != kNone && y != kNone) add_term(job, tall(x).t(), tall(y), n_ * batch_);
      if (z != kNone && u != kNone) add_term(job, tall(z).t(), tall(u), n_ * batch_);
      outer_into(job, it.to_right, m_);
    });
  }
  __device__ void outer_into(Job<S>& job, S* to, int size) const {
    to += part_ * size * size;
    into(job, {to, Axis::single(size), Axis::single(1)}, size, size);
  }

  // The gradient of the bias: the sum of x over the batch.
  __device__ void sum_batch(int x) const {
    S* to = it.to_bias + part_ * n_ * m_;
    for (int k = threadIdx.x; k < n_ * m_; k += kThreads) {
      S sum = 0;
      for (int b = 0; b < batch_; ++b) sum += read(x, b, k / m_, k % m_);
      to[k] = sum;
    }
    wait_for_all();
  }
  // alpha V o (y + beta): element by element, or its sum where the scale is one number
  __device__ void scale_gradient(int y, int beta) const {
    S sum = 0;
    each([&](int k, int b, int i, int j) {
      const S x = it.alpha * (read(kV, b, i, j) * (read(y, b, i, j) + bias(beta, i, j)));
      if (it.scale_is_full)
        (it.to_scale + first())[k] = x;
      else
        sum += x;
    });
    if (it.scale_is_full) return;
    room_[threadIdx.x] = sum;
    wait_for_all();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) room_[threadIdx.x] += room_[threadIdx.x + half];
      wait_for_all();
    }
    if (threadIdx.x == 0) it.to_scale[part_] = room_[0];
    wait_for_all();
  }
  // The cotangent of V: alpha (scale o (Q' + bias') + scale' o (Q + bias))
  __device__ void tangent(int dq, int q) const {
    each([&](int k, int b, int i, int j) {
      S y = scale(kS, b, i, j) * (read(dq, b, i, j) + bias(kDotBeta, i, j));
      if (has(kDotS)) y += scale(kDotS, b, i, j) * (read(q, b, i, j) + bias(kBeta, i, j));
      (it.to_cotangent + first())[k] = it.alpha * y;
    });
  }
};

enum class Pass { kForward, kBackward, kDoubleBackward };

// Arrays of a unit that are alive at once.
template <Pass PASS>
constexpr int kArrays = PASS == Pass::kForward    ? 2
                        : PASS == Pass::kBackward ? 3
                                                  : 6;

constexpr int kMostItems = 32;  // of a launch

// A launch travels with its items, so that a captured graph owns them.
template <class S>
struct Works {
  Work<S> item[kMostItems];
  int32_t count;
  int64_t units;
  S* arrays;     // null: they are in shared memory
  int64_t size;  // of one array
};

template <class S, Multiply HOW, Pass PASS>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    kron_units(const __grid_constant__ Works<S> all) {
  using One = Unit<S, HOW>;
  auto& job = *reinterpret_cast<Job<S>*>(shared_memory);
  auto* room = reinterpret_cast<S*>(shared_memory + One::Product::kJobBytes);
  auto* arrays =
      all.arrays ? all.arrays + blockIdx.x * kArrays<PASS> * all.size : room + One::Product::kRoom;
  for (int64_t u = blockIdx.x; u < all.units; u += gridDim.x) {
    int i = all.count - 1;
    while (all.item[i].first > u) --i;
    One unit(all.item[i], u - all.item[i].first, arrays, all.size, job, room);
    if (PASS == Pass::kForward) unit.forward();
    if (PASS == Pass::kBackward) unit.backward();
    if (PASS == Pass::kDoubleBackward) unit.double_backward();
  }
}

}  // namespace fastkfo::kron
