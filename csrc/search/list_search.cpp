// The best k rows of some lists: a first look at a fourth of the bytes, after which the best are scored exactly. As in
// topk.cpp, the order of candidates is total, so that it does not matter which thread meets which row.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../common/random.h"
#include "../common/reservoirs.h"
#include "../common/stored_rows.h"
#include "center_scores.h"
#include "lists.h"

namespace slide_torch {
namespace {

constexpr int64_t kRowsATime = 512;                    // of a list, by one thread
constexpr int64_t kPartsATime = 16;                    // of lists
constexpr int64_t kBytesAThread = int64_t{256} << 10;  // of codes, for a thread to be worth waking
static_assert(kRowsATime % kBlockRows == 0);

// Which samples probe each list: those of list l are at [offsets[l], offsets[l + 1]) of `ids`; `probed` has the lists
// that any does, in order.
struct Probes {
  std::vector<int64_t> offsets;
  std::vector<int64_t> ids;
  std::vector<int64_t> probed;

  // From probes (any, each) below `lists`, of which -1 is no list.
  template <class Int>
  Probes(const Int* probe, int64_t count, int64_t each, int64_t lists) : offsets(lists + 1, 0), ids(count) {
    for (int64_t i = 0; i < count; ++i)
      if (probe[i] >= 0) ++offsets[probe[i] + 1];
    for (int64_t l = 0; l < lists; ++l) offsets[l + 1] += offsets[l];
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (probe[i] >= 0) {
        int64_t& place = next[probe[i]];
        if (place == offsets[probe[i]]) probed.push_back(probe[i]);
        ids[place++] = i / each;
      }
    std::sort(probed.begin(), probed.end());
  }

  int64_t count(int64_t l) const { return offsets[l + 1] - offsets[l]; }
};

// A range of a list's rows.
struct ListPart {
  int64_t list;
  int64_t begin;
  int64_t end;

  int64_t block(const Lists& lists) const { return lists.blocks[list] + (begin - lists.offsets[list]) / kBlockRows; }
};

// What is looked at of the probed lists, cut into parts. Of a list longer than `cap` only so many rows, rounded up to
// blocks, from a block on that `seed` determines, around the end.
std::vector<ListPart> parts_of(const Lists& lists, const Probes& probes, int64_t cap, int64_t seed) {
  std::vector<ListPart> parts;
  const auto add = [&](int64_t l, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kRowsATime) parts.push_back({l, row, std::min(end, row + kRowsATime)});
  };
  const int64_t taken = (cap - 1) / kBlockRows + 1;
  for (const int64_t l : probes.probed) {
    const int64_t blocks = lists.blocks[l + 1] - lists.blocks[l], offset = lists.offsets[l];
    if (taken >= blocks) {
      add(l, offset, lists.offsets[l + 1]);
      continue;
    }
    const uint64_t random = random_for(static_cast<uint64_t>(seed), l);
    const int64_t first = static_cast<int64_t>(random % static_cast<uint64_t>(blocks));
    const int64_t around = std::max<int64_t>(0, first + taken - blocks);
    add(l, offset, offset + around * kBlockRows);
    add(l, offset + first * kBlockRows, std::min(lists.offsets[l + 1], offset + (first + taken) * kBlockRows));
  }
  return parts;
}

// Inputs (B, d), and the layer whose rows are searched for them: weight (N, d), bias (N) or none.
template <class T>
struct SearchedLayer {
  const T* input;
  const T* bias;
  int64_t batch;
  int64_t neurons;
  int64_t features;

  SearchedLayer(const char* op, const Tensor& input_in, const Tensor& weight, const std::optional<Tensor>& bias_in) {
    check_tensor(op, "weight", weight, stored_dtype<T>(weight), {-1, -1});
    neurons = weight.size(0), features = weight.size(1);
    check_tensor(op, "input", input_in, scalar_type_of<T>(), {-1, features});
    if (bias_in) check_tensor(op, "bias", *bias_in, scalar_type_of<T>(), {neurons});
    input = data<T>(input_in), bias = data_or_null<T>(bias_in);
    batch = input_in.size(0);
  }
};

// Scores each sample's best `rescored` exactly; values and ids (B, k) get the best of these.
template <class T>
class Rescoring {
 public:
  Rescoring(const StoredRows<T>& rows, const SearchedLayer<T>& layer) : rows_(rows), layer_(layer) {}

