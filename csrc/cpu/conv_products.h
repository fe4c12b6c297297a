// The products of a convolution: a few target pixels times a panel of columns are held in registers
// while taps and channels run. No patches are copied: every tap of every pixel is a pointer into
// the source, and pixels that lack the same taps run together. Only where there are few channels
// are taps gathered first.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

// Target pixels that are held in registers with a panel of NV vectors.
template <int NV>
constexpr int kRows = FASTKFO_VECTOR_BYTES == 64   ? (NV == 4 ? 6 : 8)
                      : FASTKFO_VECTOR_BYTES == 32 ? 6
                                                   : 4;
constexpr int64_t kMostRows = 8;

template <class S>
struct Tap {
  const S* rows[kMostRows];
  const S* packed;
};

// Packed numbers that are read for all pixels of a span before the next ones are.
constexpr int64_t kPackedBytes = 192 << 10;
constexpr int64_t kMostTaps = 64;

template <class S>
int64_t products_work(int64_t taps, int64_t channels) {
  return channels < kPatched ? 2 * patches_size<S>(kSpan, taps, channels) : 0;
}

template <class S, int MR, int NV>
FASTKFO_INLINE void add_tap(const Tap<S>& tap, int64_t channels, Lanes<S> (&sums)[MR][NV]) {
  const S* packed = tap.packed;
  const S* rows[MR];
  for (int r = 0; r < MR; ++r) rows[r] = tap.rows[r];
  for (int64_t c = 0; c < channels; ++c, packed += NV * kWidth<S>) {
    Lanes<S> right[NV];
    for (int v = 0; v < NV; ++v) right[v] = V<S>::load(packed + v * kWidth<S>);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const S left = rows[r][c];
      for (int v = 0; v < NV; ++v) sums[r][v] += left * right[v];
    }
  }
}

template <class S, int NV>
FASTKFO_INLINE void load_row(const S* from, int64_t columns, Lanes<S> (&to)[NV]) {
  if (columns == NV * kWidth<S>) {
    for (int v = 0; v < NV; ++v) to[v] = V<S>::load(from + v * kWidth<S>);
    return;
  }
  S row[NV * kWidth<S>] = {};
  for (int64_t c = 0; c < columns; ++c) row[c] = from[c];
  for (int v = 0; v < NV; ++v) to[v] = V<S>::load(row + v * kWidth<S>);
}

template <class S, int NV>
FASTKFO_INLINE void store_row(const Lanes<S> (&from)[NV], int64_t columns, S* to) {
  if (columns == NV * kWidth<S>) {
    for (int v = 0; v < NV; ++v) V<S>::store(to + v * kWidth<S>, from[v]);
    return;
  }
  S row[NV * kWidth<S>];
  for (int v = 0; v < NV; ++v) V<S>::store(row + v * kWidth<S>, from[v]);
  for (int64_t c = 0; c < columns; ++c) to[c] = row[c];
}

// What is read for a span of target pixels, of one panel of columns.
template <class S>
struct Span {
  const Geometry& geometry;
  const Products<S>& call;
  const int32_t* order;         // of the class
  int64_t in_class;             // pixels of one sample in it
  int64_t begin;                // of the span
  const S* patches[2];          // or null
  const S* packed[2];           // of the panel
  int64_t first_column, count;  // of the panel
};

// The taps [first, last) of MR target pixels, without those that are padding for this class.
template <class S, int MR, int NV>
FASTKFO_INLINE int64_t gather(const Span<S>& span, int64_t first, int64_t last, int pair,
                              Tap<S>* to, const int64_t (&sample)[MR], const int32_t (&pixel)[MR]) {
  const Products<S>& call = span.call;
  const int64_t taps = span.geometry.taps;
  const int32_t* source = span.geometry.source.data();
  int64_t found = 0;
  for (int64_t t = first; t < last; ++t) {
    if (source[pixel[0] * taps + t] < 0) continue;
    for (int r = 0; r < MR; ++r)
      to[found].rows[r] = call.x[pair] + sample[r] + source[pixel[r] * taps + t] * call.x_pixel;
    to[found++].packed = span.packed[pair] + t * call.channels * NV * kWidth<S>;
  }
  return found;
}

