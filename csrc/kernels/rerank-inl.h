// scores[i] = <weight[ids[i]], x> + bias[ids[i]]: the rows lie anywhere, so they are asked for well ahead.
template <class T>
void score_rows(const T* weight, const T* bias, const T* x, int64_t features, const int32_t* ids, int64_t count,
                T* scores) {
  constexpr int64_t ahead = 8;
  const T* row[4];
  for (int64_t i = 0; i < min_of(ahead, count); ++i) prefetch_row(weight + ids[i] * features, features);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t j = 0; j < 4; ++j) {
      row[j] = weight + ids[i + j] * features;
      if (i + j + ahead < count) prefetch_row(weight + ids[i + j + ahead] * features, features);
    }
    dot4(x, row, features, scores + i);
  }
  for (; i < count; ++i) scores[i] = dot(x, weight + ids[i] * features, features);
  for (int64_t j = 0; bias && j < count; ++j) scores[j] += bias[ids[j]];
}