  void run(const char* op, const std::vector<Reservoirs<float>>& reservoirs, int64_t rescored, int64_t k, T* values,
           int64_t* ids) const {
    std::atomic<bool> stray{false};
    parallel_for(0, layer_.batch, grain(2 * rescored * layer_.features), [&](int64_t first, int64_t last) {
      Room room;
      for (int64_t b = first; b < last; ++b) {
        gather(reservoirs, b, room.found);
        const int64_t count = std::min<int64_t>(rescored, room.found.size());
        std::nth_element(room.found.begin(), room.found.begin() + count, room.found.end());
        room.found.resize(count);
        if (score(b, room))
          write_best(room.best, k, values + b * k, ids + b * k);
        else
          stray = true;
      }
    });
    check(!stray, op, "list_rows: expected values in [0, ", layer_.neurons, ")");
  }

 private:
  struct Room {
    std::vector<Entry<float>> found;
    std::vector<int32_t> rows;
    std::vector<T> scores;
    std::vector<Entry<T>> best;
  };

  // From what was found to the best, unsorted; false where an id is no row's. Rows are scored by fours, the last
  // repeated: which row is where is left to chance, and a row scored alone would be rounded in another order.
  bool score(int64_t b, Room& room) const {
    const size_t count = room.found.size(), padded = (count + 3) / 4 * 4;
    room.rows.resize(padded);
    room.scores.resize(padded);
    room.best.resize(count);
    bool inside = true;
    for (size_t i = 0; i < count; ++i) {
      const int64_t id = room.found[i].id;
      room.rows[i] = static_cast<int32_t>(id);
      inside &= 0 <= id && id < layer_.neurons;
    }
    if (!inside) return false;
    for (size_t i = count; i < padded; ++i) room.rows[i] = room.rows[count - 1];
    rows_.score(layer_.bias, layer_.input + b * layer_.features, room.rows.data(), static_cast<int64_t>(padded),
                room.scores.data());
    for (size_t i = 0; i < count; ++i) room.best[i] = {room.scores[i], room.rows[i]};
    return true;
  }

  const StoredRows<T>& rows_;
  const SearchedLayer<T>& layer_;
};

// The tensors of a search, besides those of which lists to look into.
struct SearchTensors {
  const Tensor& input;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const Tensor& list_offsets;
  const Tensor& list_rows;
  const Tensor& codes;
  const Tensor& terms;
};

template <class T>
class ListSearch {
 public:
  ListSearch(const char* op, const SearchTensors& t)
      : layer(op, t.input, t.weight, t.bias),
        lists(op, t.list_offsets, t.list_rows),
        inputs(layer.input, layer.batch, layer.features),
        op_(op),
        rows_(t.weight, layer.features),
        coded_(op, t.codes, t.terms, layer.features, lists.blocks[lists.count]),
        codes_(data<uint8_t>(t.codes)),
        terms_(data<float>(t.terms)) {}

  // The best k of the `rescored` rows of `parts` that score best by their codes.
  std::tuple<Tensor, Tensor> best(const Probes& probes, const std::vector<ListPart>& parts, int64_t k,
                                  int64_t rescored) const {
    const int64_t looked = std::clamp<int64_t>(lists.offsets[lists.count], 1, rescored);  // lists do not hold more
    const std::vector<Reservoirs<float>> found = first_look(probes, parts, looked);
    Tensor values = empty({layer.batch, k}, scalar_type_of<T>()), indices = empty({layer.batch, k}, ScalarType::Long);
    Rescoring<T>(rows_, layer).run(op_, found, looked, k, mutable_data<T>(values), mutable_data<int64_t>(indices));
    return {values, indices};
  }

  const SearchedLayer<T> layer;
  const Lists lists;
  const CodedInputs inputs;

 private:
  // Offers the parts' rows to their samples. A few parts that follow one another are one worker's, which asks for the
  // next while it is at one.
  std::vector<Reservoirs<float>> first_look(const Probes& probes, const std::vector<ListPart>& parts, int64_t k) const {
    const CodedProblem problem = inputs.problem(nullptr);
    const int64_t items = std::ssize(parts),
                  workers = std::min(workers_for(items), bytes_of(parts) / kBytesAThread + 1);
    const int64_t at_a_time = std::clamp<int64_t>(items / (8 * workers), 1, kPartsATime);
    std::vector<Reservoirs<float>> reservoirs(workers);
    share_out((items + at_a_time - 1) / at_a_time, workers, [&](int64_t worker, int64_t share) {
      if (reservoirs[worker].empty()) reservoirs[worker].clear(layer.batch, k);
      for (int64_t item = share * at_a_time; item < std::min(items, (share + 1) * at_a_time); ++item) {
        const ListPart& part = parts[item];
        kernels().quads.offer_coded(problem, rows_of(part), rows_of(parts[std::min(item + 1, items - 1)]),
                                    probes.ids.data() + probes.offsets[part.list], probes.count(part.list),
                                    reservoirs[worker].best());
      }
    });
    return reservoirs;
  }

  int64_t bytes_of(const std::vector<ListPart>& parts) const {
    int64_t rows = 0;
    for (const ListPart& part : parts) rows += part.end - part.begin;
    return rows * 4 * coded_.quads;
  }

