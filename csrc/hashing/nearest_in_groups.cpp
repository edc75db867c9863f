// The nearest of very many centroids, found by way of groups of them. Rows and centroids are compared as seven-bit
// integers.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace slide_torch {
namespace {

// One table's centroids (2^bits, width) and the groups that they are in: members (2^bits) has the centroids' numbers,
// those of group g at [offsets[g], offsets[g + 1]).
struct GroupArgs {
  const Tensor& centroids;
  const Tensor& group_centroids;
  const Tensor& offsets;
  const Tensor& members;

  void check_for(const char* op, int64_t width) const {
    check_tensor(op, "centroids", centroids, ScalarType::Float, {-1, width});
    check_tensor(op, "group_centroids", group_centroids, ScalarType::Float, {-1, width});
    const int64_t size = centroids.size(0), groups = group_centroids.size(0);
    check(size >= 2 && size <= int64_t{1} << kMaxCodeBits, op, "centroids: expected 2 to 2^", kMaxCodeBits, ", got ",
          size);
    check(groups <= int64_t{1} << kMaxCodeBits, op, "group_centroids: expected at most 2^", kMaxCodeBits, ", got ",
          groups);
    check_tensor(op, "offsets", offsets, ScalarType::Long, {groups + 1});
    check_tensor(op, "members", members, ScalarType::Int, {size});
    check_offsets(op, "offsets", data<int64_t>(offsets), groups, size);
    check_range(op, "members", data<int32_t>(members), size, size);
  }

  // Groups that have any members.
  std::vector<int32_t> used() const {
    std::vector<int32_t> found;
    for (int64_t g = 0; g < group_centroids.size(0); ++g)
      if (data<int64_t>(offsets)[g] < data<int64_t>(offsets)[g + 1]) found.push_back(static_cast<int32_t>(g));
    return found;
  }
};

// Room for coded centroids.
struct CentroidRoom {
  std::vector<uint8_t> codes;
  std::vector<int32_t> extras;
  std::vector<float> units;

  CodedCentroids blocks(int64_t count, const CodedShape& shape) {
    codes.resize(count * shape.block_bytes());
    extras.resize(count * kBlockRows);
    units.resize(count * kBlockRows);
    return {.codes = codes.data(), .extras = extras.data(), .units = units.data()};
  }
};

int64_t blocks_of(int64_t centroids) {
  return (centroids + kBlockRows - 1) / kBlockRows;
}

// Sums of products stay below 2^31: those of features half of it, those of extras far less.
CodedShape shape_of_rows(const char* op, int64_t features, int64_t extras) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / (2 * kCenterOffset);
  check(features <= most, op, "input: expected at most ", most, " features, got ", features);
  return {.features = features,
          .extras = extras,
          .quads = quads_of(features),
          .limit = std::min<int64_t>(kCenterLimit, most / std::max<int64_t>(1, features))};
}

// The groups as the kernel takes them.
class CodedGroups {
 public:
  CodedGroups(const GroupArgs& args, const CodedShape& shape, int64_t looked) : used_(args.used()) {
    const int64_t* offset = data<int64_t>(args.offsets);
    const int32_t* member = data<int32_t>(args.members);
    const int64_t count = static_cast<int64_t>(used_.size());
    blocks_.assign(count + 1, 0);
    for (int64_t g = 0; g < count; ++g)
      blocks_[g + 1] = blocks_[g] + blocks_of(offset[used_[g] + 1] - offset[used_[g]]);
    ids_.assign(blocks_[count] * kBlockRows, -1);
    for (int64_t g = 0; g < count; ++g)
      std::copy(member + offset[used_[g]], member + offset[used_[g] + 1], ids_.begin() + blocks_[g] * kBlockRows);
    used_.resize(blocks_of(count) * kBlockRows, -1);
    all_ = {.shape = shape,
            .coarse = code(args.group_centroids, used_, shape, coarse_),
            .members = code(args.centroids, ids_, shape, members_),
            .blocks = blocks_.data(),
            .ids = ids_.data(),
            .count = count,
            .looked = std::min(looked, count)};
  }

