// Which pixels a convolution's taps connect.
#pragma once

#include <memory>

#include "cpu/layers.h"

namespace fastkfo::cpu {

// A window and the sizes of the images before it and behind it.
struct Window {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t size[2], out_size[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return size[0] * size[1]; }
  int64_t out_pixels() const { return out_size[0] * out_size[1]; }
  void set_out_size();
};

// For every pixel behind the window those before it that its taps read; with `adjoint` for every
// pixel before it those that read it. `sorted`: pixels with the same taps in the image together.
// The last ones asked for are kept.
std::shared_ptr<const Geometry> geometry_of(const Window& window, bool adjoint, bool sorted);

}  // namespace fastkfo::cpu
