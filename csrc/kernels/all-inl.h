// Every kernel body, and the table of them: included once per instruction set.

#include "simd-inl.h"
// what several kernels use
#include "dot-inl.h"
#include "matmul-inl.h"
#include "offer-inl.h"
#include "prefetch-inl.h"
#include "quads-inl.h"
//
#include "binary-inl.h"
#include "coded-inl.h"
#include "coding-inl.h"
#include "hashing-inl.h"
#include "memory-inl.h"
#include "optim-inl.h"
#include "reaching-inl.h"
#include "rerank-inl.h"
#include "sample_pattern-inl.h"
#include "shared_pattern-inl.h"
#include "topk-inl.h"
// after those that they use
#include "centroids-inl.h"     // loads rows as hashing-inl.h
#include "group_coding-inl.h"  // rounds as coding-inl.h
#include "groups-inl.h"        // as coded-inl.h
#include "sample_adam-inl.h"   // meets samples as sample_pattern-inl.h, steps as optim-inl.h

template <class T, class Code>
constexpr HashKernels<T, Code> hash_kernels() {
  return {
      .simhash_hadamard = simhash_hadamard<T, Code>,
      .simhash_dense = simhash_dense<T, Code>,
      .dwta = dwta<T, Code>,
      .nearest_centroids = nearest_centroids<T, Code>,
  };
}

template <class T>
constexpr RealKernels<T> kernels_of() {
  return {
      .lanes = Simd<T>::lanes,
      .tile_columns = tile_columns<T>(),
      .tile_rows = kTileRows,
      .depth = kDepth,
      .hash16 = hash_kernels<T, int16_t>(),
      .hash32 = hash_kernels<T, int32_t>(),
      .code_hashed_rows = code_hashed_rows<T>,
      .pack_transposed = pack_transposed<T>,
      .pack_columns = pack_columns<T>,
      .shared_logits = shared_logits<T>,
      .shared_log_normalizer = shared_log_normalizer<T>,
      .shared_softmax_gradient = shared_softmax_gradient<T>,
      .shared_grad_rows = shared_grad_rows<T>,
      .shared_grad_input = shared_grad_input<T>,
      .sample_logits = sample_logits<T>,
      .sample_log_normalizer = sample_log_normalizer<T>,
      .sample_softmax_gradient = sample_softmax_gradient<T>,
      .sample_gradients = sample_gradients<T>,
      .sample_gradients_adam = sample_gradients_adam<T>,
      .sample_weighted_rows = sample_weighted_rows<T>,
      .sample_grad_rows = sample_grad_rows<T>,
      .shared_softplus = shared_softplus<T>,
      .shared_sigmoid = shared_sigmoid<T>,
      .sample_softplus = sample_softplus<T>,
      .sample_sigmoid = sample_sigmoid<T>,
      .score_rows = score_rows<T>,
      .topk_rows = topk_rows<T>,
      .code_rows = code_rows<T>,
      .recode_rows = recode_rows<T>,
      .rows_center = rows_center<T>,
      .adam_rows = adam_rows<T>,
      .sgd_rows = sgd_rows<T>,
      .adagrad_rows = adagrad_rows<T>,
      .sum_rows = sum_rows<T>,
      .touch_rows = touch_rows<T>,
  };
}

constexpr KernelTable table_named(const char* name) {
  return {.name = name,
          .f32 = kernels_of<float>(),
          .f64 = kernels_of<double>(),
          .quads = {.offer_coded = offer_coded, .score_coded = score_coded, .nearest_in_groups = nearest_in_groups},
          .coded_center = coded_center,
          .code_centroids = code_centroids,
          .reaching_best = reaching_best};
}