  CodedRows rows_of(const ListPart& part) const {
    const int64_t block = part.block(lists);
    return {.codes = codes_ + coded_.code_at(block),
            .terms = terms_ + coded_.term_at(block),
            .ids = lists.rows + part.begin,
            .count = part.end - part.begin};
  }

  const char* op_;
  StoredRows<T> rows_;
  CodedLists coded_;
  const uint8_t* codes_;
  const float* terms_;
};

void check_counts(const char* op, int64_t k, int64_t rescored) {
  check(1 <= k && k <= INT32_MAX, op, "k: expected at least 1 and at most 2^31 - 1, got ", k);
  check(rescored >= k, op, "rescored: expected at least k, got ", rescored);
}

// Which lists each sample looks into, (B, most), -1 for none: the best `probes`, and as many more, up to `most`, as
// hold k rows.
template <class T>
std::vector<int32_t> choose_lists(const ListSearch<T>& search, const CodedCenters& centers, double radius_weight,
                                  int64_t probes, int64_t most, int64_t k) {
  const SearchedLayer<T>& layer = search.layer;
  std::vector<float> spread_weight(layer.batch);
  std::vector<int32_t> chosen(layer.batch * most, -1);
  const CodedProblem problem = search.inputs.problem(spread_weight.data());
  parallel_tiles(layer.batch, kRankedTogether, centers.lists * layer.features, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* x = layer.input + b * layer.features;
      spread_weight[b] =
          static_cast<float>(radius_weight * std::sqrt(std::inner_product(x, x + layer.features, x, 1.0)));
    }
    std::vector<int32_t> found;
    std::vector<uint64_t> best;
    centers.score(0, problem, begin, end, [&](int64_t b, const float* scores) {
      best_scores(scores, centers.lists, most, most > probes, found, best);
      int64_t rows = 0;
      for (int64_t p = 0; p < most && (p < probes || rows < k); ++p) {
        chosen[b * most + p] = static_cast<int32_t>(best[p]);
        rows += search.lists.size(chosen[b * most + p]);
      }
    });
  });
  return chosen;
}

}  // namespace

// The best k of the `rescored` rows that score best by their codes.
std::tuple<Tensor, Tensor> topk_lists(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                      Tensor list_rows, Tensor codes, Tensor terms, Tensor probes, int64_t k,
                                      int64_t rescored, int64_t list_cap, int64_t seed) {
  constexpr const char* op = "topk_lists";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const ListSearch<T> search(op, {input, weight, bias, list_offsets, list_rows, codes, terms});
    const int64_t batch = search.layer.batch, lists = search.lists.count;
    check_tensor(op, "probes", probes, ScalarType::Long, {batch, -1});
    const int64_t* probe = data<int64_t>(probes);
    for (int64_t i = 0; i < probes.numel(); ++i)
      check(-1 <= probe[i] && probe[i] < lists, op, "probes: expected values in [-1, ", lists, "), got ", probe[i]);
    check_counts(op, k, rescored);
    check(list_cap >= 1, op, "list_cap: expected at least 1, got ", list_cap);
    const Probes probed(probe, probes.numel(), probes.size(1), lists);
    return search.best(probed, parts_of(search.lists, probed, list_cap, seed), k, rescored);
  });
}

// As topk_lists, of the `probes` lists whose centers score best, <center, x> + bias + radius_weight |(x, 1)| radius, or
// of up to `enough` where these hold fewer than k rows.
std::tuple<Tensor, Tensor> search_lists(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                        Tensor list_rows, Tensor codes, Tensor terms, Tensor center_codes,
                                        Tensor center_terms, double radius_weight, int64_t probes, int64_t enough,
                                        int64_t k, int64_t rescored) {
  constexpr const char* op = "search_lists";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const ListSearch<T> search(op, {input, weight, bias, list_offsets, list_rows, codes, terms});
    const int64_t lists = search.lists.count;
    const CodedCenters centers(op, "center_codes", center_codes, "center_terms", center_terms, lists,
                               search.layer.features);
    check(centers.tables == 1, op, "center_codes: expected those of one table, got ", centers.tables);
    check_integer(op, "probes", probes, 1, lists);
    check_integer(op, "enough", enough, 1, lists);
    check_counts(op, k, rescored);
    const int64_t most = std::max(probes, enough);
    const std::vector<int32_t> chosen = choose_lists(search, centers, radius_weight, probes, most, k);
    const Probes probed(chosen.data(), std::ssize(chosen), most, lists);
    return search.best(probed, parts_of(search.lists, probed, INT64_MAX, 0), k, rescored);
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("topk_lists", TORCH_BOX(&topk_lists));
  m.impl("search_lists", TORCH_BOX(&search_lists));
}

}  // namespace slide_torch
