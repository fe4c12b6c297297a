// A vector register of BYTES bytes. Everything is inlined, so that it is compiled for whoever uses
// it.
#pragma once

#include <cstring>

namespace fastkfo::cpu {

template <class S, int BYTES>
struct Vector {
  static constexpr int width = BYTES / static_cast<int>(sizeof(S));
  typedef S type __attribute__((vector_size(BYTES)));
  static inline __attribute__((always_inline)) type load(const S* p) {
    type v;
    std::memcpy(&v, p, BYTES);
    return v;
  }
  static inline __attribute__((always_inline)) void store(S* p, type v) {
    std::memcpy(p, &v, BYTES);
  }
};

}  // namespace fastkfo::cpu
