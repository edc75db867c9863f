// Every operator's schema, by the file that has it, and the Python module whose import loads them.
#include <Python.h>

#include "common/tensors.h"
#include "kernels/dispatch.h"

STABLE_TORCH_LIBRARY(slide_torch, m) {
  // hashing/families.cpp
  m.def(
      "simhash_hadamard(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, Tensor signs, "
      "Tensor extra_projection, int K, int L, float? norm_bound=None, int probes=1) -> Tensor");
  m.def(
      "simhash_dense(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, Tensor projection, int K, int L, "
      "float? norm_bound=None, int probes=1) -> Tensor");
  m.def(
      "dwta(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, Tensor coordinates, int K, int L, "
      "float? norm_bound=None, int probes=1) -> Tensor");
  m.def(
      "nearest_centroids(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, Tensor centroids, "
      "float? norm_bound=None, int probes=1) -> Tensor");

  // hashing/nearest_in_groups.cpp
  m.def(
      "nearest_in_groups(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, Tensor centroids, "
      "Tensor group_centroids, Tensor offsets, Tensor members, int looked, float? norm_bound=None) -> Tensor");

  // hashing/means.cpp
  m.def("hashed_rows(Tensor input, Tensor? bias, Tensor? rows, Tensor? center, float? norm_bound) -> Tensor");
  m.def("group_means(Tensor values, Tensor groups, int count) -> (Tensor means, Tensor counts)");
  m.def("mean_row(Tensor weight, Tensor? bias, int most) -> Tensor");

  // sampling/tables.cpp
  m.def("build_tables(Tensor codes, int bits) -> (Tensor offsets, Tensor ids)");
  m.def("update_codes_(Tensor(a!) codes, Tensor rows, Tensor fresh) -> Tensor moved");

  // sampling/retrieve.cpp
  m.def(
      "retrieve(Tensor codes, Tensor table_offsets, Tensor table_ids, Tensor label_offsets, Tensor label_ids, "
      "Tensor tail, int budget, int bucket_cap, int seed) "
      "-> (Tensor offsets, Tensor active, Tensor tail_starts, Tensor label_positions, Tensor ids_read)");

  // sampling/active_set.cpp
  m.def(
      "transpose_active(Tensor offsets, Tensor active, int neurons) "
      "-> (Tensor rows, Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples)");
  m.def("union_active(Tensor certain, Tensor tail, int neurons) -> (Tensor rows, Tensor from_tail)");
  m.def("sample_tail(int count, int neurons, int seed) -> Tensor");

  // sampling/rerank.cpp
  m.def(
      "rerank(Tensor offsets, Tensor active, Tensor label_offsets, Tensor label_positions, Tensor tail, Tensor input, "
      "Tensor weight, Tensor? bias, int budget) -> (Tensor offsets, Tensor active, Tensor tail_starts)");

  // losses/cross_entropy.cpp
  m.def(
      "shared_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor rows, Tensor? log_weight, "
      "Tensor label_offsets, Tensor label_places, Tensor label_probabilities, float scale, "
      "bool decoupled, bool sparse) "
      "-> (Tensor losses, Tensor logits, Tensor log_normalizer)");
  m.def(
      "shared_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, "
      "Tensor label_offsets, Tensor label_places, Tensor label_probabilities, Tensor logits, Tensor log_normalizer, "
      "bool decoupled, bool has_rows, bool has_bias, Tensor? grad_log_normalizer=None) "
      "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");
  m.def(
      "shared_cross_entropy_backward_adam_(Tensor grad_loss, Tensor input, Tensor(a!) weight, Tensor rows, "
      "Tensor label_offsets, Tensor label_places, Tensor label_probabilities, Tensor logits, Tensor log_normalizer, "
      "bool decoupled, bool has_bias, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool maximize, "
      "Tensor? grad_log_normalizer=None) "
      "-> (Tensor grad_input, Tensor grad_bias)");
  m.def(
      "sample_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor rows, Tensor offsets, "
      "Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, Tensor? log_weight, Tensor label_offsets, "
      "Tensor label_places, Tensor label_probabilities, float scale, bool decoupled, bool sparse) "
      "-> (Tensor losses, Tensor logits, Tensor log_normalizer)");
  m.def(
      "sample_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, Tensor offsets, "
      "Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, Tensor label_offsets, Tensor label_places, "
      "Tensor label_probabilities, Tensor logits, Tensor log_normalizer, bool decoupled, bool has_rows, bool has_bias, "
      "Tensor? grad_log_normalizer=None) "
      "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");
  m.def(
      "sample_cross_entropy_backward_adam_(Tensor grad_loss, Tensor input, Tensor(a!) weight, Tensor rows, "
      "Tensor offsets, Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, Tensor label_offsets, "
      "Tensor label_places, Tensor label_probabilities, Tensor logits, Tensor log_normalizer, "
      "bool decoupled, bool has_bias, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool maximize, "
      "Tensor? grad_log_normalizer=None) "
      "-> (Tensor grad_input, Tensor grad_bias)");

  // losses/binary_cross_entropy.cpp
  m.def(
      "shared_binary_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor rows, Tensor? row_weight, "
      "Tensor label_offsets, Tensor label_places, Tensor label_values, Tensor? label_extra, float scale, bool sparse) "
      "-> (Tensor losses, Tensor logits)");
  m.def(
      "shared_binary_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, "
      "Tensor? row_weight, Tensor label_offsets, Tensor label_places, Tensor label_values, Tensor? label_extra, "
      "Tensor logits, bool has_rows, bool has_bias) -> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");
  m.def(
      "sample_binary_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor rows, Tensor offsets, "
      "Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, Tensor? row_weight, Tensor label_offsets, "
      "Tensor label_places, Tensor label_values, Tensor? label_extra, float scale, bool sparse) "
      "-> (Tensor losses, Tensor logits)");
  m.def(
      "sample_binary_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor weight, Tensor rows, "
      "Tensor offsets, Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, Tensor? row_weight, "
      "Tensor label_offsets, Tensor label_places, Tensor label_values, Tensor? label_extra, Tensor logits, "
      "bool has_rows, bool has_bias) -> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");

  // losses/active_linear.cpp
  m.def("shared_linear(Tensor input, Tensor weight, Tensor? bias, Tensor rows, bool sparse) -> Tensor");
  m.def(
      "shared_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, bool has_bias) "
      "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");
  m.def("shared_weighted_rows(Tensor values, Tensor weight, Tensor rows, bool sparse) -> Tensor");
  m.def(
      "shared_weighted_rows_backward(Tensor grad_output, Tensor values, Tensor weight, Tensor rows) "
      "-> (Tensor grad_values, Tensor grad_rows)");
  m.def(
      "sample_linear(Tensor input, Tensor weight, Tensor? bias, Tensor rows, Tensor offsets, Tensor pair_offsets, "
      "Tensor pair_positions, Tensor pair_samples, bool sparse) -> Tensor");
  m.def(
      "sample_linear_backward(Tensor grad_values, Tensor input, Tensor weight, Tensor rows, Tensor offsets, "
      "Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples, bool has_bias) "
      "-> (Tensor grad_input, Tensor grad_rows, Tensor grad_bias)");
  m.def(
      "sample_weighted_rows(Tensor values, Tensor weight, Tensor rows, Tensor offsets, Tensor pair_offsets, "
      "Tensor pair_positions, Tensor pair_samples, bool sparse) -> Tensor");
  m.def(
      "sample_weighted_rows_backward(Tensor grad_output, Tensor values, Tensor weight, Tensor rows, Tensor offsets, "
      "Tensor pair_offsets, Tensor pair_positions, Tensor pair_samples) -> (Tensor grad_values, Tensor grad_rows)");

  // io/xmc.cpp
  m.def(
      "parse_xmc(Tensor text, int num_features, int num_labels, int first_line=1) "
      "-> (Tensor feature_indptr, Tensor feature_indices, Tensor feature_values, Tensor label_indptr, "
      "Tensor label_indices)");

  // search/topk.cpp
  m.def("topk_linear(Tensor input, Tensor weight, Tensor? bias, int k) -> (Tensor values, Tensor indices)");

  // search/coded_lists.cpp
  m.def(
      "code_lists_(Tensor(a!) codes, Tensor(b!) terms, Tensor(c!) places, Tensor weight, Tensor? bias, "
      "Tensor list_offsets, Tensor list_rows) -> ()");
  m.def(
      "recode_rows_(Tensor(a!) codes, Tensor(b!) terms, Tensor places, Tensor weight, Tensor? bias, Tensor rows) "
      "-> ()");
  m.def(
      "topk_lists(Tensor input, Tensor weight, Tensor? bias, Tensor list_offsets, Tensor list_rows, Tensor codes, "
      "Tensor terms, Tensor probes, int k, int rescored, int list_cap, int seed) -> (Tensor values, Tensor indices)");
  m.def(
      "search_lists(Tensor input, Tensor weight, Tensor? bias, Tensor list_offsets, Tensor list_rows, Tensor codes, "
      "Tensor terms, Tensor center_codes, Tensor center_terms, float radius_weight, int probes, int enough, int k, "
      "int rescored) -> (Tensor values, Tensor indices)");

  // search/moved_codes.cpp
  m.def(
      "move_codes_(Tensor(a!) codes, Tensor(b!) terms, Tensor(c!) places, Tensor old_offsets, Tensor list_offsets, "
      "Tensor list_rows, Tensor rows) -> ()");
  m.def(
      "coded_centers(Tensor codes, Tensor terms, Tensor list_offsets, int features, bool has_bias) "
      "-> (Tensor centers, Tensor radius)");

  // search/ranked_centers.cpp
  m.def("code_centers(Tensor centers, Tensor? bias, Tensor spread) -> (Tensor codes, Tensor terms)");
  m.def(
      "rank_centers(Tensor input, Tensor spread_weight, Tensor codes, Tensor terms, int lists, int probes) -> Tensor");

  // search/list_centers.cpp
  m.def(
      "list_centers(Tensor weight, Tensor? bias, Tensor list_offsets, Tensor list_rows) "
      "-> (Tensor centers, Tensor radius)");

  // optim/row_gradients.cpp
  m.def("coalesce_rows(Tensor indices, Tensor values, int num_rows) -> (Tensor rows, Tensor summed)");
  m.def("rows_to_dense(Tensor rows, Tensor values, int neurons) -> Tensor");

  // optim/updates.cpp
  m.def(
      "adam_rows_(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? rows, Tensor grad_rows, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, bool maximize) -> ()");
  m.def(
      "sgd_rows_(Tensor(a!) param, Tensor(b!)? momentum_buffer, Tensor? rows, Tensor grad_rows, float lr, "
      "float momentum, float weight_decay, bool nesterov, bool maximize, int step=0) -> ()");
  m.def(
      "adagrad_rows_(Tensor(a!) param, Tensor(b!) sum, Tensor? rows, Tensor grad_rows, float lr, float eps, "
      "bool maximize, int step=0) -> ()");

  // memory.cpp
  m.def("advise_hugepages_(Tensor(a!) t) -> ()");
  m.def("touch_rows_(Tensor(a!) t, Tensor rows, bool write) -> Tensor");

  // below
  m.def("instruction_set() -> str");
}

namespace slide_torch {

// The instruction-set level in use: baseline, avx2 or avx512.
std::string instruction_set() {
  return kernels().name;
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace slide_torch

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
