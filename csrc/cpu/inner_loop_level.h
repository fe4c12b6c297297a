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
int late(const Plan& plan, const Blocks<S>& blocks, const Work<S>& scratch, S* tape, int64_t wanted,
         Outer<S>* to) {
  Executor<S> executor;
  return Task<Executor<S>>(executor, plan, blocks, scratch, tape).late(wanted, to);
}

template <class S>
void add_product(int64_t rows, int64_t columns, int64_t inner, const S* left, int64_t ld_left,
                 const S* right, S* to, int64_t ld) {
  Executor<S>().product(rows, columns, inner, {left, ld_left, 1}, right, ld, to, ld, S(1), to);
}

template <class S>
Kernels<S> all() {
  return {forward<S>, backward<S>, late<S>, add_product<S>};
}
Kernels<float> of_float() { return all<float>(); }
Kernels<double> of_double() { return all<double>(); }

}  // namespace FASTKFO_LEVEL
}  // namespace fastkfo::inner_loop
