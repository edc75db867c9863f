// The k largest outputs of a linear layer for each sample, from all rows in blocks (no (B, N) tensor) or, by a first
// look at int8 codes, from some lists of rows. Every thread keeps the best k of each sample among the rows that it has
// met; these are merged at the end. Which thread meets which row is left to chance, and does not matter: the order of
// candidates is total.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "../kernels/retrieve.h"
#include "stored_rows.h"

namespace slide_torch {
namespace {

// Inputs packed at a time: they should stay in a second-level cache.
constexpr int64_t kPackedBytes = int64_t{256} << 10;
// Rows that a thread takes at a time, as many as make up for the taking; fewer where there are few.
constexpr int64_t kRowsATime = 4096, kFewRowsATime = 256, kListRowsATime = 512;
constexpr int64_t kPartsATime = 16;  // of lists
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
    const int64_t by_block = workers_for(blocks);
    const int64_t chunk_rows =
        std::clamp<int64_t>(neurons / (4 * torch::stable::get_num_threads()), kFewRowsATime, kRowsATime);
    const int64_t chunks = (neurons + chunk_rows - 1) / chunk_rows;
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
          meet(block, count, packed[0], heaps[worker], chunk * chunk_rows, std::min(neurons, (chunk + 1) * chunk_rows));
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

// Samples of each list, CSR; a probe of -1 is no list.
void samples_of_lists(const int64_t* probes, int64_t batch, int64_t probed, int64_t lists,
                      std::vector<int64_t>& offsets, std::vector<int64_t>& samples) {
  offsets.assign(lists + 1, 0);
  samples.resize(batch * probed);
  for (int64_t i = 0; i < batch * probed; ++i)
    if (probes[i] >= 0) ++offsets[probes[i] + 1];
  for (int64_t l = 0; l < lists; ++l) offsets[l + 1] += offsets[l];
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < batch * probed; ++i)
    if (probes[i] >= 0) samples[next[probes[i]]++] = i / probed;
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

void check_codes(const char* op, const Tensor& codes, const Tensor& terms, int64_t blocks, int64_t pairs) {
  check_tensor(op, "codes", codes, ScalarType::Char, {-1, pairs, kBlockRows, 2});
  check(codes.size(0) >= blocks, op, "codes: expected at least ", blocks, " blocks, got ", codes.size(0));
  check_tensor(op, "terms", terms, ScalarType::Float, {codes.size(0), 2, kBlockRows});
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

// Rows of lists as int8 codes: into codes (blocks or more, pairs, 16, 2), of 16 rows of one list and all pairs of
// features, into terms (the same, 2, 16), what a row's codes are to be multiplied by, and its bias, and into places
// (N), where each row stands among the rows of all blocks, or -1. Returns centers and radius as list_centers does: a
// list's rows are in the cache by then.
std::tuple<Tensor, Tensor> code_lists_(Tensor codes, Tensor terms, Tensor places, Tensor weight,
                                       std::optional<Tensor> bias, Tensor list_offsets, Tensor list_rows) {
  constexpr const char* op = "code_lists_";
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
    check(block_of[lists] < INT32_MAX / kBlockRows, op, "list_rows: expected fewer than 2^31 places");
    check_codes(op, codes, terms, block_of[lists], pairs);
    check_tensor(op, "places", places, ScalarType::Int, {weight.size(0)});
    const int64_t width = d + bias.has_value();
    Tensor centers = empty({lists, width}, weight.scalar_type()), radius = empty({lists}, weight.scalar_type());
    T *center = mutable_data<T>(centers), *distance = mutable_data<T>(radius);
    int32_t* place = mutable_data<int32_t>(places);
    int8_t* code = mutable_data<int8_t>(codes);
    float* term = mutable_data<float>(terms);
    const T *w = data<T>(weight), *b = data_or_null<T>(bias);
    // a part of the rows is one thread's: places lie in no order, and two writers of one cache line wait for each other
    parallel_for(0, weight.size(0), kGrainWork, [&](int64_t first, int64_t last) {
      std::fill(place + first, place + last, -1);
      for (int64_t l = 0; l < lists; ++l)
        for (int64_t i = offset[l]; i < offset[l + 1]; ++i)
          if (first <= rows[i] && rows[i] < last)
            place[rows[i]] = static_cast<int32_t>(block_of[l] * kBlockRows + i - offset[l]);
    });
    const int64_t workers = workers_for(lists);
    std::vector<int8_t> scratch(workers * kBlockRows * 2 * pairs);
    share_out(lists, workers, [&](int64_t worker, int64_t l) {
      const int64_t count = offset[l + 1] - offset[l];
      const int32_t* own = rows + offset[l];
      real_kernels<T>().rows_center(w, b, d, own, count, center + l * width, center + l * width + d, distance + l);
      real_kernels<T>().code_rows(w, b, d, own, count, code + block_of[l] * pairs * 2 * kBlockRows,
                                  term + block_of[l] * 2 * kBlockRows,
                                  scratch.data() + worker * kBlockRows * 2 * pairs);
    });
    return {centers, radius};
  });
}

// Codes and terms anew of `rows`, distinct, which have changed since code_lists_.
void recode_rows_(Tensor codes, Tensor terms, Tensor places, Tensor weight, std::optional<Tensor> bias, Tensor rows) {
  constexpr const char* op = "recode_rows_";
  dispatch_real(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_tensor(op, "weight", weight, scalar_type_of<T>(), {-1, -1});
    const int64_t neurons = weight.size(0), d = weight.size(1), pairs = (d + 1) / 2;
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {neurons});
    check_codes(op, codes, terms, 0, pairs);
    check_tensor(op, "places", places, ScalarType::Int, {neurons});
    check_tensor(op, "rows", rows, ScalarType::Long, {-1});
    check_rows(op, data<int64_t>(rows), rows.numel(), neurons);
    const int32_t* place = data<int32_t>(places);
    const int64_t* id = data<int64_t>(rows);
    for (int64_t i = 0; i < rows.numel(); ++i)
      check(0 <= place[id[i]] && place[id[i]] < codes.size(0) * kBlockRows, op, "places: expected values in [0, ",
            codes.size(0) * kBlockRows, "), got ", place[id[i]]);
    const T *w = data<T>(weight), *b = data_or_null<T>(bias);
    int8_t* code = mutable_data<int8_t>(codes);
    float* term = mutable_data<float>(terms);
    parallel_for(0, rows.numel(), grain(8 * d), [&](int64_t first, int64_t last) {
      std::vector<int8_t> scratch(2 * pairs);
      real_kernels<T>().recode_rows(w, b, d, id + first, last - first, place, code, term, scratch.data());
    });
  });
}

