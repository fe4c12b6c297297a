// Convolutions of T tasks, each with weights of its own: images [T, N, H, W, C], weights
// [T, O, C / groups, kh, kw]. A convolution, its adjoint in the image and its derivative in the
// weights are each other's derivatives: fastkfo/functional/conv.py. The kernels are in
// conv_products.h and conv_outer.h.
#include <tuple>

#include "cpu/checked.h"
#include "cpu/conv_geometry.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastkfo::cpu {
namespace {

struct Shape {
  int64_t tasks, samples, channels, out_channels, groups;
  Window window;

  int64_t taps() const { return window.taps(); }
  int64_t pixels() const { return window.pixels(); }
  int64_t out_pixels() const { return window.out_pixels(); }
  int64_t group_in() const { return channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t weights() const { return out_channels * group_in() * taps(); }
};

constexpr int64_t kMostPixels = int64_t{1} << 31;

Window window_of(int64_t kh, int64_t kw, const Ints& stride, const Ints& padding,
                 const Ints& dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "fastkfo: stride, padding and dilation take two numbers each");
  Window w{
      {kh, kw}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}, {},
      {}};
  for (int a = 0; a < 2; ++a)
    STD_TORCH_CHECK(std::max({w.kernel[a], w.stride[a], w.padding[a], w.dilation[a]}) < kMostPixels,
                    "fastkfo: a window beyond all images");
  for (int a = 0; a < 2; ++a)
    STD_TORCH_CHECK(w.kernel[a] > 0 && w.stride[a] > 0 && w.padding[a] >= 0 && w.dilation[a] > 0,
                    "fastkfo: kernel, stride and dilation are positive, padding is not negative");
  return w;
}

void check_ranks(const Tensor& images, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(images.dim() == 5 && weight.dim() == 5 && groups > 0,
                  "fastkfo: expected [T, N, H, W, C] and [T, O, C / groups, kh, kw]");
}

Shape shape_of(const Tensor& x, const Tensor& weight, const Window& window, int64_t groups) {
  Shape s{};
  s.tasks = x.size(0), s.samples = x.size(1), s.channels = x.size(4), s.groups = groups;
  s.window = window, s.out_channels = weight.size(1);
  for (int a = 0; a < 2; ++a) s.window.size[a] = x.size(2 + a);
  s.window.set_out_size();
  STD_TORCH_CHECK(weight.size(0) == s.tasks && weight.size(2) * groups == s.channels &&
                      s.out_channels % groups == 0,
                  "fastkfo: the weights do not fit the images");
  return s;
}

void check_behind(const Tensor& dy, const Window& w) {
  STD_TORCH_CHECK(dy.size(2) == w.out_size[0] && dy.size(3) == w.out_size[1],
                  "fastkfo: dy does not fit the images");
}

void check_small(const Shape& s) {
  const int64_t most = (int64_t{1} << 31) - 1;
  STD_TORCH_CHECK(std::max(s.pixels(), s.out_pixels()) * s.taps() <= most,
                  "fastkfo: one image has too many pixels for this kernel");
}

// Where number k = (channel, tap) of a weight goes among the rows that products read.
std::vector<int32_t> rows_by_tap(int64_t channels, int64_t taps) {
  std::vector<int32_t> rows;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) rows.push_back(static_cast<int32_t>(t * channels + c));
  return rows;
}

// A run of target pixels of one class.
struct Piece {
  int64_t of_class, first, last;
};

std::vector<Piece> pieces_of(const Geometry& g, int64_t samples) {
  std::vector<Piece> pieces;
  for (size_t k = 0; k + 1 < g.classes.size(); ++k) {
    const int64_t count = (g.classes[k + 1] - g.classes[k]) * samples;
    for (int64_t first = 0; first < count; first += kSpan)
      pieces.push_back({static_cast<int64_t>(k), first, std::min(count, first + kSpan)});
  }
  return pieces;
}

// out = start + the sum over pairs, for all tasks. `adjoint`: from outputs to inputs.
template <class T>
struct Sum {
  const Shape& shape;
  bool adjoint;
  int pairs;
  const T* x[2];
  const T* weight[2];
  const T* start;
  T* out;

