// What a fused inner loop does, worked out before it runs: the layers of the model, in which form
// each is computed, and where every number of a task lies. Plain numbers only, so that the same
// plan serves a CPU thread and a CUDA block.
//
// Matrices of activations lie feature by feature, [features, samples], and rows are padded: a
// product reads and writes whole vectors and needs no tail. Parameters lie row by row.
#pragma once

#include <cstdint>

namespace fastkfo::inner_loop {

enum Kind : int32_t {
  kLinear,
  kRelu,
  kLeakyRelu,
  kTanh,
  kSigmoid,
  kSilu,
  kGelu,
  kGeluTanh,
  kBatchNorm,
  kLayerNorm,
  kKinds,
};

enum Loss : int32_t { kCrossEntropyMean, kCrossEntropySum, kSquaresMean, kSquaresSum, kLosses };

// What a gradient is wanted of, as bits.
enum Wanted : int64_t { kTheta = 1, kLeft = 2, kRight = 4, kBias = 8, kScale = 16 };

// How the step of a linear layer's weight, U = A (D X') C, is computed.
//   dense     as it stands, with G = D X'
//   factored  (A D)(X' C) = P Q: no more rows than there are samples
//   gram      a first layer's inputs are the same in every step, and so is M = X' C X. The outputs
//             move by -alpha P M, and no later weight is ever formed
enum Form : int32_t { kDense, kFactored, kGram };

struct Layer {
  int32_t kind, in, out;
  int32_t weight, bias;  // parameters, -1 where there is none
  double constant;       // a norm's eps, the slope of a leaky ReLU
  int32_t form;          // of a linear layer
};

// One parameter, rows x cols, its rows ld apart; a vector is one row.
struct Param {
  int32_t rows, cols, ld;
  int32_t n, m;                   // sizes of its factors: of a vector, its length and 1
  bool left, right, bias, scale;  // which operands there are
  bool own[5];                    // whether every task has its own: theta, left, ..., scale
  int32_t wanted;                 // of the gradient, as bits
  double alpha;
  int64_t at;                        // theta_0, in a block of operands
  int64_t a, a_t, c, c_t, beta, s;   // likewise; a_t is the transpose, a itself if A is symmetric
  int64_t l, r;                      // the factors themselves, where they are adapted
  int64_t next;                      // in a block of theta_1, theta_2, ..., and of V
  int64_t g, g_a, g_c, g_beta, g_s;  // in a block of gradients; theta's is also lambda
  bool late;                         // theta's, C's and beta's are not in it: gram.h forms them
};

// Where the numbers of one layer lie in the record of one pass.
struct Slots {
  int64_t a;         // its input [in, ld]; of layer 0, not in the record
  int64_t d;         // the cotangent of its output [out, ld]
  int64_t hat, inv;  // a norm: (x - mean) / std, 1 / std
  int64_t p, q;      // a linear layer's step: A D [out, ld], X C [samples, pad(in)]
  int64_t g, g_c;    // in the dense form: G, G C [n, pad(m)]
  int64_t g_w, g_b;  // the gradients in vectors: of a norm's weight; of a bias
  int64_t rows;      // X' [samples, pad(in)] of a linear layer, only in scratch
};

struct Pass {
  int32_t samples, ld;
  int64_t size;  // of the record
  int64_t work;  // of one in scratch
  int64_t out;   // the predictions [classes, ld]
  int64_t p;     // softmax of them
  const Slots* slots;
};

// Where a first layer in the gram form has what it needs besides.
struct Gram {
  bool used;
  int64_t m, m_t;         // M = X' C X [samples, ld], its transpose
  int64_t n, n_t;         // N = X' C X_q [samples, query ld], its transpose [queries, ld]
  int64_t y, y_beta;      // theta_0 X, beta X [out, ld]
  int64_t p;              // the sum of all P [out, ld]
  int64_t x_q_rows;       // X_q' [queries, pad(in)]
  int64_t work;           // of the pieces below, in scratch
  int64_t base;           // lambda_K Q' [out, ld]
  int64_t e, sum, cross;  // E, the sums of E [out, ld] and of E' P [samples, ld]
  int64_t cross_t;        // the transpose of the last
  int64_t back, forth;    // D_q' P [queries, ld], P' D_q [samples, query ld]
};

// Where the steps of an adapted transform have their pieces in scratch: see Adapting.
struct AdaptPlaces {
  int64_t work;  // of all of them
  int64_t t, turned, s_a, s_c, cross_a, cross_c, d_a, d_c, copy;
  int64_t carried;  // a block of later parameters
};

// Where the pieces of working memory begin: see Work.
struct WorkPlaces {
  int64_t rows_in, rows_out, cols_out, cols_in, square, dense, lanes;
  int64_t record, query, v, fixed, gram, adapt, x_s_grad, gradients;
  int64_t forward, all;  // numbers that a forward pass needs, and with the backward pass
};

struct Plan {
  int32_t layers, params, steps, classes, in, ld_in;
  int32_t loss, query_loss;
  bool first_order, has_query, has_query_targets, keep;
  bool adapt, psd;  // whether the transform takes steps too; whether factors are squared
  bool want_x_s, want_x_q;
  const Layer* layer;
  const Param* param;
  Pass support, query;
  Gram gram;
  AdaptPlaces adapting;
  WorkPlaces work;
  int64_t later, operands, gradients;  // sizes of blocks: theta_1 and its like, ...
  // A task's tape: what does not change from step to step, the records, theta_1 ... theta_K,
  // and the blocks of operands phi_1 ... phi_{K-1} of an adapted transform.
  int64_t x_rows, q0, q0_t;  // support inputs [samples, in], X C, its transpose
  int64_t x, records, query_record, thetas, phis, tape;
  // Statistics of batch norms: mean and biased variance of every layer, pass by pass.
  int64_t statistics;
  int64_t lanes;  // the longest row of means
};

}  // namespace fastkfo::inner_loop
