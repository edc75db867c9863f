// Drawing rows from a quadratic kernel, with shares alpha <h, w>^2 + 1 (Blanc & Rendle 2018): a binary tree over ranges
// of rows whose nodes know the sum of their rows' outer products, from which the sum of shares follows for any h.
//
// Points are drawn in [0, count), one in each stratum [t, t + 1); a node owns an interval, which it cuts in two for its
// halves, down to rows. All points go down together, so that a node is looked at once. The sums may be of older rows:
// what a node makes of them is the distribution that is drawn from, and a leaf cuts by the rows as they are.
#include <algorithm>
#include <bit>
#include <limits>

#include "../common/random.h"
#include "../common/stored_rows.h"

namespace slide_torch {
namespace {

constexpr int64_t kParts = 64;  // most threads that share the work

int64_t triangle(int64_t width) {
  return width * (width + 1) / 2;
}

// Of the sums of outer products of rows (features), with their bias.
int64_t size_of_sums(const char* op, int64_t features, bool has_bias) {
  check(features <= INT32_MAX, op, "weight: expected fewer than 2^31 columns, got ", features);
  return triangle(features + (has_bias ? 1 : 0));
}

struct Leaves {
  int64_t neurons;
  int64_t count;  // a power of two

  int64_t depth() const { return std::bit_width(static_cast<uint64_t>(count)) - 1; }
  // Rows [begin(node, depth), begin(node + 1, depth)) belong to a node of the heap that lies so deep.
  int64_t begin(int64_t node, int64_t depth) const { return (node - (int64_t{1} << depth)) * neurons >> depth; }
};

template <class T>
struct SumsOf {
  StoredRows<T> weight;
  const T* bias;
  int64_t features;
  int64_t size;
  Leaves leaves;
  T* sums;  // [0]: of all rows; [node]: of the left half of an inner node

  // Sets `total` to the node's sum, and the entries of all inner nodes below it.
  void build(int64_t node, int64_t depth, T* total) const {
    if (depth == leaves.depth()) {
      const int64_t begin = leaves.begin(node, depth), end = leaves.begin(node + 1, depth);
      std::vector<T> wide;
      real_kernels<T>().outer_sum(weight.range(begin, end, wide), bias ? bias + begin : nullptr, features, 0,
                                  end - begin, total);
      return;
    }
    T* left = sums + node * size;
    build(2 * node, depth + 1, left);
    build(2 * node + 1, depth + 1, total);
    for (int64_t i = 0; i < size; ++i) total[i] += left[i];
  }
};

struct Node {
  int64_t node, depth;
  double mass;          // what its rows' shares add up to, by the sums
  double low, high;     // its interval
  int64_t first, last;  // the points in it
  int64_t asked_first, asked_last;
};

struct Drawn {
  int32_t id;
  double inclusion;
};

// Probability that a row whose interval is [low, high) is drawn.
double inclusion_of(double low, double high) {
  const double boundary = std::floor(low) + 1;
  if (high <= boundary) return high - low;
  if (high >= boundary + 1) return 1;
  return 1 - (1 - (boundary - low)) * (1 - (high - boundary));
}

template <class T>
struct Drawing {
  StoredRows<T> weight;
  const T* bias;
  int64_t features;
  int64_t size;
  Leaves leaves;
  const T* sums;
  const T* queries;
  std::vector<T> factors;  // of each query's squared logit
  std::vector<T> form;     // sum of the queries' outer products, factors included, off the diagonal doubled
  double floor;            // that each row has, whatever its logits
  const double* points;
  const int32_t* asked;
  double* asked_inclusion;

  // A sum of squares, unless it overflowed or is a rounding error below 0.
  double squares(const T* of_rows) const {
    const double value = real_kernels<T>().dot_product(form.data(), of_rows, size);
    return value > 0 && value < std::numeric_limits<T>::max() ? value : 0;
  }