  int64_t channels() const { return adjoint ? shape.group_out() : shape.group_in(); }
  int64_t columns() const { return adjoint ? shape.group_in() : shape.group_out(); }

  void pack(const std::vector<int32_t>& rows, int64_t task, int64_t group, int pair, T* to) const {
    const auto& kernels = layer_kernels<T>();
    const int64_t taps = shape.taps(), in = shape.group_in(), depth = taps * channels();
    const T* end = weight[pair] + shape.tasks * shape.weights();
    const T* first = weight[pair] + task * shape.weights() + group * shape.group_out() * in * taps;
    if (!adjoint)
      return kernels.pack({first, in * taps, in * taps, end}, columns(), rows.data(), 0, depth, to);
    for (int64_t o = 0; o < channels(); ++o)
      kernels.pack({first + o * in * taps, taps, taps, end}, columns(), rows.data(), o, depth, to);
  }

  void run() const {
    const auto& kernels = layer_kernels<T>();
    const auto kept = geometry_of(shape.window, adjoint, channels() >= kPatched);
    const Geometry& geometry = *kept;
    const std::vector<Piece> pieces = pieces_of(geometry, shape.samples);
    const int64_t in_step = adjoint ? shape.out_channels : shape.channels;
    const int64_t out_step = adjoint ? shape.channels : shape.out_channels;
    const int64_t in_task =
        shape.samples * in_step * (adjoint ? shape.out_pixels() : shape.pixels());
    const int64_t out_task = shape.samples * out_step * geometry.pixels;
    const int64_t taps = shape.taps(), depth = taps * channels();
    const auto count = static_cast<int64_t>(pieces.size());
    std::vector<int32_t> rows;
    if (adjoint)
      for (int64_t t = 0; t < taps; ++t) rows.push_back(static_cast<int32_t>(t * channels()));
    else
      rows = rows_by_tap(channels(), taps);
    std::vector<int64_t> costs;
    for (int64_t tg = 0; tg < shape.tasks * shape.groups; ++tg)
      for (const Piece& p : pieces) costs.push_back((p.last - p.first) * depth * columns() * pairs);
    const int64_t padded = (columns() + kernels.width - 1) / kernels.width * kernels.width;
    parallel_ranges(costs, [&](int64_t first, int64_t last) {
      Scratch<T>& scratch = Scratch<T>::of_this_thread();
      Products<T> call{};
      T* packed[2] = {scratch.take(depth * padded),
                      pairs > 1 ? scratch.take(depth * padded) : nullptr};
      call.pairs = pairs;
      call.channels = channels(), call.columns = columns();
      call.work = scratch.take(kernels.work(taps, channels(), columns()));
      call.x_pixel = in_step, call.x_sample = in_task / shape.samples;
      call.out_pixel = out_step, call.out_sample = out_task / shape.samples;
      int64_t there = -1;
      for (int64_t u = first; u < last; ++u) {
        const int64_t task = u / count / shape.groups, group = u / count % shape.groups;
        if (u / count != there) {
          for (int k = 0; k < pairs; ++k) {
            pack(rows, task, group, k, packed[k]);
            call.packed[k] = packed[k];
            call.x_end[k] = x[k] + shape.tasks * in_task;
            call.x[k] = x[k] + task * in_task + group * channels();
          }
          call.out = out + task * out_task + group * columns();
          call.start = start ? start + task * out_step + group * columns() : nullptr;
          there = u / count;
        }
        const Piece& p = pieces[u % count];
        kernels.products(geometry, call, p.of_class, p.first, p.last);
      }
      scratch.reset();
    });
  }
};