// The best k of the `rescored` rows that score best by their codes. Of a list longer than `list_cap` only so many rows
// are looked at, rounded up to blocks, from a block on that `seed` determines, around the end.
std::tuple<Tensor, Tensor> topk_lists(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                      Tensor list_rows, Tensor codes, Tensor terms, Tensor probes, int64_t k,
                                      int64_t rescored, int64_t list_cap, int64_t seed) {
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
    check_codes(op, codes, terms, block_of[lists], pairs);
    check_tensor(op, "probes", probes, ScalarType::Long, {batch, -1});
    const int64_t* probe = data<int64_t>(probes);
    for (int64_t i = 0; i < probes.numel(); ++i)
      check(-1 <= probe[i] && probe[i] < lists, op, "probes: expected values in [-1, ", lists, "), got ", probe[i]);
    check_integer(op, "k", k, 1, INT32_MAX);
    check(rescored >= k, op, "rescored: expected at least k, got ", rescored);
    rescored = std::clamp<int64_t>(list_rows.numel(), 1, rescored);  // lists do not hold more
    check(list_cap >= 1, op, "list_cap: expected at least 1, got ", list_cap);
    std::vector<int64_t> sample_offsets, samples;
    samples_of_lists(probe, batch, probes.size(1), lists, sample_offsets, samples);
    std::vector<ListPart> parts;
    const auto add_parts = [&](int64_t l, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kListRowsATime)
        parts.push_back({l, row, std::min(end, row + kListRowsATime)});
    };
    for (int64_t l = 0; l < lists; ++l) {
      if (sample_offsets[l] == sample_offsets[l + 1]) continue;
      const int64_t blocks = block_of[l + 1] - block_of[l], taken = (list_cap - 1) / kBlockRows + 1;
      if (taken >= blocks) {
        add_parts(l, offset[l], offset[l + 1]);
        continue;
      }
      const uint64_t random = splitmix64(static_cast<uint64_t>(seed) ^ splitmix64(static_cast<uint64_t>(l)));
      const int64_t first = static_cast<int64_t>(random % static_cast<uint64_t>(blocks));
      const int64_t before = std::max<int64_t>(0, first + taken - blocks);
      add_parts(l, offset[l], offset[l] + before * kBlockRows);
      add_parts(l, offset[l] + first * kBlockRows, std::min(offset[l + 1], offset[l] + (first + taken) * kBlockRows));
    }

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
    const auto block_at = [&](const ListPart& part) {
      return block_of[part.list] + (part.begin - offset[part.list]) / kBlockRows;
    };
    // a few parts that follow one another are one worker's, which asks for the next while it is at one
    const int64_t workers = static_cast<int64_t>(heaps.size());
    const int64_t at_a_time = std::clamp<int64_t>(items / (8 * workers), 1, kPartsATime);
    share_out((items + at_a_time - 1) / at_a_time, workers, [&](int64_t worker, int64_t share) {
      if (heaps[worker].ids.empty()) heaps[worker].clear(batch, rescored);
      for (int64_t item = share * at_a_time; item < std::min(items, (share + 1) * at_a_time); ++item) {
        const ListPart& part = parts[item];
        const int64_t first = sample_offsets[part.list], count = sample_offsets[part.list + 1] - first;
        const int64_t block = block_at(part), next = block_at(parts[std::min(item + 1, items - 1)]);
        kernels().topk_coded(coded, code + block * pairs * 2 * kBlockRows, term + block * 2 * kBlockRows,
                             rows + part.begin, part.end - part.begin, code + next * pairs * 2 * kBlockRows,
                             samples.data() + first, count, heaps[worker].best());
      }
    });

    Tensor values = empty({batch, k}, input.scalar_type()), indices = empty({batch, k}, ScalarType::Long);
    T* value = mutable_data<T>(values);
    int64_t* index = mutable_data<int64_t>(indices);
    std::atomic<bool> stray{false};
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
        if (!inside) continue;
        stored.score(shift, x + b * d, ids.data(), count, scores.data());
        for (int64_t i = 0; i < count; ++i) best[i] = {scores[i], ids[i]};
        const int64_t given = std::min(k, count);
        std::partial_sort(best.begin(), best.begin() + given, best.end());
        for (int64_t i = 0; i < k; ++i) {
          value[b * k + i] = i < given ? best[i].value : -std::numeric_limits<T>::infinity();
          index[b * k + i] = i < given ? best[i].id : -1;
        }
      }
    });
    check(!stray, op, "list_rows: expected values in [0, ", weight.size(0), ")");
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
    share_out(lists, workers_for(lists), [&](int64_t, int64_t l) {
      real_kernels<T>().rows_center(w, b, d, rows + offset[l], offset[l + 1] - offset[l], center + l * width,
                                    center + l * width + d, distance + l);
    });
    return {centers, radius};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("topk_linear", TORCH_BOX(&topk_linear));
  m.impl("code_lists_", TORCH_BOX(&code_lists_));
  m.impl("recode_rows_", TORCH_BOX(&recode_rows_));
  m.impl("topk_lists", TORCH_BOX(&topk_lists));
  m.impl("list_centers", TORCH_BOX(&list_centers));
}

}  // namespace slide_torch
