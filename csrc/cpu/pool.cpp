// Pooling of T tasks, images [T, N, H, W, C]: pool_windows.h has the kernels.
#include <tuple>

#include "cpu/checked.h"
#include "cpu/layers.h"
#include "cpu/parallel.h"

namespace fastkfo::cpu {
namespace {

struct Images {
  int64_t count, pixels, out_pixels, channels;
};

void set(int64_t (&to)[2], const Ints& from, int64_t least) {
  STD_TORCH_CHECK(from.size() == 2 && from[0] >= least && from[1] >= least,
                  "fastkfo: expected two numbers of at least ", least);
  to[0] = from[0], to[1] = from[1];
}

Pooling pooling_of(const Tensor& images, const Ints& kernel, const Ints& stride,
                   const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(images.dim() == 5, "fastkfo: expected [T, N, H, W, C]");
  Pooling p{};
  p.channels = images.size(4);
  set(p.kernel, kernel, 1), set(p.stride, stride, 1), set(p.padding, padding, 0);
  set(p.dilation, dilation, 1);
  return p;
}

// Every window must begin inside the image, or before it by no more than the padding.
void set_sizes(Pooling& p, const Ints& size, const Ints& out_size) {
  set(p.size, size, 0), set(p.out_size, out_size, 0);
  for (int a = 0; a < 2; ++a) {
    const int64_t last = (p.out_size[a] - 1) * p.stride[a] - p.padding[a];
    STD_TORCH_CHECK(p.padding[a] <= p.dilation[a] * (p.kernel[a] - 1) &&
                        (p.out_size[a] == 0 || last < p.size[a]),
                    "fastkfo: a window that covers padding alone");
  }
  STD_TORCH_CHECK(p.size[0] * p.size[1] < int64_t{1} << 31, "fastkfo: too many pixels");
}

Images images_of(const Tensor& x, const Pooling& p) {
  return {x.size(0) * x.size(1), p.size[0] * p.size[1], p.out_size[0] * p.out_size[1], p.channels};
}

template <class F>
void for_images(const Images& images, const Pooling& p, const F& run) {
  const int64_t cost = images.out_pixels * images.channels * p.kernel[0] * p.kernel[1] * 4;
  parallel_units(std::vector<int64_t>(images.count, cost), run);
}

// An uninitialised [T, N, size, C].
Tensor images_like(const Tensor& x, const int64_t (&size)[2],
                   std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t sizes[] = {x.size(0), x.size(1), size[0], size[1], x.size(4)};
  return empty(x, sizes, 5, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding,
                                      Ints dilation, Ints size) {
  Pooling p = pooling_of(x, kernel, stride, padding, dilation);
  set_sizes(p, {x.size(2), x.size(3)}, size);
  const Images n = images_of(x, p);
  Tensor y = images_like(x, p.out_size), where = images_like(x, p.out_size, ScalarType::Int);
  int32_t* to_where = static_cast<int32_t*>(where.data_ptr());
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    const T* from = data_of<T>(x, x.scalar_type(), n.count * n.pixels * n.channels, "x");
    T* to = static_cast<T*>(y.data_ptr());
    for_images(n, p, [&](int64_t i) {
      const int64_t at = i * n.out_pixels * n.channels;
      layer_kernels<T>().max_pool(p, from + i * n.pixels * n.channels, to + at, to_where + at);
    });
  });
  return {y, where};
}

Tensor max_pool2d_scatter(Tensor dy, Tensor where, Ints size, Ints kernel, Ints stride,
                          Ints padding, Ints dilation) {
  Pooling p = pooling_of(dy, kernel, stride, padding, dilation);
  set_sizes(p, size, {dy.size(2), dy.size(3)});
  const Images n = images_of(dy, p);
  const int64_t numel = n.count * n.out_pixels * n.channels;
  const int32_t* at = data_of<int32_t>(where, ScalarType::Int, numel, "where");
  Tensor dx = images_like(dy, p.size);
  by_dtype(dy, [&](auto one) {
    using T = decltype(one);
    const T* from = data_of<T>(dy, dy.scalar_type(), numel, "dy");
    T* to = static_cast<T*>(dx.data_ptr());
    for_images(n, p, [&](int64_t i) {
      const int64_t out = i * n.out_pixels * n.channels;
      layer_kernels<T>().max_pool_scatter(p, from + out, at + out, to + i * n.pixels * n.channels);
    });
  });
  return dx;
}

Tensor max_pool2d_gather(Tensor v, Tensor where) {
  STD_TORCH_CHECK(where.dim() == 5, "fastkfo: expected where [T, N, OH, OW, C]");
  Pooling p = pooling_of(v, {1, 1}, {1, 1}, {0, 0}, {1, 1});
  set(p.size, {v.size(2), v.size(3)}, 0), set(p.out_size, {where.size(2), where.size(3)}, 0);
  const Images n = images_of(v, p);
  const int64_t numel = n.count * n.out_pixels * n.channels;
  const int32_t* at = data_of<int32_t>(where, ScalarType::Int, numel, "where");
  Tensor to = images_like(v, p.out_size);
  by_dtype(v, [&](auto one) {
    using T = decltype(one);
    const T* from = data_of<T>(v, v.scalar_type(), n.count * n.pixels * n.channels, "v");
    T* out = static_cast<T*>(to.data_ptr());
    for_images(n, p, [&](int64_t i) {
      const int64_t first = i * n.out_pixels * n.channels;
      layer_kernels<T>().max_pool_gather(p, from + i * n.pixels * n.channels, at + first,
                                         out + first);
    });
  });
  return to;
}

Tensor avg_pool2d(Tensor x, Ints kernel, Ints stride, Ints padding, Ints size, bool include_pad,
                  int64_t divisor) {
  Pooling p = pooling_of(x, kernel, stride, padding, {1, 1});
  set_sizes(p, {x.size(2), x.size(3)}, size);
  p.include_pad = include_pad, p.divisor = divisor;
  const Images n = images_of(x, p);
  Tensor y = images_like(x, p.out_size);
  by_dtype(x, [&](auto one) {
    using T = decltype(one);
    const T* from = data_of<T>(x, x.scalar_type(), n.count * n.pixels * n.channels, "x");
    T* to = static_cast<T*>(y.data_ptr());
    for_images(n, p, [&](int64_t i) {
      layer_kernels<T>().avg_pool(p, from + i * n.pixels * n.channels,
                                  to + i * n.out_pixels * n.channels);
    });
  });
  return y;
}

Tensor avg_pool2d_backward(Tensor dy, Ints size, Ints kernel, Ints stride, Ints padding,
                           bool include_pad, int64_t divisor) {
  Pooling p = pooling_of(dy, kernel, stride, padding, {1, 1});
  set_sizes(p, size, {dy.size(2), dy.size(3)});
  p.include_pad = include_pad, p.divisor = divisor;
  const Images n = images_of(dy, p);
  Tensor dx = images_like(dy, p.size);
  by_dtype(dy, [&](auto one) {
    using T = decltype(one);
    const T* from = data_of<T>(dy, dy.scalar_type(), n.count * n.out_pixels * n.channels, "dy");
    T* to = static_cast<T*>(dx.data_ptr());
    for_images(n, p, [&](int64_t i) {
      layer_kernels<T>().avg_pool_backward(p, from + i * n.out_pixels * n.channels,
                                           to + i * n.pixels * n.channels);
    });
  });
  return dx;
}

}  // namespace fastkfo::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkfo, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&fastkfo::cpu::max_pool2d));
  m.impl("max_pool2d_scatter", TORCH_BOX(&fastkfo::cpu::max_pool2d_scatter));
  m.impl("max_pool2d_gather", TORCH_BOX(&fastkfo::cpu::max_pool2d_gather));
  m.impl("avg_pool2d", TORCH_BOX(&fastkfo::cpu::avg_pool2d));
  m.impl("avg_pool2d_backward", TORCH_BOX(&fastkfo::cpu::avg_pool2d_backward));
}
