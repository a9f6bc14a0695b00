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

inline int magnitude(int code) { return (code < 0 ? -code : code) * kUnit; }

class Neighbours {
 public:
  explicit Neighbours(Shape shape)
      : columns_(shape.columns),
        kernel_(std::max(1u, shape.kernel)),
        width_(kernel_ == 9 ? 3 : kernel_ == 25 ? 5 : kernel_ == 49 ? 7 : 0),
        pad_(2 * kernel_ + 4),
        column_(shape.columns, 0),
        channel_(kernel_, kStart) {
    for (auto& row : rows_) row.assign(size_t{columns_} + pad_ + 1, 0);
  }

  void start_row(uint32_t row) {
    row_ = row;
    std::rotate(rows_, rows_ + 2, rows_ + 3);
    std::fill(rows_[0].begin(), rows_[0].end(), 0);
    near_ = far_;
    std::fill(channel_.begin(), channel_.end(), near_);
  }

  // Moves to a column of the row, all columns before it being known.
  void look(uint32_t column) {
    looked_ = column;
    at_ = pad_ + column;
    position = static_cast<int>(column % kernel_);
    bool beside = width_ ? position % width_ > 0 : kernel_ == 1 && column > 0;
    bool below = width_ && position >= width_;
    previous = column ? magnitude(here(1)) : near_;
    before = column > 1 ? magnitude(here(2)) : near_;
    left = beside ? here(1) : 0;
    up = below ? here(width_) : 0;
    diagonal = beside && below ? here(width_ + 1) : 0;
    other = below && position % width_ < width_ - 1 ? here(width_ - 1) : 0;
    int upper = width_ && position >= 2 * width_ ? here(2 * width_) : 0;
    lean = 4 * left + 4 * up - 2 * diagonal - upper;
    upward = below ? magnitude(up) : previous;
    of_row = near_;
    of_rows = far_;
    of_column = row_ ? column_[column] : near_;
    of_channel = spatial() ? channel_[position] : of_column;
    expected = spatial() ? (2 * of_row + 5 * of_column + 3 * previous + before + of_channel +
                            4 * upward) >> 4
                         : (6 * of_rows + 8 * of_column + previous + before) >> 4;
    inverse_ = (1u << 20) / (static_cast<uint32_t>(expected) + kUnit);
    shift = std::max(0, floor_log2(static_cast<uint32_t>(expected) / kUnit) - 1);
  }

  // Adds the code at the column looked at.
  void add(int32_t code) {
    uint32_t column = looked_;
    int capped = clamp(code, -kCap, kCap);
    int seen = magnitude(capped);
    rows_[0][at_] = static_cast<int16_t>(capped);
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

  // Clamped codes: `back` columns before in this row, or around the same column in rows above.
  int here(uint32_t back) const { return rows_[0][at_ - back]; }
  int above(int right = 0) const { return rows_[1][at_ + right]; }
  int two_above() const { return rows_[2][at_]; }

  // A sum of codes against the magnitude expected, times `scale`, at most `most` either way.
  int relative(int sum, int scale, int most) const {
    uint64_t size = static_cast<uint64_t>(sum < 0 ? -sum : sum) * static_cast<uint64_t>(scale);
    int steps = static_cast<int>(std::min<uint64_t>((size * inverse_) >> 16, most));
    return sum < 0 ? -steps : steps;
  }

  int position = 0, left = 0, up = 0, diagonal = 0, other = 0, lean = 0;
  int previous = 0, before = 0, upward = 0;
  int of_row = 0, of_rows = 0, of_column = 0, of_channel = 0, expected = 0, shift = 0;

 private:
  uint32_t columns_, kernel_;
  int width_;
  uint32_t pad_, row_ = 0, looked_ = 0;
  size_t at_ = 0;
  uint32_t inverse_ = 0;
  int near_ = kStart, far_ = kStart;
  std::vector<int> column_, channel_;
  std::vector<int16_t> rows_[3];
};

}  // namespace tersor
