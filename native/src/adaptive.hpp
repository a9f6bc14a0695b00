// Adaptive probabilities of a bit, and the logistic function in integers.
#pragma once

#include <array>

#include "common.hpp"

namespace tersor {

// The probability of a one, of 65536: 1 to 65534. Each bit seen moves it towards that bit by `rate`
// of 65536, which falls from 1/2 to 1/181.
struct Probability {
  uint16_t value = 32768;
  uint16_t rate = 32768;

  void update(int bit) {
    uint32_t flip = bit ? 65535 : 0, gap = value ^ flip;
    gap -= (gap * rate) >> 16;
    value = static_cast<uint16_t>(gap ^ flip);
    rate = static_cast<uint16_t>(rate - ((uint32_t{rate} * rate) >> 17));
  }
};

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
