// Batch norm on batch statistics, with ReLU in the same pass, and its first two derivatives, for a
// few neighbouring channels of one task. Formulas: fastkfo/reference/norm.py.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

constexpr int64_t kRowsAtOnce = 128;  // of which sums are taken before they go to the total

// NV vectors of channels in every row; PART: only `count` channels of a single vector are there.
template <class S, int NV, bool PART>
struct Rows {
  int64_t step, count;
  FASTKFO_INLINE Lanes<S> load(const S* from, int64_t row, int v) const {
    const S* at = from + row * step + v * kWidth<S>;
    if constexpr (!PART) return V<S>::load(at);
    S lanes[kWidth<S>] = {};
    for (int64_t c = 0; c < count; ++c) lanes[c] = at[c];
    return V<S>::load(lanes);
  }
  FASTKFO_INLINE void store(S* to, int64_t row, int v, Lanes<S> value) const {
    S* at = to + row * step + v * kWidth<S>;
    if constexpr (!PART) return V<S>::store(at, value);
    S lanes[kWidth<S>];
    V<S>::store(lanes, value);
    for (int64_t c = 0; c < count; ++c) at[c] = lanes[c];
  }
};

template <class S>
FASTKFO_INLINE Lanes<S> all_of(S value) {
  return Lanes<S>{} + value;
}

// What is the same for all rows of a channel.
template <class S, int NV>
struct Affine {
  Lanes<S> mean[NV], rstd[NV], scale[NV], shift[NV];  // scale = weight rstd, shift = bias

  template <class R>
  FASTKFO_INLINE Affine(const R& rows, const BatchNorm<S>& n) {
    for (int v = 0; v < NV; ++v) {
      mean[v] = rows.load(n.mean, 0, v);
      rstd[v] = n.rstd ? rows.load(n.rstd, 0, v) : of_variance(rows.load(n.var, 0, v), n.eps);
      scale[v] = n.weight ? rows.load(n.weight, 0, v) * rstd[v] : rstd[v];
      shift[v] = n.bias ? rows.load(n.bias, 0, v) : Lanes<S>{};
    }
  }
  static FASTKFO_INLINE Lanes<S> of_variance(Lanes<S> var, double eps) {
    for (int64_t l = 0; l < kWidth<S>; ++l) var[l] = S(1) / std::sqrt(var[l] + static_cast<S>(eps));
    return var;
  }
  // y before ReLU. Every pass computes it alike, so that all of them agree where it is positive.
  FASTKFO_INLINE Lanes<S> value(Lanes<S> x, int v) const {
    return (x - mean[v]) * scale[v] + shift[v];
  }
  FASTKFO_INLINE Lanes<S> normal(Lanes<S> x, int v) const { return (x - mean[v]) * rstd[v]; }
  // The cotangent behind ReLU; a NaN passes.
  FASTKFO_INLINE Lanes<S> through(Lanes<S> dy, Lanes<S> x, int v) const {
    return value(x, v) <= Lanes<S>{} ? Lanes<S>{} : dy;
  }
};

// Mean and variance, chunk by chunk: each by its own mean, then merged (Chan, Golub,
// LeVeque 1979), which reads memory once and does not cancel.
template <class S, int NV, class R>
void statistics(const R& rows, const BatchNorm<S>& n) {
  Lanes<S> mean[NV] = {}, square[NV] = {};
  for (int64_t first = 0; first < n.rows; first += kRowsAtOnce) {
    const int64_t last = std::min(n.rows, first + kRowsAtOnce);
    Lanes<S> sum[NV] = {}, squares[NV] = {};
    for (int64_t p = first; p < last; ++p)
      for (int v = 0; v < NV; ++v) sum[v] += rows.load(n.x, p, v);
    const S count = static_cast<S>(last - first), share = count / static_cast<S>(last);
    for (int v = 0; v < NV; ++v) sum[v] /= all_of(count);
    for (int64_t p = first; p < last; ++p)
      for (int v = 0; v < NV; ++v) {
        const Lanes<S> x = rows.load(n.x, p, v) - sum[v];
        squares[v] += x * x;
      }
    for (int v = 0; v < NV; ++v) {
      const Lanes<S> apart = sum[v] - mean[v];
      mean[v] += apart * share;
      square[v] += squares[v] + apart * apart * (share * static_cast<S>(first));
    }
  }
  for (int v = 0; v < NV; ++v) {
    rows.store(n.mean, 0, v, mean[v]);
    rows.store(n.var, 0, v, square[v] / static_cast<S>(n.rows));
  }
}

