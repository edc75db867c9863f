// Every kernel from four threads over ragged sizes, for builds with a sanitizer: see tests/programs/test_sanitizers.py.
// Results of the threads together must equal those of one thread, bit for bit.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../csrc/common/reservoirs.h"
#include "../../csrc/kernels/dispatch.h"
#include "../../csrc/sampling/collisions.h"

using namespace slide_torch;

namespace {

// Calls body(begin, end) for ranges of [0, count) that are multiples of `multiple`, on `threads` threads.
template <class F>
void parallel(int threads, int64_t count, int64_t multiple, const F& body) {
  const int64_t tiles = (count + multiple - 1) / multiple;
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = tiles * t / threads * multiple, end = std::min(count, tiles * (t + 1) / threads * multiple);
    if (begin < end) pool.emplace_back([&body, begin, end] { body(begin, end); });
  }
  for (std::thread& thread : pool) thread.join();
}

template <class V>
void expect_equal(const char* what, const V& one, const V& many) {
  if (one == many) return;
  std::fprintf(stderr, "%s: one thread and four threads differ\n", what);
  std::exit(1);
}

// Runs fill(threads) with 1 and with 4 threads.
template <class F>
void compare(const char* what, const F& fill) {
  expect_equal(what, fill(1), fill(4));
}

template <class T>
std::vector<T> normal(std::mt19937& random, int64_t count) {
  std::normal_distribution<double> draw;
  std::vector<T> values(count);
  for (T& v : values) v = static_cast<T>(draw(random));
  return values;
}

// All families, on rows whose bias is appended and norm augmented; `probes` codes a table.
template <class T, class Code>
void hashing(std::mt19937& random, const HashKernels<T, Code>& k, int64_t n, int64_t d, int64_t probes) {
  const int64_t lanes = real_kernels<T>().lanes, columns = real_kernels<T>().tile_columns;
  const int64_t K = 3, L = 7, width = d + 2, centroids = 16;
  int64_t D = 1;
  while (D < d) D *= 2;
  const int64_t rotations = (K * L + D - 1) / D;
  const auto x = normal<T>(random, n * d), bias = normal<T>(random, n), center = normal<T>(random, d + 1);
  auto signs = normal<T>(random, rotations * 3 * D);
  for (T& s : signs) s = s > 0 ? T(1) : T(-1);
  const auto gauss = normal<T>(random, 2 * rotations * D), projection = normal<T>(random, K * L * width);
  const auto heads = normal<T>(random, L * centroids * width);
  std::vector<int32_t> coordinates(K * L * 8);
  for (int32_t& c : coordinates) c = static_cast<int32_t>(random() % width);
  const HashInput<T> in{x.data(), nullptr, bias.data(), center.data(), d, true, T(2), true};
  const HadamardFunctions<T> rotate{signs.data(), gauss.data(), rotations, D};
  const auto family = [&](const char* what, int64_t scratch_size, const auto& hash) {
    compare(what, [&](int threads) {
      std::vector<Code> codes(L * probes * n);
      const HashOutput<Code> out{codes.data(), n, L, K, probes};
      parallel(threads, n, columns, [&](int64_t b, int64_t e) {
        std::vector<T> scratch(scratch_size);
        hash(out, b, e, scratch.data());
      });
      return codes;
    });
  };
  family("simhash_hadamard", (width + D) * lanes,
         [&](const auto& out, int64_t b, int64_t e, T* s) { k.simhash_hadamard(in, rotate, out, b, e, s); });
  family("simhash_dense", width * lanes,
         [&](const auto& out, int64_t b, int64_t e, T* s) { k.simhash_dense(in, projection.data(), out, b, e, s); });
  family("dwta", width * lanes, [&](const auto& out, int64_t b, int64_t e, T* s) {
    std::vector<int32_t> winners(K * L * lanes);
    k.dwta(in, {coordinates.data(), 8, 3}, out, b, e, s, winners.data());
  });
  family("nearest_centroids", (width + centroids) * columns, [&](const auto& out, int64_t b, int64_t e, T* s) {
    k.nearest_centroids(in, {heads.data(), centroids}, out, b, e, s);
  });
}

