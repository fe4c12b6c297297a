// Batch norm of T tasks, x [T, P, C], and layer norm, x [T, R, D]: norm_batch.h and norm_rows.h
// have the kernels, fastkfo/reference/norm.py the formulas.
#include <tuple>

#include "cpu/checked.h"
#include "cpu/layers.h"
#include "cpu/parallel.h"

namespace fastkfo::cpu {
namespace {

constexpr int64_t kOperationsPerNumber = 6;

struct Shape {
  int64_t tasks, rows, channels;
};

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "fastkfo: expected [T, P, C], got ", x.dim(), " axes");
  STD_TORCH_CHECK(x.size(1) > 0 || x.numel() == 0, "fastkfo: a norm of no samples");
  return {x.size(0), x.size(1), x.size(2)};
}

template <class T>
T* out(Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Runs a pass over tasks and over parts of their channels; `whole` begins with the first task.
template <class T>
void run(const Shape& s, const BatchNorm<T>& whole, void (*pass)(const BatchNorm<T>&)) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t vector = layer_kernels<T>().width, vectors = (s.channels + vector - 1) / vector;
  // Two vectors, a pair of cache lines, at least: threads that write to both of one are slow.
  const int64_t parts = s.tasks >= threads ? 1 : std::max<int64_t>(1, vectors / 2);
  const int64_t cost = s.rows * s.channels * kOperationsPerNumber / parts;
  parallel_units(std::vector<int64_t>(s.tasks * parts, cost), [&](int64_t unit) {
    const int64_t task = unit / parts, part = unit % parts;
    const int64_t begin = vectors * part / parts * vector;
    const int64_t end = std::min(s.channels, vectors * (part + 1) / parts * vector);
    BatchNorm<T> n = whole;
    const int64_t image = task * s.rows * s.channels + begin, channel = task * s.channels + begin;
    for (const T** p : {&n.x, &n.dy, &n.a})
      if (*p) *p += image;
    for (T** p : {&n.y, &n.dx, &n.d_dy})
      if (*p) *p += image;
    for (const T** p : {&n.weight, &n.bias, &n.b, &n.c})
      if (*p) *p += channel;
    for (T** p : {&n.mean, &n.var, &n.rstd, &n.d_weight, &n.d_bias})
      if (*p) *p += channel;
    n.channels = end - begin;
    pass(n);
  });
}

template <class T>
BatchNorm<T> operands(const Shape& s, const Tensor& x, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, bool relu) {
  BatchNorm<T> n{};
  n.rows = s.rows, n.step = s.channels, n.channels = s.channels, n.relu = relu;
  n.x = data_of<T>(x, x.scalar_type(), x.numel(), "x");
  n.weight = data_of<T>(weight, x.scalar_type(), s.tasks * s.channels, "weight");
  n.bias = data_of<T>(bias, x.scalar_type(), s.tasks * s.channels, "bias");
  return n;
}

