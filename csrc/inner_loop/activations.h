// Elementwise functions: y = f(z), and f'(z), f''(z) given z and y. A NaN stays one.
#pragma once

#include <cmath>

#include "inner_loop/plan.h"

namespace fastkfo::inner_loop::FASTKFO_LEVEL {

template <class S>
struct Derivatives {
  S first, second;
};

template <class Exec, class S>
FASTKFO_FN S normal_cdf(S z) {
  return S(0.5) * Exec::erfc(-z * S(0.70710678118654752440));
}

template <class Exec, class S>
FASTKFO_FN S normal_pdf(S z) {
  return S(0.39894228040143267794) * Exec::exp(S(-0.5) * z * z);
}

// The argument of the tanh in GELU's approximation, and its derivatives.
template <class S>
struct GeluTanh {
  S u, first, second;
  static FASTKFO_FN GeluTanh at(S z) {
    constexpr S k = S(0.79788456080286535588), c = S(0.044715);
    return {k * (z + c * z * z * z), k * (1 + 3 * c * z * z), 6 * k * c * z};
  }
};

template <int KIND, class Exec, class S>
FASTKFO_FN S activate(S z, S slope) {
  if constexpr (KIND == kRelu) return z <= 0 ? S(0) : z;
  if constexpr (KIND == kLeakyRelu) return z <= 0 ? slope * z : z;
  if constexpr (KIND == kTanh) return Exec::tanh(z);
  if constexpr (KIND == kSigmoid) return 1 / (1 + Exec::exp(-z));
  if constexpr (KIND == kSilu) return z / (1 + Exec::exp(-z));
  if constexpr (KIND == kGelu) return z * normal_cdf<Exec>(z);
  if constexpr (KIND == kGeluTanh) return S(0.5) * z * (1 + Exec::tanh(GeluTanh<S>::at(z).u));
  return z;
}

template <int KIND, class Exec, class S>
FASTKFO_FN Derivatives<S> derivatives(S z, S y, S slope) {
  if constexpr (KIND == kRelu) return {z <= 0 ? S(0) : S(1), S(0)};
  if constexpr (KIND == kLeakyRelu) return {z <= 0 ? slope : S(1), S(0)};
  if constexpr (KIND == kTanh) return {1 - y * y, -2 * y * (1 - y * y)};
  if constexpr (KIND == kSigmoid) return {y * (1 - y), y * (1 - y) * (1 - 2 * y)};
  if constexpr (KIND == kSilu) {
    const S s = 1 / (1 + Exec::exp(-z)), slope_of_s = s * (1 - s);
    return {s + z * slope_of_s, slope_of_s * (2 + z * (1 - 2 * s))};
  }
  if constexpr (KIND == kGelu) {
    const S pdf = normal_pdf<Exec>(z);
    return {normal_cdf<Exec>(z) + z * pdf, pdf * (2 - z * z)};
  }
  if constexpr (KIND == kGeluTanh) {
    const auto g = GeluTanh<S>::at(z);
    const S t = Exec::tanh(g.u), rest = 1 - t * t;
    return {S(0.5) * (1 + t) + S(0.5) * z * rest * g.first,
            rest * g.first + S(0.5) * z * rest * (g.second - 2 * t * g.first * g.first)};
  }
  return {S(1), S(0)};
}

template <int KIND>
struct Constant {
  static constexpr int value = KIND;
};

// Calls f with the kind as a type, so that the loop inside has no branch.
template <class F>
FASTKFO_FN void with_kind(int kind, const F& f) {
  switch (kind) {
    case kRelu:
      return f(Constant<kRelu>{});
    case kLeakyRelu:
      return f(Constant<kLeakyRelu>{});
    case kTanh:
      return f(Constant<kTanh>{});
    case kSigmoid:
      return f(Constant<kSigmoid>{});
    case kSilu:
      return f(Constant<kSilu>{});
    case kGelu:
      return f(Constant<kGelu>{});
    case kGeluTanh:
      return f(Constant<kGeluTanh>{});
    default:
      return;
  }
}

}  // namespace fastkfo::inner_loop::FASTKFO_LEVEL
