// Layer norm and its first two derivatives, row by row of one task. Formulas:
// fastkfo/reference/norm.py.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

// A vector, or a single number where a row has no whole one left.
template <class S, class X>
FASTKFO_INLINE X load_as(const S* p) {
  X x;
  std::memcpy(&x, p, sizeof(X));
  return x;
}
template <class S, class X>
FASTKFO_INLINE void store_as(S* p, X x) {
  std::memcpy(p, &x, sizeof(X));
}

// Calls visit(type, place) along a row: in vectors, then in single numbers.
template <class S, class F>
FASTKFO_INLINE void for_row(int64_t size, const F& visit) {
  int64_t i = 0;
  for (; i + kWidth<S> <= size; i += kWidth<S>) visit(Lanes<S>{}, i);
  for (; i < size; ++i) visit(S{}, i);
}

// Sums over a row, a vector and a number for each.
template <class S, int COUNT>
struct RowSums {
  Lanes<S> vectors[COUNT] = {};
  S numbers[COUNT] = {};
  FASTKFO_INLINE void add(int k, Lanes<S> x) { vectors[k] += x; }
  FASTKFO_INLINE void add(int k, S x) { numbers[k] += x; }
  FASTKFO_INLINE S total(int k) const {
    S sum = numbers[k];
    for (int64_t l = 0; l < kWidth<S>; ++l) sum += vectors[k][l];
    return sum;
  }
};

template <class S>
void layer_norm(const LayerNorm<S>& n) {
  const S size = static_cast<S>(n.size);
  for (int64_t r = 0; r < n.rows; ++r) {
    const S* x = n.x + r * n.size;
    S* y = n.y + r * n.size;
    RowSums<S, 1> first, second;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      first.add(0, load_as<S, decltype(one)>(x + i));
    });
    const S mean = first.total(0) / size;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      const auto apart = load_as<S, decltype(one)>(x + i) - mean;
      second.add(0, apart * apart);
    });
    const S rstd = S(1) / std::sqrt(second.total(0) / size + static_cast<S>(n.eps));
    n.mean[r] = mean, n.rstd[r] = rstd;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      using X = decltype(one);
      X z = (load_as<S, X>(x + i) - mean) * rstd;
      if (n.weight) z = z * load_as<S, X>(n.weight + i);
      if (n.bias) z = z + load_as<S, X>(n.bias + i);
      store_as<S, X>(y + i, z);
    });
  }
}

// What a pass reads at one place of a row: x normalised, dy, and weight dy.
template <class S, class X>
struct Gradients {
  X normal, dy, g;
  FASTKFO_INLINE Gradients(const LayerNorm<S>& n, int64_t r, int64_t i) {
    normal = (load_as<S, X>(n.x + r * n.size + i) - n.mean[r]) * n.rstd[r];
    dy = load_as<S, X>(n.dy + r * n.size + i);
    g = n.weight ? dy * load_as<S, X>(n.weight + i) : dy;
  }
};

// dx = rstd (g - s1/n - normal s2/n), with g = weight dy, s1 = sum g, s2 = sum g normal
template <class S>
void layer_norm_backward(const LayerNorm<S>& n) {
  std::fill(n.d_weight, n.d_weight + n.size, S(0));
  std::fill(n.d_bias, n.d_bias + n.size, S(0));
  for (int64_t r = 0; r < n.rows; ++r) {
    RowSums<S, 2> sums;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      using X = decltype(one);
      const Gradients<S, X> at(n, r, i);
      sums.add(0, at.g), sums.add(1, at.g * at.normal);
      store_as<S, X>(n.d_weight + i, load_as<S, X>(n.d_weight + i) + at.dy * at.normal);
      store_as<S, X>(n.d_bias + i, load_as<S, X>(n.d_bias + i) + at.dy);
    });
    const S rstd = n.rstd[r];
    const S s1 = sums.total(0) / static_cast<S>(n.size);
    const S s2 = sums.total(1) / static_cast<S>(n.size);
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      using X = decltype(one);
      const Gradients<S, X> at(n, r, i);
      store_as<S, X>(n.dx + r * n.size + i, rstd * (at.g - s1 - at.normal * s2));
    });
  }
}

// With a, b, c the cotangents of dx, d_weight, d_bias, and A1, A2, A3 the sums of a, a normal, a g:
//   dg = rstd (a - A1/n - normal A2/n),  d_dy = weight dg + b normal + c,  d_weight = sum dy dg
//   h = b dy - rstd (a s2 + g A2)/n,  G = A3 - A1 s1/n - A2 s2/n
//   dx = rstd (h - mean(h) - normal mean(h normal)) - rstd^2 normal G/n
template <class S>
void layer_norm_double_backward(const LayerNorm<S>& n) {
  std::fill(n.d_weight, n.d_weight + n.size, S(0));
  const S share = S(1) / static_cast<S>(n.size);
  for (int64_t r = 0; r < n.rows; ++r) {
    const S* a = n.a + r * n.size;
    RowSums<S, 7> sums;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      using X = decltype(one);
      const Gradients<S, X> at(n, r, i);
      const X v = load_as<S, X>(a + i);
      sums.add(0, at.g), sums.add(1, at.g * at.normal);
      sums.add(2, v), sums.add(3, v * at.normal), sums.add(4, v * at.g);
      if (n.b) {
        const X b = load_as<S, X>(n.b + i) * at.dy;
        sums.add(5, b), sums.add(6, b * at.normal);
      }
    });
    const S rstd = n.rstd[r], s1 = sums.total(0), s2 = sums.total(1), a1 = sums.total(2),
            a2 = sums.total(3);
    const S g = sums.total(4) - (a1 * s1 + a2 * s2) * share;
    const S of_a = rstd * s2 * share, of_g = rstd * a2 * share;
    const S mean = (sums.total(5) - of_a * a1 - of_g * s1) * share;
    const S with_normal = (sums.total(6) - of_a * a2 - of_g * s2) * share;
    const S slope = rstd * with_normal + rstd * rstd * g * share;
    for_row<S>(n.size, [&](auto one, int64_t i) __attribute__((always_inline)) {
      using X = decltype(one);
      const Gradients<S, X> at(n, r, i);
      const X v = load_as<S, X>(a + i);
      const X dg = rstd * (v - a1 * share - at.normal * (a2 * share));
      X d_dy = n.weight ? dg * load_as<S, X>(n.weight + i) : dg;
      X h = at.g * (-of_g) - v * of_a;
      if (n.b) {
        const X b = load_as<S, X>(n.b + i);
        d_dy = d_dy + b * at.normal;
        h = h + b * at.dy;
      }
      if (n.c) d_dy = d_dy + load_as<S, X>(n.c + i);
      store_as<S, X>(n.d_dy + r * n.size + i, d_dy);
      store_as<S, X>(n.dx + r * n.size + i, rstd * (h - mean) - at.normal * slope);
      store_as<S, X>(n.d_weight + i, load_as<S, X>(n.d_weight + i) + at.dy * dg);
    });
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
