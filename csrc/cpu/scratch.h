// Working memory of one thread: taken piece by piece, given back all at once, kept between calls.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastkfo::cpu {

template <class S>
class Scratch {
 public:
  // The pieces stay valid until reset(). Never returns null, even for size 0.
  S* take(int64_t size) {
    const int64_t rounded = (size + kAlign) / kAlign * kAlign;
    if (blocks_.empty() || used_ + rounded > capacity_) {
      capacity_ = rounded > kFirst ? rounded : kFirst;
      blocks_.emplace_back(new S[capacity_]);  // not make_unique, which would write zeros
      total_ += capacity_;
      used_ = 0;
    }
    S* piece = blocks_.back().get() + used_;
    used_ += rounded;
    return piece;
  }

  // One block as large as all that the last round needed, so that the next takes no memory;
  // beyond kKeep it is returned, so that one large model does not hold memory for ever.
  void reset() {
    if (blocks_.size() > 1 || total_ > kKeep) {
      const int64_t total = total_;
      blocks_.clear();
      total_ = capacity_ = 0;
      if (total <= kKeep) {
        blocks_.emplace_back(new S[total]);
        total_ = capacity_ = total;
      }
    }
    used_ = 0;
  }

  static Scratch& of_this_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  static constexpr int64_t kAlign = 16;
  static constexpr int64_t kFirst = 1 << 14;
  static constexpr int64_t kKeep = 1 << 22;
  std::vector<std::unique_ptr<S[]>> blocks_;
  int64_t capacity_ = 0, used_ = 0, total_ = 0;
};

}  // namespace fastkfo::cpu
