// Which table of `fast` codes which position.
#pragma once

#include <cstring>

#include "static_tables.hpp"

namespace tersor {

// Which table codes which position of a matrix: base + row + channel + place, clamped.
struct Layout {
  Shape shape;
  int base = 0;
  std::vector<int32_t> row, column;

  void fill(uint32_t index, uint32_t first, uint32_t count, int tables, uint8_t* into) const {
    int64_t start = int64_t{base} + (row.empty() ? 0 : row[index]);
    if (column.empty()) {
      std::memset(into, static_cast<int>(std::clamp<int64_t>(start, 0, tables - 1)), count);
      return;
    }
    int whole = static_cast<int>(start), most = tables - 1;
    const int32_t* column_at = column.data() + first;
    for (uint32_t i = 0; i < count; ++i) {
      into[i] = static_cast<uint8_t>(clamp(whole + column_at[i], 0, most));
    }
  }
};

inline Layout read_layout(SideDecoder& side, Shape shape) {
  Layout layout{shape, 0, {}, {}};
  auto classes = [&](uint32_t count) {
    auto values = side_row(side, count);
    for (int32_t value : values) checked(value, -64, 64, "holds an impossible class");
    return values;
  };
  auto header = side_row(side, 2);
  int mode = checked(header[0], 0, 3, "holds an unknown mode");
  layout.base = checked(header[1], -64, 64, "holds an impossible class");
  if (mode & 1) layout.row = classes(shape.rows);
  if (mode & 2) {
    auto channel = classes(shape.columns / shape.kernel);
    auto place = shape.kernel > 1 ? classes(shape.kernel) : std::vector<int32_t>{0};
    layout.column.reserve(shape.columns);
    for (int32_t value : channel) {
      for (int32_t more : place) layout.column.push_back(value + more);
    }
  }
  return layout;
}

// The tables of the positions of a group, in blocks.
class Positions {
 public:
  Positions(const std::vector<Layout>& layouts, int tables) : layouts_(layouts), tables_(tables) {}

  void fill(uint8_t* into, size_t count) {
    while (count) {
      const Layout& layout = layouts_[matrix_];
      if (row_ == layout.shape.rows || layout.shape.columns == 0) {
        ++matrix_;
        row_ = column_ = 0;
        continue;
      }
      uint32_t left = layout.shape.columns - column_;
      uint32_t taken = static_cast<uint32_t>(std::min<size_t>(left, count));
      layout.fill(row_, column_, taken, tables_, into);
      into += taken;
      count -= taken;
      column_ += taken;
      if (column_ == layout.shape.columns) ++row_, column_ = 0;
    }
  }

 private:
  const std::vector<Layout>& layouts_;
  int tables_;
  size_t matrix_ = 0;
  uint32_t row_ = 0, column_ = 0;
};

}  // namespace tersor