template <class T>
void shared_pattern(std::mt19937& random, int64_t N, int64_t d, int64_t active, int64_t batch) {
  const RealKernels<T>& k = real_kernels<T>();
  const auto weight = normal<T>(random, N * d), bias = normal<T>(random, N), x = normal<T>(random, batch * d);
  const auto log_weight = normal<T>(random, active), scale = normal<T>(random, batch);
  std::vector<int64_t> rows(active);
  for (int64_t u = 0; u < active; ++u) rows[u] = u * N / active;
  const SharedProblem<T> s{weight.data(), bias.data(), rows.data(), log_weight.data(), active, d, batch, T(1.5)};
  const int64_t by_rows = (batch + k.tile_columns - 1) / k.tile_columns;
  const int64_t by_columns = (d + k.tile_columns - 1) / k.tile_columns;
  std::vector<T> transposed(by_rows * k.tile_columns * d), columns(by_columns * k.tile_columns * batch);
  k.pack_transposed(x.data(), batch, d, 0, by_rows, transposed.data());
  k.pack_columns(x.data(), batch, d, 0, by_columns, columns.data());
  std::vector<T> logits(active * batch), normalizer(batch), gradient(active * batch);
  compare("shared_logits", [&](int threads) {
    parallel(threads, active, k.tile_rows,
             [&](int64_t b, int64_t e) { k.shared_logits(s, transposed.data(), logits.data(), b, e); });
    return logits;
  });
  compare("shared_log_normalizer", [&](int threads) {
    parallel(threads, batch, k.lanes, [&](int64_t b, int64_t e) {
      k.shared_log_normalizer(logits.data(), active, batch, normalizer.data(), b, e);
    });
    return normalizer;
  });
  compare("shared_softplus", [&](int threads) {
    std::vector<T> losses(batch);
    parallel(threads, batch, k.lanes, [&](int64_t b, int64_t e) {
      k.shared_softplus(logits.data(), log_weight.data(), active, batch, losses.data(), b, e);
    });
    return losses;
  });
  compare("shared_sigmoid", [&](int threads) {
    std::vector<T> out(active * batch);
    parallel(threads, active, k.tile_rows, [&](int64_t b, int64_t e) {
      k.shared_sigmoid(logits.data(), log_weight.data(), scale.data(), batch, out.data(), b, e);
    });
    return out;
  });
  compare("score_rows", [&](int threads) {
    std::vector<int32_t> ids(active);
    for (int64_t u = 0; u < active; ++u) ids[u] = static_cast<int32_t>(rows[u]);
    std::vector<T> scores(batch * active);
    parallel(threads, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        k.score_rows(weight.data(), bias.data(), x.data() + b * d, d, ids.data(), active, scores.data() + b * active);
    });
    return scores;
  });
  compare("shared_softmax_gradient", [&](int threads) {
    parallel(threads, active, k.tile_rows, [&](int64_t b, int64_t e) {
      k.shared_softmax_gradient(logits.data(), normalizer.data(), scale.data(), batch, gradient.data(), b, e);
    });
    return gradient;
  });
  compare("shared_grad_rows", [&](int threads) {
    std::vector<T> out(active * d + active);
    parallel(threads, active, k.tile_rows, [&](int64_t b, int64_t e) {
      k.shared_grad_rows(s, gradient.data(), columns.data(), out.data(), out.data() + active * d, b, e);
    });
    return out;
  });
  compare("shared_grad_input", [&](int threads) {
    std::vector<T> out(batch * d);
    parallel(threads, batch, k.tile_rows, [&](int64_t b, int64_t e) {
      std::vector<T> panel(k.depth * k.tile_columns);
      k.shared_grad_input(s, gradient.data(), out.data(), b, e, panel.data());
    });
    return out;
  });
}

