// Two models of integer codes with one binarisation.
//
// A code is a magnitude and a sign. The magnitude is divided by 2^shift, where shift follows the
// magnitude expected; the quotient is up to 14 flags ("larger still?") and an Exp-Golomb tail, the
// remainder plain bits, of which the upper two are modelled. The sign follows the first flag, or
// the remainder of a quotient of zero.
#pragma once

#include "adaptive.hpp"
#include "linear.hpp"
#include "range_coder.hpp"

namespace tersor {

constexpr int kFlags = 14;
constexpr int kMostLevel = 63;
constexpr int kMostLean = 12;
constexpr uint32_t kSettled = 4500;  // rate of a chance that has seen 24 bits

// What both models code in the same, simple way.
template <class Coder>
TERSOR_INLINE int code_bit(Coder& coder, int value, Probability& p) {
  value = coder.code(value, p.value);
  p.update(value);
  return value;
}

class Tail {
 public:
  // A number >= 0 as the length of its binary form and that form.
  template <class Coder>
  TERSOR_INLINE uint64_t exp_golomb(Coder& coder, uint64_t value) {
    int length = floor_log2(static_cast<uint32_t>(value + 1));
    int i = 0;
    while (code_bit(coder, i < length, lengths_[i])) {
      if (++i == 32) throw Malformed("holds a code of more than 32 bits");
    }
    int upper = std::max(0, i - kMostPlain);
    uint64_t found = 1;
    found = found << upper | plain(coder, value + 1, i - upper, upper);
    found = found << (i - upper) | plain(coder, value + 1, 0, i - upper);
    return found - 1;
  }

  template <class Coder>
  TERSOR_INLINE uint64_t remainder(Coder& coder, uint64_t value, uint64_t quotient, int shift) {
    if (shift == 0) return 0;
    Probability* upper = upper_[std::min<uint64_t>(quotient, 15)];
    uint64_t found = code_bit(coder, value >> (shift - 1) & 1, upper[0]);
    if (shift == 1) return found;
    found = found << 1 | code_bit(coder, value >> (shift - 2) & 1, upper[1 + found]);
    return found << (shift - 2) | plain(coder, value, 0, shift - 2);
  }

 private:
  template <class Coder>
  TERSOR_INLINE static uint32_t plain(Coder& coder, uint64_t value, int from, int count) {
    return coder.plain(static_cast<uint32_t>(value >> from & ((1u << count) - 1)), count);
  }

  Probability lengths_[33], upper_[16][3];
};

// The codes of a matrix, row by row, as 32-bit numbers.
class Rows {
 public:
  virtual ~Rows() = default;
  virtual int32_t* open(size_t row) = 0;
  virtual void close(size_t) {}
};

// Codes that lie elsewhere as `Value`; the rows of a decoder need not be read first.
template <class Value, bool kDecodes>
class RowsOf : public Rows {
 public:
  RowsOf(Value* codes, uint32_t columns) : codes_(codes), row_(columns) {}

  int32_t* open(size_t row) override {
    if (!kDecodes) std::copy_n(codes_ + row * row_.size(), row_.size(), row_.begin());
    return row_.data();
  }

  void close(size_t row) override {
    if (!kDecodes) return;
    Value* into = codes_ + row * row_.size();
    bool fits = true;
    for (size_t i = 0; i < row_.size(); ++i) {
      into[i] = static_cast<Value>(row_[i]);
      fits &= into[i] == row_[i];
    }
    if (!fits) throw Malformed("holds a code too large for its type");
  }

 private:
  Value* codes_;
  std::vector<int32_t> row_;
};

// The magnitude expected from the neighbours is the context; of small ones, whose codes are far
// from alike, a second one is the means of the row (in kernels: the codes before) and the column.
class Small {
 public:
  template <class Coder>
  void start(Coder&, Rows&, Shape) {}

  template <class Near>
  void look(const Near& near) {
    one_ = by_level_[near.odd][level(near.expected, 4, kMostLevel)];
    two_ = nullptr;
    if (near.shift) return;
    int recent = level(near.recent, 2, 15), column = level(near.of_column, 2, 15);
    two_ = by_means_[near.odd][recent * 16 + column];
  }