template <class S, int NV, bool PART>
void batch_norm(const BatchNorm<S>& n) {
  const Rows<S, NV, PART> rows{n.step, n.channels};
  statistics<S, NV>(rows, n);
  const Affine<S, NV> affine(rows, n);
  for (int64_t p = 0; p < n.rows; ++p)
    for (int v = 0; v < NV; ++v) {
      const Lanes<S> y = affine.value(rows.load(n.x, p, v), v);
      rows.store(n.y, p, v, n.relu ? (y <= Lanes<S>{} ? Lanes<S>{} : y) : y);
    }
}

// Sums of COUNT numbers per row and channel, as `of` gives them.
template <class S, int NV, int COUNT, class F>
FASTKFO_INLINE void sums(int64_t rows, Lanes<S> (&total)[COUNT][NV], const F& of) {
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t last = std::min(rows, first + kRowsAtOnce);
    Lanes<S> part[COUNT][NV] = {};
    for (int64_t p = first; p < last; ++p)
      for (int v = 0; v < NV; ++v) of(p, v, part);
    for (int k = 0; k < COUNT; ++k)
      for (int v = 0; v < NV; ++v) total[k][v] += part[k][v];
  }
}

// dx = scale (dz - s1/n - normal s2/n), with s1 = sum dz and s2 = sum dz normal
template <class S, int NV, bool PART>
void batch_norm_backward(const BatchNorm<S>& n) {
  const Rows<S, NV, PART> rows{n.step, n.channels};
  const Affine<S, NV> affine(rows, n);
  const auto cotangent = [&](int64_t p, int v, Lanes<S> x) {
    const Lanes<S> dy = rows.load(n.dy, p, v);
    return n.relu ? affine.through(dy, x, v) : dy;
  };
  Lanes<S> total[2][NV] = {};
  sums<S, NV>(n.rows, total, [&](int64_t p, int v, auto& part) __attribute__((always_inline)) {
    const Lanes<S> x = rows.load(n.x, p, v), dz = cotangent(p, v, x);
    part[0][v] += dz, part[1][v] += dz * affine.normal(x, v);
  });
  const S share = S(1) / static_cast<S>(n.rows);
  for (int v = 0; v < NV; ++v) {
    rows.store(n.d_bias, 0, v, total[0][v]);
    rows.store(n.d_weight, 0, v, total[1][v]);
    total[0][v] *= share, total[1][v] *= share;
  }
  for (int64_t p = 0; p < n.rows; ++p)
    for (int v = 0; v < NV; ++v) {
      const Lanes<S> x = rows.load(n.x, p, v), dz = cotangent(p, v, x);
      rows.store(n.dx, p, v,
                 affine.scale[v] * (dz - total[0][v] - affine.normal(x, v) * total[1][v]));
    }
}

