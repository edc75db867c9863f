// The k largest outputs of a linear layer for each sample, from all rows in blocks (no (B, N) tensor) or, by a first
// look at int8 codes, from some lists of rows. Every thread keeps the best k of each sample among the rows that it has
// met; these are merged at the end. Which thread meets which row is left to chance, and does not matter: the order of
// candidates is total.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "stored_rows.h"

namespace slide_torch {
namespace {

// Inputs packed at a time: they should stay in a second-level cache.
constexpr int64_t kPackedBytes = int64_t{256} << 10;
// Rows that a thread takes at a time, as many as make up for the taking.
constexpr int64_t kRowsATime = 4096, kListRowsATime = 512;
static_assert(kListRowsATime % kBlockRows == 0);
// In heaps that are not full.
constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

template <class T>
TopkProblem<T> topk_problem(const char* op, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
  check(input.dim() == 2 && weight.dim() == 2, op, "expected input (B, d) and weight (N, d), got ", shape_of(input),
        " and ", shape_of(weight));
  check_tensor(op, "input", input, scalar_type_of<T>(), {-1, weight.size(1)});
  check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
  if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {weight.size(0)});
  return {data<T>(weight), data_or_null<T>(bias), data<T>(input), weight.size(1), input.size(0)};
}

// A worker's best k of `count` samples.
template <class T>
struct Heaps {
  std::vector<T> values;
  std::vector<int64_t> ids;
  int64_t k;

  void clear(int64_t count, int64_t size) {
    k = size;
    values.assign(count * k, -std::numeric_limits<T>::infinity());
    ids.assign(count * k, kNoRow);
  }
  Best<T> best() { return {values.data(), ids.data(), k}; }
};

template <class T>
struct Entry {
  T value;
  int64_t id;

  bool operator<(const Entry& other) const {  // as ranks_before in topk-inl.h
    const bool nan = value != value, other_nan = other.value != other.value;
    if (nan != other_nan) return nan;
    if (!nan && value != other.value) return value > other.value;
    return id < other.id;
  }
};

// Writes the best k of sample `b`, in order, from all workers' heaps.
template <class T>
void merge(const std::vector<Heaps<T>>& workers, int64_t b, int64_t k, std::vector<Entry<T>>& entries, T* values,
           int64_t* ids) {
  entries.clear();
  for (const Heaps<T>& heaps : workers)
    for (int64_t i = b * k; i < (b + 1) * k && !heaps.ids.empty(); ++i)
      entries.push_back({heaps.values[i], heaps.ids[i]});
  std::partial_sort(entries.begin(), entries.begin() + k, entries.end());
  for (int64_t i = 0; i < k; ++i) {
    values[i] = entries[i].value;
    ids[i] = entries[i].id;
  }
}

template <class T>
void merge_all(const std::vector<Heaps<T>>& workers, int64_t count, int64_t k, T* values, int64_t* ids) {
  parallel_for(0, count, grain(64 * k), [&](int64_t first, int64_t last) {
    std::vector<Entry<T>> entries;
    for (int64_t b = first; b < last; ++b) merge(workers, b, k, entries, values + b * k, ids + b * k);
  });
}

// Calls body(worker, item) for all items, each by whichever worker is free.
template <class F>
void share_out(int64_t items, int64_t workers, const F& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(worker, item);
  });
}

int64_t workers_for(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), items));
}

}  // namespace

