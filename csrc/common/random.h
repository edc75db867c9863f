// Random numbers without a state: a hash of the seed and of what the number is for, so that any thread may draw any of
// them.
#pragma once

#include <cstdint>

namespace slide_torch {

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit.
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// Number `i` of a sequence.
inline uint64_t random_of(int64_t seed, int64_t i) {
  return splitmix64(splitmix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(i));
}

// A number of its own for each of many things that share a seed.
inline uint64_t random_for(uint64_t seed, int64_t thing) {
  return splitmix64(seed ^ splitmix64(static_cast<uint64_t>(thing)));
}

}  // namespace slide_torch
