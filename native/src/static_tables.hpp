// Frequency tables as they lie in a stream: quarter octaves, each against a neighbour's.
#pragma once

#include "mixed.hpp"

namespace tersor {

constexpr int kMostTables = 16, kMostSymbols = 256, kMostWeight = 64;
constexpr int kLeastTableBits = 10, kMostTableBits = 14;

// Decodes matrix by matrix, where the first say how large the next are.
class SideDecoder {
 public:
  explicit SideDecoder(Span data) : range_(data), model_(std::make_unique<Small>()) {}

  void matrix(int32_t* codes, Shape shape) { code_matrices(range_, *model_, codes, {shape}); }
  void finish() const { range_.finish(); }

 private:
  RangeDecoder range_;
  std::unique_ptr<Small> model_;
};

// 2^((code - 1) / 4), times 16; no symbol has code 0.
inline uint32_t table_weight(int code) {
  static constexpr uint32_t quarter[4] = {65536, 77936, 92682, 110218};  // 2^(i / 4) of 65536
  if (code == 0) return 0;
  uint64_t scaled = static_cast<uint64_t>(quarter[(code - 1) % 4]) << ((code - 1) / 4);
  return static_cast<uint32_t>(scaled >> 12);
}

// Frequencies that sum to `total` >= symbols, in proportion to the weights and at least 1 each.
inline std::vector<uint32_t> frequencies(const std::vector<uint32_t>& weights, uint32_t total) {
  uint64_t sum = 0;
  for (uint32_t weight : weights) sum += weight;
  std::vector<uint32_t> found(weights.size(), 0);
  if (sum == 0) {
    found[0] = total;
    return found;
  }
  int64_t missing = total;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i]) continue;
    found[i] = std::max<uint32_t>(1, static_cast<uint32_t>(uint64_t{weights[i]} * total / sum));
    missing -= found[i];
  }
  while (missing != 0) {
    auto largest = std::max_element(found.begin(), found.end());
    int64_t change = std::max(missing, int64_t{1} - static_cast<int64_t>(*largest));
    *largest = static_cast<uint32_t>(*largest + change);
    missing -= change;
  }
  return found;
}

inline std::vector<int32_t> side_row(SideDecoder& side, uint32_t count) {
  std::vector<int32_t> values(count);
  side.matrix(values.data(), Shape{1, count});
  return values;
}

inline int checked(int32_t value, int low, int high, const char* what) {
  if (value < low || value > high) throw Malformed(what);
  return value;
}

inline std::vector<uint32_t> side_weights(SideDecoder& side, uint32_t tables, uint32_t symbols) {
  std::vector<int32_t> codes(size_t{tables} * symbols);
  side.matrix(codes.data(), Shape{tables, symbols});
  std::vector<uint32_t> weights(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) {
    size_t symbol = i % symbols;
    int64_t base = symbol >= 2 ? codes[i - 2] : symbol == 1 ? codes[i - 1]
                                            : i ? codes[i - symbols] : 0;
    int64_t code = base + codes[i];
    if (code < 0 || code > kMostWeight) throw Malformed("holds an impossible frequency");
    codes[i] = static_cast<int32_t>(code);
    weights[i] = table_weight(codes[i]);
  }
  return weights;
}

inline int32_t signed_value(uint32_t symbol) {
  return symbol & 1 ? -static_cast<int32_t>((symbol + 1) / 2) : static_cast<int32_t>(symbol / 2);
}

// Reads the parts of a stream, never beyond its end.
class Reader {
 public:
  explicit Reader(Span data) : data_(data) {}

  Span part() {
    size_t size = 0;
    for (int shift = 0;; shift += 7) {
      if (shift > 35) throw Malformed("holds an impossible length");
      uint8_t byte = *take(1).data;
      size |= size_t{byte & 127u} << shift;
      if (byte < 128) break;
    }
    return take(size);
  }

  Span rest() { return take(data_.size - position_); }

 private:
  Span take(size_t size) {
    if (size > data_.size - position_) throw Malformed("ends too early");
    position_ += size;
    return {data_.data + position_ - size, size};
  }

  Span data_;
  size_t position_ = 0;
};

}  // namespace tersor
