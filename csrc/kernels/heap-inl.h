// The best k so far of a sample: a heap whose root is the worst of them.

// NaN is larger than any number, as in torch.topk; equal values go by the smaller id. A total order: the best k are
// the same in whatever order, and on however many threads, candidates are met.
template <class T>
inline bool ranks_before(T a, int64_t a_id, T b, int64_t b_id) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a != b) return a > b;
  return a_id < b_id;
}

template <class T>
inline void offer(T value, int64_t id, T* values, int64_t* ids, int64_t k) {
  if (!ranks_before(value, id, values[0], ids[0])) return;
  int64_t hole = 0;
  for (int64_t child = 1; child < k; child = 2 * hole + 1) {
    if (child + 1 < k && ranks_before(values[child], ids[child], values[child + 1], ids[child + 1])) ++child;
    if (!ranks_before(value, id, values[child], ids[child])) break;
    values[hole] = values[child];
    ids[hole] = ids[child];
    hole = child;
  }
  values[hole] = value;
  ids[hole] = id;
}
