// Canonical Huffman codes of at most 12 bits, most significant bit first.
#pragma once

#include "fast.hpp"

namespace tersor {

constexpr int kMostLength = 12;

// The code of each symbol: shorter codes first, equal ones by symbol.
inline std::vector<uint32_t> canonical(const std::vector<int32_t>& lengths) {
  uint32_t next = 0, used = 0, many = 0;
  std::vector<uint32_t> codes(lengths.size());
  for (int length = 1; length <= kMostLength; ++length) {
    next <<= 1;
    for (size_t i = 0; i < lengths.size(); ++i) {
      if (lengths[i] != length) continue;
      codes[i] = next++;
      ++many;
      used += 1u << (kMostLength - length);
    }
  }
  bool single = used == 1u << (kMostLength - 1) && many == 1;  // of one bit, clear
  if (used != 1u << kMostLength && !single) throw Malformed("holds an incomplete Huffman code");
  return codes;
}

inline Bytes huffman_bits(const uint8_t* symbols, size_t count,
                          const std::vector<int32_t>& lengths) {
  auto codes = canonical(lengths);
  Bytes out;
  uint64_t bits = 0;
  int held = 0;
  for (size_t i = 0; i < count; ++i) {
    if (symbols[i] >= lengths.size() || lengths[symbols[i]] == 0) {
      throw std::invalid_argument("a symbol has no code");
    }
    bits = bits << lengths[symbols[i]] | codes[symbols[i]];
    held += lengths[symbols[i]];
    while (held >= 8) {
      held -= 8;
      out.push_back(static_cast<uint8_t>(bits >> held));
    }
  }
  if (held) out.push_back(static_cast<uint8_t>(bits << (8 - held)));
  return out;
}

template <class Value>
void huffman_decode(Span data, Value* out, size_t count) {
  if (count == 0) {
    if (data.size) throw Malformed("goes on after its last symbol");
    return;
  }
  Reader reader(data);
  SideDecoder side(reader.part());
  auto header = side_row(side, 2);
  int symbols = checked(header[0], 0, kMostSymbols - 1, "holds too many symbols") + 1;
  bool escapes = checked(header[1], 0, 1, "holds an unknown flag");
  auto lengths = side_row(side, symbols);
  for (int32_t length : lengths) checked(length, 0, kMostLength, "has a code too long");
  side.finish();
  Span escaped = reader.part();
  if (!escapes && escaped.size) throw Malformed("holds escaped codes without need");
  auto codes = canonical(lengths);
  std::vector<uint16_t> table(1u << kMostLength, 0);  // length << 8 | symbol; 0: no such code
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (!lengths[i]) continue;
    int free = kMostLength - lengths[i];
    for (uint32_t j = 0; j < 1u << free; ++j) {
      table[(codes[i] << free) + j] = static_cast<uint16_t>(lengths[i] << 8 | i);
    }
  }
  Span words = reader.rest();
  uint64_t bits = 0;
  int held = 0;
  size_t position = 0;
  for (size_t i = 0; i < count; ++i) {
    while (held < kMostLength) {
      bits = bits << 8 | (position < words.size ? words.data[position] : 0u);
      ++position;
      held += 8;
    }
    uint16_t entry = table[bits >> (held - kMostLength) & ((1u << kMostLength) - 1)];
    if (!entry) throw Malformed("holds bits that are no code");
    held -= entry >> 8;
    out[i] = static_cast<Value>(signed_value(entry & 255));
  }
  uint64_t read = position * 8 - held;
  if ((read + 7) / 8 != words.size) throw Malformed("is shorter or longer than its codes");
  uint32_t spare = static_cast<uint32_t>(words.size * 8 - read);
  if (words.size && (words.data[words.size - 1] & ((1u << spare) - 1))) {
    throw Malformed("ends in bits that are no code");
  }
  if (escapes) put_escaped(escaped, signed_value(symbols - 1), out, count);
}

}  // namespace tersor
