// Every kernel body, and the table of them: included once per instruction set.

#include "simd-inl.h"
//
#include "binary-inl.h"
#include "hashing-inl.h"
#include "matmul-inl.h"
#include "memory-inl.h"
#include "sample_pattern-inl.h"
#include "shared_pattern-inl.h"
//
#include "optim-inl.h"   // prefetches as sample_pattern-inl.h does
#include "outer-inl.h"   // multiplies as sample_pattern-inl.h
#include "rerank-inl.h"  // multiplies as sample_pattern-inl.h
#include "topk-inl.h"
//
#include "sample_adam-inl.h"  // steps as optim-inl.h
//
#include "centroids-inl.h"  // loads rows as hashing-inl.h, multiplies as matmul-inl.h and topk-inl.h
#include "coded-inl.h"      // keeps the best as topk-inl.h

template <class T, class Code>
constexpr HashKernels<T, Code> hash_kernels() {
  return {simhash_hadamard<T, Code>,         simhash_dense<T, Code>,
          bin_winners<T, Code, LargestWins>, bin_winners<T, Code, FirstPositiveWins>,
          cross_polytope<T, Code>,           nearest_centroids<T, Code>};
}

template <class T>
constexpr RealKernels<T> kernels_of() {
  return {Simd<T>::lanes,
          tile_columns<T>(),
          kTileRows,
          kDepth,
          hash_kernels<T, int16_t>(),
          hash_kernels<T, int32_t>(),
          nearest_in_groups<T>,
          pack_transposed<T>,
          pack_columns<T>,
          shared_logits<T>,
          shared_log_normalizer<T>,
          shared_softmax_gradient<T>,
          shared_grad_rows<T>,
          shared_grad_input<T>,
          sample_logits<T>,
          sample_log_normalizer<T>,
          sample_softmax_gradient<T>,
          sample_gradients<T>,
          sample_gradients_adam<T>,
          sample_weighted_rows<T>,
          sample_grad_rows<T>,
          shared_softplus<T>,
          shared_sigmoid<T>,
          sample_softplus<T>,
          sample_sigmoid<T>,
          score_rows<T>,
          outer_sum<T>,
          dot_product<T>,
          topk_rows<T>,
          code_rows<T>,
          recode_rows<T>,
          rows_center<T>,
          adam_rows<T>,
          sgd_rows<T>,
          adagrad_rows<T>,
          sum_rows<T>,
          touch_rows<T>};
}
