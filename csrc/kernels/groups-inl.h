// The nearest of very many centroids, found by way of groups of them. Rows and centroids are small integers, whose
// products add_quads sums; a sum is multiplied by one float, the centroid's unit, and so is the same at every
// instruction set. A row's own unit does not matter to the order of centroids.

static_assert(kCodedSamples <= kRowsTogether);
constexpr int64_t kBlocksTogether = 8;  // of a group; they stay in the first-level cache

// Calls body<n>(rows) for groups of n `members`.
template <class F>
inline void for_rows(const int32_t* members, int64_t count, const F& body) {
  int64_t i = 0;
  for (; i + kCodedSamples <= count; i += kCodedSamples) body.template operator()<kCodedSamples>(members + i);
  for (; i < count; ++i) body.template operator()<1>(members + i);
}

// scores[i * stride + c] = what row members[i] scores with centroid c of a block.
template <int64_t Rows>
inline void score_block(const CodedShape& shape, const CodedCentroids& centroids, int64_t block,
                        const GroupScratch& rows, const int32_t* members, float* scores, int64_t stride) {
  const uint8_t* codes = centroids.codes + block * shape.block_bytes();
  const int32_t* own = centroids.extras + block * kBlockRows;
  const float* units = centroids.units + block * kBlockRows;
  CodedInts sum[Rows][kCodedVectors];
  const int32_t* input[Rows];
  for (int64_t i = 0; i < Rows; ++i) {
    input[i] = rows.codes + members[i] * shape.quads;
    const CodedShorts extras = (CodedShorts)(CodedInts{} + rows.extras[members[i]]);
    for (int64_t j = 0; j < kCodedVectors; ++j)
      sum[i][j] = (multiply_pairs(load<CodedShorts>(own + j * kCodedLanes), extras) >> (2 * kExtraBits)) -
                  kCenterOffset * rows.sums[members[i]];
  }
  for (int64_t q = 0; q < shape.quads; q += 2) {
    CenterBytes code[2][kCodedVectors];
    for (int64_t p = 0; p < 2; ++p)
      for (int64_t j = 0; j < kCodedVectors; ++j)
        code[p][j] = load<CenterBytes>(codes + (q + p) * 4 * kBlockRows + j * kCodedBytes);
    for (int64_t i = 0; i < Rows; ++i) {
      const CodedInts x = CodedInts{} + input[i][q], y = CodedInts{} + input[i][q + 1];
      for (int64_t j = 0; j < kCodedVectors; ++j) sum[i][j] = add_quads(sum[i][j], code[0][j], x, code[1][j], y);
    }
  }
  for (int64_t i = 0; i < Rows; ++i)
    for (int64_t j = 0; j < kCodedVectors; ++j)
      store(scores + i * stride + j * kCodedLanes,
            __builtin_convertvector(sum[i][j], CodedFloats) * load<CodedFloats>(units + j * kCodedLanes));
}

// The places of the `wanted` largest of `scores` (blocks * kBlockRows), of equal ones the first, or -1 where there are
// no more but NaN. Overwrites those that it finds.
inline void largest_places(float* scores, int64_t blocks, int64_t wanted, int32_t* places) {
  const int64_t vectors = blocks * kCodedVectors;
  for (int64_t p = 0; p < wanted; ++p) {
    CodedFloats largest = CodedFloats{} - __builtin_huge_valf();
    for (int64_t v = 0; v < vectors; ++v) {
      const CodedFloats score = load<CodedFloats>(scores + v * kCodedLanes);
      largest = score > largest ? score : largest;
    }
    float lane[kCodedLanes];
    store(lane, largest);
    const float most = largest_of_halves<float, kCodedLanes>(lane);
    places[p] = -1;
    if (most == -__builtin_huge_valf()) continue;
    uint32_t found = 0;
    int64_t v = 0;
    for (; (found = lane_bits(load<CodedFloats>(scores + v * kCodedLanes) == most)) == 0; ++v) {
    }
    places[p] = static_cast<int32_t>(v * kCodedLanes + __builtin_ctz(found));
    scores[places[p]] = -__builtin_huge_valf();
  }
}