  std::pair<Node, Node> halves(const Node& n) const {
    const int64_t begin = leaves.begin(n.node, n.depth), middle = leaves.begin(2 * n.node + 1, n.depth + 1);
    const int64_t end = leaves.begin(n.node + 1, n.depth);
    const double left = squares(sums + n.node * size) + floor * static_cast<double>(middle - begin);
    const double right = std::max(n.mass - left, floor * static_cast<double>(end - middle));
    const double cut = n.low + (n.high - n.low) * (left / (left + right));
    const int64_t point = std::lower_bound(points + n.first, points + n.last, cut) - points;
    const int64_t ask = std::lower_bound(asked + n.asked_first, asked + n.asked_last, middle) - asked;
    return {{2 * n.node, n.depth + 1, left, n.low, cut, n.first, point, n.asked_first, ask},
            {2 * n.node + 1, n.depth + 1, right, cut, n.high, point, n.last, ask, n.asked_last}};
  }

  static bool wanted(const Node& n) { return n.first < n.last || n.asked_first < n.asked_last; }

  // Appends the rows below a node that its points fall on.
  void draw(const Node& n, std::vector<Drawn>& drawn) const {
    if (!wanted(n)) return;
    if (n.depth < leaves.depth()) {
      const auto [left, right] = halves(n);
      draw(left, drawn);
      draw(right, drawn);
      return;
    }
    const int64_t begin = leaves.begin(n.node, n.depth), count = leaves.begin(n.node + 1, n.depth) - begin;
    std::vector<int32_t> ids(count);
    for (int64_t i = 0; i < count; ++i) ids[i] = static_cast<int32_t>(begin + i);
    std::vector<T> logits(count);
    std::vector<double> ends(count, floor);
    for (size_t q = 0; q < factors.size(); ++q) {
      weight.score(bias, queries + static_cast<int64_t>(q) * features, ids.data(), count, logits.data());
      for (int64_t i = 0; i < count; ++i) ends[i] += static_cast<double>(factors[q]) * logits[i] * logits[i];
    }
    double total = 0;
    for (double& end : ends) {
      if (!(end < std::numeric_limits<T>::max())) end = floor;  // a row holds NaN or Inf
      end = total += end;
    }
    for (double& end : ends) end = n.low + (n.high - n.low) * (end / total);
    const auto low = [&](int64_t i) { return i == 0 ? n.low : ends[i - 1]; };
    int64_t i = 0;
    for (int64_t p = n.first, previous = -1; p < n.last; ++p) {
      while (i + 1 < count && points[p] >= ends[i]) ++i;
      if (i != previous) drawn.push_back({ids[i], inclusion_of(low(i), ends[i])});
      previous = i;
    }
    for (int64_t a = n.asked_first; a < n.asked_last; ++a)
      asked_inclusion[a] = inclusion_of(low(asked[a] - begin), ends[asked[a] - begin]);
  }
};

// factors, form and floor from the queries: each is normalised by its own sum over all rows, so that all count alike.
template <class T>
void set_queries(Drawing<T>& d, int64_t count, double alpha) {
  const int64_t width = d.features + (d.bias ? 1 : 0);
  const double neurons = static_cast<double>(d.leaves.neurons);
  d.form.assign(d.size, T(0));
  d.floor = count > 0 ? 0 : 1 / neurons;
  std::vector<T> outer(d.size);
  for (int64_t q = 0; q < count; ++q) {
    const T* h = d.queries + q * d.features;
    const auto at = [&](int64_t i) { return i < d.features ? h[i] : T(1); };
    for (int64_t i = 0, place = 0; i < width; ++i)
      for (int64_t j = i; j < width; ++j, ++place) outer[place] = at(i) * at(j) * (i == j ? T(1) : T(2));
    double squares = real_kernels<T>().dot_product(outer.data(), d.sums, d.size);
    // a query with NaN, Inf or nothing to say counts as uniform
    const bool usable = squares > 0 && squares < std::numeric_limits<T>::max();
    if (!usable) squares = 0;
    const double share = 1 / (static_cast<double>(count) * (alpha * squares + neurons));
    const T factor = static_cast<T>(usable ? alpha * share : 0);
    d.floor += share;
    d.factors.push_back(factor);
    for (int64_t i = 0; usable && i < d.size; ++i) d.form[i] += factor * outer[i];
  }
}

Leaves check_leaves(const char* op, int64_t neurons, int64_t count) {
  check(neurons >= 1 && neurons <= kMaxNeurons, op, "weight: expected 1 to 2^31 - 2 rows, got ", neurons);
  check(count >= 1 && count <= neurons && std::has_single_bit(static_cast<uint64_t>(count)), op,
        "leaves: expected a power of two of at most ", neurons, ", got ", count);
  return {neurons, count};
}

}  // namespace

// (leaves, D (D + 1) / 2): see SumsOf::sums.
Tensor kernel_sums(Tensor weight, std::optional<Tensor> bias, int64_t leaves) {
  constexpr const char* op = "kernel_sums";
  check_tensor(op, "weight", weight, weight.scalar_type(), {-1, -1});
  const int64_t neurons = weight.size(0), features = weight.size(1);
  const Leaves own = check_leaves(op, neurons, leaves);
  const int64_t size = size_of_sums(op, features, bias.has_value());
  return dispatch_stored(op, weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (bias) check_tensor(op, "bias", *bias, scalar_type_of<T>(), {neurons});
    Tensor sums = empty({leaves, size}, scalar_type_of<T>());
    const SumsOf<T> of{.weight = StoredRows<T>(weight, features),
                       .bias = data_or_null<T>(bias),
                       .features = features,
                       .size = size,
                       .leaves = own,
                       .sums = mutable_data<T>(sums)};
    // Subtrees one by one, then what lies above them: the same additions at any number of threads.
    const int64_t parts = std::min(kParts, leaves), depth = Leaves{neurons, parts}.depth();
    std::vector<T> totals(parts * size);
    parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) of.build(parts + p, depth, totals.data() + p * size);
    });
    for (int64_t level = parts / 2; level >= 1; level /= 2)
      for (int64_t p = 0; p < level; ++p) {
        const T *left = totals.data() + 2 * p * size, *right = left + size;
        std::copy(left, left + size, of.sums + (level + p) * size);
        for (int64_t i = 0; i < size; ++i) totals[p * size + i] = left[i] + right[i];
      }
    std::copy(totals.begin(), totals.begin() + size, of.sums);
    return sums;
  });
}

