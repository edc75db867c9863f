// An inverted file: lists of rows, each beginning a block of int8 codes of its own.
#pragma once

#include "../common/tensors.h"
#include "../kernels/dispatch.h"

namespace slide_torch {

// The first block of each list, and the end.
inline std::vector<int64_t> first_blocks(const int64_t* offsets, int64_t count) {
  std::vector<int64_t> blocks(count + 1, 0);
  for (int64_t l = 0; l < count; ++l)
    blocks[l + 1] = blocks[l] + (offsets[l + 1] - offsets[l] + kBlockRows - 1) / kBlockRows;
  return blocks;
}

// list_offsets (lists + 1) into list_rows.
struct Lists {
  const int64_t* offsets;
  const int32_t* rows;
  int64_t count;
  std::vector<int64_t> blocks;  // (lists + 1), see first_blocks

  Lists(const char* op, const Tensor& list_offsets, const Tensor& list_rows) {
    check(list_offsets.dim() == 1 && list_offsets.size(0) >= 1, op, "list_offsets: expected shape (lists + 1), got ",
          shape_of(list_offsets));
    check_tensor(op, "list_offsets", list_offsets, ScalarType::Long, {-1});
    check_tensor(op, "list_rows", list_rows, ScalarType::Int, {-1});
    offsets = data<int64_t>(list_offsets);
    rows = data<int32_t>(list_rows);
    count = list_offsets.numel() - 1;
    check_offsets(op, "list_offsets", offsets, count, list_rows.numel());
    blocks = first_blocks(offsets, count);
  }

  int64_t size(int64_t l) const { return offsets[l + 1] - offsets[l]; }
  const int32_t* rows_of(int64_t l) const { return rows + offsets[l]; }
};

// codes (any, quads of features, 16, 4) and terms (any, 2, 16): rows of lists, see code_lists_.
struct CodedLists {
  int64_t quads;
  int64_t blocks;

  CodedLists(const char* op, const Tensor& codes, const Tensor& terms, int64_t features, int64_t least)
      : quads(quads_of(features)) {
    check_tensor(op, "codes", codes, ScalarType::Byte, {-1, quads, kBlockRows, 4});
    blocks = codes.size(0);
    check(blocks >= least, op, "codes: expected at least ", least, " blocks, got ", blocks);
    check_tensor(op, "terms", terms, ScalarType::Float, {blocks, kRowTerms, kBlockRows});
  }

  // Where a block begins.
  int64_t code_at(int64_t block) const { return block * quads * 4 * kBlockRows; }
  int64_t term_at(int64_t block) const { return block * kRowTerms * kBlockRows; }
};

// weight (N, d) and bias (N) or none, all of type T.
template <class T>
struct RealRows {
  const T* weight;
  const T* bias;
  int64_t count;
  int64_t features;

  RealRows(const char* op, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
    check_tensor(op, "weight", weight_in, scalar_type_of<T>(), {-1, -1});
    count = weight_in.size(0), features = weight_in.size(1);
    if (bias_in) check_tensor(op, "bias", *bias_in, scalar_type_of<T>(), {count});
    weight = data<T>(weight_in), bias = data_or_null<T>(bias_in);
  }
};

}  // namespace slide_torch
