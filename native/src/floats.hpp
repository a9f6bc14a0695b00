// Floats from their exponents and the bytes of the rest: bfloat16 and float32.
#pragma once

#include "common.hpp"

namespace tersor {

// rest: (bytes, count), the lowest byte first; the top bit of the last byte is the sign.
template <class Element>
void join_floats(const int8_t* exponents, const uint8_t* rest, Element* out, size_t count,
                 int center) {
  constexpr int low_bytes = sizeof(Element) - 1, top = 8 * sizeof(Element) - 1;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    for (int byte = 0; byte < low_bytes; ++byte) {
      bits |= uint32_t{rest[byte * count + i]} << (8 * byte);
    }
    uint32_t exponent = static_cast<uint8_t>(exponents[i] + center);
    uint32_t mantissa = bits & ((1u << (top - 8)) - 1), sign = bits >> (top - 8);
    out[i] = static_cast<Element>(sign << top | exponent << (top - 8) | mantissa);
  }
}

}  // namespace tersor