template <class T>
Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& x2, const std::optional<Tensor>& weight2,
               const Shape& s) {
  const int64_t sizes[] = {s.tasks, s.samples, s.window.out_size[0], s.window.out_size[1],
                           s.out_channels};
  Tensor out = empty(x, sizes, 5);
  const int64_t images = s.tasks * s.samples * s.pixels() * s.channels;
  Sum<T> sum{s,
             false,
             1,
             {data_of<T>(x, x.scalar_type(), images, "x"), nullptr},
             {data_of<T>(weight, x.scalar_type(), s.tasks * s.weights(), "weight"), nullptr},
             nullptr,
             static_cast<T*>(out.data_ptr())};
  if (x2.has_value()) {
    sum.pairs = 2;
    sum.x[1] = data_of<T>(*x2, x.scalar_type(), images, "x2");
    sum.weight[1] = data_of<T>(*weight2, x.scalar_type(), s.tasks * s.weights(), "weight2");
  }
  sum.start = data_of<T>(bias, x.scalar_type(), s.tasks * s.out_channels, "bias");
  if (out.numel() > 0) sum.run();
  return out;
}

template <class T>
Tensor to_input(const Tensor& dy, const Tensor& weight, const Shape& s) {
  const int64_t sizes[] = {s.tasks, s.samples, s.window.size[0], s.window.size[1], s.channels};
  Tensor out = empty(dy, sizes, 5);
  const int64_t images = s.tasks * s.samples * s.out_pixels() * s.out_channels;
  const Sum<T> sum{s,
                   true,
                   1,
                   {data_of<T>(dy, dy.scalar_type(), images, "dy"), nullptr},
                   {data_of<T>(weight, dy.scalar_type(), s.tasks * s.weights(), "weight"), nullptr},
                   nullptr,
                   static_cast<T*>(out.data_ptr())};
  if (out.numel() > 0) sum.run();
  return out;
}

// Parts of a group's channels, so that there is work for all threads.
int64_t parts_of(const Shape& s) {
  const int64_t threads = torch::stable::get_num_threads(), units = s.tasks * s.groups;
  if (units >= 4 * threads || units % threads == 0) return 1;
  return std::max<int64_t>(1, std::min(s.group_in() / 16, 2 * threads));
}

template <class T>
std::tuple<Tensor, Tensor> to_weight(const Tensor& x, const Tensor& dy, const Shape& s, bool bias) {
  const int64_t sizes[] = {s.tasks, s.out_channels, s.group_in(), s.window.kernel[0],
                           s.window.kernel[1]};
  const int64_t bias_sizes[] = {bias ? s.tasks : 0, s.out_channels};
  Tensor dw = empty(x, sizes, 5), db = empty(x, bias_sizes, 2);
  const auto& kernels = layer_kernels<T>();
  const int64_t x_task = s.samples * s.pixels() * s.channels;
  const int64_t dy_task = s.samples * s.out_pixels() * s.out_channels;
  const T* from_x = data_of<T>(x, x.scalar_type(), s.tasks * x_task, "x");
  const T* from_dy = data_of<T>(dy, x.scalar_type(), s.tasks * dy_task, "dy");
  T* to_dw = static_cast<T*>(dw.data_ptr());
  T* to_db = static_cast<T*>(db.data_ptr());
  const int64_t taps = s.taps(), columns = s.group_out(), parts = parts_of(s);
  const int64_t padded = (columns + kernels.width - 1) / kernels.width * kernels.width;
  const auto kept = geometry_of(s.window, false, false);
  const Geometry& geometry = *kept;
  const int64_t cost = s.samples * s.out_pixels() * columns * taps * s.group_in() / parts;
  const std::vector<int64_t> costs(s.tasks * s.groups * parts, cost);
  parallel_ranges(costs, [&](int64_t first, int64_t last) {
    Scratch<T>& scratch = Scratch<T>::of_this_thread();
    T* sums = scratch.take(taps * s.group_in() * padded);
    T* sum_of_dy = scratch.take(padded);
    T* work = scratch.take(kernels.work(taps, s.group_in(), columns));
    for (int64_t u = first; u < last; ++u) {
      const int64_t part = u % parts, group = u / parts % s.groups, task = u / parts / s.groups;
      const int64_t begin = s.group_in() * part / parts, end = s.group_in() * (part + 1) / parts;
      const int64_t channels = end - begin;
      if (s.samples * s.out_pixels() == 0) std::fill(sums, sums + taps * channels * padded, T(0));
      std::fill(sum_of_dy, sum_of_dy + padded, T(0));
      Outer<T> call{};
      call.x = from_x + task * x_task + group * s.group_in() + begin;
      call.x_end = from_x + s.tasks * x_task;
      call.x_sample = s.pixels() * s.channels, call.x_pixel = s.channels;
      call.dy = from_dy + task * dy_task + group * columns;
      call.dy_sample = s.out_pixels() * s.out_channels, call.dy_pixel = s.out_channels;
      call.channels = channels, call.columns = columns, call.samples = s.samples;
      call.sums = sums, call.work = work;
      call.sum_of_dy = bias && part == 0 ? sum_of_dy : nullptr;
      kernels.outer(geometry, call);
      T* to =
          to_dw + (task * s.out_channels + group * columns) * s.group_in() * taps + begin * taps;
      kernels.unpack(sums, columns, rows_by_tap(channels, taps).data(),
                     {to, s.group_in() * taps, channels * taps, nullptr});
      if (call.sum_of_dy)
        std::copy(sum_of_dy, sum_of_dy + columns, to_db + task * s.out_channels + group * columns);
    }
    scratch.reset();
  });
  return {dw, db};
}

}  // namespace

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> x2,
              std::optional<Tensor> weight2, Ints stride, Ints padding, Ints dilation,
              int64_t groups) {
  check_ranks(x, weight, groups);
  STD_TORCH_CHECK(x2.has_value() == weight2.has_value(), "fastkfo: x2 and weight2 come together");
  const Window window = window_of(weight.size(3), weight.size(4), stride, padding, dilation);
  const Shape s = shape_of(x, weight, window, groups);
  check_small(s);
  return by_dtype(
      x, [&](auto one) { return forward<decltype(one)>(x, weight, bias, x2, weight2, s); });
}

