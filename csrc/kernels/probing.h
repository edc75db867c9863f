// Multi-probe: which further buckets a query looks into. Scalar code without the standard library, so that
// kernels may call it (see simd-inl.h).
#pragma once

#include <cstdint>

namespace slide_torch {

// L * probes is at most kMaxTables = 254.
constexpr int64_t kMaxProbes = 254;

// Another value for one hash of a code: code ^ flip. It costs what the query would have to move, squared.
struct ProbeMove {
  double cost;
  int32_t hash;
  int32_t flip;
};

// The `wanted` cheapest of the moves that are offered, cheapest first; equal ones in the order they came.
struct MoveList {
  ProbeMove move[kMaxProbes];
  int64_t wanted;
  int64_t count = 0;

  explicit MoveList(int64_t most) : wanted(most < kMaxProbes ? most : kMaxProbes) {}

  void offer(double cost, int32_t hash, int32_t flip) {
    if (count == wanted && (wanted == 0 || !(cost < move[count - 1].cost))) return;
    int64_t place = count < wanted ? count++ : count - 1;
    for (; place > 0 && cost < move[place - 1].cost; --place) move[place] = move[place - 1];
    move[place] = {cost, hash, flip};
  }
};

// Query-directed probing (Lv et al. 2007): sets of moves, at most one for each hash, by rising total cost. Writes the
// flip of each to flips[0 .. wanted) and returns how many there are. A set stands as its last move and the rest; its
// successors shift the last move to the next dearer one, or add that one. Moves dearer than the first `wanted` cannot
// occur: each of those is a set by itself.
inline int64_t probe_flips(const MoveList& moves, int32_t* flips) {
  struct Set {
    double rest_cost;
    uint32_t rest_hashes;
    int32_t rest_flip;
    int64_t last;
  };
  Set open[kMaxProbes + 1];  // each set found opens at most one more: few, so searched in order
  int64_t opened = 0, found = 0;
  if (moves.count > 0) open[opened++] = {0.0, 0, 0, 0};
  while (opened > 0 && found < moves.wanted) {
    int64_t best = 0;
    const auto cost = [&](const Set& s) { return s.rest_cost + moves.move[s.last].cost; };
    for (int64_t i = 1; i < opened; ++i)
      if (cost(open[i]) < cost(open[best])) best = i;
    const Set set = open[best];
    open[best] = open[--opened];
    const ProbeMove& last = moves.move[set.last];
    const uint32_t hash = uint32_t{1} << last.hash;
    const bool valid = (set.rest_hashes & hash) == 0;
    if (valid) flips[found++] = set.rest_flip ^ last.flip;
    if (set.last + 1 == moves.count) continue;
    open[opened++] = {set.rest_cost, set.rest_hashes, set.rest_flip, set.last + 1};
    if (valid)
      open[opened++] = {set.rest_cost + last.cost, set.rest_hashes | hash, set.rest_flip ^ last.flip, set.last + 1};
  }
  return found;
}

}  // namespace slide_torch
