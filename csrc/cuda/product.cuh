// Products of matrices of any strides by one block, in tiles that it stages in shared memory:
// c = a b + a' b' + .... Sums are in an order that sizes alone fix.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/tensor_cores.cuh"

namespace fastkfo::cuda {

// How numbers are multiplied: as they are, or on tensor cores, rounded to TF32.
enum class Multiply { kExactly, kTensorCores };

// Quotients by a multiplication: right for i below 2^32 / by.
struct Divisor {
  uint32_t by, reciprocal;  // times 2^32, rounded up; 0 for by = 1
  __device__ static Divisor of(int by) {
    const uint32_t n = static_cast<uint32_t>(by);
    return {n, n > 1 ? 0xffffffffu / n + 1 : 0};
  }
  __device__ uint32_t quotient(uint32_t i) const {
    return reciprocal ? __umulhi(i, reciprocal) : i;
  }
};

// Where the rows or the columns of a matrix are. One that counts through two axes of a tensor has
// i = outer index * inner size + inner index.
struct Axis {
  Divisor inner;  // of 0: a single axis
  int64_t outer, step;

  __device__ static Axis single(int64_t step) { return {{0, 0}, 0, step}; }
  __device__ static Axis pair(int inner_size, int64_t outer, int64_t step) {
    if (inner_size <= 1) return single(outer);
    return {Divisor::of(inner_size), outer, step};
  }
  __device__ int64_t at(uint32_t i) const {
    if (inner.by == 0) return i * step;
    const uint32_t o = inner.quotient(i);
    return o * outer + (i - o * inner.by) * step;
  }
};

// Of a kernel that multiplies, on one multiprocessor: left to itself, nvcc spills for a third one.
template <class S>
constexpr int kBlocks = sizeof(S) == 4 ? 2 : 1;

template <class S>
struct Strided {
  S* data;
  Axis row, column;
  __device__ Strided t() const { return {data, column, row}; }
};

template <class S>
struct Term {
  Strided<const S> a, b;
  int depth;
};

// c [rows, columns] = a b of the first term + that of the second; of none, zero.
template <class S>
struct Job {
  Term<S> term[2];
  Strided<S> c;
  int count, rows, columns;
};

constexpr int kPadding = 8;  // of staged rows: what a warp reads at once lies in other banks

template <class S>
struct alignas(16) Four {
  S x[4];
};

// ROWS x COLUMNS results of a block, by threads that have 4 x 4 each, and share the depth among
// groups where there are more threads than that.
template <class S, int ROWS, int COLUMNS>
struct ScalarTile {
  static constexpr int kAcross = COLUMNS / 4, kThreadsEach = ROWS / 4 * kAcross;
  static constexpr int kGroups = kThreads / kThreadsEach;
  static constexpr int kResults = 16;
  S sums[kResults] = {};

  __device__ static S staged(S x) { return x; }
  __device__ static int group() { return kGroups == 1 ? 0 : threadIdx.x / kThreadsEach; }
  __device__ static int row(int k) { return thread() / kAcross * 4 + k / 4; }
  __device__ static int column(int k) { return thread() % kAcross * 4 + k % 4; }

  template <int DEPTH>
  __device__ void add(const S* a, const S* b) {
    const S* left = a + row(0);
    const S* right = b + column(0);
#pragma unroll 2
    for (int k = group(); k < DEPTH; k += kGroups) {
      const auto x = *reinterpret_cast<const Four<S>*>(left + k * (ROWS + kPadding));
      const auto y = *reinterpret_cast<const Four<S>*>(right + k * (COLUMNS + kPadding));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[4 * i + j] += x.x[i] * y.x[j];
    }
  }

