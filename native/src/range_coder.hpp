// Binary range coder: 32-bit range, bytewise renormalisation, 15-bit probabilities of a one.
#pragma once

#include <cstdint>
#include <vector>

#include "common.hpp"

namespace tersor {

constexpr int kProbabilityBits = 15;
constexpr uint32_t kRangeBottom = 1u << 24;

class RangeEncoder {
 public:
  static constexpr bool kDecodes = false;

  // Returns `bit`; `probability` of a one lies in [1, 2^15 - 1].
  int code(int bit, uint32_t probability) {
    uint32_t bound = (range_ >> kProbabilityBits) * probability;
    if (bit) {
      range_ = bound;
    } else {
      low_ += bound;
      if (low_ < bound) carry();
      range_ -= bound;
    }
    while (range_ < kRangeBottom) shift();
    return bit;
  }

  // The shortest bytes that, followed by zeros, lie within the final range.
  std::vector<uint8_t> finish() {
    for (int zeros = 32; zeros >= 0; --zeros) {
      uint64_t mask = (uint64_t{1} << zeros) - 1;
      uint64_t value = (low_ + mask) & ~mask;
      if (value < uint64_t{low_} + range_) {
        if (value >> 32) carry();
        low_ = static_cast<uint32_t>(value);
        break;
      }
    }
    for (int i = 0; i < 4; ++i) shift();
    while (!out_.empty() && out_.back() == 0) out_.pop_back();
    return std::move(out_);
  }

 private:
  void carry() {
    for (size_t i = out_.size(); i-- > 0 && ++out_[i] == 0;) {
    }
  }

  void shift() {
    out_.push_back(static_cast<uint8_t>(low_ >> 24));
    low_ <<= 8;
    range_ <<= 8;
  }

  std::vector<uint8_t> out_;
  uint32_t low_ = 0;
  uint32_t range_ = 0xffffffffu;
};

class RangeDecoder {
 public:
  static constexpr bool kDecodes = true;

  explicit RangeDecoder(Span data) : data_(data) {
    for (int i = 0; i < 4; ++i) code_ = code_ << 8 | next();
  }

  int code(int, uint32_t probability) {
    uint32_t bound = (range_ >> kProbabilityBits) * probability;
    // Without a condition, since no processor can predict it.
    uint32_t one = code_ < bound, mask = 0u - one;
    code_ -= bound & ~mask;
    range_ = (range_ - bound) + ((2 * bound - range_) & mask);
    int bit = static_cast<int>(one);
    while (range_ < kRangeBottom) {
      code_ = code_ << 8 | next();
      range_ <<= 8;
    }
    return bit;
  }

  // Refuses bytes that the encoder would not have written.
  void finish() const {
    if (position_ < data_.size) throw Malformed("goes on after its last symbol");
    if (data_.size && data_.data[data_.size - 1] == 0) throw Malformed("ends in a zero byte");
  }

 private:
  uint8_t next() { return position_ < data_.size ? data_.data[position_++] : (++position_, 0); }

  Span data_;
  size_t position_ = 0;
  uint32_t code_ = 0;
  uint32_t range_ = 0xffffffffu;
};

}  // namespace tersor
