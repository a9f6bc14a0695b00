// What all coders share: errors, views of bytes, integer helpers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <memory>
#include <vector>

#if defined(__GNUC__) || defined(__clang__)
#define TERSOR_INLINE __attribute__((always_inline)) inline
#else
#define TERSOR_INLINE inline
#endif

namespace tersor {

using Bytes = std::vector<uint8_t>;

// Bytes that no encoder writes; Python sees a ValueError.
struct Malformed : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Span {
  const uint8_t* data;
  size_t size;
};

// A matrix of codes; `kernel` neighbouring columns belong to one input channel. With more than one
// state a trellis runs along each row.
struct Shape {
  uint32_t rows;
  uint32_t columns;
  uint32_t kernel = 1;
  uint32_t states = 1;

  size_t size() const { return size_t{rows} * columns; }
};

inline int floor_log2(uint32_t value) { return 31 - __builtin_clz(value | 1); }

inline int clamp(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace tersor
