// The k largest outputs of a linear layer for each sample, from all rows in blocks (no (B, N) tensor). Every thread
// keeps the best k of each sample among the rows that it has met; these are merged at the end. Which thread meets which
// row is left to chance, and does not matter: the order of candidates is total.
#include <algorithm>

#include "../common/layer.h"
#include "../common/reservoirs.h"
#include "../kernels/dispatch.h"

namespace slide_torch {
namespace {

// Inputs packed at a time: they should stay in a second-level cache.
constexpr int64_t kPackedBytes = int64_t{256} << 10;
// Rows that a thread takes at a time, as many as make up for the taking; fewer where there are few.
constexpr int64_t kRowsATime = 4096, kFewRowsATime = 256;

// The best k of samples [first, last), to values and ids (any, k).
template <class T>
void merge(const std::vector<Reservoirs<T>>& workers, int64_t first, int64_t last, int64_t k, T* values, int64_t* ids) {
  std::vector<Entry<T>> entries;
  for (int64_t b = first; b < last; ++b) {
    gather(workers, b, entries);
    write_best(entries, k, values + b * k, ids + b * k);
  }
}

// The search, block of samples by block; values and ids (B, k) get the results.
template <class T>
class BlockSearch {
 public:
  BlockSearch(const TopkProblem<T>& problem, int64_t neurons, int64_t k, T* values, int64_t* ids)
      : problem_(problem), neurons_(neurons), k_(k), values_(values), ids_(ids) {
    const int64_t bytes_of_a_panel = problem.features * int64_t{sizeof(T)} * panel_;
    panels_ = std::clamp<int64_t>(kPackedBytes / (bytes_of_a_panel + 1), 4, 64);
    step_ = panels_ * panel_;
    blocks_ = (problem.batch + step_ - 1) / step_;
  }

  // Many blocks of samples: each is one worker's. Few: all workers share the rows for one block after the other.
  void run() {
    const int64_t by_block = workers_for(blocks_), threads = torch::stable::get_num_threads();
    const int64_t chunk = std::clamp<int64_t>(neurons_ / (4 * threads), kFewRowsATime, kRowsATime);
    if (blocks_ >= 4 * by_block || neurons_ <= chunk)
      share_blocks(by_block);
    else
      share_rows(chunk);
  }

 private:
  // A block's samples, packed for tiles.
  struct Block {
    TopkProblem<T> problem;
    const T* packed;
    int64_t first;

    // Offers it rows [begin, end).
    void meet(Reservoirs<T>& own, int64_t k, int64_t begin, int64_t end) const {
      if (own.empty()) own.clear(problem.batch, k);
      real_kernels<T>().topk_rows(problem, packed, own.best(), begin, end);
    }
  };

  Block pack(int64_t block, std::vector<T>& space) const {
    Block result{problem_, nullptr, block * step_};
    result.problem.input += result.first * problem_.features;
    result.problem.batch = std::min(step_, problem_.batch - result.first);
    space.resize(panels_ * panel_ * problem_.features);
    real_kernels<T>().pack_transposed(result.problem.input, result.problem.batch, problem_.features, 0,
                                      (result.problem.batch + panel_ - 1) / panel_, space.data());
    result.packed = space.data();
    return result;
  }

  void share_blocks(int64_t workers) const {
    std::vector<std::vector<T>> packed(workers);
    share_out(blocks_, workers, [&](int64_t worker, int64_t number) {
      std::vector<Reservoirs<T>> own(1);
      const Block block = pack(number, packed[worker]);
      block.meet(own[0], k_, 0, neurons_);
      merge(own, 0, block.problem.batch, k_, values_ + block.first * k_, ids_ + block.first * k_);
    });
  }

  void share_rows(int64_t chunk_rows) const {
    const int64_t chunks = (neurons_ + chunk_rows - 1) / chunk_rows, workers = workers_for(chunks);
    std::vector<Reservoirs<T>> reservoirs(workers);
    std::vector<T> packed;
    for (int64_t number = 0; number < blocks_; ++number) {
      const Block block = pack(number, packed);
      for (Reservoirs<T>& own : reservoirs) own.forget();
      share_out(chunks, workers, [&](int64_t worker, int64_t chunk) {
        block.meet(reservoirs[worker], k_, chunk * chunk_rows, std::min(neurons_, (chunk + 1) * chunk_rows));
      });
      parallel_for(0, block.problem.batch, grain(64 * k_), [&](int64_t first, int64_t last) {
        merge(reservoirs, first, last, k_, values_ + block.first * k_, ids_ + block.first * k_);
      });
    }
  }

  const TopkProblem<T> problem_;
  const int64_t neurons_, k_, panel_ = real_kernels<T>().tile_columns;
  int64_t panels_, step_, blocks_;
  T* values_;
  int64_t* ids_;
};

}  // namespace

std::tuple<Tensor, Tensor> topk_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t k) {
  constexpr const char* op = "topk_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const LayerArgs<T> layer(op, input, weight, bias);
    const TopkProblem<T> problem = {.weight = data<T>(weight),
                                    .bias = layer.bias,
                                    .input = data<T>(input),
                                    .features = layer.features(),
                                    .batch = layer.batch()};
    const int64_t neurons = weight.size(0);
    check(1 <= k && k <= neurons, op, "k: expected 1 to ", neurons, " (rows of weight), got ", k);
    Tensor values = empty({problem.batch, k}, scalar_type_of<T>());
    Tensor indices = empty({problem.batch, k}, ScalarType::Long);
    BlockSearch<T>(problem, neurons, k, mutable_data<T>(values), mutable_data<int64_t>(indices)).run();
    return {values, indices};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("topk_linear", TORCH_BOX(&topk_linear));
}

}  // namespace slide_torch