Tensor conv2d_input(Tensor dy, Tensor weight, Ints size, Ints stride, Ints padding, Ints dilation,
                    int64_t groups) {
  check_ranks(dy, weight, groups);
  STD_TORCH_CHECK(size.size() == 2, "fastkfo: size takes two numbers");
  Shape s{};
  s.window = window_of(weight.size(3), weight.size(4), stride, padding, dilation);
  s.tasks = dy.size(0), s.samples = dy.size(1), s.groups = groups;
  s.out_channels = weight.size(1), s.channels = weight.size(2) * groups;
  for (int a = 0; a < 2; ++a) s.window.size[a] = size[a];
  s.window.set_out_size();
  check_behind(dy, s.window);
  STD_TORCH_CHECK(
      weight.size(0) == s.tasks && s.out_channels % groups == 0 && dy.size(4) == s.out_channels,
      "fastkfo: the weights do not fit dy");
  check_small(s);
  return by_dtype(dy, [&](auto one) { return to_input<decltype(one)>(dy, weight, s); });
}

std::tuple<Tensor, Tensor> conv2d_weight(Tensor x, Tensor dy, Ints kernel, Ints stride,
                                         Ints padding, Ints dilation, int64_t groups, bool bias) {
  STD_TORCH_CHECK(x.dim() == 5 && dy.dim() == 5 && groups > 0 && kernel.size() == 2,
                  "fastkfo: expected [T, N, H, W, C], [T, N, H, W, O] and two kernel sizes");
  Shape s{};
  s.window = window_of(kernel[0], kernel[1], stride, padding, dilation);
  s.tasks = x.size(0), s.samples = x.size(1), s.channels = x.size(4), s.groups = groups;
  s.out_channels = dy.size(4);
  STD_TORCH_CHECK(s.channels % groups == 0 && s.out_channels % groups == 0,
                  "fastkfo: channels are not divisible by groups");
  for (int a = 0; a < 2; ++a) s.window.size[a] = x.size(2 + a);
  s.window.set_out_size();
  check_behind(dy, s.window);
  STD_TORCH_CHECK(dy.size(0) == s.tasks && dy.size(1) == s.samples, "fastkfo: dy does not fit x");
  check_small(s);
  return by_dtype(x, [&](auto one) { return to_weight<decltype(one)>(x, dy, s, bias); });
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&fastkfo::cpu::conv2d));
  m.impl("conv2d_input", TORCH_BOX(&fastkfo::cpu::conv2d_input));
  m.impl("conv2d_weight", TORCH_BOX(&fastkfo::cpu::conv2d_weight));
}
