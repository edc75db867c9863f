// Rows of lists as codes of seven bits, for searches.
#include "coded_lists.h"

namespace slide_torch {

// Rows of lists as codes: into codes (blocks or more, quads, 16, 4), of 16 rows of one list and all quads of features,
// into terms (the same, 2, 16), what a row's codes are to be multiplied by, and its bias, and into places
// (N), where each row stands among the rows of all blocks, or -1.
void code_lists_(Tensor codes, Tensor terms, Tensor places, Tensor weight, std::optional<Tensor> bias,
                 Tensor list_offsets, Tensor list_rows) {
  constexpr const char* op = "code_lists_";
  dispatch_real(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RealRows<T> rows(op, weight, bias);
    const Lists lists(op, list_offsets, list_rows);
    check_range(op, "list_rows", lists.rows, list_rows.numel(), rows.count);
    check_places_fit(op, lists);
    const CodedLists coded(op, codes, terms, rows.features, lists.blocks[lists.count]);
    check_tensor(op, "places", places, ScalarType::Int, {rows.count});
    write_places(lists, rows.count, mutable_data<int32_t>(places));
    uint8_t* code = mutable_data<uint8_t>(codes);
    float* term = mutable_data<float>(terms);
    const int64_t workers = workers_for(lists.count);
    std::vector<uint8_t> scratch(workers * coded.code_at(1));
    share_out(lists.count, workers, [&](int64_t worker, int64_t l) {
      const int64_t block = lists.blocks[l];
      real_kernels<T>().code_rows(rows.weight, rows.bias, rows.features, lists.rows_of(l), lists.size(l),
                                  code + coded.code_at(block), term + coded.term_at(block),
                                  scratch.data() + coded.code_at(worker));
    });
  });
}

// Codes and terms anew of `rows`, distinct, which have changed since code_lists_.
void recode_rows_(Tensor codes, Tensor terms, Tensor places, Tensor weight, std::optional<Tensor> bias, Tensor rows) {
  constexpr const char* op = "recode_rows_";
  dispatch_real(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RealRows<T> all(op, weight, bias);
    const CodedLists coded(op, codes, terms, all.features, 0);
    check_tensor(op, "places", places, ScalarType::Int, {all.count});
    check_tensor(op, "rows", rows, ScalarType::Long, {-1});
    const int64_t* id = data<int64_t>(rows);
    const int32_t* place = data<int32_t>(places);
    check_rows(op, id, rows.numel(), all.count);
    for (int64_t i = 0; i < rows.numel(); ++i)
      check(0 <= place[id[i]] && place[id[i]] < coded.blocks * kBlockRows, op, "places: expected values in [0, ",
            coded.blocks * kBlockRows, "), got ", place[id[i]]);
    uint8_t* code = mutable_data<uint8_t>(codes);
    float* term = mutable_data<float>(terms);
    parallel_for(0, rows.numel(), grain(8 * all.features), [&](int64_t first, int64_t last) {
      std::vector<uint8_t> scratch(4 * coded.quads);
      real_kernels<T>().recode_rows(all.weight, all.bias, all.features, id + first, last - first, place, code, term,
                                    scratch.data());
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("code_lists_", TORCH_BOX(&code_lists_));
  m.impl("recode_rows_", TORCH_BOX(&recode_rows_));
}

}  // namespace slide_torch