template <class T>
void sample_pattern(std::mt19937& random, int64_t N, int64_t d, int64_t batch) {
  const RealKernels<T>& k = real_kernels<T>();
  const auto weight = normal<T>(random, N * d), bias = normal<T>(random, N), x = normal<T>(random, batch * d);
  std::vector<int64_t> rows, offsets{0};
  std::vector<int32_t> samples;
  for (int64_t row = 0; row < N; row += 2) {  // every other neuron, each activated by some samples
    for (int64_t b = 0; b < batch; ++b)
      if (random() % 3 == 0) samples.push_back(static_cast<int32_t>(b));
    if (static_cast<int64_t>(samples.size()) == offsets.back()) continue;
    rows.push_back(row);
    offsets.push_back(static_cast<int64_t>(samples.size()));
  }
  const int64_t pairs = static_cast<int64_t>(samples.size()), active = static_cast<int64_t>(rows.size());
  std::vector<int32_t> positions(pairs);
  for (int64_t i = 0; i < pairs; ++i) positions[i] = static_cast<int32_t>((i * 7919 + 3) % pairs);
  if (pairs % 7919 == 0) return;  // the positions must be a permutation
  const SampleProblem<T> s{weight.data(),  bias.data(), x.data(), rows.data(), offsets.data(), positions.data(),
                           samples.data(), active,      d};
  std::vector<T> logits(pairs), gradient(pairs);
  compare("sample_logits", [&](int threads) {
    parallel(threads, active, 1, [&](int64_t b, int64_t e) { k.sample_logits(s, logits.data(), b, e); });
    return logits;
  });
  const T normalizer = k.sample_log_normalizer(logits.data(), pairs);
  k.sample_sigmoid(logits.data(), nullptr, pairs, k.sample_softplus(logits.data(), logits.data(), pairs),
                   gradient.data());
  k.sample_softmax_gradient(logits.data(), pairs, normalizer, T(0.5), gradient.data());
  compare("sample_gradients", [&](int threads) {
    const int64_t chunks = 4, values = batch * d;
    std::vector<T> accumulators(chunks * values), out(active * d + active);
    parallel(threads, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        k.sample_gradients(s, gradient.data(), accumulators.data() + c * values, out.data(), out.data() + active * d,
                           active * c / chunks, active * (c + 1) / chunks);
    });
    out.insert(out.end(), accumulators.begin(), accumulators.end());
    return out;
  });
  compare("sample_gradients_adam", [&](int threads) {
    const int64_t chunks = 4, values = batch * d;
    std::vector<T> accumulators(chunks * values), out = weight, moments(2 * N * d), grad_bias(active);
    SampleProblem<T> own = s;
    own.weight = out.data();
    RowUpdate<T> update{};
    update.param = out.data();
    update.state[0] = moments.data();
    update.state[1] = moments.data() + N * d;
    const AdamScalars<T> scalars{T(1), T(0.9), T(0.1), T(0.01), T(0.1), T(1e-8)};
    parallel(threads, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        k.sample_gradients_adam(own, gradient.data(), accumulators.data() + c * values, grad_bias.data(), update,
                                scalars, active * c / chunks, active * (c + 1) / chunks);
    });
    for (const auto* part : {&accumulators, &moments, &grad_bias}) out.insert(out.end(), part->begin(), part->end());
    return out;
  });
}

template <class T>
void hidden_layers(std::mt19937& random, int64_t N, int64_t d, int64_t batch) {
  const RealKernels<T>& k = real_kernels<T>();
  const auto weight = normal<T>(random, N * d), x = normal<T>(random, batch * d), values = normal<T>(random, N * batch);
  std::vector<int64_t> rows(N), offsets(N + 1);
  std::vector<int32_t> samples, positions;
  for (int64_t u = 0; u < N; ++u) {  // neuron u meets u % (batch + 1) samples
    rows[u] = u;
    for (int64_t b = 0; b < u % (batch + 1); ++b) {
      positions.push_back(static_cast<int32_t>(samples.size()));
      samples.push_back(static_cast<int32_t>(b));
    }
    offsets[u + 1] = static_cast<int64_t>(samples.size());
  }
  const SampleProblem<T> s{weight.data(),  nullptr, x.data(), rows.data(), offsets.data(), positions.data(),
                           samples.data(), N,       d};
  compare("sample_weighted_rows", [&](int threads) {
    const int64_t chunks = 4;
    std::vector<T> sums(chunks * batch * d);
    parallel(threads, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        k.sample_weighted_rows(s, values.data(), sums.data() + c * batch * d, N * c / chunks, N * (c + 1) / chunks);
    });
    return sums;
  });
  compare("sample_grad_rows", [&](int threads) {
    std::vector<T> out(N * d);
    parallel(threads, N, 1, [&](int64_t b, int64_t e) { k.sample_grad_rows(s, values.data(), out.data(), b, e); });
    return out;
  });
}