// Layer norm of every task; the statistics lie per row, weight and bias per place.
template <class T>
void run(const Shape& s, const LayerNorm<T>& whole, void (*pass)(const LayerNorm<T>&)) {
  const int64_t size = s.channels, cost = s.rows * size * kOperationsPerNumber;
  parallel_units(std::vector<int64_t>(s.tasks, cost), [&](int64_t task) {
    LayerNorm<T> n = whole;
    n.rows = s.rows, n.size = size;
    for (const T** p : {&n.x, &n.dy, &n.a})
      if (*p) *p += task * s.rows * size;
    for (T** p : {&n.y, &n.dx, &n.d_dy})
      if (*p) *p += task * s.rows * size;
    for (const T** p : {&n.weight, &n.bias, &n.b, &n.c})
      if (*p) *p += task * size;
    for (T** p : {&n.d_weight, &n.d_bias})
      if (*p) *p += task * size;
    for (T** p : {&n.mean, &n.rstd})
      if (*p) *p += task * s.rows;
    pass(n);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps, bool relu) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.channels};
  Tensor y = empty_shaped_like(x), mean = empty(x, sizes, 2), var = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    BatchNorm<T> n = operands<T>(s, x, weight, bias, relu);
    n.eps = eps, n.y = out<T>(y), n.mean = out<T>(mean), n.var = out<T>(var);
    run(s, n, layer_kernels<T>().batch_norm);
  });
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor x, Tensor mean,
                                                       Tensor rstd, std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, bool relu) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.channels};
  Tensor dx = empty_shaped_like(x), d_weight = empty(x, sizes, 2), d_bias = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    BatchNorm<T> n = operands<T>(s, x, weight, bias, relu);
    n.mean = const_cast<T*>(data_of<T>(mean, x.scalar_type(), s.tasks * s.channels, "mean"));
    n.rstd = const_cast<T*>(data_of<T>(rstd, x.scalar_type(), s.tasks * s.channels, "rstd"));
    n.dy = data_of<T>(dy, x.scalar_type(), x.numel(), "dy");
    n.dx = out<T>(dx), n.d_weight = out<T>(d_weight), n.d_bias = out<T>(d_bias);
    run(s, n, layer_kernels<T>().batch_norm_backward);
  });
  return {dx, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_double_backward(
    Tensor a, std::optional<Tensor> b, std::optional<Tensor> c, Tensor dy, Tensor x, Tensor mean,
    Tensor rstd, std::optional<Tensor> weight, std::optional<Tensor> bias, bool relu) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.channels};
  Tensor d_dy = empty_shaped_like(x), dx = empty_shaped_like(x), d_weight = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    BatchNorm<T> n = operands<T>(s, x, weight, bias, relu);
    n.mean = const_cast<T*>(data_of<T>(mean, x.scalar_type(), s.tasks * s.channels, "mean"));
    n.rstd = const_cast<T*>(data_of<T>(rstd, x.scalar_type(), s.tasks * s.channels, "rstd"));
    n.dy = data_of<T>(dy, x.scalar_type(), x.numel(), "dy"),
    n.a = data_of<T>(a, x.scalar_type(), x.numel(), "a");
    n.b = data_of<T>(b, x.scalar_type(), s.tasks * s.channels, "b");
    n.c = data_of<T>(c, x.scalar_type(), s.tasks * s.channels, "c");
    n.dx = out<T>(dx), n.d_weight = out<T>(d_weight), n.d_dy = out<T>(d_dy);
    run(s, n, layer_kernels<T>().batch_norm_double_backward);
  });
  return {d_dy, dx, d_weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.rows};
  Tensor y = empty_shaped_like(x), mean = empty(x, sizes, 2), rstd = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    LayerNorm<T> n{};
    n.eps = eps;
    n.x = data_of<T>(x, x.scalar_type(), x.numel(), "x");
    n.weight = data_of<T>(weight, x.scalar_type(), s.tasks * s.channels, "weight");
    n.bias = data_of<T>(bias, x.scalar_type(), s.tasks * s.channels, "bias");
    n.y = out<T>(y), n.mean = out<T>(mean), n.rstd = out<T>(rstd);
    run(s, n, layer_kernels<T>().layer_norm);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor mean,
                                                       Tensor rstd, std::optional<Tensor> weight) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.channels};
  Tensor dx = empty_shaped_like(x), d_weight = empty(x, sizes, 2), d_bias = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    LayerNorm<T> n{};
    n.x = data_of<T>(x, x.scalar_type(), x.numel(), "x"),
    n.dy = data_of<T>(dy, x.scalar_type(), x.numel(), "dy");
    n.weight = data_of<T>(weight, x.scalar_type(), s.tasks * s.channels, "weight");
    n.mean = const_cast<T*>(data_of<T>(mean, x.scalar_type(), s.tasks * s.rows, "mean"));
    n.rstd = const_cast<T*>(data_of<T>(rstd, x.scalar_type(), s.tasks * s.rows, "rstd"));
    n.dx = out<T>(dx), n.d_weight = out<T>(d_weight), n.d_bias = out<T>(d_bias);
    run(s, n, layer_kernels<T>().layer_norm_backward);
  });
  return {dx, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(Tensor a, std::optional<Tensor> b,
                                                              std::optional<Tensor> c, Tensor dy,
                                                              Tensor x, Tensor mean, Tensor rstd,
                                                              std::optional<Tensor> weight) {
  const Shape s = shape_of(x);
  const int64_t sizes[] = {s.tasks, s.channels}, places = s.tasks * s.channels;
  Tensor d_dy = empty_shaped_like(x), dx = empty_shaped_like(x), d_weight = empty(x, sizes, 2);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    LayerNorm<T> n{};
    n.x = data_of<T>(x, x.scalar_type(), x.numel(), "x"),
    n.dy = data_of<T>(dy, x.scalar_type(), x.numel(), "dy");
    n.a = data_of<T>(a, x.scalar_type(), x.numel(), "a");
    n.b = data_of<T>(b, x.scalar_type(), places, "b"),
    n.c = data_of<T>(c, x.scalar_type(), places, "c");
    n.weight = data_of<T>(weight, x.scalar_type(), places, "weight");
    n.mean = const_cast<T*>(data_of<T>(mean, x.scalar_type(), s.tasks * s.rows, "mean"));
    n.rstd = const_cast<T*>(data_of<T>(rstd, x.scalar_type(), s.tasks * s.rows, "rstd"));
    n.d_dy = out<T>(d_dy), n.dx = out<T>(dx), n.d_weight = out<T>(d_weight);
    run(s, n, layer_kernels<T>().layer_norm_double_backward);
  });
  return {d_dy, dx, d_weight};
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&fastkfo::cpu::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&fastkfo::cpu::batch_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&fastkfo::cpu::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&fastkfo::cpu::layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&fastkfo::cpu::layer_norm_double_backward));
  m.impl("batch_norm_double_backward", TORCH_BOX(&fastkfo::cpu::batch_norm_double_backward));
}
