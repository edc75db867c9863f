// Rows' codes as rows go from list to list, and what is known of a list from them: a fourth of the bytes that the rows
// themselves take, in order.
#include <cstring>

#include "coded_lists.h"

namespace slide_torch {
namespace {

constexpr int64_t kSegments = 16;  // of lists, of which one at a time is moved: so small a part of the codes is kept

// Blocks as they were, while new ones are written over them: those from the first that has yet to be read.
class KeptBlocks {
 public:
  KeptBlocks(const CodedLists& coded, const uint8_t* codes, const float* terms, int64_t room)
      : coded_(coded),
        codes_(codes),
        terms_(terms),
        room_(std::max<int64_t>(1, room)),
        kept_codes_(coded.code_at(room_)),
        kept_terms_(coded.term_at(room_)) {}

  // Blocks [first, last), in the place of those `room` before them.
  void keep(int64_t first, int64_t last) {
    parallel_for(first, last, grain(coded_.code_at(1) / 16), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::copy_n(codes_ + coded_.code_at(b), coded_.code_at(1), kept_codes_.data() + coded_.code_at(b % room_));
        std::copy_n(terms_ + coded_.term_at(b), coded_.term_at(1), kept_terms_.data() + coded_.term_at(b % room_));
      }
    });
  }

  // Of the row that stood at `place`: its first quad, of which the next is a block's width on, and its scale.
  const uint8_t* code(int32_t place) const {
    return kept_codes_.data() + coded_.code_at(place / kBlockRows % room_) + 4 * (place % kBlockRows);
  }
  const float* term(int32_t place) const {
    return kept_terms_.data() + coded_.term_at(place / kBlockRows % room_) + place % kBlockRows;
  }

 private:
  const CodedLists& coded_;
  const uint8_t* codes_;
  const float* terms_;
  int64_t room_;
  std::vector<uint8_t> kept_codes_;
  std::vector<float> kept_terms_;
};

// Moves rows' codes: of the rows of a list those that are not `fresh` stood in the same list before.
class Move {
 public:
  Move(const CodedLists& coded, const Lists& lists, const std::vector<int64_t>& old_blocks, uint8_t* codes,
       float* terms, const int32_t* places, const std::vector<uint8_t>& fresh)
      : coded_(coded),
        lists_(lists),
        old_blocks_(old_blocks),
        codes_(codes),
        terms_(terms),
        places_(places),
        fresh_(fresh),
        blank_(coded.code_at(1), kCenterOffset) {}

  // Segment after segment, so that what is kept of the old blocks is a part of them.
  void run() const {
    std::vector<int64_t> cut(kSegments + 1), needed(kSegments + 1, 0);
    for (int64_t s = 0; s <= kSegments; ++s) cut[s] = lists_.count * s / kSegments;
    const int64_t old_end = old_blocks_[lists_.count];
    int64_t room = 0;
    for (int64_t s = 0; s < kSegments; ++s) {  // until where old blocks are kept before the segment is written
      const int64_t end = cut[s + 1];
      needed[s + 1] = std::max({needed[s], old_blocks_[end], std::min(old_end, lists_.blocks[end])});
      room = std::max(room, needed[s + 1] - old_blocks_[cut[s]]);
    }
    KeptBlocks kept(coded_, codes_, terms_, room);
    const int64_t rows_a_list = lists_.offsets[lists_.count] / std::max<int64_t>(1, lists_.count) + 1;
    for (int64_t s = 0; s < kSegments; ++s) {
      kept.keep(needed[s], needed[s + 1]);
      parallel_for(cut[s], cut[s + 1], grain(rows_a_list * coded_.quads), [&](int64_t first, int64_t last) {
        for (int64_t l = first; l < last; ++l) move_list(l, kept);
      });
    }
    const int64_t end = lists_.blocks[lists_.count];
    if (end < old_end) {
      std::fill(codes_ + coded_.code_at(end), codes_ + coded_.code_at(old_end), uint8_t{0});
      std::fill(terms_ + coded_.term_at(end), terms_ + coded_.term_at(old_end), 0.0f);
    }
  }