template <class S, int MR, int NV>
FASTKFO_INLINE void block(const Span<S>& span, int64_t j, int64_t first, int64_t last,
                          Tap<S>* taps) {
  const Products<S>& call = span.call;
  int64_t sample[MR];
  int32_t pixel[MR];
  S* out[MR];
  for (int r = 0; r < MR; ++r) {
    const int64_t n = (j + r) / span.in_class;
    pixel[r] = span.order[j + r - n * span.in_class];
    sample[r] = n * call.x_sample;
    out[r] = call.out + n * call.out_sample + pixel[r] * call.out_pixel + span.first_column;
  }
  Lanes<S> sums[MR][NV] = {};
  if (first > 0) {
    for (int r = 0; r < MR; ++r) load_row<S, NV>(out[r], span.count, sums[r]);
  } else if (call.start) {
    load_row<S, NV>(call.start + span.first_column, span.count, sums[0]);
    for (int r = 1; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = sums[0][v];
  }
  for (int pair = 0; pair < call.pairs; ++pair) {
    if (span.patches[pair]) {
      const int64_t depth = span.geometry.taps * call.channels;
      for (int r = 0; r < MR; ++r)
        taps[0].rows[r] = span.patches[pair] + (j + r - span.begin) * depth;
      taps[0].packed = span.packed[pair];
      add_tap<S, MR, NV>(taps[0], depth, sums);
      continue;
    }
    const int64_t found = gather<S, MR, NV>(span, first, last, pair, taps, sample, pixel);
    for (int64_t t = 0; t < found; ++t) add_tap<S, MR, NV>(taps[t], call.channels, sums);
  }
  for (int r = 0; r < MR; ++r) store_row<S, NV>(sums[r], span.count, out[r]);
}

// A block of as many pixels as `rows` says, at most MR.
template <class S, int MR, int NV>
FASTKFO_INLINE void any_block(int64_t rows, const Span<S>& span, int64_t j, int64_t first,
                              int64_t last, Tap<S>* taps) {
  if (rows == MR) return block<S, MR, NV>(span, j, first, last, taps);
  if constexpr (MR > 1) any_block<S, MR - 1, NV>(rows, span, j, first, last, taps);
}

// Blocks of about equal size: of 20 pixels 5 + 5 + 5 + 5, not 6 + 6 + 6 + 2.
template <class S, int NV>
FASTKFO_INLINE void blocks(const Span<S>& span, int64_t j, int64_t end, int64_t first, int64_t last,
                           Tap<S>* taps) {
  int64_t left = (end - j + kRows<NV> - 1) / kRows<NV>;
  for (; left > 0; --left) {
    const int64_t rows = (end - j + left - 1) / left;
    any_block<S, kRows<NV>, NV>(rows, span, j, first, last, taps);
    j += rows;
  }
}

template <class S, int NV>
void panel(const Span<S>& span, int64_t end) {
  const int64_t taps = span.geometry.taps;
  const int64_t row = span.call.channels * NV * kWidth<S> * static_cast<int64_t>(sizeof(S));
  const int64_t fitting = std::max<int64_t>(1, kPackedBytes / std::max<int64_t>(row, 1));
  const int64_t at_once = span.patches[0] ? taps : std::min({taps, fitting, kMostTaps});
  Tap<S> list[kMostTaps + 1];
  for (int64_t t = 0; t < taps; t += at_once)
    blocks<S, NV>(span, span.begin, end, t, std::min(taps, t + at_once), list);
}

template <class S>
void products(const Geometry& geometry, const Products<S>& call, int64_t of_class, int64_t first,
              int64_t last) {
  const int32_t begin = geometry.classes[of_class];
  Span<S> span{geometry, call, geometry.order.data() + begin,
               geometry.classes[of_class + 1] - begin, first};
  const int64_t depth = geometry.taps * call.channels;
  if (call.channels < kPatched)
    for (int pair = 0; pair < call.pairs; ++pair) {
      S* patches = call.work + pair * patches_size<S>(kSpan, geometry.taps, call.channels);
      for (int64_t j = first; j < last; ++j) {
        const int64_t n = j / span.in_class;
        copy_patch(geometry, call.x[pair] + n * call.x_sample, call.x_pixel, call.channels,
                   span.order[j - n * span.in_class], call.x_end[pair],
                   patches + (j - first) * depth);
      }
      span.patches[pair] = patches;
    }
  const int64_t vectors = vectors_of<S>(call.columns);
  for (int64_t v = 0; v < vectors; v += kPanel) {
    span.first_column = v * kWidth<S>;
    span.count = std::min(kPanel * kWidth<S>, call.columns - span.first_column);
    for (int pair = 0; pair < call.pairs; ++pair)
      span.packed[pair] = call.packed[pair] + span.first_column * depth;
    switch (std::min(kPanel, vectors - v)) {
      case 1:
        panel<S, 1>(span, last);
        break;
      case 2:
        panel<S, 2>(span, last);
        break;
#if FASTKFO_VECTOR_BYTES == 64
      case 3:
        panel<S, 3>(span, last);
        break;
      case 4:
        panel<S, 4>(span, last);
        break;
#endif
    }
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