// The best groups of some rows.
template <int64_t Rows>
inline void choose_groups(const CentroidGroups& groups, const GroupScratch& rows, const int32_t* members) {
  const int64_t blocks = (groups.count + kBlockRows - 1) / kBlockRows, stride = blocks * kBlockRows;
  for (int64_t block = 0; block < blocks; ++block)
    score_block<Rows>(groups.shape, groups.coarse, block, rows, members, rows.scores + block * kBlockRows, stride);
  for (int64_t i = 0; i < Rows; ++i)
    largest_places(rows.scores + i * stride, blocks, groups.looked, rows.chosen + members[i] * groups.looked);
}

// Offers the centroids of blocks [begin, end) to some rows; of equal ones the smallest number wins.
template <int64_t Rows>
inline void offer_centroids(const CentroidGroups& groups, int64_t begin, int64_t end, const GroupScratch& rows,
                            const int32_t* members, int32_t* codes) {
  float scores[Rows * kBlockRows];
  for (int64_t block = begin; block < end; ++block) {
    score_block<Rows>(groups.shape, groups.members, block, rows, members, scores, kBlockRows);
    for (int64_t i = 0; i < Rows; ++i) {
      float& best = rows.best[members[i]];
      int32_t& code = codes[members[i]];
      uint32_t worth = 0;  // a bit for each centroid; never set for NaN
      for (int64_t j = 0; j < kCodedVectors; ++j)
        worth |= lane_bits(load<CodedFloats>(scores + i * kBlockRows + j * kCodedLanes) >= best) << (j * kCodedLanes);
      for (; worth; worth &= worth - 1) {
        const int c = __builtin_ctz(worth);
        const float score = scores[i * kBlockRows + c];
        const int32_t id = groups.ids[block * kBlockRows + c];
        if (score < best || (score == best && 0 <= code && code < id)) continue;
        best = score;
        code = id;
      }
    }
  }
}

// The rows that chose each group, `members`, from the `count` choices of all rows; starts[g] becomes the end of group
// g's.
inline void list_members(int64_t groups, int64_t looked, int64_t count, const GroupScratch& rows) {
  for (int64_t g = 0; g <= groups; ++g) rows.starts[g] = 0;
  for (int64_t i = 0; i < count; ++i)
    if (rows.chosen[i] >= 0) ++rows.starts[rows.chosen[i] + 1];
  for (int64_t g = 0; g < groups; ++g) rows.starts[g + 1] += rows.starts[g];
  for (int64_t i = 0; i < count; ++i)
    if (rows.chosen[i] >= 0) rows.members[rows.starts[rows.chosen[i]]++] = static_cast<int32_t>(i / looked);
}

// codes (count): the best centroid of each row's best groups, -1 where the row is not one of the `finite` `members`.
// Group by group, so that its centroids meet many rows while they are in the cache.
inline void nearest_in_groups(const CentroidGroups& groups, int64_t count, int64_t finite, const GroupScratch& rows,
                              int32_t* codes) {
  const int64_t chosen = count * groups.looked;
  for (int64_t i = 0; i < chosen; ++i) rows.chosen[i] = -1;
  for (int64_t i = 0; i < count; ++i) {
    rows.best[i] = -__builtin_huge_valf();
    codes[i] = -1;
  }
  for_rows(rows.members, finite, [&]<int64_t Rows>(const int32_t* some) { choose_groups<Rows>(groups, rows, some); });
  list_members(groups.count, groups.looked, chosen, rows);
  int64_t first = 0;
  for (int64_t g = 0; g < groups.count; first = rows.starts[g++])
    for (int64_t from = groups.blocks[g]; from < groups.blocks[g + 1]; from += kBlocksTogether) {
      const int64_t to = min_of(from + kBlocksTogether, groups.blocks[g + 1]);
      for_rows(rows.members + first, rows.starts[g] - first,
               [&]<int64_t Rows>(const int32_t* some) { offer_centroids<Rows>(groups, from, to, rows, some, codes); });
    }
}
