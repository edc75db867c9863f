// The nearest of very many centroids, found by way of groups of them.
#include <algorithm>

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
    check_tensor(op, "offsets", offsets, ScalarType::Long, {groups + 1});
    check_tensor(op, "members", members, ScalarType::Int, {size});
    check_offsets(op, "offsets", data<int64_t>(offsets), groups, size);
    check_range(op, "members", data<int32_t>(members), size, size);
  }

  // Groups that have any members.
  std::vector<int64_t> used() const {
    std::vector<int64_t> found;
    for (int64_t g = 0; g < group_centroids.size(0); ++g)
      if (data<int64_t>(offsets)[g] < data<int64_t>(offsets)[g + 1]) found.push_back(g);
    return found;
  }
};

// The groups in panels of transposed centroids, as the kernel takes them.
template <class T>
class PackedGroups {
 public:
  PackedGroups(const GroupArgs& args, int64_t width)
      : width_(width), used_(args.used()), panels_(used_.size() + 1, 0), columns_(real_kernels<T>().tile_columns) {
    const int64_t* offset = data<int64_t>(args.offsets);
    for (int64_t g = 0; g < count(); ++g)
      panels_[g + 1] = panels_[g] + (offset[used_[g] + 1] - offset[used_[g]] + columns_ - 1) / columns_;
    coarse_.resize(coarse_panels() * columns_ * width);
    for (int64_t g = 0; g < count(); ++g) pack(data<float>(args.group_centroids) + used_[g] * width, g, coarse_);
    packed_.resize(panels_[count()] * columns_ * width);
    ids_.resize(panels_[count()] * columns_);
    parallel_for(0, count(), grain(2 * width * (args.centroids.size(0) / count() + 1)),
                 [&](int64_t first, int64_t last) {
                   for (int64_t g = first; g < last; ++g) pack_group(args, g);
                 });
  }

  int64_t count() const { return static_cast<int64_t>(used_.size()); }
  int64_t coarse_panels() const { return (count() + columns_ - 1) / columns_; }
  CentroidGroups<T> looking_into(int64_t groups) const {
    return {.coarse = coarse_.data(),
            .packed = packed_.data(),
            .ids = ids_.data(),
            .panels = panels_.data(),
            .count = count(),
            .looked = groups};
  }

 private:
  void pack(const float* source, int64_t column, std::vector<T>& target) const {
    for (int64_t i = 0; i < width_; ++i)
      target[(column / columns_ * width_ + i) * columns_ + column % columns_] = static_cast<T>(source[i]);
  }

  void pack_group(const GroupArgs& args, int64_t g) {
    const int64_t begin = data<int64_t>(args.offsets)[used_[g]], end = data<int64_t>(args.offsets)[used_[g] + 1];
    for (int64_t column = panels_[g] * columns_; column < panels_[g + 1] * columns_; ++column) {
      ids_[column] = data<int32_t>(args.members)[std::min(begin + column - panels_[g] * columns_, end - 1)];
      pack(data<float>(args.centroids) + ids_[column] * width_, column, packed_);
    }
  }

  int64_t width_;
  std::vector<int64_t> used_, panels_;
  int64_t columns_;
  std::vector<T> coarse_, packed_;
  std::vector<int32_t> ids_;
};

template <class T>
std::vector<int32_t> search(const RowArgs<T>& rows, const PackedGroups<T>& groups, int64_t looked) {
  const auto& k = real_kernels<T>();
  const CentroidGroups<T> all = groups.looking_into(looked);
  std::vector<int32_t> found(rows.count);
  const int64_t chunks = (rows.count + kGroupedRows - 1) / kGroupedRows, width = rows.in.width();
  parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<T> numbers(kGroupedRows * (width + 1) + k.tile_rows * groups.coarse_panels() * k.tile_columns);
    std::vector<int32_t> places(2 * kGroupedRows * looked);
    std::vector<int64_t> starts(groups.count() + 1);
    T* best = numbers.data() + kGroupedRows * width;
    const GroupScratch<T> scratch = {.rows = numbers.data(),
                                     .best = best,
                                     .coarse = best + kGroupedRows,
                                     .chosen = places.data(),
                                     .members = places.data() + kGroupedRows * looked,
                                     .starts = starts.data()};
    for (int64_t chunk = first; chunk < last; ++chunk)
      k.nearest_in_groups(rows.in, all, found.data(), chunk * kGroupedRows,
                          std::min(rows.count, (chunk + 1) * kGroupedRows), scratch);
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
    const PackedGroups<T> groups(group_args, row_args.in.width());
    const std::vector<int32_t> found = search(row_args, groups, std::min(looked, groups.count()));
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
