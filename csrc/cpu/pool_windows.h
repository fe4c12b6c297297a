// Pooling of one image, [H, W, C]: taps run outside, channels inside, where vectors run along them.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

// The pixels that window (y, x) covers: from first[axis] in steps of dilation, inside the image.
struct Covered {
  int64_t first[2], last[2];
};

FASTKFO_INLINE Covered covered(const Pooling& p, int64_t y, int64_t x) {
  Covered c;
  const int64_t at[2] = {y, x};
  for (int a = 0; a < 2; ++a) {
    c.first[a] = at[a] * p.stride[a] - p.padding[a];
    c.last[a] = std::min(p.size[a], c.first[a] + p.dilation[a] * (p.kernel[a] - 1) + 1);
    if (c.first[a] < 0)
      c.first[a] += (-c.first[a] + p.dilation[a] - 1) / p.dilation[a] * p.dilation[a];
  }
  return c;
}

// Calls visit(window, pixel, whether it is the window's first) for all of them, in order.
template <class F>
FASTKFO_INLINE void for_windows(const Pooling& p, const F& visit) {
  for (int64_t y = 0; y < p.out_size[0]; ++y)
    for (int64_t x = 0; x < p.out_size[1]; ++x) {
      const Covered c = covered(p, y, x);
      bool first = true;
      for (int64_t h = c.first[0]; h < c.last[0]; h += p.dilation[0])
        for (int64_t w = c.first[1]; w < c.last[1]; w += p.dilation[1], first = false)
          visit(y * p.out_size[1] + x, h * p.size[1] + w, first);
    }
}

// The first maximum wins, and a NaN wins over everything.
template <class S>
void max_pool(const Pooling& p, const S* x, S* y, int32_t* where) {
  if (p.dilation[0] > 1 || p.dilation[1] > 1) {  // a window may miss the image
    const int64_t numbers = p.out_size[0] * p.out_size[1] * p.channels;
    for (int64_t i = 0; i < numbers; ++i) y[i] = -std::numeric_limits<S>::infinity(), where[i] = -1;
  }
  for_windows(p, [&](int64_t window, int64_t pixel, bool first) __attribute__((always_inline)) {
    const S* from = x + pixel * p.channels;
    S* to = y + window * p.channels;
    int32_t* at = where + window * p.channels;
    const auto index = static_cast<int32_t>(pixel);
    if (first) {
      for (int64_t c = 0; c < p.channels; ++c) to[c] = from[c], at[c] = index;
      return;
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const bool wins = from[c] > to[c] || (from[c] != from[c] && to[c] == to[c]);
      to[c] = wins ? from[c] : to[c];
      at[c] = wins ? index : at[c];
    }
  });
}

template <class S>
void max_pool_scatter(const Pooling& p, const S* dy, const int32_t* where, S* dx) {
  std::memset(dx, 0, sizeof(S) * p.size[0] * p.size[1] * p.channels);
  for_windows(p, [&](int64_t window, int64_t pixel, bool) __attribute__((always_inline)) {
    const S* from = dy + window * p.channels;
    S* to = dx + pixel * p.channels;
    const int32_t* at = where + window * p.channels;
    const auto index = static_cast<int32_t>(pixel);
    for (int64_t c = 0; c < p.channels; ++c) to[c] += at[c] == index ? from[c] : S(0);
  });
}

template <class S>
void max_pool_gather(const Pooling& p, const S* v, const int32_t* where, S* to) {
  const int64_t windows = p.out_size[0] * p.out_size[1], pixels = p.size[0] * p.size[1];
  for (int64_t w = 0; w < windows; ++w)
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t at = where[w * p.channels + c];
      to[w * p.channels + c] = at >= 0 && at < pixels ? v[at * p.channels + c] : S(0);
    }
}

// 1 / what the sum of a window is divided by, as F.avg_pool2d has it.
template <class S>
FASTKFO_INLINE S share(const Pooling& p, int64_t window) {
  if (p.divisor != 0) return S(1) / static_cast<S>(p.divisor);
  const int64_t at[2] = {window / p.out_size[1], window % p.out_size[1]};
  int64_t count = 1;
  for (int a = 0; a < 2; ++a) {
    const int64_t first = at[a] * p.stride[a] - p.padding[a];
    const int64_t last = std::min(first + p.kernel[a], p.size[a] + p.padding[a]);
    count *= p.include_pad ? last - first : std::min(last, p.size[a]) - std::max<int64_t>(first, 0);
  }
  return S(1) / static_cast<S>(count);
}

template <class S>
void avg_pool(const Pooling& p, const S* x, S* y) {
  const int64_t windows = p.out_size[0] * p.out_size[1];
  std::memset(y, 0, sizeof(S) * windows * p.channels);
  for_windows(p, [&](int64_t window, int64_t pixel, bool) __attribute__((always_inline)) {
    const S* from = x + pixel * p.channels;
    S* to = y + window * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) to[c] += from[c];
  });
  for (int64_t w = 0; w < windows; ++w) {
    const S factor = share<S>(p, w);
    for (int64_t c = 0; c < p.channels; ++c) y[w * p.channels + c] *= factor;
  }
}

template <class S>
void avg_pool_backward(const Pooling& p, const S* dy, S* dx) {
  std::memset(dx, 0, sizeof(S) * p.size[0] * p.size[1] * p.channels);
  for_windows(p, [&](int64_t window, int64_t pixel, bool) __attribute__((always_inline)) {
    const S factor = share<S>(p, window);
    const S* from = dy + window * p.channels;
    S* to = dx + pixel * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) to[c] += factor * from[c];
  });
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