 private:
  void move_list(int64_t l, const KeptBlocks& kept) const {
    const int32_t* ids = lists_.rows_of(l);
    for (int64_t first = 0; first < lists_.size(l); first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, lists_.size(l) - first), block = lists_.blocks[l] + first / kBlockRows;
      int32_t from[kBlockRows];
      bool together = count == kBlockRows;
      for (int64_t r = 0; r < count; ++r) {
        from[r] = fresh_[ids[first + r]] ? -1 : places_[ids[first + r]];
        together &= from[0] >= 0 && from[r] == from[0] + r && from[0] % kBlockRows == 0;
      }
      for (int64_t r = count; r < kBlockRows; ++r) from[r] = -1;
      if (together) {
        std::copy_n(kept.code(from[0]), coded_.code_at(1), codes_ + coded_.code_at(block));
        std::copy_n(kept.term(from[0]), coded_.term_at(1), terms_ + coded_.term_at(block));
      } else {
        gather(from, kept, codes_ + coded_.code_at(block), terms_ + coded_.term_at(block));
      }
    }
  }

  // A block of rows that stood at the places `from`, or, where that is -1, of zeros.
  void gather(const int32_t* from, const KeptBlocks& kept, uint8_t* codes, float* terms) const {
    const uint8_t* source[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const bool any = from[r] >= 0;
      source[r] = any ? kept.code(from[r]) : blank_.data();
      for (int64_t t = 0; t < kRowTerms; ++t)
        terms[t * kBlockRows + r] = any ? kept.term(from[r])[t * kBlockRows] : 0.0f;
    }
    // read before anything is written: a store might be what the next load waits for
    typedef int32_t Four __attribute__((vector_size(16)));
    for (int64_t q = 0; q < coded_.quads; ++q) {
      Four quads[kBlockRows / 4];
      for (int64_t i = 0; i < kBlockRows / 4; ++i) {
        int32_t quad[4];
        for (int64_t r = 0; r < 4; ++r) std::memcpy(quad + r, source[4 * i + r] + 4 * q * kBlockRows, 4);
        quads[i] = Four{quad[0], quad[1], quad[2], quad[3]};
      }
      std::memcpy(codes + 4 * q * kBlockRows, quads, sizeof(quads));
    }
  }

  const CodedLists& coded_;
  const Lists& lists_;
  const std::vector<int64_t>& old_blocks_;
  uint8_t* codes_;
  float* terms_;
  const int32_t* places_;
  const std::vector<uint8_t>& fresh_;
  std::vector<uint8_t> blank_;  // a block without rows
};

// From (lists + 1) offsets the first block of each list, and the end, which must be among those that are coded.
std::vector<int64_t> checked_blocks(const char* op, const char* name, const Tensor& offsets, const CodedLists& coded) {
  check_tensor(op, name, offsets, ScalarType::Long, {-1});
  const int64_t count = offsets.numel() - 1;
  check(count >= 0, op, name, ": expected shape (lists + 1), got ", shape_of(offsets));
  const int64_t* offset = data<int64_t>(offsets);
  check_offsets(op, name, offset, count, offset[count]);
  check(offset[count] <= coded.blocks * kBlockRows, op, name, ": expected at most ", coded.blocks * kBlockRows,
        " rows, as there are codes for, got ", offset[count]);
  const std::vector<int64_t> blocks = first_blocks(offset, count);
  check(blocks[count] <= coded.blocks, op, "codes: expected at least ", blocks[count], " blocks, got ", coded.blocks);
  return blocks;
}