std::tuple<Tensor, Tensor> topk_linear(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t k) {
  constexpr const char* op = "topk_linear";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const TopkProblem<T> s = topk_problem<T>(op, input, weight, bias);
    const int64_t batch = input.size(0), neurons = weight.size(0), d = s.features;
    check(1 <= k && k <= neurons, op, "k: expected 1 to ", neurons, " (rows of weight), got ", k);
    const auto& kernels = real_kernels<T>();
    Tensor values = empty({batch, k}, input.scalar_type()), indices = empty({batch, k}, ScalarType::Long);
    const int64_t panel = kernels.tile_columns;
    const int64_t panels = std::clamp<int64_t>(kPackedBytes / (d * int64_t{sizeof(T)} * panel + 1), 4, 64);
    const int64_t step = panels * panel, blocks = (batch + step - 1) / step;
    T* value = mutable_data<T>(values);
    int64_t* index = mutable_data<int64_t>(indices);

    // Many blocks of samples: each is one worker's. Few: all workers share the rows for one block after the other.
    const int64_t by_block = workers_for(blocks), chunks = (neurons + kRowsATime - 1) / kRowsATime;
    const bool many = blocks >= 4 * by_block || chunks == 1;
    std::vector<Heaps<T>> heaps(many ? by_block : workers_for(chunks));
    std::vector<std::vector<T>> packed(many ? by_block : 1);
    auto pack = [&](int64_t block, std::vector<T>& target) {
      const int64_t first = block * step, count = std::min(step, batch - first);
      target.resize(panels * panel * d);
      kernels.pack_transposed(s.input + first * d, count, d, 0, (count + panel - 1) / panel, target.data());
      return count;
    };
    // heaps hold one block of samples only: the problem is shifted to it
    auto meet = [&](int64_t block, int64_t count, const std::vector<T>& target, Heaps<T>& own, int64_t begin,
                    int64_t end) {
      if (own.ids.empty()) own.clear(count, k);
      TopkProblem<T> shifted = s;
      shifted.input += block * step * d;
      shifted.batch = count;
      kernels.topk_rows(shifted, target.data(), own.best(), begin, end);
    };
    if (many) {
      share_out(blocks, by_block, [&](int64_t worker, int64_t block) {
        std::vector<Heaps<T>> own(1);
        const int64_t count = pack(block, packed[worker]), at = block * step * k;
        meet(block, count, packed[worker], own[0], 0, neurons);
        std::vector<Entry<T>> entries;
        for (int64_t b = 0; b < count; ++b) merge(own, b, k, entries, value + at + b * k, index + at + b * k);
      });
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t count = pack(block, packed[0]), at = block * step * k;
        for (Heaps<T>& own : heaps) own.ids.clear();
        share_out(chunks, static_cast<int64_t>(heaps.size()), [&](int64_t worker, int64_t chunk) {
          meet(block, count, packed[0], heaps[worker], chunk * kRowsATime, std::min(neurons, (chunk + 1) * kRowsATime));
        });
        merge_all(heaps, count, k, value + at, index + at);
      }
    }
    return {values, indices};
  });
}

namespace {

// A range of a list's rows, and the list's samples.
struct ListPart {
  int64_t list;
  int64_t begin;
  int64_t end;
};

// Samples of each list, CSR.
void samples_of_lists(const int64_t* probes, int64_t batch, int64_t probed, int64_t lists,
                      std::vector<int64_t>& offsets, std::vector<int64_t>& samples) {
  offsets.assign(lists + 1, 0);
  samples.resize(batch * probed);
  for (int64_t i = 0; i < batch * probed; ++i) ++offsets[probes[i] + 1];
  for (int64_t l = 0; l < lists; ++l) offsets[l + 1] += offsets[l];
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < batch * probed; ++i) samples[next[probes[i]]++] = i / probed;
}

void check_lists(const char* op, const Tensor& offsets, const Tensor& rows) {
  check(offsets.dim() == 1 && offsets.size(0) >= 1, op, "list_offsets: expected shape (lists + 1), got ",
        shape_of(offsets));
  check_tensor(op, "list_offsets", offsets, ScalarType::Long, {-1});
  check_tensor(op, "list_rows", rows, ScalarType::Int, {-1});
  check_offsets(op, "list_offsets", data<int64_t>(offsets), offsets.numel() - 1, rows.numel());
}

// First block of each list: every list begins a block of its own.
std::vector<int64_t> blocks_of_lists(const int64_t* offsets, int64_t lists) {
  std::vector<int64_t> blocks(lists + 1, 0);
  for (int64_t l = 0; l < lists; ++l)
    blocks[l + 1] = blocks[l] + (offsets[l + 1] - offsets[l] + kBlockRows - 1) / kBlockRows;
  return blocks;
}