  template <class Coder>
  TERSOR_INLINE int flag(Coder& coder, int i, int value) {
    uint32_t chance = one_[i].value;
    if (two_) chance = (chance + two_[i].value) >> 1;
    value = coder.decide(value, chance);
    one_[i].update(value);
    if (two_) two_[i].update(value);
    return value;
  }

  template <class Coder, class Near>
  TERSOR_INLINE int sign(Coder& coder, const Near& near, int value) {
    if (!near.spatial) return sign_of_column(coder, near.column % 1024, value);
    int lean = relative(near.lean, near.inverse(), 2, kMostLean);
    return code_bit(coder, value, by_lean_[lean + kMostLean]);
  }

  static constexpr bool kPredicts = false;
  int predicted() const { return 0; }
  void add(int) {}

  Tail tail;

 private:
  // By the chance of all columns, until a column has seen 24.
  template <class Coder>
  TERSOR_INLINE int sign_of_column(Coder& coder, uint32_t column, int value) {
    Probability& own = by_column_[column];
    value = coder.code(value, own.rate < kSettled ? own.value : sign_.value);
    sign_.update(value);
    own.update(value);
    return value;
  }

  Probability by_level_[2][kMostLevel + 1][16], by_means_[2][256][16];
  Probability sign_, by_column_[1024], by_lean_[2 * kMostLean + 1];
  Probability *one_ = nullptr, *two_ = nullptr;
};

// Codes one code, or returns the one decoded.
template <class Coder, class Model, class Near>
TERSOR_INLINE int32_t code_one(Coder& coder, Model& model, const Near& near, int64_t known) {
  uint64_t size = static_cast<uint64_t>(known < 0 ? -known : known);
  uint64_t quotient = size >> near.shift, found = 0;
  int64_t negative = 0;
  bool first = model.flag(coder, 0, quotient > 0);
  if (first) {
    negative = model.sign(coder, near, known < 0);
    found = 1;
    while (found < kFlags && model.flag(coder, static_cast<int>(found), quotient > found)) ++found;
    if (found == kFlags) found += model.tail.exp_golomb(coder, quotient - kFlags);
  }
  if (near.shift) {
    found = found << near.shift | model.tail.remainder(coder, size, found, near.shift);
    if (found > 0x7fffffff) throw Malformed("holds a code of more than 32 bits");
    if (!first && found) negative = model.sign(coder, near, known < 0);
  }
  return static_cast<int32_t>((static_cast<int64_t>(found) ^ -negative) + negative);
}

template <bool kSpatial, class Coder, class Model>
void code_rows(Coder& into, Model& model, Rows& rows, Shape shape) {
  Surroundings around(shape);
  Neighbours<kSpatial, Model::kPredicts> near(around, shape);
  Coder coder = std::move(into);  // a copy that lives in registers
  for (uint32_t row = 0; row < shape.rows; ++row) {
    int32_t* codes = rows.open(row);
    near.start_row(row, around);
    for (uint32_t column = 0; column < shape.columns; ++column) {
      near.look(column);
      model.look(near);
      int32_t code = code_one(coder, model, near, Coder::kDecodes ? 0 : codes[column]);
      if (Coder::kDecodes) codes[column] = code;
      near.add(code, model.predicted());
      model.add(near.halves);
    }
    rows.close(row);
  }
  into = std::move(coder);
}

// Codes a matrix, or fills it with the codes decoded.
template <class Coder, class Model>
void code_matrix(Coder& coder, Model& model, Rows& rows, Shape shape) {
  if (shape.size() == 0) return;
  model.start(coder, rows, shape);
  shape.kernel > 1 ? code_rows<true>(coder, model, rows, shape)
                   : code_rows<false>(coder, model, rows, shape);
}

// Codes matrices that lie one after another.
template <class Coder, class Model, class Value>
void code_matrices(Coder& coder, Model& model, Value* codes, const std::vector<Shape>& shapes) {
  for (Shape shape : shapes) {
    RowsOf<Value, Coder::kDecodes> rows(codes, shape.columns);
    code_matrix(coder, model, rows, shape);
    codes += shape.size();
  }
}

}  // namespace tersor
