// Rows of lists as codes of seven bits, and the best k of some lists: a first look at a fourth of the bytes, after
// which the best are scored exactly. As in topk.cpp, the order of candidates is total, so that it does not matter which
// thread meets which row.
#include <algorithm>
#include <atomic>

#include "../common/random.h"
#include "../common/reservoirs.h"
#include "../common/stored_rows.h"
#include "coded_inputs.h"
#include "lists.h"

namespace slide_torch {
namespace {

constexpr int64_t kRowsATime = 512;  // of a list, by one thread
constexpr int64_t kPartsATime = 16;  // of lists
static_assert(kRowsATime % kBlockRows == 0);

// codes (any, quads of features, 16, 4) and terms (any, 2, 16): see code_lists_.
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

// places[row] = where the row stands among the rows of all blocks, or -1. A part of the rows is one thread's: places
// lie in no order, and two writers of one cache line wait for each other.
void write_places(const Lists& lists, int64_t rows, int32_t* places) {
  parallel_for(0, rows, kGrainWork, [&](int64_t first, int64_t last) {
    std::fill(places + first, places + last, -1);
    for (int64_t l = 0; l < lists.count; ++l)
      for (int64_t i = lists.offsets[l]; i < lists.offsets[l + 1]; ++i) {
        const int32_t row = lists.rows[i];
        if (first <= row && row < last)
          places[row] = static_cast<int32_t>(lists.blocks[l] * kBlockRows + i - lists.offsets[l]);
      }
  });
}

// Which samples probe each list: those of list l are at [offsets[l], offsets[l + 1]) of `ids`.
struct Probes {
  std::vector<int64_t> offsets;
  std::vector<int64_t> ids;

