// Between weights as PyTorch keeps them, a column's numbers side by side, and as the products read
// them, numbers of many columns side by side: squares of one vector by as many.

namespace fastkfo::cpu {
namespace FASTKFO_LEVEL {

template <class S>
using V = Vector<S, FASTKFO_VECTOR_BYTES>;
template <class S>
using Lanes = typename V<S>::type;
template <class S>
constexpr int64_t kWidth = V<S>::width;

// Columns of a panel are held in registers together: at most so many vectors of them.
constexpr int64_t kPanel = FASTKFO_VECTOR_BYTES == 64 ? 4 : 2;

template <class S>
constexpr int64_t vectors_of(int64_t columns) {
  return (columns + kWidth<S> - 1) / kWidth<S>;
}

#if defined(__GNUC__) && !defined(__clang__)
// Exchanges the blocks above and below the diagonal, first large ones, then smaller.
template <class S>
FASTKFO_INLINE void transpose(Lanes<S>* x) {
  using Index = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(FASTKFO_VECTOR_BYTES)));
  constexpr int w = static_cast<int>(kWidth<S>);
#pragma GCC unroll 8
  for (int s = w / 2; s > 0; s /= 2) {
    Mask low, high;
    for (int l = 0; l < w; ++l) {
      low[l] = static_cast<Index>(l & s ? w + l - s : l);
      high[l] = static_cast<Index>(l & s ? w + l : l + s);
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      if (i & s) continue;
      const Lanes<S> a = x[i], b = x[i + s];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}
constexpr bool kTransposes = true;
#else
template <class S>
void transpose(Lanes<S>*) {}
constexpr bool kTransposes = false;
#endif

// Where a vector of columns begins in packed rows, and how long a row of its panel is.
template <class S>
struct Place {
  S* data;
  int64_t row;
};
template <class S>
FASTKFO_INLINE Place<S> place_of(S* packed, int64_t vector, int64_t vectors, int64_t depth) {
  const int64_t first = vector / kPanel * kPanel;
  const int64_t row = std::min(kPanel, vectors - first) * kWidth<S>;
  return {packed + first * kWidth<S> * depth + (vector - first) * kWidth<S>, row};
}

template <class S>
void pack(const Columns<const S>& from, int64_t columns, const int32_t* rows, int64_t shift,
          int64_t depth, S* packed) {
  constexpr int64_t w = kWidth<S>;
  const int64_t vectors = vectors_of<S>(columns);
  for (int64_t v = 0; v < vectors; ++v) {
    const Place<S> to = place_of(packed, v, vectors, depth);
    const S* data = from.data + v * w * from.step;
    const int64_t lanes = std::min(w, columns - v * w);
    for (int64_t k = 0; k < from.count; k += w) {
      const int64_t count = std::min(w, from.count - k);
      if (kTransposes && count > 1 && lanes == w &&
          data + (w - 1) * from.step + k + w <= from.end) {
        Lanes<S> square[w];
        for (int64_t l = 0; l < w; ++l) square[l] = V<S>::load(data + l * from.step + k);
        transpose<S>(square);
        for (int64_t i = 0; i < count; ++i)
          V<S>::store(to.data + (rows[k + i] + shift) * to.row, square[i]);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        S* row = to.data + (rows[k + i] + shift) * to.row;
        for (int64_t l = 0; l < lanes; ++l) row[l] = data[l * from.step + k + i];
        for (int64_t l = lanes; l < w; ++l) row[l] = 0;
      }
    }
  }
}

template <class S>
void unpack(const S* from, int64_t columns, const int32_t* rows, const Columns<S>& to) {
  constexpr int64_t w = kWidth<S>;
  const int64_t vectors = vectors_of<S>(columns), row = vectors * w;
  for (int64_t v = 0; v < vectors; ++v) {
    S* data = to.data + v * w * to.step;
    const int64_t lanes = std::min(w, columns - v * w);
    for (int64_t k = 0; k < to.count; k += w) {
      const int64_t count = std::min(w, to.count - k);
      if (kTransposes && count == w) {
        Lanes<S> square[w];
        for (int64_t i = 0; i < w; ++i) square[i] = V<S>::load(from + rows[k + i] * row + v * w);
        transpose<S>(square);
        for (int64_t l = 0; l < lanes; ++l) V<S>::store(data + l * to.step + k, square[l]);
        continue;
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t l = 0; l < lanes; ++l)
          data[l * to.step + k + i] = from[rows[k + i] * row + v * w + l];
    }
  }
}

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::cpu
