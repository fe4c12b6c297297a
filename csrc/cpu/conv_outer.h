// The weight gradient of a convolution: a few channels times a panel of columns are held in
// registers while pixels run, over few enough of them that what is read stays in the first cache.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

constexpr int64_t kMostPixels = 256;

template <class S>
int64_t pixels_at_once(int64_t columns) {
  const int64_t row = vectors_of<S>(columns) * FASTKFO_VECTOR_BYTES;
  return std::min(kMostPixels, std::max<int64_t>(32, kOuterBytes / std::max<int64_t>(row, 1)));
}

template <class S>
int64_t outer_work(int64_t taps, int64_t channels, int64_t columns) {
  const int64_t pixels = pixels_at_once<S>(columns);
  const int64_t patches = channels < kPatched ? patches_size<S>(pixels, taps, channels) : 0;
  return pixels * vectors_of<S>(columns) * kWidth<S> + patches;
}

// to [MR rows][NV vectors] += sum_p x[p][r] dy[p]; `fresh`: there is nothing yet to add to
template <class S, int MR, int NV>
FASTKFO_INLINE void add_outer(const S* const* x, const S* const* dy, int64_t count, int64_t channel,
                              int64_t column, bool fresh, S* to, int64_t to_row) {
  Lanes<S> sums[MR][NV] = {};
  if (!fresh)
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = V<S>::load(to + r * to_row + v * kWidth<S>);
  for (int64_t p = 0; p < count; ++p) {
    const S* left = x[p] + channel;
    const S* right = dy[p] + column;
    Lanes<S> rights[NV];
    for (int v = 0; v < NV; ++v) rights[v] = V<S>::load(right + v * kWidth<S>);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const S one = left[r];
      for (int v = 0; v < NV; ++v) sums[r][v] += one * rights[v];
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) V<S>::store(to + r * to_row + v * kWidth<S>, sums[r][v]);
}

template <class S, int MR, int NV>
FASTKFO_INLINE void rows_of_panel(const S* const* x, const S* const* dy, int64_t count,
                                  int64_t channel, int64_t channels, int64_t column, bool fresh,
                                  S* to, int64_t to_row) {
  for (; channel + MR <= channels; channel += MR)
    add_outer<S, MR, NV>(x, dy, count, channel, column, fresh, to + channel * to_row, to_row);
  if constexpr (MR > 1)
    if (channel < channels)
      rows_of_panel<S, MR / 2, NV>(x, dy, count, channel, channels, column, fresh, to, to_row);
}

// to [channels][columns] += x^T dy for pixels whose numbers are at x[p] and dy[p]
template <class S>
void add_outer_products(const S* const* x, const S* const* dy, int64_t count, int64_t channels,
                        int64_t vectors, bool fresh, S* to) {
  constexpr int kMost = FASTKFO_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t row = vectors * kWidth<S>;
  for (int64_t v = 0; v < vectors; v += kPanel) {
    S* at = to + v * kWidth<S>;
    const int64_t column = v * kWidth<S>;
    switch (std::min(kPanel, vectors - v)) {
      case 1:
        rows_of_panel<S, kMost, 1>(x, dy, count, 0, channels, column, fresh, at, row);
        break;
      case 2:
        rows_of_panel<S, kMost, 2>(x, dy, count, 0, channels, column, fresh, at, row);
        break;
#if FASTKFO_VECTOR_BYTES == 64
      case 3:
        rows_of_panel<S, 4, 3>(x, dy, count, 0, channels, column, fresh, at, row);
        break;
      case 4:
        rows_of_panel<S, 4, 4>(x, dy, count, 0, channels, column, fresh, at, row);
        break;
#endif
    }
  }
}

template <class S>
void add_rows(const S* const* dy, int64_t count, int64_t vectors, S* to) {
  for (int64_t v = 0; v < vectors; ++v) {
    Lanes<S> sum = {};
    for (int64_t p = 0; p < count; ++p) sum += V<S>::load(dy[p] + v * kWidth<S>);
    V<S>::store(to + v * kWidth<S>, V<S>::load(to + v * kWidth<S>) + sum);
  }
}

// One chunk of pixels [first, last), counted over samples.
template <class S>
struct Chunk {
  const Geometry& geometry;
  const Outer<S>& call;
  int64_t first, count, vectors;
  const S** dy;  // [count]
};

template <class S>
void outer_of_patches(const Chunk<S>& chunk, const S** left, S* patches) {
  const Outer<S>& call = chunk.call;
  const Geometry& geometry = chunk.geometry;
  const int64_t depth = geometry.taps * call.channels;
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t n = (chunk.first + i) / geometry.pixels;
    copy_patch(geometry, call.x + n * call.x_sample, call.x_pixel, call.channels,
               chunk.first + i - n * geometry.pixels, call.x_end, patches + i * depth);
    left[i] = patches + i * depth;
  }
  add_outer_products(left, chunk.dy, chunk.count, depth, chunk.vectors, chunk.first == 0,
                     call.sums);
}

template <class S>
void outer_of_taps(const Chunk<S>& chunk, const S** left, const S** right) {
  const Outer<S>& call = chunk.call;
  const Geometry& geometry = chunk.geometry;
  for (int64_t t = 0; t < geometry.taps; ++t) {
    int64_t found = 0;
    for (int64_t i = 0; i < chunk.count; ++i) {
      const int64_t n = (chunk.first + i) / geometry.pixels;
      const int32_t at =
          geometry.source[(chunk.first + i - n * geometry.pixels) * geometry.taps + t];
      if (at < 0) continue;
      left[found] = call.x + n * call.x_sample + at * call.x_pixel;
      right[found++] = chunk.dy[i];
    }
    S* sums = call.sums + t * call.channels * chunk.vectors * kWidth<S>;
    add_outer_products(left, right, found, call.channels, chunk.vectors, chunk.first == 0, sums);
  }
}

template <class S>
void outer(const Geometry& geometry, const Outer<S>& call) {
  const int64_t at_once = pixels_at_once<S>(call.columns), vectors = vectors_of<S>(call.columns);
  const int64_t row = vectors * kWidth<S>, pixels = call.samples * geometry.pixels;
  const S *dy[kMostPixels], *left[kMostPixels], *right[kMostPixels];
  S* padded = call.work;
  S* patches = padded + at_once * row;
  for (int64_t first = 0; first < pixels; first += at_once) {
    const int64_t count = std::min(at_once, pixels - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = (first + i) / geometry.pixels;
      dy[i] = call.dy + n * call.dy_sample + (first + i - n * geometry.pixels) * call.dy_pixel;
      if (row == call.columns) continue;
      S* copy = padded + i * row;  // whole vectors are read
      for (int64_t c = 0; c < row; ++c) copy[c] = c < call.columns ? dy[i][c] : S(0);
      dy[i] = copy;
    }
    const Chunk<S> chunk{geometry, call, first, count, vectors, dy};
    if (call.sum_of_dy) add_rows(dy, count, vectors, call.sum_of_dy);
    if (call.channels < kPatched)
      outer_of_patches(chunk, left, patches);
    else
      outer_of_taps(chunk, left, right);
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