  // From probes (B, any), of which -1 is no list.
  Probes(const char* op, const Tensor& probes, int64_t batch, int64_t lists) : offsets(lists + 1, 0) {
    check_tensor(op, "probes", probes, ScalarType::Long, {batch, -1});
    const int64_t count = probes.numel(), each = probes.size(1);
    const int64_t* probe = data<int64_t>(probes);
    for (int64_t i = 0; i < count; ++i) {
      check(-1 <= probe[i] && probe[i] < lists, op, "probes: expected values in [-1, ", lists, "), got ", probe[i]);
      if (probe[i] >= 0) ++offsets[probe[i] + 1];
    }
    for (int64_t l = 0; l < lists; ++l) offsets[l + 1] += offsets[l];
    ids.resize(count);
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (probe[i] >= 0) ids[next[probe[i]]++] = i / each;
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
  for (int64_t l = 0; l < lists.count; ++l) {
    if (probes.count(l) == 0) continue;
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

// Offers the parts' rows to their samples. A few parts that follow one another are one worker's, which asks for the
// next while it is at one. `rows_of` gives the coded rows of a part.
template <class F>
std::vector<Reservoirs<float>> first_look(const Probes& probes, const std::vector<ListPart>& parts,
                                          const CodedInputs& inputs, int64_t k, const F& rows_of) {
  const CodedProblem problem = inputs.problem(nullptr);
  const int64_t items = std::ssize(parts), workers = workers_for(items);
  const int64_t at_a_time = std::clamp<int64_t>(items / (8 * workers), 1, kPartsATime);
  std::vector<Reservoirs<float>> reservoirs(workers);
  share_out((items + at_a_time - 1) / at_a_time, workers, [&](int64_t worker, int64_t share) {
    if (reservoirs[worker].empty()) reservoirs[worker].clear(inputs.batch(), k);
    for (int64_t item = share * at_a_time; item < std::min(items, (share + 1) * at_a_time); ++item) {
      const ListPart& part = parts[item];
      kernels().quads.offer_coded(problem, rows_of(part), rows_of(parts[std::min(item + 1, items - 1)]),
                                  probes.ids.data() + probes.offsets[part.list], probes.count(part.list),
                                  reservoirs[worker].best());
    }
  });
  return reservoirs;
}

// Scores each sample's best `rescored` exactly; values and ids (B, k) get the best of these.
template <class T>
class Rescoring {
 public:
  Rescoring(const StoredRows<T>& rows, const T* bias, int64_t neurons, int64_t features, const T* x)
      : rows_(rows), bias_(bias), neurons_(neurons), features_(features), x_(x) {}

  void run(const char* op, const std::vector<Reservoirs<float>>& reservoirs, int64_t batch, int64_t rescored, int64_t k,
           T* values, int64_t* ids) const {
    std::atomic<bool> stray{false};
    parallel_for(0, batch, grain(2 * rescored * features_), [&](int64_t first, int64_t last) {
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
    check(!stray, op, "list_rows: expected values in [0, ", neurons_, ")");
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
      inside &= 0 <= id && id < neurons_;
    }
    if (!inside) return false;
    for (size_t i = count; i < padded; ++i) room.rows[i] = room.rows[count - 1];
    rows_.score(bias_, x_ + b * features_, room.rows.data(), static_cast<int64_t>(padded), room.scores.data());
    for (size_t i = 0; i < count; ++i) room.best[i] = {room.scores[i], room.rows[i]};
    return true;
  }

  const StoredRows<T>& rows_;
  const T* bias_;
  int64_t neurons_, features_;
  const T* x_;
};

}  // namespace

// Rows of lists as codes: into codes (blocks or more, quads, 16, 4), of 16 rows of one list and all quads of features,
// into terms (the same, 2, 16), what a row's codes are to be multiplied by, and its bias, and into places
// (N), where each row stands among the rows of all blocks, or -1. Returns centers and radius as list_centers does: a
// list's rows are in the cache by then.
std::tuple<Tensor, Tensor> code_lists_(Tensor codes, Tensor terms, Tensor places, Tensor weight,
                                       std::optional<Tensor> bias, Tensor list_offsets, Tensor list_rows) {
  constexpr const char* op = "code_lists_";
  return dispatch_real(op, weight.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const RealRows<T> rows(op, weight, bias);
    const Lists lists(op, list_offsets, list_rows);
    check_range(op, "list_rows", lists.rows, list_rows.numel(), rows.count);
    check(lists.blocks[lists.count] < INT32_MAX / kBlockRows, op, "list_rows: expected fewer than 2^31 places");
    const CodedLists coded(op, codes, terms, rows.features, lists.blocks[lists.count]);
    check_tensor(op, "places", places, ScalarType::Int, {rows.count});
    Centers<T> centers(rows, lists, bias.has_value());
    write_places(lists, rows.count, mutable_data<int32_t>(places));
    uint8_t* code = mutable_data<uint8_t>(codes);
    float* term = mutable_data<float>(terms);
    const int64_t workers = workers_for(lists.count);
    std::vector<uint8_t> scratch(workers * coded.code_at(1));
    share_out(lists.count, workers, [&](int64_t worker, int64_t l) {
      centers.find(l);
      const int64_t block = lists.blocks[l];
      real_kernels<T>().code_rows(rows.weight, rows.bias, rows.features, lists.rows_of(l), lists.size(l),
                                  code + coded.code_at(block), term + coded.term_at(block),
                                  scratch.data() + coded.code_at(worker));
    });
    return centers.tensors();
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

// The best k of the `rescored` rows that score best by their codes.
std::tuple<Tensor, Tensor> topk_lists(Tensor input, Tensor weight, std::optional<Tensor> bias, Tensor list_offsets,
                                      Tensor list_rows, Tensor codes, Tensor terms, Tensor probes, int64_t k,
                                      int64_t rescored, int64_t list_cap, int64_t seed) {
  constexpr const char* op = "topk_lists";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    check(weight.dim() == 2, op, "weight: expected shape (N, d), got ", shape_of(weight));
    const int64_t neurons = weight.size(0), features = weight.size(1);
    check_tensor(op, "input", input, scalar_type_of<T>(), {-1, features});
    check_tensor(op, "weight", weight, stored_dtype<T>(weight), {-1, -1});
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {neurons});
    const int64_t batch = input.size(0);
    const Lists lists(op, list_offsets, list_rows);
    const CodedLists coded(op, codes, terms, features, lists.blocks[lists.count]);
    const Probes probed(op, probes, batch, lists.count);
    check(1 <= k && k <= INT32_MAX, op, "k: expected at least 1 and at most 2^31 - 1, got ", k);
    check(rescored >= k, op, "rescored: expected at least k, got ", rescored);
    check(list_cap >= 1, op, "list_cap: expected at least 1, got ", list_cap);
    const int64_t looked = std::clamp<int64_t>(list_rows.numel(), 1, rescored);  // lists do not hold more

    const T* x = data<T>(input);
    const std::vector<ListPart> parts = parts_of(lists, probed, list_cap, seed);
    const CodedInputs inputs(x, batch, features);
    const uint8_t* code = data<uint8_t>(codes);
    const float* term = data<float>(terms);
    const std::vector<Reservoirs<float>> reservoirs =
        first_look(probed, parts, inputs, looked, [&](const ListPart& part) -> CodedRows {
          const int64_t block = part.block(lists);
          return {.codes = code + coded.code_at(block),
                  .terms = term + coded.term_at(block),
                  .ids = lists.rows + part.begin,
                  .first = 0,
                  .count = part.end - part.begin};
        });
    Tensor values = empty({batch, k}, input.scalar_type()), indices = empty({batch, k}, ScalarType::Long);
    const StoredRows<T> stored(weight, features);
    Rescoring<T>(stored, data_or_null<T>(bias), neurons, features, x)
        .run(op, reservoirs, batch, looked, k, mutable_data<T>(values), mutable_data<int64_t>(indices));
    return {values, indices};
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("code_lists_", TORCH_BOX(&code_lists_));
  m.impl("recode_rows_", TORCH_BOX(&recode_rows_));
  m.impl("topk_lists", TORCH_BOX(&topk_lists));
}

}  // namespace slide_torch