  const CentroidGroups& all() const { return all_; }

 private:
  static CodedCentroids code(const Tensor& centroids, const std::vector<int32_t>& ids, const CodedShape& shape,
                             CentroidRoom& room) {
    const int64_t count = static_cast<int64_t>(ids.size()) / kBlockRows;
    const CodedCentroids out = room.blocks(count, shape);
    parallel_for(0, count, grain(4 * kBlockRows * shape.features), [&](int64_t first, int64_t last) {
      std::vector<int8_t> scratch(4 * shape.quads);
      kernels().code_centroids(data<float>(centroids), ids.data(), shape, first, last, out, scratch.data());
    });
    return out;
  }

  std::vector<int32_t> used_, ids_;
  std::vector<int64_t> blocks_;
  CentroidRoom coarse_, members_;
  CentroidGroups all_;
};

template <class T>
std::vector<int32_t> search(const RowArgs<T>& rows, const CentroidGroups& groups) {
  std::vector<int32_t> found(rows.count);
  const int64_t chunks = (rows.count + kGroupedRows - 1) / kGroupedRows, quads = groups.shape.quads;
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    const int64_t held = std::min(kGroupedRows, rows.count), looked = held * groups.looked;
    std::vector<int32_t> integers(held * (quads + 2) + 2 * looked);
    std::vector<float> scores(held + kRowsTogether * blocks_of(groups.count) * kBlockRows);
    std::vector<int64_t> starts(groups.count + 1);
    std::vector<T> row(rows.in.width());
    int32_t* sums = integers.data() + held * quads;
    const GroupScratch scratch = {.codes = integers.data(),
                                  .sums = sums,
                                  .extras = sums + held,
                                  .best = scores.data(),
                                  .chosen = sums + 2 * held,
                                  .members = sums + 2 * held + looked,
                                  .starts = starts.data(),
                                  .scores = scores.data() + held};
    for (int64_t begin = first * kGroupedRows; begin < std::min(rows.count, last * kGroupedRows);
         begin += kGroupedRows) {
      const int64_t end = std::min(rows.count, begin + kGroupedRows);
      const int64_t finite = real_kernels<T>().code_hashed_rows(rows.in, groups.shape, begin, end, scratch, row.data());
      kernels().quads.nearest_in_groups(groups, end - begin, finite, scratch, found.data() + begin);
    }
  });
  return found;
}

template <class Code>
void store(const std::vector<int32_t>& found, const Tensor& codes) {
  std::transform(found.begin(), found.end(), mutable_data<Code>(codes),
                 [](int32_t code) { return static_cast<Code>(code); });
}

}  // namespace

// As nearest_centroids for one table (1, n), looking only into the groups of centroids whose own centroids are nearest.
Tensor nearest_in_groups(Tensor input, std::optional<Tensor> bias, std::optional<Tensor> rows,
                         std::optional<Tensor> center, Tensor centroids, Tensor group_centroids, Tensor offsets,
                         Tensor members, int64_t looked, std::optional<double> norm_bound) {
  constexpr const char* op = "nearest_in_groups";
  return dispatch_real(op, input.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RowArgs<T> row_args(op, input, bias, rows, center, norm_bound);
    const GroupArgs group_args{
        .centroids = centroids, .group_centroids = group_centroids, .offsets = offsets, .members = members};
    group_args.check_for(op, row_args.in.width());
    check(looked >= 1, op, "looked: expected at least 1, got ", looked);
    const CodedGroups groups(group_args, shape_of_rows(op, row_args.in.features, row_args.in.extras()), looked);
    const std::vector<int32_t> found = search(row_args, groups.all());
    const bool narrow = centroids.size(0) <= int64_t{1} << 15;
    Tensor codes = empty({1, row_args.count}, narrow ? ScalarType::Short : ScalarType::Int);
    narrow ? store<int16_t>(found, codes) : store<int32_t>(found, codes);
    return codes;
  });
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("nearest_in_groups", TORCH_BOX(&nearest_in_groups));
}

}  // namespace slide_torch
