// The nearest rings of a bit-shift trellis, by the Viterbi algorithm.
//
// A state is the last `state_bits` bits of a ring of bits, of which each value adds `bits`; a table
// says what value a state stands for. All states with the same upper bits follow from the same few,
// so one step takes one minimum for each of those groups. src/tersor/methods/viterbi.py says the
// same in Python, and both give the same codes.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "threads.hpp"
#include "vectors.hpp"

namespace tersor {

constexpr int kLeastStateBits = 8, kMostStateBits = 16, kMostBits = 4;

struct Bitshift {
  size_t rings, length;
  const float* values;   // (rings, length)
  const float* weights;  // (rings, length), of a squared error
  const float* table;    // (2 ** state_bits), the value of each state
  int bits, state_bits;
  size_t reach;          // values on each side of the seam that decide which bits lie there

  size_t groups() const { return size_t{1} << (state_bits - bits); }
  size_t states() const { return size_t{1} << state_bits; }
};

// cost, next: (states); from: (groups), the upper bits of the best state before.
inline void plain_step(const Bitshift& t, float value, float weight, const float* cost, float* next,
                       uint8_t* from) {
  size_t groups = t.groups(), fan = size_t{1} << t.bits;
  for (size_t group = 0; group < groups; ++group) {
    float best = cost[group];
    uint8_t chosen = 0;
    for (size_t upper = 1; upper < fan; ++upper) {
      float other = cost[upper * groups + group];
      if (other < best) best = other, chosen = static_cast<uint8_t>(upper);
    }
    from[group] = chosen;
    for (size_t state = group * fan; state < (group + 1) * fan; ++state) {
      float error = value - t.table[state];
      next[state] = best + weight * (error * error);
    }
  }
}

#ifdef TERSOR_AVX2
template <int kBits>
__attribute__((target("avx2"))) inline void wide_step(const Bitshift& t, float value, float weight,
                                                      const float* cost, float* next,
                                                      uint8_t* from) {
  constexpr int kFan = 1 << kBits;
  size_t groups = t.groups();
  __m256 values = _mm256_set1_ps(value), weights = _mm256_set1_ps(weight);
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t group = 0; group < groups; group += 8) {
    __m256 best = _mm256_loadu_ps(cost + group);
    __m256i chosen = _mm256_setzero_si256();
    for (int upper = 1; upper < kFan; ++upper) {
      __m256 other = _mm256_loadu_ps(cost + static_cast<size_t>(upper) * groups + group);
      __m256 less = _mm256_cmp_ps(other, best, _CMP_LT_OQ);
      best = _mm256_min_ps(other, best);
      chosen = _mm256_blendv_epi8(chosen, _mm256_set1_epi32(upper), _mm256_castps_si256(less));
    }
    __m256i halves = _mm256_packus_epi32(chosen, chosen);
    __m128i words = _mm_unpacklo_epi64(_mm256_castsi256_si128(halves),
                                       _mm256_extracti128_si256(halves, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(from + group), _mm_packus_epi16(words, words));
    for (int part = 0; part < kFan; ++part) {
      __m256i place = _mm256_srli_epi32(_mm256_add_epi32(lanes, _mm256_set1_epi32(8 * part)), kBits);
      size_t state = group * kFan + static_cast<size_t>(8 * part);
      __m256 error = _mm256_sub_ps(values, _mm256_loadu_ps(t.table + state));
      __m256 added = _mm256_mul_ps(weights, _mm256_mul_ps(error, error));
      _mm256_storeu_ps(next + state, _mm256_add_ps(_mm256_permutevar8x32_ps(best, place), added));
    }
  }
}
#endif

inline void bitshift_step(const Bitshift& t, float value, float weight, const float* cost,
                          float* next, uint8_t* from) {
#ifdef TERSOR_AVX2
  if (wide().load(std::memory_order_relaxed)) {
    switch (t.bits) {
      case 1: return wide_step<1>(t, value, weight, cost, next, from);
      case 2: return wide_step<2>(t, value, weight, cost, next, from);
      case 3: return wide_step<3>(t, value, weight, cost, next, from);
      case 4: return wide_step<4>(t, value, weight, cost, next, from);
    }
  }
#endif
  plain_step(t, value, weight, cost, next, from);
}

class RingSearch {
 public:
  explicit RingSearch(const Bitshift& task)
      : t_(task), cost_(task.states()), next_(task.states()),
        from_(std::max(task.length, 2 * task.reach) * task.groups()) {}

  // Fills codes (length), each of `bits` bits.
  void find(const float* values, const float* weights, uint8_t* codes) {
    size_t seam = seam_of(values, weights);
    std::fill(cost_.begin(), cost_.end(), kNever);
    for (size_t s = seam; s < t_.states(); s += t_.groups()) cost_[s] = 0;
    for (size_t i = 0; i < t_.length; ++i) advance(i, values[i], weights[i]);
    size_t state = seam;
    for (size_t s = seam; s < t_.states(); s += t_.groups()) {
      if (cost_[s] < cost_[state]) state = s;
    }
    for (size_t i = t_.length; i-- > 0;) {
      codes[i] = static_cast<uint8_t>(state & ((size_t{1} << t_.bits) - 1));
      state = before(i, state);
    }
  }

 private:
  static constexpr float kNever = std::numeric_limits<float>::infinity();

  // The lower bits of the state at the seam, where the last value is followed by the first: those
  // of the best path through the values around it.
  size_t seam_of(const float* values, const float* weights) {
    std::fill(cost_.begin(), cost_.end(), 0.0f);
    for (size_t i = 0; i < 2 * t_.reach; ++i) {
      size_t at = (i + t_.length - t_.reach) % t_.length;
      advance(i, values[at], weights[at]);
    }
    size_t state = static_cast<size_t>(std::min_element(cost_.begin(), cost_.end()) - cost_.begin());
    for (size_t i = 2 * t_.reach; i-- > t_.reach;) state = before(i, state);
    return state & (t_.groups() - 1);
  }

  void advance(size_t i, float value, float weight) {
    bitshift_step(t_, value, weight, cost_.data(), next_.data(), &from_[i * t_.groups()]);
    std::swap(cost_, next_);
  }

  size_t before(size_t i, size_t state) const {
    size_t group = state >> t_.bits;
    return size_t{from_[i * t_.groups() + group]} << (t_.state_bits - t_.bits) | group;
  }

  const Bitshift& t_;
  std::vector<float> cost_, next_;
  std::vector<uint8_t> from_;
};

// Fills codes (rings, length); threads change nothing in them.
inline void bitshift_search(const Bitshift& task, uint8_t* codes, size_t threads) {
  in_threads(task.rings, threads, [&](size_t first, size_t last) {
    RingSearch search(task);
    for (size_t i = first; i < last; ++i) {
      size_t at = i * task.length;
      search.find(task.values + at, task.weights + at, codes + at);
    }
  });
}

}  // namespace tersor