// Rows that are hashed by centroids in groups, of which the last is not a whole block.
template <class T>
void grouped_centroids(std::mt19937& random, int64_t n, int64_t d) {
  const CodedShape shape = {.features = d, .extras = 2, .quads = quads_of(d), .limit = kCenterLimit};
  const int64_t width = d + 2, size = 3 * kBlockRows - 5;
  const auto x = normal<T>(random, n * d), bias = normal<T>(random, n), center = normal<T>(random, d + 1);
  const auto centroids = normal<float>(random, size * width);
  const HashInput<T> in{x.data(), nullptr, bias.data(), center.data(), d, true, T(2), true};
  std::vector<int32_t> ids(3 * kBlockRows, -1), groups(kBlockRows, -1);
  for (int64_t i = 0; i < size; ++i) ids[i] = static_cast<int32_t>(i);
  groups[0] = 0, groups[1] = static_cast<int32_t>(size - 1);
  const std::vector<int64_t> blocks = {0, 1, 3};
  compare("nearest_in_groups", [&](int threads) {
    std::vector<uint8_t> codes(4 * shape.block_bytes());
    std::vector<int32_t> extras(4 * kBlockRows), found(n);
    std::vector<float> units(4 * kBlockRows);
    const CodedCentroids coarse{codes.data(), extras.data(), units.data()};
    const CodedCentroids members{codes.data() + shape.block_bytes(), extras.data() + kBlockRows,
                                 units.data() + kBlockRows};
    std::vector<int8_t> room(4 * shape.quads);
    kernels().code_centroids(centroids.data(), groups.data(), shape, 0, 1, coarse, room.data());
    parallel(threads, 3, 1, [&](int64_t b, int64_t e) {
      std::vector<int8_t> scratch(4 * shape.quads);
      kernels().code_centroids(centroids.data(), ids.data(), shape, b, e, members, scratch.data());
    });
    const CentroidGroups all{shape, coarse, members, blocks.data(), ids.data(), 2, 1};
    parallel(threads, n, 1, [&](int64_t b, int64_t e) {
      const int64_t count = e - b;
      std::vector<int32_t> inputs(count * shape.quads), sums(count), pairs(count), chosen(count), rows(count);
      std::vector<float> best(count), scores(kRowsTogether * kBlockRows);
      std::vector<int64_t> starts(3);
      std::vector<T> row(width);
      const GroupScratch scratch{inputs.data(), sums.data(), pairs.data(),  best.data(),
                                 chosen.data(), rows.data(), starts.data(), scores.data()};
      const int64_t finite = real_kernels<T>().code_hashed_rows(in, shape, b, e, scratch, row.data());
      kernels().quads.nearest_in_groups(all, count, finite, scratch, found.data() + b);
    });
    return found;
  });
}

// Calls body(reservoirs, range, ranges) for four ranges, each with reservoirs of `best` for every sample of its own;
// returns all their values, in order.
template <class T, class F>
std::vector<T> ranged_search(int threads, int64_t batch, int64_t best, const F& body) {
  const int64_t ranges = 4;
  std::vector<Reservoirs<T>> reservoirs(ranges);
  parallel(threads, ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      reservoirs[r].clear(batch, best);
      body(reservoirs[r].best(), r, ranges);
    }
  });
  std::vector<T> values(batch * best);
  std::vector<int64_t> ids(batch * best);
  std::vector<Entry<T>> entries;
  for (int64_t b = 0; b < batch; ++b) {
    gather(reservoirs, b, entries);
    write_best(entries, best, values.data() + b * best, ids.data() + b * best);
  }
  return values;
}

