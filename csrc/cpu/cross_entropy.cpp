// Softmax cross-entropy of T tasks: logits z [T, S, C], labels [T, S]. The forward pass also
// returns p = softmax(z) and (p - e)/S, e the unit vectors of the labels, which are all that the
// derivatives need: fastkfo/reference/cross_entropy.py has the formulas.
#include <cmath>
#include <tuple>

#include "cpu/parallel.h"
#include "operand.h"

namespace fastkfo::cpu {
namespace {

constexpr int64_t kOperationsPerNumber = 20;  // an exponential and what is around it

struct Shape {
  int64_t tasks, samples, classes;
  std::vector<int64_t> costs() const {
    return std::vector<int64_t>(tasks, samples * classes * kOperationsPerNumber);
  }
};

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "fastkfo: expected [T, S, C], got ", x.dim(), " axes");
  return {x.size(0), x.size(1), x.size(2)};
}

template <class T>
const T* data_of(const Tensor& x, const char* name) {
  const T* data = static_cast<const T*>(x.data_ptr());
  STD_TORCH_CHECK(data || x.numel() == 0, "fastkfo: operand ", name, " has no memory");
  return data;
}

void check_like(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "fastkfo: dtypes differ: ", name);
  bool same = x.dim() == like.dim();
  for (int64_t k = 0; same && k < x.dim(); ++k) same = x.size(k) == like.size(k);
  STD_TORCH_CHECK(same, "fastkfo: shapes differ: ", name);
}

// One row of logits: its p, and -log p of the label.
template <class T>
T softmax_row(const T* z, int64_t stride, int64_t classes, int64_t label, T* p) {
  T highest = z[0];
  for (int64_t c = 1; c < classes; ++c) highest = std::max(highest, z[c * stride]);
  T sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += p[c] = std::exp(z[c * stride] - highest);
  for (int64_t c = 0; c < classes; ++c) p[c] /= sum;
  return std::log(sum) + (highest - z[label * stride]);  // logits may be large
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& labels) {
  const Shape s = shape_of(logits);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 2 &&
                      labels.size(0) == s.tasks && labels.size(1) == s.samples,
                  "fastkfo: expected int64 labels [", s.tasks, ", ", s.samples, "]");
  const int64_t full[] = {s.tasks, s.samples, s.classes};
  Tensor loss = empty(logits, full, 1), p = empty(logits, full, 3), rest = empty(logits, full, 3);
  const T* z = data_of<T>(logits, "logits");
  const int64_t* y = data_of<int64_t>(labels, "labels");
  const int64_t z0 = logits.stride(0), z1 = logits.stride(1), z2 = logits.stride(2);
  const int64_t y0 = labels.stride(0), y1 = labels.stride(1);
  for (int64_t t = 0; t < s.tasks; ++t)
    for (int64_t i = 0; i < s.samples; ++i) {
      const int64_t label = y[t * y0 + i * y1];
      STD_TORCH_CHECK(label >= 0 && label < s.classes, "fastkfo: expected labels from 0 to ",
                      s.classes - 1, ", got ", label);
    }
  T* to_loss = static_cast<T*>(loss.data_ptr());
  T* to_p = static_cast<T*>(p.data_ptr());
  T* to_rest = static_cast<T*>(rest.data_ptr());
  const T share = T(1) / static_cast<T>(s.samples);
  parallel_units(s.costs(), [&](int64_t t) {
    T sum = 0;
    for (int64_t i = 0; i < s.samples; ++i) {
      const int64_t label = y[t * y0 + i * y1], at = (t * s.samples + i) * s.classes;
      sum += softmax_row(z + t * z0 + i * z1, z2, s.classes, label, to_p + at);
      for (int64_t c = 0; c < s.classes; ++c) to_rest[at + c] = to_p[at + c] * share;
      to_rest[at + label] -= share;
    }
    to_loss[t] = sum * share;
  });
  return {loss, p, rest};
}

// c' = <v, (p - e)/S>,  z' = c/S p o (v - <p, v>)
template <class T>
std::tuple<Tensor, Tensor> double_backward(Tensor v, Tensor cotangent, Tensor p, Tensor rest) {
  const Shape s = shape_of(p);
  check_like(v, p, "v");
  check_like(rest, p, "residual");
  STD_TORCH_CHECK(cotangent.numel() == s.tasks && cotangent.scalar_type() == p.scalar_type(),
                  "fastkfo: expected a cotangent [", s.tasks, "]");
  data_of<T>(v, "v"), data_of<T>(cotangent, "cotangent");  // before anything reads them
  data_of<T>(p, "p"), data_of<T>(rest, "residual");
  for (Tensor* x : {&v, &cotangent, &p, &rest})
    if (!x->is_contiguous()) *x = torch::stable::contiguous(*x);
  const int64_t full[] = {s.tasks, s.samples, s.classes};
  Tensor to_cotangent = empty(p, full, 1), to_logits = empty(p, full, 3);
  const T* from_v = data_of<T>(v, "v");
  const T* from_c = data_of<T>(cotangent, "cotangent");
  const T* from_p = data_of<T>(p, "p");
  const T* from_rest = data_of<T>(rest, "residual");
  T* out_c = static_cast<T*>(to_cotangent.data_ptr());
  T* out_z = static_cast<T*>(to_logits.data_ptr());
  parallel_units(s.costs(), [&](int64_t t) {
    const T scale = from_c[t] / static_cast<T>(s.samples);
    T sum = 0;
    for (int64_t i = 0; i < s.samples; ++i) {
      const int64_t at = (t * s.samples + i) * s.classes;
      T along = 0;
      for (int64_t c = at; c < at + s.classes; ++c) {
        sum += from_v[c] * from_rest[c];
        along += from_p[c] * from_v[c];
      }
      for (int64_t c = at; c < at + s.classes; ++c)
        out_z[c] = scale * from_p[c] * (from_v[c] - along);
    }
    out_c[t] = sum;
  });
  return {to_cotangent, to_logits};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return forward<float>(logits, labels);
    case ScalarType::Double:
      return forward<double>(logits, labels);
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32 or float64");
  }
}

std::tuple<Tensor, Tensor> cross_entropy_double_backward(Tensor v, Tensor cotangent, Tensor p,
                                                         Tensor residual) {
  switch (p.scalar_type()) {
    case ScalarType::Float:
      return double_backward<float>(v, cotangent, p, residual);
    case ScalarType::Double:
      return double_backward<double>(v, cotangent, p, residual);
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32 or float64");
  }
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&fastkfo::cpu::cross_entropy));
  m.impl("cross_entropy_double_backward", TORCH_BOX(&fastkfo::cpu::cross_entropy_double_backward));
}
