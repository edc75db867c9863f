// Offering candidates to the best k of a sample: see Best.

// Of a candidate that is not below the sample's limit.
template <class T>
inline void offer(const Best<T>& best, int64_t sample, T value, int64_t id) {
  int64_t& held = best.held[sample];
  best.entries[sample * best.room + held] = {value, id};
  if (++held == best.room) best.keep_best(best, sample);
}
