// Binary range coder: 64-bit range, renormalised by 32 bits, 16-bit probabilities of a one.
#pragma once

#include <cstdint>
#include <vector>

#include "common.hpp"

namespace tersor {

constexpr int kProbabilityBits = 16;
constexpr uint64_t kRangeBottom = uint64_t{1} << 32;
constexpr int kMostPlain = 16;

// How far above `low` the number below low + range lies that ends in the most zeros.
inline uint64_t shortest(uint64_t low, uint64_t range) {
  uint64_t up = 0 - low;
  for (int zeros = 63; up >= range; --zeros) up = (0 - low) & ((uint64_t{1} << zeros) - 1);
  return up;
}

class RangeEncoder {
 public:
  static constexpr bool kDecodes = false;

  // Returns `bit`; `probability` of a one lies in [1, 2^16 - 1].
  int code(int bit, uint32_t probability) {
    uint64_t bound = (range_ >> kProbabilityBits) * probability;
    if (bit) {
      range_ = bound;
    } else {
      raise(bound);
      range_ -= bound;
    }
    if (range_ < kRangeBottom) shift();
    return bit;
  }

  int decide(int bit, uint32_t probability) { return code(bit, probability); }

  // The lowest `count` <= 16 bits of a number, all values alike.
  uint32_t plain(uint32_t value, int count) {
    range_ >>= count;
    raise(range_ * value);
    if (range_ < kRangeBottom) shift();
    return value;
  }

  // The shortest bytes that, followed by zeros, lie within the final range.
  std::vector<uint8_t> finish() {
    raise(shortest(low_, range_));
    shift();
    shift();
    while (!out_.empty() && out_.back() == 0) out_.pop_back();
    return std::move(out_);
  }

 private:
  void raise(uint64_t more) {
    low_ += more;
    if (low_ >= more) return;
    for (size_t i = out_.size(); i-- > 0 && ++out_[i] == 0;) {
    }
  }

  void shift() {
    for (int at = 56; at >= 32; at -= 8) out_.push_back(static_cast<uint8_t>(low_ >> at));
    low_ <<= 32;
    range_ <<= 32;
  }

  std::vector<uint8_t> out_;
  uint64_t low_ = 0;
  uint64_t range_ = ~uint64_t{0};
};

class RangeDecoder {
 public:
  static constexpr bool kDecodes = true;

  explicit RangeDecoder(Span data) : data_(data) { code_ = uint64_t{next()} << 32 | next(); }

  // Without a condition, for no processor can predict the bit.
  TERSOR_INLINE int code(int, uint32_t probability) {
    uint64_t bound = (range_ >> kProbabilityBits) * probability;
    uint64_t one = code_ < bound, mask = 0 - one;
    code_ -= bound & ~mask;
    range_ = (range_ - bound) + ((2 * bound - range_) & mask);
    if (__builtin_expect(range_ < kRangeBottom, 0)) shift();
    return static_cast<int>(one);
  }

  // The same for a bit that decides what comes next: one branch will do for both.
  TERSOR_INLINE int decide(int, uint32_t probability) {
    uint64_t bound = (range_ >> kProbabilityBits) * probability;
    bool one = code_ < bound;
    if (one) {
      range_ = bound;
    } else {
      code_ -= bound;
      range_ -= bound;
    }
    if (__builtin_expect(range_ < kRangeBottom, 0)) shift();
    return one;
  }

  TERSOR_INLINE uint32_t plain(uint32_t, int count) {
    range_ >>= count;
    uint32_t value = 0;
    while (count) {
      uint64_t bound = range_ << --count, one = code_ >= bound;
      code_ -= bound & (0 - one);
      value = value << 1 | static_cast<uint32_t>(one);
    }
    if (range_ < kRangeBottom) shift();
    return value;
  }

  // Refuses bytes that the encoder would not have written.
  void finish() const {
    uint64_t read = uint64_t{last(data_, position_ - 8)} << 32 | last(data_, position_ - 4);
    bool ends = code_ == shortest(read - code_, range_);
    if (position_ < data_.size || !ends) throw Malformed("goes on after its last symbol");
    if (data_.size && data_.data[data_.size - 1] == 0) throw Malformed("ends in a zero byte");
  }

 private:
  TERSOR_INLINE void shift() {
    code_ = code_ << 32 | next();
    range_ <<= 32;
  }

  // The next four bytes; beyond the end all are zero.
  TERSOR_INLINE uint32_t next() {
    size_t from = position_;
    position_ += 4;
    if (position_ > data_.size) return last(data_, from);
    const uint8_t* at = data_.data + from;
    return uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | at[3];
  }

  static uint32_t last(Span data, size_t from) {
    uint32_t word = 0;
    for (size_t i = from; i < from + 4; ++i) word = word << 8 | (i < data.size ? data.data[i] : 0u);
    return word;
  }

  Span data_;
  size_t position_ = 0;
  uint64_t code_ = 0;
  uint64_t range_ = ~uint64_t{0};
};

}  // namespace tersor