template <class T>
void prediction(std::mt19937& random, int64_t N, int64_t d, int64_t batch) {
  const RealKernels<T>& k = real_kernels<T>();
  const int64_t best = std::min<int64_t>(N, 7), panels = (batch + k.tile_columns - 1) / k.tile_columns;
  const auto weight = normal<T>(random, N * d), bias = normal<T>(random, N), x = normal<T>(random, batch * d);
  std::vector<T> packed(panels * k.tile_columns * d);
  k.pack_transposed(x.data(), batch, d, 0, panels, packed.data());
  const TopkProblem<T> s{weight.data(), bias.data(), x.data(), d, batch};
  compare("topk_rows", [&](int threads) {
    return ranged_search<T>(threads, batch, best, [&](const Best<T>& reservoirs, int64_t r, int64_t ranges) {
      k.topk_rows(s, packed.data(), reservoirs, N * r / ranges, N * (r + 1) / ranges);
    });
  });
  std::vector<int32_t> ids(batch);
  for (int64_t b = 0; b < batch; ++b) ids[b] = static_cast<int32_t>(batch - 1 - b);
  compare("score_rows", [&](int threads) {  // every input for a row, as where buckets are searched
    std::vector<T> scores(N * batch);
    parallel(threads, N, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        k.score_rows(x.data(), nullptr, weight.data() + i * d, d, ids.data(), batch, scores.data() + i * batch);
    });
    return scores;
  });
  if constexpr (std::is_same_v<T, float>) {
    const int64_t quads = quads_of(d), blocks = (N + kBlockRows - 1) / kBlockRows;
    std::vector<uint8_t> codes(blocks * quads * kBlockRows * 4);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(1 + random() % 127);
    const auto terms = normal<float>(random, blocks * kCenterTerms * kBlockRows);
    std::vector<int32_t> inputs(batch * quads), rows(N);
    for (int32_t& input : inputs) input = static_cast<int32_t>(random() & 0x3f3f3f3f);
    for (int64_t i = 0; i < N; ++i) rows[i] = static_cast<int32_t>(N - 1 - i);
    std::vector<int64_t> samples(ids.begin(), ids.end());
    const std::vector<float> scales(batch, 0.5F);
    const std::vector<int32_t> sums(batch, 1);
    const CodedProblem coded{inputs.data(), sums.data(), scales.data(), nullptr, quads};
    compare("offer_coded", [&](int threads) {
      return ranged_search<float>(threads, batch, best, [&](const Best<float>& reservoirs, int64_t r, int64_t ranges) {
        const int64_t first = blocks * r / ranges, last = blocks * (r + 1) / ranges, begin = first * kBlockRows;
        const CodedRows some{codes.data() + first * quads * kBlockRows * 4,
                             terms.data() + first * kRowTerms * kBlockRows, rows.data() + begin,
                             std::min(N, last * kBlockRows) - begin};
        kernels().quads.offer_coded(coded, some, some, samples.data(), batch, reservoirs);
      });
    });
    CodedProblem ranked = coded;
    ranked.spread_weight = scales.data();
    compare("score_coded", [&](int threads) {
      std::vector<float> scores(batch * blocks * kBlockRows);
      parallel(threads, batch, 1, [&](int64_t first, int64_t last) {
        kernels().quads.score_coded(ranked, {codes.data(), terms.data(), nullptr, N}, samples.data() + first,
                                    last - first, scores.data() + first * blocks * kBlockRows);
      });
      return scores;
    });
  }
}

// The best of scores: too few for a sample, or enough; those that a limit leaves are among them.
void reaching(std::mt19937& random, int64_t count) {
  auto scores = normal<float>(random, count);
  scores[count / 2] = std::numeric_limits<float>::quiet_NaN();
  for (int64_t wanted : {int64_t{1}, count / 50 + 1, count - 1})
    compare("reaching_best", [&](int threads) {
      std::vector<std::vector<int32_t>> found(8);
      parallel(threads, 8, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          found[i].resize(count);
          found[i].resize(kernels().reaching_best(scores.data(), count, wanted, found[i].data()));
          if (static_cast<int64_t>(found[i].size()) < wanted) std::exit(1);
        }
      });
      return found;
    });
}

void retrieval(std::mt19937& random, int64_t N) {
  std::vector<int32_t> ids(N);
  for (int64_t i = 0; i < N; ++i) ids[i] = static_cast<int32_t>(i);
  std::shuffle(ids.begin(), ids.end(), random);
  compare("collision counting", [&](int threads) {
    std::vector<std::vector<int32_t>> found(8);
    parallel(threads, 8, 1, [&](int64_t first, int64_t last) {
      CollisionCounter counter(N);
      for (int64_t b = first; b < last; ++b) {
        counter.exclude(static_cast<int32_t>(b % N));
        for (int64_t t = 0; t < 9; ++t)
          counter.read_bucket(ids.data() + (t * b) % N, N - (t * b) % N, (N - (t * b) % N) / 3, N / 2 + 1);
        counter.take_best(N / 3, 9, found[b]);
        counter.release_excluded();
      }
    });
    return found;
  });
}

template <class T>
void all(std::mt19937& random) {
  for (int64_t d : {1, 7, 32, 65, 128}) {
    for (int64_t probes : {1, 36}) {
      hashing<T>(random, real_kernels<T>().hash16, 45, d, probes);
      hashing<T>(random, real_kernels<T>().hash32, 3, d, probes);
    }
    shared_pattern<T>(random, 90, d, 1, 1);
    shared_pattern<T>(random, 300, d, 73, 37);
    sample_pattern<T>(random, 90, d, 11);
    hidden_layers<T>(random, 33, d, 11);
    grouped_centroids<T>(random, 45, d);
    for (int64_t batch : {1, 5, 37}) prediction<T>(random, 203, d, batch);
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  all<float>(random);
  all<double>(random);
  for (int64_t N : {1, 2, 100}) retrieval(random, N);
  for (int64_t count : {2, 77, 5003}) reaching(random, count);
  std::printf("%s ok\n", kernels().name);
}