 private:
  __device__ static int thread() { return threadIdx.x % kThreadsEach; }
};

// The same by warps on tensor cores: a warp has up to 32 x 16 or 16 x 32 results, in products of
// 16 x 8 x 8.
template <int ROWS, int COLUMNS>
struct TensorTile {
  static constexpr int kDown = ROWS >= 32 ? 2 : 1, kOver = ROWS >= 32 || COLUMNS < 32 ? 2 : 4;
  static constexpr int kAcross = COLUMNS / (8 * kOver);
  static constexpr int kWarpsEach = ROWS / (16 * kDown) * kAcross;
  static constexpr int kGroups = kThreads / 32 / kWarpsEach;
  static constexpr int kResults = 4 * kDown * kOver;
  float sums[kResults] = {};

  // Numbers are rounded on their way into shared memory, each of them once.
  __device__ static float staged(float x) { return __uint_as_float(as_tf32(x)); }
  __device__ static int group() { return kGroups == 1 ? 0 : threadIdx.x / 32 / kWarpsEach; }
  __device__ static int row(int k) {
    return first_row() + k / 4 / kOver * 16 + lane() / 4 + k % 4 / 2 * 8;
  }
  __device__ static int column(int k) {
    return first_column() + k / 4 % kOver * 8 + lane() % 4 * 2 + k % 2;
  }

  template <int DEPTH>
  __device__ void add(const float* a, const float* b) {
    constexpr int kA = ROWS + kPadding, kB = COLUMNS + kPadding;
#pragma unroll
    for (int k = 8 * group(); k < DEPTH; k += 8 * kGroups) {
      const int deep = k + lane() % 4;
      const float* left = a + deep * kA + first_row() + lane() / 4;
      const float* right = b + deep * kB + first_column() + lane() / 4;
      uint32_t y[kOver][2];
#pragma unroll
      for (int j = 0; j < kOver; ++j) {
        y[j][0] = __float_as_uint(right[8 * j]);
        y[j][1] = __float_as_uint(right[8 * j + 4 * kB]);
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const float* l = left + 16 * i;
        const uint32_t x[4] = {__float_as_uint(l[0]), __float_as_uint(l[8]),
                               __float_as_uint(l[4 * kA]), __float_as_uint(l[4 * kA + 8])};
#pragma unroll
        for (int j = 0; j < kOver; ++j) multiply_tf32(sums + 4 * (i * kOver + j), x, y[j]);
      }
    }
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32 % kWarpsEach; }
  __device__ static int first_row() { return warp() / kAcross * 16 * kDown; }
  __device__ static int first_column() { return warp() % kAcross * 8 * kOver; }
};

template <class S, Multiply HOW>
class Products {
 public:
  // Numbers of shared memory that `room` has, and bytes of it with a job in front.
  static constexpr int kRoom = 4096;
  static constexpr int kJobBytes = (sizeof(Job<S>) + 15) / 16 * 16;
  static constexpr int kBytes = kJobBytes + kRoom * static_cast<int>(sizeof(S));

  // The job is in shared memory, so that it takes no registers. Narrow results take narrow tiles:
  // few of their results are beyond the last then.
  __device__ __noinline__ static void run(const Job<S>& job, S* room) {
    if (job.rows <= 16 && job.columns <= 16)
      tiles<16, 16>(job, room);
    else if (job.columns <= 16)
      tiles<128, 16>(job, room);
    else if (job.rows <= 16)
      tiles<16, 128>(job, room);
    else
      tiles<64, 64>(job, room);
  }

 private:
  template <int ROWS, int COLUMNS>
  using Tile = std::conditional_t<HOW == Multiply::kExactly, ScalarTile<S, ROWS, COLUMNS>,
                                  TensorTile<ROWS, COLUMNS>>;