namespace {

// The layer and its sums, `queries` (n, features), and how many points are drawn from them.
struct DrawArgs {
  const Tensor& sums;
  const Tensor& weight;
  const std::optional<Tensor>& bias;
  const Tensor& queries;
  double alpha;
  int64_t count;
  const Tensor& asked;  // ids whose inclusion probabilities are wanted too

  int64_t neurons() const { return weight.size(0); }
  int64_t features() const { return weight.size(1); }
  ScalarType dtype() const {
    return weight.scalar_type() == ScalarType::BFloat16 ? ScalarType::Float : weight.scalar_type();
  }

  Leaves check_all(const char* op) const {
    check_tensor(op, "weight", weight, weight.scalar_type(), {-1, -1});
    if (bias) check_tensor(op, "bias", *bias, dtype(), {neurons()});
    check_tensor(op, "queries", queries, dtype(), {-1, features()});
    check_tensor(op, "sums", sums, dtype(), {-1, size_of_sums(op, features(), bias.has_value())});
    const Leaves leaves = check_leaves(op, neurons(), sums.size(0));
    check(alpha > 0 && alpha <= 1e6, op, "alpha: expected a number above 0 and at most 1e6, got ", alpha);
    check_integer(op, "count", count, 0, neurons());
    check_tensor(op, "asked", asked, ScalarType::Int, {-1});
    check_range(op, "asked", data<int32_t>(asked), asked.numel(), neurons());
    check(std::is_sorted(data<int32_t>(asked), data<int32_t>(asked) + asked.numel()), op,
          "asked: expected increasing ids");
    return leaves;
  }
};

// One in each stratum [t, t + 1).
std::vector<double> stratified_points(int64_t count, int64_t seed) {
  std::vector<double> points(count);
  for (int64_t t = 0; t < count; ++t)
    points[t] = static_cast<double>(t) + static_cast<double>(random_of(seed, t) >> 11) * 0x1p-53;
  return points;
}

// The nodes, at most kParts, that the tree's top is cut into.
template <class T>
std::vector<Node> top_nodes(const Drawing<T>& drawing, const Node& root) {
  std::vector<Node> level{root};
  while (static_cast<int64_t>(level.size()) < std::min(kParts, drawing.leaves.count)) {
    std::vector<Node> next;
    for (const Node& node : level) {
      const auto [left, right] = drawing.halves(node);
      next.push_back(left);
      next.push_back(right);
    }
    level = std::move(next);
  }
  return level;
}

// The rows drawn, part by part of the tree.
template <class T>
std::vector<std::vector<Drawn>> draw_all(const DrawArgs& args, const Leaves& leaves, const std::vector<double>& points,
                                         double* asked_inclusion) {
  Drawing<T> drawing{.weight = StoredRows<T>(args.weight, args.features()),
                     .bias = data_or_null<T>(args.bias),
                     .features = args.features(),
                     .size = args.sums.size(1),
                     .leaves = leaves,
                     .sums = data<T>(args.sums),
                     .queries = data<T>(args.queries),
                     .factors = {},
                     .form = {},
                     .floor = 0,
                     .points = points.data(),
                     .asked = data<int32_t>(args.asked),
                     .asked_inclusion = asked_inclusion};
  set_queries(drawing, args.queries.size(0), args.alpha);
  const double total = drawing.squares(drawing.sums) + drawing.floor * static_cast<double>(args.neurons());
  const std::vector<Node> level = top_nodes(drawing, {.node = 1,
                                                      .depth = 0,
                                                      .mass = total,
                                                      .low = 0,
                                                      .high = static_cast<double>(args.count),
                                                      .first = 0,
                                                      .last = args.count,
                                                      .asked_first = 0,
                                                      .asked_last = args.asked.numel()});
  std::vector<std::vector<Drawn>> drawn(level.size());
  parallel_for(0, static_cast<int64_t>(level.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) drawing.draw(level[i], drawn[i]);
  });
  return drawn;
}

}  // namespace