// x (features) as integers up to `limit` times the scale returned, through put(feature, integer). What is not finite
// has only zeros, and NaN for a scale; what is too small for a scale counts as zero.
template <class T, class F>
float quantize(const T* x, int64_t features, int64_t limit, const F& put) {
  T largest = T(0);
  bool finite = true;
  for (int64_t p = 0; p < features; ++p) {
    finite &= std::isfinite(x[p]);
    largest = std::max(largest, std::abs(x[p]));
  }
  const float scale = static_cast<float>(largest / static_cast<T>(limit));
  const bool any = finite && scale >= std::numeric_limits<float>::min();
  const T inverse = any ? static_cast<T>(limit) / largest : T(0);
  for (int64_t p = 0; p < features; ++p) put(p, any ? static_cast<int32_t>(std::nearbyint(x[p] * inverse)) : 0);
  return finite ? (any ? scale : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

// The largest integer of an input's: a sum over all features of products with codes stays below 2^31.
int64_t input_limit(int64_t pairs) {
  return std::min<int64_t>(32767, std::numeric_limits<int32_t>::max() / (127 * 2 * std::max<int64_t>(1, pairs)));
}

}  // namespace

// Rows of lists as int8 codes: codes (blocks, pairs, 16, 2), of 16 rows of one list and all pairs of features, and
// terms (blocks, 2, 16), what a row's codes are to be multiplied by, and its bias.
std::tuple<Tensor, Tensor> code_lists(Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                      Tensor list_rows) {
  constexpr const char* op = "code_lists";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {weight.size(0)});
    check_lists(op, list_offsets, list_rows);
    check_range(op, "list_rows", data<int32_t>(list_rows), list_rows.numel(), weight.size(0));
    const int64_t lists = list_offsets.numel() - 1, d = weight.size(1), pairs = (d + 1) / 2;
    const int64_t* offset = data<int64_t>(list_offsets);
    const int32_t* rows = data<int32_t>(list_rows);
    const std::vector<int64_t> block_of = blocks_of_lists(offset, lists);
    Tensor codes = empty({block_of[lists], pairs, kBlockRows, 2}, ScalarType::Char);
    Tensor terms = empty({block_of[lists], 2, kBlockRows}, ScalarType::Float);
    int8_t* code = mutable_data<int8_t>(codes);
    float* term = mutable_data<float>(terms);
    const T *w = data<T>(weight), *b = data_or_null<T>(bias);
    parallel_for(0, lists, grain(8 * d * (list_rows.numel() / (lists + 1) + 1)), [&](int64_t first, int64_t last) {
      std::fill(code + block_of[first] * pairs * 2 * kBlockRows, code + block_of[last] * pairs * 2 * kBlockRows, 0);
      std::fill(term + block_of[first] * 2 * kBlockRows, term + block_of[last] * 2 * kBlockRows, 0.0f);
      for (int64_t l = first; l < last; ++l)
        for (int64_t i = offset[l]; i < offset[l + 1]; ++i) {
          const int64_t block = block_of[l] + (i - offset[l]) / kBlockRows, lane = (i - offset[l]) % kBlockRows;
          int8_t* own = code + block * pairs * 2 * kBlockRows + lane * 2;
          term[block * 2 * kBlockRows + lane] = quantize(w + rows[i] * d, d, 127, [&](int64_t p, int32_t value) {
            own[p / 2 * 2 * kBlockRows + p % 2] = static_cast<int8_t>(value);
          });
          if (b) term[(block * 2 + 1) * kBlockRows + lane] = static_cast<float>(b[rows[i]]);
        }
    });
    return {codes, terms};
  });
}