// The rows of each list that are not fresh must stand among the list's old blocks.
void check_old_places(const char* op, const Lists& lists, const std::vector<int64_t>& old_blocks, const int32_t* places,
                      const std::vector<uint8_t>& fresh) {
  const auto right = [&](int64_t l, int32_t row) {
    const int64_t block = places[row] < 0 ? -1 : places[row] / kBlockRows;
    return fresh[row] || (old_blocks[l] <= block && block < old_blocks[l + 1]);
  };
  const bool all = all_parts(lists.count, [&](int64_t first, int64_t last) {
    bool every = true;
    for (int64_t l = first; l < last; ++l)
      for (int64_t i = 0; i < lists.size(l); ++i) every &= right(l, lists.rows_of(l)[i]);
    return every;
  });
  for (int64_t l = 0; !all && l < lists.count; ++l)
    for (int64_t i = 0; i < lists.size(l); ++i) {
      const int32_t row = lists.rows_of(l)[i];
      check(right(l, row), op, "rows: expected all rows that are in another list than before, got no ", row,
            ", which is in list ", l, " and stood at ", places[row]);
    }
}

}  // namespace

// Moves the codes and terms of rows to where they stand in new lists, and writes places anew. `rows`, which may have
// left their lists, get no codes: recode_rows_ is to follow.
void move_codes_(Tensor codes, Tensor terms, Tensor places, Tensor old_offsets, Tensor list_offsets, Tensor list_rows,
                 Tensor rows) {
  constexpr const char* op = "move_codes_";
  check(codes.dim() == 4, op, "codes: expected shape (blocks, quads, 16, 4), got ", shape_of(codes));
  check_tensor(op, "places", places, ScalarType::Int, {-1});
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  const int64_t neurons = places.numel();
  const Lists lists(op, list_offsets, list_rows);
  check_range(op, "list_rows", lists.rows, list_rows.numel(), neurons);
  check_places_fit(op, lists);
  check(codes.size(1) % 2 == 0 && codes.size(1) < INT32_MAX, op, "codes: expected an even number of quads, got ",
        codes.size(1));
  const CodedLists coded(op, codes, terms, 4 * codes.size(1), lists.blocks[lists.count]);
  const std::vector<int64_t> old_blocks = checked_blocks(op, "old_offsets", old_offsets, coded);
  check(old_offsets.numel() == lists.count + 1, op, "old_offsets: expected ", lists.count + 1, " of them, got ",
        old_offsets.numel());
  const int64_t* row = data<int64_t>(rows);
  check_rows(op, row, rows.numel(), neurons);
  std::vector<uint8_t> fresh(neurons, 0);
  for (int64_t i = 0; i < rows.numel(); ++i) fresh[row[i]] = 1;
  int32_t* place = mutable_data<int32_t>(places);
  check_old_places(op, lists, old_blocks, place, fresh);
  Move(coded, lists, old_blocks, mutable_data<uint8_t>(codes), mutable_data<float>(terms), place, fresh).run();
  write_places(lists, neurons, place);
}

// What list_centers finds, of coded rows.
std::tuple<Tensor, Tensor> coded_centers(Tensor codes, Tensor terms, Tensor list_offsets, int64_t features,
                                         bool has_bias) {
  constexpr const char* op = "coded_centers";
  check_integer(op, "features", features, 1, INT32_MAX);
  const CodedLists coded(op, codes, terms, features, 0);
  const std::vector<int64_t> blocks = checked_blocks(op, "list_offsets", list_offsets, coded);
  const int64_t count = list_offsets.numel() - 1, width = features + (has_bias ? 1 : 0);
  const int64_t* offset = data<int64_t>(list_offsets);
  const uint8_t* code = data<uint8_t>(codes);
  const float* term = data<float>(terms);
  Tensor centers = empty({count, width}, ScalarType::Float), radius = empty({count}, ScalarType::Float);
  float* center = mutable_data<float>(centers);
  float* distance = mutable_data<float>(radius);
  share_out(count, workers_for(count), [&](int64_t, int64_t l) {
    float* own = center + l * width;
    kernels().coded_center(code + coded.code_at(blocks[l]), term + coded.term_at(blocks[l]), offset[l + 1] - offset[l],
                           features, own, has_bias ? own + features : nullptr, distance + l);
  });
  return {centers, radius};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("move_codes_", TORCH_BOX(&move_codes_));
  m.impl("coded_centers", TORCH_BOX(&coded_centers));
}

}  // namespace slide_torch
