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

// A running mean of magnitudes, with four more bits.
class Mean {
 public:
  Mean() : Mean(kStart) {}
  explicit Mean(int value) : sum_(value * 16) {}

  int now() const { return sum_ >> 4; }

  // `rate` of 256.
  void add(int value, int rate) { sum_ += ((value * 16 - sum_) * rate) >> 8; }

 private:
  int sum_;
};

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

// The arrays that a walk over a matrix needs, apart from its numbers: these stay in registers.
class Surroundings {
 public:
  explicit Surroundings(Shape shape)
      : pad(2 * shape.kernel + 4),
        rows{std::vector<int16_t>(size_t{shape.columns} + pad + 1, 0), {}},
        columns(shape.columns),
        sides(shape.kernel) {
    rows[1] = rows[0];
    int width = width_of(shape.kernel);
    for (int i = 0; i < width * width; ++i) {
      bool beside = i % width > 0, below = i >= width;
      sides[i] = {-beside, -below, -(beside && below), -(below && i % width < width - 1),
                  -(i >= 2 * width)};
    }
  }

  static int width_of(uint32_t kernel) {
    return kernel == 9 ? 3 : kernel == 25 ? 5 : kernel == 49 ? 7 : 0;
  }

  // Which neighbours lie in the same kernel: all bits, or none.
  struct Sides {
    int left = 0, up = 0, diagonal = 0, other = 0, upper = 0;
  };
  struct Column {
    Mean seen, missed;
  };

  uint32_t pad;
  std::vector<int16_t> rows[2];
  std::vector<Column> columns;
  std::vector<Sides> sides;  // of each place in a kernel
};

// kSpatial: kernels of more than one column; kMisses: follows how far predictions miss.
template <bool kSpatial, bool kMisses>
class Neighbours {
 public:
  static constexpr bool spatial = kSpatial;

  Neighbours(Surroundings& around, Shape shape)
      : kernel_(static_cast<int>(shape.kernel)),
        width_(Surroundings::width_of(shape.kernel)),
        pad_(around.pad),
        trellis_(trellis_of(shape.states)),
        columns_(around.columns.data()),
        sides_(around.sides.data()) {}

  // Moves before a row, all rows above being known.
  void start_row(uint32_t row, Surroundings& around) {
    first_row_ = row == 0;
    early_ = static_cast<int>(256 / (row + 2));
    around.rows[0].swap(around.rows[1]);
    std::fill(around.rows[0].begin(), around.rows[0].end(), int16_t{0});
    row_ = around.rows[0].data() + pad_;
    above_ = around.rows[1].data() + pad_;
    position = kSpatial ? -1 : 0;
    state_ = 0;
    odd = 0;
  }

  // Moves to a column of the row, all columns before it being known.
  void look(uint32_t at) {
    column = at;
    // Sums and masks, because it is rare that a processor foresees a place.
    if (kSpatial) position = (position + 1) & -(position + 1 < kernel_);
    auto& means = columns_[column];
    if (first_row_) means = {row_mean_, missed_};
    of_row = row_mean_.now();
    of_column = means.seen.now();
    if (kMisses) {
      missed_row = missed_.now();
      missed_column = means.missed.now();
    }
    previous = column ? magnitude(here(1)) : of_row;
    if (kSpatial) {
      recent = recent_.now();
      look_around();
      expected = (9 * of_row + 9 * of_column + 6 * previous + 7 * upward) >> 5;
    } else {
      recent = of_row;
      upward = previous;
      expected = (15 * of_row + 12 * of_column + magnitude(above(0))) >> 4;
    }
    shift = std::max(0, floor_log2(static_cast<uint32_t>(expected) / kUnit) - 1);
  }

  // Adds the code at the column looked at, whose weight was predicted in units of magnitudes.
  void add(int32_t code, int predicted) {
    // The weight that the code stands for: k, or with `odd` half a step nearer to zero.
    halves = 2 * clamp(code, -kCap, kCap);
    halves += odd * ((code < 0) - (code > 0));
    int seen = magnitude(halves);
    row_[column] = static_cast<int16_t>(halves);
    uint32_t carried = trellis_.carried & (0 - (state_ & 1));
    uint32_t fed = trellis_.fed & (0 - (static_cast<uint32_t>(code) & 1));
    state_ = state_ >> 1 ^ carried ^ fed;
    odd = static_cast<int>(state_ & 1);
    auto& means = columns_[column];
    row_mean_.add(seen, 6);
    means.seen.add(seen, std::max(early_, 6));
    if (kSpatial) recent_.add(seen, 120);
    if (kMisses) {
      int gap = halves * (kUnit / 2) - predicted;
      int missed = std::min(gap < 0 ? -gap : gap, 2 * kCap * kUnit);
      missed_.add(missed, 13);
      means.missed.add(missed, std::max(early_, 4));
    }
  }

  // Clamped weights in half steps: `back` columns before in this row, or in the row above.
  int here(int back) const { return row_[static_cast<ptrdiff_t>(column) - back]; }
  int above(int right) const { return above_[static_cast<ptrdiff_t>(column) + right]; }

  // Of the magnitude expected, for `relative`.
  uint32_t inverse() const { return (1u << 20) / (static_cast<uint32_t>(expected) + kUnit); }

  uint32_t column = 0;
  int position = 0, left = 0, up = 0, diagonal = 0, other = 0, lean = 0;
  int previous = 0, upward = 0, recent = 0;
  int of_row = 0, of_column = 0, missed_row = 0, missed_column = 0;
  int expected = 0, shift = 0;
  int odd = 0;     // which of the trellis's two quantizers the code at this column belongs to
  int halves = 0;  // the weight added last

 private:
  void look_around() {
    const auto& sides = sides_[position];
    left = here(1) & sides.left;
    up = here(width_) & sides.up;
    diagonal = here(width_ + 1) & sides.diagonal;
    other = here(width_ - 1) & sides.other;
    int upper = here(2 * width_) & sides.upper;
    lean = 4 * left + 4 * up - 2 * diagonal - upper;
    upward = magnitude(up) + (previous & ~sides.up);
  }

  int kernel_, width_;
  uint32_t pad_;
  Trellis trellis_;
  Surroundings::Column* columns_;
  const Surroundings::Sides* sides_;
  int16_t *row_ = nullptr, *above_ = nullptr;
  uint32_t state_ = 0;
  bool first_row_ = true;
  int early_ = 0;  // rate of the means of columns in the first rows
  Mean row_mean_, recent_, missed_;
};

// A number against `inverse`, times `scale` of 2^17, rounded, at most `most` either way.
inline int relative(int64_t value, uint32_t inverse, int scale, int most) {
  uint64_t size = static_cast<uint64_t>(value < 0 ? -value : value) * inverse;
  uint64_t steps = (size * static_cast<uint64_t>(scale) + (1u << 16)) >> 17;
  int found = static_cast<int>(std::min<uint64_t>(steps, most));
  return value < 0 ? -found : found;
}

}  // namespace tersor
