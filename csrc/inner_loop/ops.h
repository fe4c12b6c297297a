// The ops of a fused inner loop, for every device that can run one.
#pragma once

#include "inner_loop/call.h"

namespace fastkfo::inner_loop {

template <class F>
auto by_dtype(const Tensor& x, const F& run) -> decltype(run(float{})) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Double:
      return run(double{});
    default:
      STD_TORCH_CHECK(false, "fastkfo: expected float32 or float64");
  }
}

inline MaybeTensors optional(const Tensors& tensors) {
  return MaybeTensors(tensors.begin(), tensors.end());
}

// As library.cpp declares them. Machine: what runs a call, for instance cpu::Cpu.
template <class Machine>
struct Ops {
  static Tensors forward(Tensors theta, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                         MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q,
                         MaybeTensor y_q, MaybeTensor tape, Ints layers, Floats constants,
                         Floats alpha, int64_t steps, int64_t loss, int64_t query_loss,
                         int64_t forms, bool psd, bool adapt, bool adapted) {
    Call call{{optional(theta), left, right, bias, scale},
              x_s,
              y_s,
              x_q,
              y_q,
              layers,
              constants,
              alpha,
              steps,
              loss,
              query_loss,
              forms,
              psd,
              false,
              adapt};
    return Machine::forward(call, tape, adapted);
  }
  static int64_t tape(Tensors theta, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                      MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q, MaybeTensor y_q,
                      Ints layers, Floats constants, Floats alpha, int64_t steps, int64_t loss,
                      int64_t query_loss, int64_t forms, bool psd, bool adapt) {
    Call call{{optional(theta), left, right, bias, scale},
              x_s,
              y_s,
              x_q,
              y_q,
              layers,
              constants,
              alpha,
              steps,
              loss,
              query_loss,
              forms,
              psd,
              false,
              adapt};
    return Machine::tape(call);
  }
  static Tensors gradient(Tensors theta, MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                          MaybeTensors scale, Tensor x_s, Tensor y_s, Tensor x_q, Tensor y_q,
                          Ints layers, Floats constants, Floats alpha, int64_t steps, int64_t loss,
                          int64_t query_loss, int64_t forms, bool psd, bool adapt, bool first_order,
                          Ints wanted, bool want_x_s, bool want_x_q) {
    Call call{{optional(theta), left, right, bias, scale},
              x_s,
              y_s,
              x_q,
              y_q,
              layers,
              constants,
              alpha,
              steps,
              loss,
              query_loss,
              forms,
              psd,
              first_order,
              adapt};
    return Machine::gradient(call, wanted, want_x_s, want_x_q);
  }
  static Tensors backward(MaybeTensor d_loss, MaybeTensors d_adapted, Tensors theta,
                          MaybeTensors left, MaybeTensors right, MaybeTensors bias,
                          MaybeTensors scale, Tensor x_s, Tensor y_s, MaybeTensor x_q,
                          MaybeTensor y_q, Tensor tape, Ints layers, Floats constants, Floats alpha,
                          int64_t steps, int64_t loss, int64_t query_loss, int64_t forms, bool psd,
                          bool adapt, bool first_order, Ints wanted, bool want_x_s, bool want_x_q) {
    Call call{{optional(theta), left, right, bias, scale},
              x_s,
              y_s,
              x_q,
              y_q,
              layers,
              constants,
              alpha,
              steps,
              loss,
              query_loss,
              forms,
              psd,
              first_order,
              adapt};
    return Machine::backward(call, d_loss, d_adapted, tape, wanted, want_x_s, want_x_q);
  }
};

template <class Machine, class Library>
void implement(Library& m) {
  m.impl("inner_loop_forward", TORCH_BOX(&Ops<Machine>::forward));
  m.impl("inner_loop_tape", TORCH_BOX(&Ops<Machine>::tape));
  m.impl("inner_loop_gradient", TORCH_BOX(&Ops<Machine>::gradient));
  m.impl("inner_loop_backward", TORCH_BOX(&Ops<Machine>::backward));
}

}  // namespace fastkfo::inner_loop
