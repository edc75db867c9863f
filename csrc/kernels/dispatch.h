// What the kernels take (raw pointers and sizes, no torch) and the table of them for each instruction set.
#pragma once

#include <cstdint>

#include "probing.h"

namespace slide_torch {

// Rows to hash: data (n, features) row-major; `rows` picks and orders some of them, or is null; `bias`, or null,
// appends one more coordinate; `center` (features [+ 1]), or null, is subtracted from each row; `augmented` rows get a
// last coordinate that brings their norm up to `norm_bound` (0 where it is larger already).
template <class T>
struct HashInput {
  const T* data;
  const int64_t* rows;
  const T* bias;
  const T* center;
  int64_t features;
  bool augmented;
  T norm_bound;
  bool has_bias;  // that of no rows at all may be a null pointer

  int64_t extras() const { return (has_bias ? 1 : 0) + (augmented ? 1 : 0); }
  int64_t width() const { return features + extras(); }
};

// codes[(table * probes + p) * stride + i] receives row i's p-th best code in that table; -1 where there are fewer.
template <class Code>
struct HashOutput {
  Code* codes;
  int64_t stride;
  int64_t tables;
  int64_t hashes;
  int64_t probes;
};

// signs (rotations, 3, size) of +-1; extra_projection (2, rotations, size) standard normal, of the bias and of the
// augmented coordinate.
template <class T>
struct HadamardFunctions {
  const T* signs;
  const T* extra_projection;
  int64_t rotations;
  int64_t size;
};

// coordinates (tables * hashes, bin); `bits` = log2(bin).
struct WinnerFunctions {
  const int32_t* coordinates;
  int64_t bin;
  int64_t bits;
};

// centroids (tables, count, width).
template <class T>
struct Centroids {
  const T* data;
  int64_t count;
};

// weight (N, features), bias (N) or null; rows (active) of one active set shared by `batch` samples;
// logits are scale * (<weight, x> + bias) + log_weight (active, or null).
template <class T>
struct SharedProblem {
  const T* weight;
  const T* bias;
  const int64_t* rows;
  const T* log_weight;
  int64_t active;
  int64_t features;
  int64_t batch;
  T scale;
};

// One active set a sample, transposed: pairs [pair_offsets[u], pair_offsets[u + 1]) are the samples that
// activated neuron rows[u], each with its position in the sample-major list of logits.
template <class T>
struct SampleProblem {
  const T* weight;
  const T* bias;
  const T* input;
  const int64_t* rows;
  const int64_t* pair_offsets;
  const int32_t* pair_positions;
  const int32_t* pair_samples;
  int64_t active;
  int64_t features;
};

// Rows to choose the best from: weight (N, features), bias (N) or null; input (batch, features).
template <class T>
struct TopkProblem {
  const T* weight;
  const T* bias;
  const T* input;
  int64_t features;
  int64_t batch;
};

// A candidate of a search.
template <class T>
struct Entry {
  T value;
  int64_t id;
};

// The best k so far of each sample, and others that are not sorted out yet: held (B) of entries (B, room), room > k.
// What is below limits (B) is not among the best; keep_best sorts out the entries of one sample, and raises its limit.
template <class T>
struct Best {
  Entry<T>* entries;
  T* limits;
  int64_t* held;
  int64_t room;
  int64_t k;
  void (*keep_best)(const Best&, int64_t sample);
};

// Coded rows, or centers of lists, lie in blocks of so many, with so many terms.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kRowTerms = 2, kCenterTerms = 3;

// A feature is coded as an integer of at most kCenterLimit in magnitude, plus kCenterOffset: seven bits, and so
// products with inputs of seven bits two of which an int16 holds. Four features lie next to each other (a quad); an
// even number of quads.
constexpr int32_t kCenterLimit = 63, kCenterOffset = 64;

constexpr int64_t quads_of(int64_t features) {
  return (features + 7) / 8 * 2;
}

// Inputs for coded rows: input (B, quads) has four int8 of at most kCenterLimit in magnitude in each element, of which
// `sum` (B) is the sum; to be multiplied by input_scale (B). spread_weight (B), or null for rows without a spread.
struct CodedProblem {
  const int32_t* input;
  const int32_t* sum;
  const float* input_scale;
  const float* spread_weight;
  int64_t quads;

  int64_t terms() const { return spread_weight ? kCenterTerms : kRowTerms; }
};

// Coded rows, or centers of lists, from one that begins a block on: codes (blocks, quads, 16, 4); terms (blocks, 2 or
// 3, 16), what the codes are to be multiplied by, a bias, and a spread where there is a spread_weight. Their numbers
// are `ids`, which centers lack.
struct CodedRows {
  const uint8_t* codes;
  const float* terms;
  const int32_t* ids;
  int64_t count;
};

// How vectors become integers: `features` coordinates of at most `limit` in magnitude, in quads, of which there is an
// even number, and at most two `extras` that follow, in multiples of a finer unit.
struct CodedShape {
  int64_t features;
  int64_t extras;
  int64_t quads;
  int64_t limit;