// The best k of the `rescored` rows that score best by their codes.
std::tuple<Tensor, Tensor> topk_lists(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                      Tensor list_rows, Tensor codes, Tensor terms, Tensor probes, int64_t k,
                                      int64_t rescored) {
  constexpr const char* op = "topk_lists";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check(weight.dim() == 2, op, "weight: expected shape (N, d), got ", shape_of(weight));
    const int64_t d = weight.size(1);
    check_tensor(op, "input", input, scalar_type_of<T>(), {-1, d});
    check_tensor(op, "weight", weight, stored_dtype<T>(weight), {-1, -1});
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {weight.size(0)});
    check_lists(op, list_offsets, list_rows);
    const int64_t batch = input.size(0), lists = list_offsets.numel() - 1, pairs = (d + 1) / 2;
    const StoredRows<T> stored(weight, d);
    const T *x = data<T>(input), *shift = data_or_null<T>(bias);
    const int64_t* offset = data<int64_t>(list_offsets);
    const int32_t* rows = data<int32_t>(list_rows);
    const std::vector<int64_t> block_of = blocks_of_lists(offset, lists);
    check_tensor(op, "codes", codes, ScalarType::Char, {block_of[lists], pairs, kBlockRows, 2});
    check_tensor(op, "terms", terms, ScalarType::Float, {block_of[lists], 2, kBlockRows});
    check_tensor(op, "probes", probes, ScalarType::Long, {batch, -1});
    check_range(op, "probes", data<int64_t>(probes), probes.numel(), lists);
    check(k >= 1, op, "k: expected at least 1, got ", k);
    check(rescored >= k, op, "rescored: expected at least k, got ", rescored);
    std::vector<int64_t> sample_offsets, samples;
    samples_of_lists(data<int64_t>(probes), batch, probes.size(1), lists, sample_offsets, samples);
    std::vector<ListPart> parts;
    for (int64_t l = 0; l < lists; ++l)
      for (int64_t row = offset[l]; row < offset[l + 1] && sample_offsets[l] < sample_offsets[l + 1];
           row += kListRowsATime)
        parts.push_back({l, row, std::min(offset[l + 1], row + kListRowsATime)});

    std::vector<int32_t> inputs(batch * pairs);
    std::vector<float> scales(batch);
    const int64_t limit = input_limit(pairs);
    parallel_for(0, batch, grain(4 * d), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        int16_t* own = reinterpret_cast<int16_t*>(inputs.data() + i * pairs);
        scales[i] =
            quantize(x + i * d, d, limit, [&](int64_t p, int32_t value) { own[p] = static_cast<int16_t>(value); });
      }
    });
    const CodedProblem coded = {inputs.data(), scales.data(), pairs};
    const int8_t* code = data<int8_t>(codes);
    const float* term = data<float>(terms);
    const int64_t items = static_cast<int64_t>(parts.size());
    std::vector<Heaps<float>> heaps(workers_for(items));
    share_out(items, static_cast<int64_t>(heaps.size()), [&](int64_t worker, int64_t item) {
      if (heaps[worker].ids.empty()) heaps[worker].clear(batch, rescored);
      const ListPart& part = parts[item];
      const int64_t first = sample_offsets[part.list], count = sample_offsets[part.list + 1] - first;
      const int64_t block = block_of[part.list] + (part.begin - offset[part.list]) / kBlockRows;
      kernels().topk_coded(coded, code + block * pairs * 2 * kBlockRows, term + block * 2 * kBlockRows,
                           rows + part.begin, part.end - part.begin, samples.data() + first, count,
                           heaps[worker].best());
    });

    Tensor values = empty({batch, k}, input.scalar_type()), indices = empty({batch, k}, ScalarType::Long);
    T* value = mutable_data<T>(values);
    int64_t* index = mutable_data<int64_t>(indices);
    std::atomic<bool> stray{false}, few{false};
    parallel_for(0, batch, grain(2 * rescored * d), [&](int64_t first, int64_t last) {
      std::vector<Entry<float>> found;
      std::vector<int32_t> ids;
      std::vector<T> scores;
      std::vector<Entry<T>> best;
      for (int64_t b = first; b < last; ++b) {
        found.clear();
        for (const Heaps<float>& heap : heaps)
          for (int64_t i = b * rescored; i < (b + 1) * rescored && !heap.ids.empty(); ++i)
            if (heap.ids[i] != kNoRow) found.push_back({heap.values[i], heap.ids[i]});
        const int64_t count = std::min<int64_t>(rescored, found.size());
        std::nth_element(found.begin(), found.begin() + count, found.end());
        ids.resize(count);
        scores.resize(count);
        best.resize(count);
        bool inside = true;
        for (int64_t i = 0; i < count; ++i) {
          ids[i] = static_cast<int32_t>(found[i].id);
          inside &= 0 <= found[i].id && found[i].id < weight.size(0);
        }
        if (!inside) stray = true;
        if (count < k) few = true;
        if (!inside || count < k) continue;
        stored.score(shift, x + b * d, ids.data(), count, scores.data());
        for (int64_t i = 0; i < count; ++i) best[i] = {scores[i], ids[i]};
        std::partial_sort(best.begin(), best.begin() + k, best.end());
        for (int64_t i = 0; i < k; ++i) {
          value[b * k + i] = best[i].value;
          index[b * k + i] = best[i].id;
        }
      }
    });
    check(!stray, op, "list_rows: expected values in [0, ", weight.size(0), ")");
    check(!few, op, "k: expected at most as many as the rows of a sample's lists, got ", k);
    return {values, indices};
  });
}