// With a, b, c the cotangents of dx, d_weight, d_bias, and s1, s2, A1, A2, A3 the sums of dz,
// dz normal, a, a normal, a dz:
//   q = b - scale A2/n
//   d_dy = [y > 0] (scale a + q normal + c - scale A1/n)
//   h = -scale s2/n a + q dz
//   dx = rstd (h - mean(h) - normal mean(h normal)) - rstd^2 normal G/n
//   G = weight (A3 - A1 s1/n - A2 s2/n),  d_weight = rstd/weight G
template <class S, int NV, bool PART>
void batch_norm_double_backward(const BatchNorm<S>& n) {
  const Rows<S, NV, PART> rows{n.step, n.channels};
  const Affine<S, NV> affine(rows, n);
  const auto cotangent = [&](int64_t p, int v, Lanes<S> x) {
    const Lanes<S> dy = rows.load(n.dy, p, v);
    return n.relu ? affine.through(dy, x, v) : dy;
  };
  Lanes<S> total[5][NV] = {};
  sums<S, NV>(n.rows, total, [&](int64_t p, int v, auto& part) __attribute__((always_inline)) {
    const Lanes<S> x = rows.load(n.x, p, v), dz = cotangent(p, v, x), a = rows.load(n.a, p, v);
    const Lanes<S> normal = affine.normal(x, v);
    part[0][v] += dz, part[1][v] += dz * normal;
    part[2][v] += a, part[3][v] += a * normal, part[4][v] += a * dz;
  });
  const S share = S(1) / static_cast<S>(n.rows);
  Lanes<S> q[NV], of_a[NV], constant[NV], mean[NV], along[NV];
  for (int v = 0; v < NV; ++v) {
    const Lanes<S> s1 = total[0][v], s2 = total[1][v], a1 = total[2][v], a2 = total[3][v];
    const Lanes<S> scale = affine.scale[v], rstd = affine.rstd[v];
    const Lanes<S> b = n.b ? rows.load(n.b, 0, v) : Lanes<S>{};
    const Lanes<S> c = n.c ? rows.load(n.c, 0, v) : Lanes<S>{};
    const Lanes<S> g = total[4][v] - (a1 * s1 + a2 * s2) * share;
    rows.store(n.d_weight, 0, v, rstd * g);
    q[v] = b - scale * a2 * share;
    of_a[v] = scale * s2 * share;
    constant[v] = c - scale * a1 * share;
    mean[v] = (q[v] * s1 - of_a[v] * a1) * share * rstd;
    const Lanes<S> h_normal = (q[v] * s2 - of_a[v] * a2) * share;
    along[v] = rstd * h_normal + rstd * scale * g * share;
  }
  for (int64_t p = 0; p < n.rows; ++p)
    for (int v = 0; v < NV; ++v) {
      const Lanes<S> x = rows.load(n.x, p, v), dz = cotangent(p, v, x), a = rows.load(n.a, p, v);
      const Lanes<S> normal = affine.normal(x, v);
      const Lanes<S> d_dz = affine.scale[v] * a + q[v] * normal + constant[v];
      rows.store(n.d_dy, p, v, n.relu ? affine.through(d_dz, x, v) : d_dz);
      const Lanes<S> h = q[v] * dz - of_a[v] * a;
      rows.store(n.dx, p, v, affine.rstd[v] * h - mean[v] - normal * along[v]);
    }
}

enum class Pass { forward, backward, double_backward };

template <class S, Pass PASS, int NV, bool PART>
FASTKFO_INLINE void batch_norm_pass(const BatchNorm<S>& n) {
  if constexpr (PASS == Pass::forward) batch_norm<S, NV, PART>(n);
  if constexpr (PASS == Pass::backward) batch_norm_backward<S, NV, PART>(n);
  if constexpr (PASS == Pass::double_backward) batch_norm_double_backward<S, NV, PART>(n);
}

// All channels of a call, a few vectors at a time.
template <class S, Pass PASS>
void batch_norm_channels(const BatchNorm<S>& all) {
  constexpr int kMost = FASTKFO_VECTOR_BYTES == 64 ? 2 : 1;
  BatchNorm<S> n = all;
  while (n.channels > 0) {
    int64_t done = kWidth<S>;
    if (n.channels >= kMost * kWidth<S>) {
      batch_norm_pass<S, PASS, kMost, false>(n);
      done = kMost * kWidth<S>;
    } else if (n.channels >= kWidth<S>) {
      batch_norm_pass<S, PASS, 1, false>(n);
    } else {
      batch_norm_pass<S, PASS, 1, true>(n);
      done = n.channels;
    }
    n.skip(done);
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
