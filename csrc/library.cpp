// Every op's schema. The public, differentiable functions are in fastkfo/functional;
// these raw ops know nothing of autograd. An item is one parameter of a learner:
//   dims    four numbers per item, T B n m
//   alpha   one factor per item
//   wanted  one bit mask per item: 1 grad, 2 left, 4 right, 8 bias, 16 scale, 32 cotangent
// A list of optional operands may be empty, which means "absent for every item".
//   tf32    whether float32 may be multiplied as TF32; on CUDA alone
#include "common.h"

STABLE_TORCH_LIBRARY(fastkfo, m) {
  // out = param + alpha * scale o (left @ grad @ right + bias)
  m.def(
      "kron_forward(Tensor[] grads, Tensor?[] left, Tensor?[] right, Tensor?[] bias, "
      "Tensor?[] scale, Tensor?[] params, int[] dims, float[] alpha, bool tf32=False) -> Tensor[]");
  // the vector-Jacobian product of kron_forward, item by item, in the order of the bits
  m.def(
      "kron_backward(Tensor[] cotangents, Tensor[] grads, Tensor?[] left, Tensor?[] right, "
      "Tensor?[] bias, Tensor?[] scale, int[] dims, float[] alpha, int[] wanted, bool tf32=False) "
      "-> Tensor[]");
  // the vector-Jacobian product of kron_backward; d_x is the cotangent of what it returned for x
  m.def(
      "kron_double_backward(Tensor[] cotangents, Tensor[] grads, Tensor?[] left, "
      "Tensor?[] right, Tensor?[] bias, Tensor?[] scale, Tensor?[] d_grads, Tensor?[] d_left, "
      "Tensor?[] d_right, Tensor?[] d_bias, Tensor?[] d_scale, int[] dims, float[] alpha, "
      "int[] wanted, bool tf32=False) -> Tensor[]");

  // L^T L;  L (V + V^T), its vector-Jacobian product;  L^T M + M^T L, its derivative along M
  m.def("gram(Tensor[] factors, bool tf32=False) -> Tensor[]");
  m.def("gram_vjp(Tensor[] factors, Tensor[] cotangents, bool tf32=False) -> Tensor[]");
  m.def("gram_jvp(Tensor[] factors, Tensor[] tangents, bool tf32=False) -> Tensor[]");

  // the mean loss of every task, softmax, and (softmax - unit vectors)/S; the derivative of
  // cotangent * residual along v
  m.def("cross_entropy(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_entropy_double_backward(Tensor v, Tensor cotangent, Tensor p, Tensor residual) -> "
      "(Tensor, Tensor)");

  // Layers of T tasks. Images are [T, N, H, W, C], channels last and without gaps; weights
  // [T, O, C / groups, kh, kw]. conv(x, weight) + conv(x2, weight2) + bias; its adjoint in x, for
  // images of `size`; its derivative in weight, and the sum of dy over samples and pixels (empty
  // unless bias).
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? x2, Tensor? weight2, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_input(Tensor dy, Tensor weight, int[] size, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_weight(Tensor x, Tensor dy, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, int groups, bool bias) -> (Tensor, Tensor)");

  // Batch norm of x [T, P, C] on the statistics of every task and channel, then ReLU if `relu`:
  // y, mean and the biased variance [T, C]. With rstd = 1/sqrt(var + eps), its vector-Jacobian
  // product: dx, d_weight, d_bias. And that of the latter, for cotangents a, b, c: of dy, x and
  // weight.
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool relu) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? bias, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_double_backward(Tensor a, Tensor? b, Tensor? c, Tensor dy, Tensor x, "
      "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool relu) -> "
      "(Tensor, Tensor, Tensor)");

  // The same three of layer norm: x [T, R, D] over D, weight and bias [T, D], mean and rstd [T, R].
  m.def(
      "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_double_backward(Tensor a, Tensor? b, Tensor? c, Tensor dy, Tensor x, "
      "Tensor mean, Tensor rstd, Tensor? weight) -> (Tensor, Tensor, Tensor)");

  // Pooling of images [T, N, H, W, C] to `size`. `where` (int32) is the pixel of each maximum,
  // h * W + w; scatter sends cotangents there, gather reads there. divisor 0: none is given.
  m.def(
      "max_pool2d(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int[] size) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_scatter(Tensor dy, Tensor where, int[] size, int[] kernel, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  m.def("max_pool2d_gather(Tensor v, Tensor where) -> Tensor");
  m.def(
      "avg_pool2d(Tensor x, int[] kernel, int[] stride, int[] padding, int[] size, "
      "bool include_pad, int divisor) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor dy, int[] size, int[] kernel, int[] stride, int[] padding, "
      "bool include_pad, int divisor) -> Tensor");

  // K steps of a whole model for all tasks, csrc/inner_loop. layers: five numbers each, kind, in,
  // out, parameter of the weight and of the bias (-1: none). With psd, A is left' left; with
  // adapt, the transform takes steps of its own. Returns the
  // query losses, support losses, predictions, statistics of batch norms, whether a task's losses
  // are finite, then theta_K (with adapted), one per parameter. forms: which may be chosen, as bits
  // (1 dense, 2 factored, 4 gram; without the last where theta_K is returned). What the derivative
  // needs goes to the tape, whose rows are as long as inner_loop_tape says.
  m.def(
      "inner_loop_forward(Tensor[] theta, Tensor?[] left, Tensor?[] right, Tensor?[] bias, "
      "Tensor?[] scale, Tensor x_s, Tensor y_s, Tensor? x_q, Tensor? y_q, Tensor(a!)? tape, "
      "int[] layers, float[] constants, float[] alpha, int steps, int loss, int query_loss, "
      "int forms, bool psd, bool adapt, bool adapted) -> Tensor[]");
  m.def(
      "inner_loop_tape(Tensor[] theta, Tensor?[] left, Tensor?[] right, Tensor?[] bias, "
      "Tensor?[] scale, Tensor x_s, Tensor y_s, Tensor? x_q, Tensor? y_q, int[] layers, "
      "float[] constants, float[] alpha, int steps, int loss, int query_loss, int forms, bool psd, "
      "bool adapt) "
      "-> int");
  // forward and backward at once for a cotangent of 1 of every task's query loss: the outputs of
  // inner_loop_forward, then those of inner_loop_backward
  m.def(
      "inner_loop_gradient(Tensor[] theta, Tensor?[] left, Tensor?[] right, Tensor?[] bias, "
      "Tensor?[] scale, Tensor x_s, Tensor y_s, Tensor x_q, Tensor y_q, int[] layers, "
      "float[] constants, float[] alpha, int steps, int loss, int query_loss, int forms, bool psd, "
      "bool adapt, bool first_order, int[] wanted, bool want_x_s, bool want_x_q) -> Tensor[]");
  // the vector-Jacobian product: what is wanted of every parameter, in the order of the bits
  // (1 theta, 2 left, 4 right, 8 bias, 16 scale), then of the inputs
  m.def(
      "inner_loop_backward(Tensor? d_loss, Tensor?[] d_adapted, Tensor[] theta, Tensor?[] left, "
      "Tensor?[] right, Tensor?[] bias, Tensor?[] scale, Tensor x_s, Tensor y_s, Tensor? x_q, "
      "Tensor? y_q, Tensor tape, int[] layers, float[] constants, float[] alpha, int steps, "
      "int loss, int query_loss, int forms, bool psd, bool adapt, bool first_order, int[] wanted, "
      "bool "
      "want_x_s, "
      "bool want_x_q) -> Tensor[]");
}