  template <int ROWS, int COLUMNS>
  __device__ static void tiles(const Job<S>& job, S* room) {
    using One = Tile<ROWS, COLUMNS>;
    constexpr int kDepth = ROWS * COLUMNS == 256 ? 64 : 16;
    static_assert(kDepth * (ROWS + COLUMNS + 2 * kPadding) <= kRoom);
    static_assert(One::kGroups == 1 || One::kGroups * ROWS * COLUMNS <= kRoom);
    const int rows = job.rows, columns = job.columns, count = job.count;
    S *a = room, *b = room + kDepth * (ROWS + kPadding);
    for (int r = 0; r < rows; r += ROWS)
      for (int c = 0; c < columns; c += COLUMNS) {
        One tile;
        for (int i = 0; i < count; ++i) {
          const Term<S>& term = job.term[i];
          Side<One, ROWS, kDepth> left(term.a.data, term.a.row, term.a.column, r, rows, term.depth);
          Side<One, COLUMNS, kDepth> right(term.b.data, term.b.column, term.b.row, c, columns,
                                           term.depth);
          for (int k = 0; k < term.depth; k += kDepth) {
            left.load(k);
            right.load(k);
            left.store(a);
            right.store(b);
            wait_for_all();
            tile.template add<kDepth>(a, b);
            wait_for_all();
          }
        }
        deliver<ROWS, COLUMNS>(tile, r, rows, c, columns, job.c, room);
      }
    wait_for_all();
  }

  // One side of a product, SIZE of its elements from `first` on, DEPTH at a time: through
  // registers, so that all loads are under way at once, into shared memory [DEPTH, SIZE], zeros
  // where there is nothing. Neighbouring threads read along the axis that has no gaps; a thread's
  // place on that axis stays the same.
  template <class One, int SIZE, int DEPTH>
  struct Side {
    static constexpr int kEach = SIZE * DEPTH / kThreads;
    static_assert(kThreads % SIZE == 0 && kThreads % DEPTH == 0);
    const S* data;
    const Axis &along, &deep;  // in shared memory, and read anew: registers are few
    const int first, size, depth;
    const bool deep_first;
    S x[kEach];

    __device__ Side(const S* data_, const Axis& along_, const Axis& deep_, int first_, int size_,
                    int depth_)
        : data(data_),
          along(along_),
          deep(deep_),
          first(first_),
          size(size_),
          depth(depth_),
          deep_first(deep_.step == 1) {}
    // Of this thread's n-th element.
    __device__ int place(int n) const {
      return deep_first ? threadIdx.x / DEPTH + n * (kThreads / DEPTH) : threadIdx.x % SIZE;
    }
    __device__ int level(int n) const {
      return deep_first ? threadIdx.x % DEPTH : threadIdx.x / SIZE + n * (kThreads / SIZE);
    }
    __device__ void load(int k) {
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int i = first + place(n), d = k + level(n);
        x[n] = i < size && d < depth ? data[along.at(i) + deep.at(d)] : S(0);
      }
    }
    __device__ void store(S* side) const {
#pragma unroll
      for (int n = 0; n < kEach; ++n)
        side[level(n) * (SIZE + kPadding) + place(n)] = One::staged(x[n]);
    }
  };

  template <int ROWS, int COLUMNS, class One>
  __device__ static void deliver(const One& tile, int r, int rows, int c, int columns,
                                 const Strided<S>& to, S* room) {
    if constexpr (One::kGroups == 1) {
#pragma unroll
      for (int k = 0; k < One::kResults; ++k)
        write(to, r + tile.row(k), rows, c + tile.column(k), columns, tile.sums[k]);
    } else {  // the groups' sums are added in their order
#pragma unroll
      for (int k = 0; k < One::kResults; ++k)
        room[(tile.group() * ROWS + tile.row(k)) * COLUMNS + tile.column(k)] = tile.sums[k];
      wait_for_all();
      for (int e = threadIdx.x; e < ROWS * COLUMNS; e += kThreads) {
        S sum = 0;
        for (int g = 0; g < One::kGroups; ++g) sum += room[g * ROWS * COLUMNS + e];
        write(to, r + e / COLUMNS, rows, c + e % COLUMNS, columns, sum);
      }
      wait_for_all();
    }
  }
  __device__ static void write(const Strided<S>& to, int r, int rows, int c, int columns, S sum) {
    if (r < rows && c < columns) to.data[to.row.at(r) + to.column.at(c)] = sum;
  }
};

}  // namespace fastkfo::cuda
