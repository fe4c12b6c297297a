// The taps of a target pixel side by side, where a pixel has too few channels for a product each.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

// What `pixels` patches take, and a vector behind them: copies write whole ones.
template <class S>
int64_t patches_size(int64_t pixels, int64_t taps, int64_t channels) {
  return pixels * taps * channels + kWidth<S>;
}

// Whole vectors where the source has them; the next copy writes over what was too much.
template <class S>
FASTKFO_INLINE void copy_run(const S* from, int64_t count, const S* end, S* to) {
  for (int64_t c = 0; c < count; c += kWidth<S>) {
    if (from + c + kWidth<S> <= end)
      V<S>::store(to + c, V<S>::load(from + c));
    else
      for (int64_t i = c; i < count; ++i) to[i] = from[i];
  }
}

// Taps of one row of the window lie side by side in the source, too, away from its borders.
template <class S>
FASTKFO_INLINE void copy_patch(const Geometry& geometry, const S* x, int64_t x_pixel,
                               int64_t channels, int64_t pixel, const S* x_end, S* to) {
  const int32_t* source = geometry.source.data() + pixel * geometry.taps;
  const int64_t row = geometry.row;
  for (int64_t t = 0; t < geometry.taps; t += row) {
    const int64_t count = row * channels;
    if (source[t] >= 0 && source[t + row - 1] == source[t] + row - 1 && x_pixel == channels) {
      copy_run(x + source[t] * x_pixel, count, x_end, to);
    } else {
      for (int64_t i = 0; i < row; ++i)
        for (int64_t c = 0; c < channels; ++c)
          to[i * channels + c] = source[t + i] < 0 ? S(0) : x[source[t + i] * x_pixel + c];
    }
    to += count;
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