// Returns distinct ids (n) in increasing order, their inclusion probabilities, and those of the rows `asked`.
std::tuple<Tensor, Tensor, Tensor> kernel_draw(Tensor sums, Tensor weight, std::optional<Tensor> bias, Tensor queries,
                                               double alpha, int64_t count, Tensor asked, int64_t seed) {
  constexpr const char* op = "kernel_draw";
  const DrawArgs args{sums, weight, bias, queries, alpha, count, asked};
  const Leaves leaves = args.check_all(op);
  const std::vector<double> points = stratified_points(count, seed);
  Tensor asked_inclusion = empty({asked.numel()}, ScalarType::Double);
  double* to_asked = mutable_data<double>(asked_inclusion);
  const auto drawn = dispatch_real(op, args.dtype(),
                                   [&](auto zero) { return draw_all<decltype(zero)>(args, leaves, points, to_asked); });
  int64_t found = 0;
  for (const auto& part : drawn) found += static_cast<int64_t>(part.size());
  Tensor ids = empty({found}, ScalarType::Int), inclusion = empty({found}, ScalarType::Double);
  int64_t i = 0;
  for (const auto& part : drawn)
    for (const Drawn& one : part) {
      mutable_data<int32_t>(ids)[i] = one.id;
      mutable_data<double>(inclusion)[i++] = one.inclusion;
    }
  return {ids, inclusion, asked_inclusion};
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("kernel_sums", TORCH_BOX(&kernel_sums));
  m.impl("kernel_draw", TORCH_BOX(&kernel_draw));
}

}  // namespace slide_torch
