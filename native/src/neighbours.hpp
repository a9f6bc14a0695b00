// What the codes already known say about the next one.
#pragma once

#include <algorithm>

#include "common.hpp"

namespace tersor {

constexpr int kCap = 4095;      // magnitudes above are taken for this one
constexpr int kUnit = 16;       // of expected magnitudes
constexpr int kStart = 4 * kUnit;

// Levels of a magnitude, `resolution` to an octave.
inline int level(int magnitude, int resolution, int most) {
  uint32_t e = static_cast<uint32_t>(magnitude) + 2;
  int octave = floor_log2(e);
  int fraction = static_cast<int>((e << 5) >> octave) & 31;
  int found = octave * resolution + ((fraction * resolution) >> 5) - resolution;
  return clamp(found, 0, most);
}

// Of a weight in half steps, as rows are kept.
inline int magnitude(int halves) { return (halves < 0 ? -halves : halves) * (kUnit / 2); }

// What a trellis of `states` adds to a halved state whose lowest bit is set, and for an odd code.
struct Trellis {
  uint32_t states, carried, fed;
};

inline constexpr Trellis kTrellises[] = {{1, 0, 0},        {4, 0b10, 0b01},
                                         {8, 0b101, 0b010}, {16, 0b1001, 0b0010},
                                         {32, 0b10010, 0b00100}, {64, 0b100001, 0b001010}};

inline Trellis trellis_of(uint32_t states) {
  for (const Trellis& trellis : kTrellises) {
    if (trellis.states == states) return trellis;
  }
  throw std::invalid_argument("a trellis has 1, 4, 8, 16, 32 or 64 states");
}

class Neighbours {
 public:
  explicit Neighbours(Shape shape)
      : columns_(shape.columns),
        kernel_(std::max(1u, shape.kernel)),
        width_(kernel_ == 9 ? 3 : kernel_ == 25 ? 5 : kernel_ == 49 ? 7 : 0),
        pad_(2 * kernel_ + 4),
        trellis_(trellis_of(shape.states)),
        column_(shape.columns, 0),
        channel_(kernel_, kStart),
        sides_(kernel_, 0) {
    for (int i = 0; width_ && i < width_ * width_; ++i) {
      bool beside = i % width_ > 0, below = i >= width_;
      sides_[i] = static_cast<uint8_t>((beside ? kLeft : 0) | (below ? kUp : 0) |
                                       (beside && below ? kDiagonal : 0) |
                                       (below && i % width_ < width_ - 1 ? kOther : 0) |
                                       (i >= 2 * width_ ? kUpper : 0));
    }
    for (auto& row : rows_) row.assign(size_t{columns_} + pad_ + 1, 0);
  }

  void start_row(uint32_t row) {
    row_ = row;
    std::rotate(rows_, rows_ + 2, rows_ + 3);
    std::fill(rows_[0].begin(), rows_[0].end(), 0);
    near_ = far_;
    std::fill(channel_.begin(), channel_.end(), near_);
    state_ = 0;
    odd = 0;
  }

  // Moves to a column of the row, all columns before it being known.
  void look(uint32_t column) {
    looked_ = column;
    at_ = pad_ + column;
    position = column && static_cast<uint32_t>(position) + 1 < kernel_ ? position + 1 : 0;
    previous = column ? magnitude(here(1)) : near_;
    before = column > 1 ? magnitude(here(2)) : near_;
    int sides = kernel_ > 1 ? sides_[position] : column ? kLeft : 0;
    left = sides & kLeft ? here(1) : 0;
    up = sides & kUp ? here(width_) : 0;
    diagonal = sides & kDiagonal ? here(width_ + 1) : 0;
    other = sides & kOther ? here(width_ - 1) : 0;
    int upper = sides & kUpper ? here(2 * width_) : 0;
    lean = 4 * left + 4 * up - 2 * diagonal - upper;
    upward = sides & kUp ? magnitude(up) : previous;
    of_row = near_;
    of_rows = far_;
    of_column = row_ ? column_[column] : near_;
    of_channel = spatial() ? channel_[position] : of_column;
    expected = spatial() ? (2 * of_row + 5 * of_column + 3 * previous + before + of_channel +
                            4 * upward) >> 4
                         : (6 * of_rows + 8 * of_column + previous + before) >> 4;
    shift = std::max(0, floor_log2(static_cast<uint32_t>(expected) / kUnit) - 1);
  }

  // Adds the code at the column looked at.
  void add(int32_t code) {
    uint32_t column = looked_;
    // The weight that the code stands for: k, or with `odd` half a step nearer to zero.
    int halves = 2 * clamp(code, -kCap, kCap);
    if (odd) halves += (code < 0) - (code > 0);
    int seen = magnitude(halves);
    rows_[0][at_] = static_cast<int16_t>(halves);
    uint32_t fed = code & 1 ? trellis_.fed : 0;
    state_ = state_ >> 1 ^ (odd ? trellis_.carried : 0) ^ fed;
    odd = static_cast<int>(state_ & 1);
    near_ += ((seen - near_) * 26) >> 8;
    far_ += ((seen - far_) * 8) >> 8;
    int rate = spatial() ? 24 : 8;
    if (row_ == 0) {
      column_[column] = (of_column + seen) >> 1;
    } else {
      rate = std::max(rate, static_cast<int>(256 / (row_ + 1)));
      column_[column] += ((seen - of_column) * rate) >> 8;
    }
    int& channel = channel_[position];
    channel += ((seen - channel) * 40) >> 8;
  }

  bool spatial() const { return kernel_ > 1; }
  int column() const { return static_cast<int>(looked_); }
  int kernel() const { return static_cast<int>(kernel_); }

  // Clamped weights in half steps: `back` columns before in this row, or around the same column in rows above.
  int here(uint32_t back) const { return rows_[0][at_ - back]; }
  int above(int right = 0) const { return rows_[1][at_ + right]; }
  int two_above() const { return rows_[2][at_]; }

  // A sum of weights against the magnitude expected, times `scale`, at most `most` either way.
  int relative(int sum, int scale, int most) const {
    uint32_t inverse = (1u << 20) / (static_cast<uint32_t>(expected) + kUnit);
    uint64_t size = static_cast<uint64_t>(sum < 0 ? -sum : sum) * static_cast<uint64_t>(scale);
    int steps = static_cast<int>(std::min<uint64_t>((size * inverse) >> 17, most));
    return sum < 0 ? -steps : steps;
  }

  int position = 0, left = 0, up = 0, diagonal = 0, other = 0, lean = 0;
  int previous = 0, before = 0, upward = 0;
  int odd = 0;  // which of the trellis's two quantizers the code at this column belongs to
  int of_row = 0, of_rows = 0, of_column = 0, of_channel = 0, expected = 0, shift = 0;

 private:
  enum : uint8_t { kLeft = 1, kUp = 2, kDiagonal = 4, kOther = 8, kUpper = 16 };

  uint32_t columns_, kernel_;
  int width_;
  uint32_t pad_, row_ = 0, looked_ = 0;
  size_t at_ = 0;
  Trellis trellis_;
  uint32_t state_ = 0;
  int near_ = kStart, far_ = kStart;
  std::vector<int> column_, channel_;
  std::vector<uint8_t> sides_;  // which neighbours lie in the same kernel
  std::vector<int16_t> rows_[3];
};

}  // namespace tersor
