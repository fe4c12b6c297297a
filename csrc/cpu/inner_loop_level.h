// The fused inner loop for one instruction set: included by inner_loop_v4.cpp and its like, which
// say which. All of it lies in a namespace of that name, so that nothing that is compiled for a
// newer processor can stand in for what an older one needs.
#include "cpu/inner_loop_kernels.h"

#define FASTKFO_INLINE inline __attribute__((always_inline))
#define FASTKFO_FN inline

#include "inner_loop/task.h"
//
#include "cpu/inner_loop_executor.h"

namespace fastkfo::inner_loop {
namespace FASTKFO_LEVEL {

template <class S>
void forward(const Plan& plan, const Blocks<S>& blocks, const Work<S>& scratch, S* tape,
             const Data<S>& data, const Results<S>& to) {
  Executor<S> executor;
  Task<Executor<S>>(executor, plan, blocks, scratch, tape).forward(data, to);
}

template <class S>
void backward(const Plan& plan, const Blocks<S>& blocks, const Work<S>& scratch, S* tape,
              S cotangent, S* x_s_grad, S* x_q_grad) {
  Executor<S> executor;
  Task<Executor<S>>(executor, plan, blocks, scratch, tape).backward(cotangent, x_s_grad, x_q_grad);
}

template <class S>
void late(const Plan& plan, const Blocks<S>& blocks, const Work<S>& scratch, S* tape,
          int64_t wanted, S* to) {
  Executor<S> executor;
  Task<Executor<S>>(executor, plan, blocks, scratch, tape).late(wanted, to);
}

Kernels<float> of_float() { return {forward<float>, backward<float>, late<float>}; }
Kernels<double> of_double() { return {forward<double>, backward<double>, late<double>}; }

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::inner_loop
