// Floats from their exponents, coded as by `fast`, and the bytes of the rest.
#pragma once

#include "fast.hpp"

namespace tersor {

// The bits of the rest: mantissa, and the sign above it.
template <class Word>
struct WithExponent {
  using Bits = Word;

  static Word join(uint8_t exponent, uint32_t rest) {
    constexpr int mantissa = 8 * sizeof(Word) - 9;
    uint32_t sign = rest >> mantissa, low = rest & ((1u << mantissa) - 1);
    return static_cast<Word>(sign << (mantissa + 8) | uint32_t{exponent} << mantissa | low);
  }
};

// Of float16 the upper byte is coded, the lower is the rest.
struct Float16 {
  using Bits = uint16_t;

  static uint16_t join(uint8_t upper, uint32_t rest) {
    return static_cast<uint16_t>(uint32_t{upper} << 8 | rest);
  }
};

using Bfloat16 = WithExponent<uint16_t>;
using Float32 = WithExponent<uint32_t>;

// rest: (bytes, count), the lowest byte first.
template <class Float>
void floats_decode(Span data, const std::vector<Shape>& shapes, const uint8_t* rest, int center,
                   typename Float::Bits* out, size_t count) {
  auto join = [&](size_t i, int code) {
    uint32_t bits = rest[i];
    for (size_t byte = 1; byte < sizeof(*out) - 1; ++byte) {
      bits |= uint32_t{rest[byte * count + i]} << (8 * byte);
    }
    out[i] = Float::join(static_cast<uint8_t>(code + center), bits);
  };
  FastStream stream(data, shapes);
  int8_t codes[RansDecoder<int8_t>::kBlock];
  std::vector<size_t> places;
  auto take = [&](size_t first, size_t size) {
    for (size_t i = 0; i < size; ++i) join(first + i, codes[i]);
    if (!stream.escapes) return;
    for (size_t i = 0; i < size; ++i) {
      if (codes[i] == stream.escape) places.push_back(first + i);
    }
  };
  stream.decode<int8_t>(count, [&](size_t) { return codes; }, take);
  if (!stream.escapes) return;
  auto values = escaped_values(stream.escaped, places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    join(places[i], checked(values[i], -128, 127, "holds a code too large for its type"));
  }
}

}  // namespace tersor