// Returns the mean row of each list, centers (lists, d), or (lists, d + 1) with the bias appended, and radius (lists),
// the root mean square distance of a list's rows from it. Zeros for an empty list.
std::tuple<Tensor, Tensor> list_centers(Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                        Tensor list_rows) {
  constexpr const char* op = "list_centers";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {weight.size(0)});
    check_lists(op, list_offsets, list_rows);
    check_range(op, "list_rows", data<int32_t>(list_rows), list_rows.numel(), weight.size(0));
    const int64_t lists = list_offsets.numel() - 1, d = weight.size(1), width = d + bias.has_value();
    Tensor centers = empty({lists, width}, weight.scalar_type()), radius = empty({lists}, weight.scalar_type());
    const T *w = data<T>(weight), *b = data_or_null<T>(bias);
    const int64_t* offset = data<int64_t>(list_offsets);
    const int32_t* rows = data<int32_t>(list_rows);
    T *center = mutable_data<T>(centers), *distance = mutable_data<T>(radius);
    parallel_for(0, lists, grain(2 * width * (list_rows.numel() / (lists + 1) + 1)), [&](int64_t first, int64_t last) {
      std::vector<double> mean(width);
      for (int64_t l = first; l < last; ++l) {
        const double share = 1.0 / static_cast<double>(std::max<int64_t>(1, offset[l + 1] - offset[l]));
        std::fill(mean.begin(), mean.end(), 0.0);
        for (int64_t i = offset[l]; i < offset[l + 1]; ++i) {
          for (int64_t p = 0; p < d; ++p) mean[p] += w[rows[i] * d + p];
          if (b) mean[d] += b[rows[i]];
        }
        for (int64_t p = 0; p < width; ++p) center[l * width + p] = static_cast<T>(mean[p] *= share);
        double squares = 0.0;
        for (int64_t i = offset[l]; i < offset[l + 1]; ++i) {
          for (int64_t p = 0; p < d; ++p) squares += (w[rows[i] * d + p] - mean[p]) * (w[rows[i] * d + p] - mean[p]);
          if (b) squares += (b[rows[i]] - mean[d]) * (b[rows[i]] - mean[d]);
        }
        distance[l] = static_cast<T>(std::sqrt(squares * share));
      }
    });
    return {centers, radius};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("topk_linear", TORCH_BOX(&topk_linear));
  m.impl("code_lists", TORCH_BOX(&code_lists));
  m.impl("topk_lists", TORCH_BOX(&topk_lists));
  m.impl("list_centers", TORCH_BOX(&list_centers));
}

}  // namespace slide_torch
