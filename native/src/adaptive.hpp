// Adaptive probabilities of a bit, and the logistic function in integers.
#pragma once

#include <array>

#include "common.hpp"

namespace tersor {

constexpr int kLimit = 254;  // counts stop here
constexpr uint32_t kLeast = 32, kMost = (1u << 15) - kLeast;

// Steps towards what was seen, of 65536: 1/2, 1/3, 1/4, ... down to 2^-least.
struct Rates {
  int32_t fast[kLimit + 1];
  int32_t slow[kLimit + 1];

  constexpr Rates() : fast(), slow() {
    for (int n = 0; n <= kLimit; ++n) {
      int step = 65536 / (n + 2);
      fast[n] = step > (65536 >> 6) ? step : 65536 >> 6;
      slow[n] = step > (65536 >> 8) ? step : 65536 >> 8;
    }
  }
};

inline constexpr Rates kRates{};

// Two estimates of the probability of a one, of 65536: one forgets fast, one slowly.
struct Probability {
  uint16_t fast = 32768;
  uint16_t slow = 32768;
  uint16_t count = 0;

  int value() const { return (fast + slow) >> 1; }

  void update(int bit) {
    int32_t target = -bit & 65535;
    fast = static_cast<uint16_t>(fast + (((target - fast) * kRates.fast[count]) >> 16));
    slow = static_cast<uint16_t>(slow + (((target - slow) * kRates.slow[count]) >> 16));
    count += count < kLimit;
  }
};

// A probability of 65536 as one of 32768 that the range coder accepts.
inline uint32_t codable(int value) {
  uint32_t p = static_cast<uint32_t>(value) >> 1;
  return p < kLeast ? kLeast : p > kMost ? kMost : p;
}

// squash(x) = 65536 / (1 + exp(-x / 256)), stretch its inverse; |x| <= 2047.
struct Logistic {
  uint16_t squashed[4096];
  int16_t stretched[4096];

  Logistic() {
    constexpr uint64_t one = uint64_t{1} << 32, decay = 4278222846u;  // exp(-1 / 256) of 2^32
    std::array<uint64_t, 2049> power{};
    power[0] = one;
    for (int i = 1; i <= 2048; ++i) power[i] = (power[i - 1] * decay) >> 32;
    for (int i = 0; i < 4096; ++i) {
      int x = i - 2048;
      uint64_t p = (uint64_t{65536} << 32) / (one + power[x < 0 ? -x : x]);
      squashed[i] = static_cast<uint16_t>(x < 0 ? 65536 - p : p);
    }
    for (int p = 0, i = 0; p < 4096; ++p) {
      while (i < 4095 && squashed[i] < p * 16 + 8) ++i;
      stretched[p] = static_cast<int16_t>(clamp(i - 2048, -2047, 2047));
    }
  }

  int squash(int x) const { return squashed[x + 2048]; }
  int stretch(int p) const { return stretched[p >> 4]; }
};

inline const Logistic& logistic() {
  static const Logistic tables;
  return tables;
}

}  // namespace tersor