  int64_t block_bytes() const { return quads * 4 * kBlockRows; }
};

// Extras may be kExtraLimit times a vector's unit; they are given in multiples of 2^-kExtraBits of it.
constexpr int32_t kExtraBits = 4, kExtraLimit = (1 << (14 - kExtraBits)) - 1;

// Centroids in blocks of kBlockRows: codes (blocks, quads, kBlockRows, 4) of their features, plus kCenterOffset; extras
// (blocks, kBlockRows), two int16 each; units (blocks, kBlockRows), what a centroid's integers are multiples of,
// NaN where there is none.
struct CodedCentroids {
  uint8_t* codes;
  int32_t* extras;
  float* units;
};

// The centroids of one table in groups: `coarse` the groups' own centroids, `members` all centroids, those of group g
// in blocks [blocks[g], blocks[g + 1]), and their numbers in `ids` (-1 where a block is not full). A row looks into its
// best `looked` groups.
struct CentroidGroups {
  CodedShape shape;
  CodedCentroids coarse;
  CodedCentroids members;
  const int64_t* blocks;
  const int32_t* ids;
  int64_t count;
  int64_t looked;
};

constexpr int64_t kGroupedRows = 2048, kRowsTogether = 4;  // at most

// Room for kGroupedRows rows: codes (., quads) of four int8, their sums, extras of two int16, best, chosen and members
// (., looked); starts (groups + 1); scores (kRowsTogether, blocks of groups).
struct GroupScratch {
  int32_t* codes;
  int32_t* sums;
  int32_t* extras;
  float* best;
  int32_t* chosen;
  int32_t* members;
  int64_t* starts;
  float* scores;
};

// Touched rows of an optimizer: rows (count) of param (N, width) and of the states shaped like it; gradient
// (count, width). All are of type T; or the states bits of bfloat16; or all three are. What is bfloat16 is rounded by
// random bits that `step` seeds.
template <class T>
struct RowUpdate {
  T* param;
  T* state[2];
  uint16_t* bfloat16_param;
  uint16_t* bfloat16_state[2];
  const int64_t* rows;
  const T* gradient;
  const uint16_t* bfloat16_gradient;
  int64_t count;
  int64_t width;
  uint32_t step;
};

// sign is -1 to maximize; keep = 1 - lr * weight_decay; rate = 1 - beta.
template <class T>
struct AdamScalars {
  T sign;
  T keep;
  T rate1;
  T rate2;
  T step_size;
  T eps;
};

// The step is lr * (from_buffer * buffer + from_gradient * gradient): (1, 0), or (momentum, 1) for Nesterov's.
template <class T>
struct SgdScalars {
  T sign;
  T lr;
  T weight_decay;
  T momentum;
  T from_buffer;
  T from_gradient;
};

// One entry of an uncoalesced row-sparse gradient: its row, and its place among the values.
struct RowEntry {
  uint32_t row;
  uint32_t position;
};

// values (any, width); the entries of the u-th distinct row are [starts[u], starts[u + 1]).
template <class T>
struct RowSum {
  const T* values;
  const RowEntry* entries;
  const int64_t* starts;
  int64_t width;
};

template <class T, class Code>
struct HashKernels {
  void (*simhash_hadamard)(const HashInput<T>&, const HadamardFunctions<T>&, const HashOutput<Code>&, int64_t begin,
                           int64_t end, T* scratch);
  void (*simhash_dense)(const HashInput<T>&, const T* projection, const HashOutput<Code>&, int64_t begin, int64_t end,
                        T* scratch);
  void (*dwta)(const HashInput<T>&, const WinnerFunctions&, const HashOutput<Code>&, int64_t begin, int64_t end,
               T* scratch, int32_t* winners);
  void (*nearest_centroids)(const HashInput<T>&, const Centroids<T>&, const HashOutput<Code>&, int64_t begin,
                            int64_t end, T* scratch);
};

template <class T>
struct RealKernels {
  int64_t lanes;         // elements of a vector
  int64_t tile_columns;  // columns of a packed panel
  int64_t tile_rows;     // a good multiple for ranges of rows
  int64_t depth;         // rows of a panel in shared_grad_input
  HashKernels<T, int16_t> hash16;
  HashKernels<T, int32_t> hash32;
  int64_t (*code_hashed_rows)(const HashInput<T>&, const CodedShape&, int64_t begin, int64_t end, const GroupScratch&,
                              T* row);
  void (*pack_transposed)(const T* x, int64_t count, int64_t width, int64_t first, int64_t last, T* packed);
  void (*pack_columns)(const T* x, int64_t count, int64_t width, int64_t first, int64_t last, T* packed);
  void (*shared_logits)(const SharedProblem<T>&, const T* packed_input, T* logits, int64_t begin, int64_t end);
  void (*shared_log_normalizer)(const T* logits, int64_t active, int64_t batch, T* log_normalizer, int64_t begin,
                                int64_t end);
  void (*shared_softmax_gradient)(const T* logits, const T* log_normalizer, const T* scale, int64_t batch, T* gradient,
                                  int64_t begin, int64_t end);
  void (*shared_grad_rows)(const SharedProblem<T>&, const T* gradient, const T* packed_columns, T* grad_rows,
                           T* grad_bias, int64_t begin, int64_t end);
  void (*shared_grad_input)(const SharedProblem<T>&, const T* gradient, T* grad_input, int64_t begin, int64_t end,
                            T* panel);
  void (*sample_logits)(const SampleProblem<T>&, T* logits, int64_t begin, int64_t end);
  T (*sample_log_normalizer)(const T* logits, int64_t count);
  void (*sample_softmax_gradient)(const T* logits, int64_t count, T log_normalizer, T scale, T* gradient);
  void (*sample_gradients)(const SampleProblem<T>&, const T* gradient, T* grad_input, T* grad_rows, T* grad_bias,
                           int64_t begin, int64_t end);
  void (*sample_gradients_adam)(const SampleProblem<T>&, const T* gradient, T* grad_input, T* grad_bias,
                                const RowUpdate<T>&, const AdamScalars<T>&, int64_t begin, int64_t end);
  void (*sample_weighted_rows)(const SampleProblem<T>&, const T* values, T* y, int64_t begin, int64_t end);
  void (*sample_grad_rows)(const SampleProblem<T>&, const T* values, T* grad_rows, int64_t begin, int64_t end);
  void (*shared_softplus)(const T* logits, const T* weight, int64_t active, int64_t batch, T* losses, int64_t begin,
                          int64_t end);
  void (*shared_sigmoid)(const T* logits, const T* weight, const T* scale, int64_t batch, T* gradient, int64_t begin,
                         int64_t end);
  T (*sample_softplus)(const T* logits, const T* weight, int64_t count);
  void (*sample_sigmoid)(const T* logits, const T* weight, int64_t count, T scale, T* gradient);
  void (*score_rows)(const T* weight, const T* bias, const T* x, int64_t features, const int32_t* ids, int64_t count,
                     T* scores);
  void (*topk_rows)(const TopkProblem<T>&, const T* packed, const Best<T>&, int64_t begin, int64_t end);
  void (*code_rows)(const T* weight, const T* bias, int64_t features, const int32_t* ids, int64_t count, uint8_t* codes,
                    float* terms, uint8_t* scratch);
  void (*recode_rows)(const T* weight, const T* bias, int64_t features, const int64_t* ids, int64_t count,
                      const int32_t* places, uint8_t* codes, float* terms, uint8_t* scratch);
  void (*rows_center)(const T* weight, const T* bias, int64_t features, const int32_t* ids, int64_t count, T* center,
                      T* bias_center, T* radius);
  void (*adam_rows)(const RowUpdate<T>&, const AdamScalars<T>&, int64_t begin, int64_t end);
  void (*sgd_rows)(const RowUpdate<T>&, const SgdScalars<T>&, int64_t begin, int64_t end);
  void (*adagrad_rows)(const RowUpdate<T>&, T lr, T eps, T sign, int64_t begin, int64_t end);
  void (*sum_rows)(const RowSum<T>&, T* out, int64_t begin, int64_t end);
  int64_t (*touch_rows)(T* table, const int64_t* rows, int64_t width, bool write, int64_t begin, int64_t end);
};

// The kernels that multiply bytes: some processors of a level have an instruction for it that others have not.
struct QuadKernels {
  void (*offer_coded)(const CodedProblem&, const CodedRows&, const CodedRows& following, const int64_t* samples,
                      int64_t sample_count, const Best<float>&);
  void (*score_coded)(const CodedProblem&, const CodedRows&, const int64_t* samples, int64_t sample_count,
                      float* scores);
  void (*nearest_in_groups)(const CentroidGroups&, int64_t count, int64_t finite, const GroupScratch&, int32_t* codes);
};

struct KernelTable {
  const char* name;
  RealKernels<float> f32;
  RealKernels<double> f64;
  QuadKernels quads;
  void (*coded_center)(const uint8_t* codes, const float* terms, int64_t count, int64_t features, float* center,
                       float* bias_center, float* radius);
  void (*code_centroids)(const float* centroids, const int32_t* ids, const CodedShape&, int64_t begin, int64_t end,
                         const CodedCentroids&, int8_t* scratch);
  int64_t (*reaching_best)(const float* scores, int64_t count, int64_t wanted, int32_t* found);
};

// The table for this machine, chosen at the first call: the best supported level, or the one named by the environment
// variable SLIDE_TORCH_ISA (baseline, avx2, avx2_vnni, avx512, avx512_vnni); throws if that one is unknown or
// unsupported.
const KernelTable& kernels();

template <class T>
const RealKernels<T>& real_kernels();
template <>
inline const RealKernels<float>& real_kernels<float>() {
  return kernels().f32;
}
template <>
inline const RealKernels<double>& real_kernels<double>() {
  return kernels().f64;
}

extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const QuadKernels avx2_vnni_quads;
extern const QuadKernels avx512_vnni_quads;
#endif

}  // namespace slide_torch
