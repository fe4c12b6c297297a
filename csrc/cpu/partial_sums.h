// Gradients of shared operands: each unit writes its own part, then the parts are added in a fixed
// order, so that the result is bitwise the same for any number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "operand.h"

namespace fastkfo::cpu {

template <class S, class T>
class PartialSums {
 public:
  // entries: operands (one per task, or one for all); parts: summands of each; size: its numbers.
  PartialSums(Tensor out, int64_t entries, int64_t parts, int64_t size)
      : out_(std::move(out)),
        data_(static_cast<T*>(out_.data_ptr())),
        entries_(entries),
        parts_(parts),
        size_(size) {
    if (!direct()) buffer_.reset(new S[std::max<int64_t>(1, entries * parts * size)]);
  }

  S* part(int64_t entry, int64_t part) {
    if constexpr (std::is_same_v<S, T>)
      if (direct()) return data_ + entry * size_;
    return buffer_.get() + (entry * parts_ + part) * size_;
  }

  void finish() {
    if (direct()) return;
    for (int64_t e = 0; e < entries_; ++e)
      for (int64_t k = 0; k < size_; ++k) {
        S sum = 0;
        for (int64_t p = 0; p < parts_; ++p) sum += buffer_[(e * parts_ + p) * size_ + k];
        data_[e * size_ + k] = static_cast<T>(sum);
      }
  }

  const Tensor& tensor() const { return out_; }

 private:
  bool direct() const { return std::is_same_v<S, T> && parts_ == 1; }
  Tensor out_;
  T* data_;
  int64_t entries_, parts_, size_;
  std::unique_ptr<S[]> buffer_;
};

}  // namespace fastkfo::cpu
