// The best of many scores: those that reach a limit which the wanted ones, and not many more, reach. Only these are
// then sorted. NaN reaches any limit.

constexpr int64_t kSampledStride = 8, kLeastSampled = 4096;

// Every `stride`-th vector of `count` scores and, if all are looked at, those that fill none.
struct ScoreView {
  const float* scores;
  int64_t count;
  int64_t stride;

  int64_t whole() const { return count / kCodedLanes * kCodedLanes; }

  int64_t reaching(float limit) const {
    CodedInts below{};
    int64_t seen = 0;
    for (int64_t i = 0; i < whole(); i += stride * kCodedLanes, seen += kCodedLanes)
      below += load<CodedFloats>(scores + i) < limit;  // -1 each
    int64_t found = seen;
    for (int64_t lane = 0; lane < kCodedLanes; ++lane) found += below[lane];
    if (stride == 1)
      for (int64_t i = whole(); i < count; ++i) found += !(scores[i] < limit);
    return found;
  }
};

// Raises `low`, or lowers `high`, by bisection until `low` is reached by `wanted` to `most`, or as near as can be.
// `reaching` is how many reach `low`, `wanted` at least; fewer reach `high`.
inline void bisect(const ScoreView& view, int64_t wanted, int64_t most, int64_t reaching, float& low, float& high) {
  while (reaching > most) {
    const float middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) return;  // equal scores, or infinite ones
    const int64_t found = view.reaching(middle);
    if (found < wanted)
      high = middle;
    else
      low = middle, reaching = found;
  }
}

// The smallest and the largest of all scores but NaN.
inline void range_of(const ScoreView& all, float& low, float& high) {
  low = __builtin_inff(), high = -__builtin_inff();
  CodedFloats lowest = CodedFloats{} + low, highest = CodedFloats{} + high;
  for (int64_t i = 0; i < all.whole(); i += kCodedLanes) {
    const CodedFloats here = load<CodedFloats>(all.scores + i);
    lowest = here < lowest ? here : lowest;
    highest = here > highest ? here : highest;
  }
  const auto meet = [&](float smaller, float larger) {
    low = smaller < low ? smaller : low;
    high = larger > high ? larger : high;
  };
  for (int64_t lane = 0; lane < kCodedLanes; ++lane) meet(lowest[lane], highest[lane]);
  for (int64_t i = all.whole(); i < all.count; ++i) meet(all.scores[i], all.scores[i]);
}

// Writes to `found`, in order, the numbers of those of `count` scores that reach a limit, `wanted` or more; returns
// how many. The limit is first looked for among an eighth of the scores.
inline int64_t reaching_best(const float* scores, int64_t count, int64_t wanted, int32_t* found) {
  const ScoreView all = {scores, count, 1};
  float low, high;
  range_of(all, low, high);
  const int64_t most = 2 * wanted + 16;
  int64_t reaching = count;
  if (count >= kLeastSampled && reaching > most) {
    const ScoreView some = {scores, count, kSampledStride};
    const int64_t least = (wanted + wanted / 2) / kSampledStride + 1;
    float guess = low, above = high;
    bisect(some, least, least + least / 4, count, guess, above);
    const int64_t reached = all.reaching(guess);
    if (reached < wanted)
      high = guess;
    else
      low = guess, reaching = reached;
  }
  bisect(all, wanted, most, reaching, low, high);
  int64_t held = 0;
  for (int64_t i = 0; i < all.whole(); i += kCodedLanes)
    for (uint32_t bits = lane_bits(~(load<CodedFloats>(scores + i) < low)); bits; bits &= bits - 1)
      found[held++] = static_cast<int32_t>(i + __builtin_ctz(bits));
  for (int64_t i = all.whole(); i < count; ++i)
    if (!(scores[i] < low)) found[held++] = static_cast<int32_t>(i);
  return held;
}
