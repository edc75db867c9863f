// Hash tables: codes (L, N) -> packed buckets, by counting sort, one table at a time.
#include <algorithm>

#include "../common/tensors.h"

namespace slide_torch {
namespace {

template <class Code>
void build_table(const Code* codes, int64_t neurons, int64_t buckets, int32_t* offsets, int32_t* ids, int32_t* cursor) {
  std::fill(cursor, cursor + buckets, 0);
  for (int64_t i = 0; i < neurons; ++i) ++cursor[codes[i]];
  int32_t total = 0;
  for (int64_t c = 0; c < buckets; ++c) {
    const int32_t count = cursor[c];
    offsets[c] = cursor[c] = total;
    total += count;
  }
  offsets[buckets] = total;
  for (int64_t i = 0; i < neurons; ++i) ids[cursor[codes[i]]++] = static_cast<int32_t>(i);
}

template <class Code>
void check_codes(const char* op, const Tensor& codes, int64_t buckets) {
  const int64_t tables = codes.size(0), neurons = codes.size(1);
  std::vector<int64_t> outside(tables, -1);  // the first neuron of each table whose code is out of range
  parallel_for(0, tables, grain(neurons), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const Code* row = data<Code>(codes) + t * neurons;
      bool inside = true;
      for (int64_t i = 0; i < neurons; ++i) inside &= (row[i] >= 0) & (row[i] < buckets);
      for (int64_t i = 0; !inside && outside[t] < 0; ++i)
        if (row[i] < 0 || row[i] >= buckets) outside[t] = i;
    }
  });
  for (int64_t t = 0; t < tables; ++t)
    check(outside[t] < 0, op, "codes: expected values in [0, ", buckets, "), got ",
          outside[t] < 0 ? 0 : int64_t(data<Code>(codes)[t * neurons + outside[t]]), " for neuron ", outside[t]);
}

template <class F>
auto dispatch_code(const char* op, ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Short) return f(int16_t{});
  check(dtype == ScalarType::Int, op, "codes: expected dtype Short or Int, got ", torch::headeronly::toString(dtype));
  return f(int32_t{});
}

}  // namespace

std::tuple<Tensor, Tensor> build_tables(Tensor codes, int64_t bits) {
  constexpr const char* op = "build_tables";
  check_integer(op, "bits", bits, 1, kMaxCodeBits);
  check_tensor(op, "codes", codes, codes.scalar_type(), {-1, -1});
  const int64_t tables = codes.size(0), neurons = codes.size(1), buckets = int64_t{1} << bits;
  check(tables <= kMaxTables, op, "codes: expected at most ", kMaxTables, " tables, got ", tables);
  check(neurons <= kMaxNeurons, op, "codes: expected fewer than 2^31 - 1 neurons, got ", neurons);
  Tensor offsets = empty({tables, buckets + 1}, ScalarType::Int);
  Tensor ids = empty({tables, neurons}, ScalarType::Int);
  dispatch_code(op, codes.scalar_type(), [&](auto zero) {
    using Code = decltype(zero);
    check_codes<Code>(op, codes, buckets);
    parallel_for(0, tables, grain(neurons), [&](int64_t first, int64_t last) {
      std::vector<int32_t> cursor(buckets);
      for (int64_t t = first; t < last; ++t)
        build_table(data<Code>(codes) + t * neurons, neurons, buckets,
                    mutable_data<int32_t>(offsets) + t * (buckets + 1), mutable_data<int32_t>(ids) + t * neurons,
                    cursor.data());
    });
  });
  return {offsets, ids};
}

// codes[:, rows] = fresh, counting for each table how many changed.
Tensor update_codes_(Tensor codes, Tensor rows, Tensor fresh) {
  constexpr const char* op = "update_codes_";
  check_tensor(op, "codes", codes, codes.scalar_type(), {-1, -1});
  const int64_t tables = codes.size(0), neurons = codes.size(1);
  check(tables <= kMaxTables, op, "codes: expected at most ", kMaxTables, " tables, got ", tables);
  check_tensor(op, "rows", rows, ScalarType::Long, {-1});
  const int64_t count = rows.numel();
  check_tensor(op, "fresh", fresh, codes.scalar_type(), {tables, count});
  check_range(op, "rows", data<int64_t>(rows), count, neurons);
  Tensor moved = empty({tables}, ScalarType::Long);
  dispatch_code(op, codes.scalar_type(), [&](auto zero) {
    using Code = decltype(zero);
    const int64_t* row = data<int64_t>(rows);
    parallel_for(0, tables, grain(2 * count), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        Code* target = mutable_data<Code>(codes) + t * neurons;
        const Code* source = data<Code>(fresh) + t * count;
        int64_t changed = 0;
        for (int64_t i = 0; i < count; ++i) {
          changed += target[row[i]] != source[i];
          target[row[i]] = source[i];
        }
        mutable_data<int64_t>(moved)[t] = changed;
      }
    });
  });
  return moved;
}

STABLE_TORCH_LIBRARY_IMPL(slide_torch, CPU, m) {
  m.impl("build_tables", TORCH_BOX(&build_tables));
  m.impl("update_codes_", TORCH_BOX(&update_codes_));
}

}  // namespace slide_torch
