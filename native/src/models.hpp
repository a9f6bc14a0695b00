// Two models of integer codes with one binarisation.
//
// A code is a magnitude and a sign. The magnitude is divided by 2^shift, where shift follows the
// magnitude expected; the quotient is up to 14 flags ("larger still?") and an Exp-Golomb tail, the
// remainder plain bits, of which the upper two are modelled.
#pragma once

#include "adaptive.hpp"
#include "neighbours.hpp"
#include "range_coder.hpp"

namespace tersor {

constexpr int kFlags = 14;
constexpr int kMostLevel = 63;
constexpr int kMostLean = 12;

// What both models code in the same, simple way.
template <class Coder>
class Tail {
 public:
  explicit Tail(Coder& coder) : coder_(coder) {}

  int bit(int value, Probability& p) {
    value = coder_.code(value, codable(p.value()));
    p.update(value);
    return value;
  }

  int plain(int value) { return coder_.code(value, 1u << (kProbabilityBits - 1)); }

  // A number >= 0 as the length of its binary form and that form.
  uint64_t exp_golomb(uint64_t value) {
    int length = floor_log2(static_cast<uint32_t>(value + 1));
    int i = 0;
    while (bit(i < length, lengths_[i])) {
      if (++i == 32) throw Malformed("holds a code of more than 32 bits");
    }
    uint64_t found = 1;
    for (int j = i - 1; j >= 0; --j) found = found << 1 | plain((value + 1) >> j & 1);
    return found - 1;
  }

  uint64_t remainder(uint64_t value, uint64_t quotient, int shift) {
    uint64_t found = 0;
    for (int j = shift - 1; j >= 0; --j) {
      int known = value >> j & 1, rank = shift - 1 - j;
      found = found << 1 | (rank < 2 ? bit(known, upper_[std::min<uint64_t>(quotient, 15)][rank])
                                     : plain(known));
    }
    return found;
  }

 private:
  Coder& coder_;
  Probability lengths_[33], upper_[16][2];
};

// One context: the magnitude expected from the neighbours, and the trellis's quantizer.
template <class Coder>
class Small {
 public:
  explicit Small(Coder& coder) : tail(coder) {}

  void look(const Neighbours& near) {
    flags_ = chances_[near.odd][level(near.expected, 4, kMostLevel)];
  }

  int flag(int i, int value) { return tail.bit(value, flags_[i]); }

  int sign(const Neighbours& near, int value, uint64_t size) {
    int beyond = static_cast<int>(std::min<uint64_t>(size, 4)) - 1;
    int lean = near.relative(near.lean, 2, kMostLean) + kMostLean;
    return tail.bit(value, signs_[near.spatial() ? lean * 4 + beyond : 100]);
  }

  Tail<Coder> tail;

 private:
  Probability chances_[2][kMostLevel + 1][16], signs_[101];
  Probability* flags_ = nullptr;
};

// Eight contexts, mixed by their logits with weights that learn, then corrected by what came of
// the mixture before.
template <class Coder>
class Mixed {
 public:
  explicit Mixed(Coder& coder)
      : tail(coder), coder_(coder), chances_(2 * kSlots * 16), signs_(8 * 1024),
        mixers_(256 + 1024 + 8 + 64), corrections_(2048 + 64) {
    for (auto& mixer : mixers_) std::fill(mixer.weight, mixer.weight + 8, 16384 / 4);
    for (auto& correction : corrections_) {
      for (int i = 0; i < 33; ++i) {
        correction.value[i] = tables_.squashed[std::min(4095, i * 128)];
      }
    }
  }

  Tail<Coder> tail;

  void look(const Neighbours& near) {
    int expected = near.expected;
    level_ = level(expected, 4, kMostLevel);
    int row = near.spatial() ? near.of_row : near.of_rows;
    int first[8];
    first[0] = level_;
    first[1] = level(row, 2, 31) * 32 + level(near.of_column, 2, 31);
    first[2] = (level(near.previous, 2, 15) * 16 + level(near.upward, 2, 15)) * 16 +
               level(near.before, 2, 15);
    int second = near.spatial() ? near.here(near.kernel()) : near.two_above();
    first[3] = (level(magnitude(near.above()), 2, 15) * 16 + level(magnitude(second), 2, 15)) * 16 +
               std::min(15, level_ / 3);
    int around = magnitude(near.above(-1)) + magnitude(near.above(1));
    int place = near.spatial() ? std::min(near.position, 24) : level(around, 2, 31);
    first[4] = place * 32 + level_ / 2;
    int lean = near.relative(near.lean, 2, kMostLean);
    first[5] = (lean < 0 ? -lean : lean) * 64 + level_;
    int corner = magnitude(near.diagonal) + magnitude(near.other);
    int further = magnitude(near.here(3)) + magnitude(near.here(4));
    first[6] = near.spatial() ? level(corner, 2, 31) * 32 + level(expected, 2, 31)
                              : level(further, 2, 15) * 64 + level_;
    first[7] = level(near.of_channel, 2, 31) * 32 + level(near.of_rows, 2, 31);
    int quantizer = near.odd * kSlots;
    for (int i = 0; i < 8; ++i) slots_[i] = &chances_[(quantizer + kFirst[i] + first[i]) * 16];
    correction_ = (near.odd * 64 + level_) * 16;
    mixer_ = (near.spatial() * 16) * 8 + std::min(near.shift, 7);
  }

  int flag(int i, int value) {
    Probability* inputs[8];
    for (int j = 0; j < 8; ++j) inputs[j] = slots_[j] + i;
    return mix(value, inputs, mixers_[mixer_ + i * 8], mixers_[256 + level_ * 16 + i],
               corrections_[correction_ + i]);
  }

  int sign(const Neighbours& near, int value, uint64_t size) {
    int context[8] = {};
    int beyond = static_cast<int>(std::min<uint64_t>(size, 4)) - 1;
    int lean = near.relative(near.lean, 2, kMostLean);
    int above = near.above(), twice = near.two_above();
    if (near.spatial()) {
      int channel = near.here(near.kernel()), kernels = channel + near.here(2 * near.kernel());
      auto third = [&](int code) { return near.relative(code * 3, 1, 3) + 3; };
      int doubled = static_cast<int>(std::min<uint64_t>(size, kCap)) * kUnit;
      int scale = clamp(level(doubled, 1, 31) - level(near.expected, 1, 31) + 1, 0, 3);
      context[0] = (lean + 12) * 4 + beyond;
      context[1] = (((side(near.left) * 3 + side(near.up)) * 3 + side(near.diagonal)) * 3 +
                    side(near.other)) * 4 + beyond;
      context[2] = ((side(above) * 3 + side(channel)) * 3 + side(twice)) * 4 + beyond;
      context[3] = (std::min(near.position, 24) * 7 + clamp(lean / 2, -3, 3) + 3) * 4 + beyond;
      context[4] = (third(near.left) * 7 + third(near.up)) * 7 + third(near.diagonal);
      context[5] = (third(near.here(1)) * 7 + third(channel)) * 7 + third(above);
      context[6] = ((lean + 12) * 4 + scale) * 4 + near.shift % 4;
      context[7] = (near.relative(above + twice + kernels, 2, 12) + 12) * 4 + beyond;
    } else {
      context[0] = (side(near.left) * 3 + side(above)) * 3 + side(twice);
      context[1] = near.column() % 1024;
      context[2] = side(near.above(-1)) * 3 + side(near.above(1));
    }
    Probability* inputs[8];
    for (int j = 0; j < 8; ++j) inputs[j] = &signs_[j * 1024 + context[j]];
    int kind = near.spatial();
    return mix(value, inputs, mixers_[1280 + kind * 4 + beyond],
               mixers_[1288 + kind * 32 + std::min(near.position, 24)],
               corrections_[2048 + kind * 32 + lean + 12]);
  }

 private:
  struct Mixer {
    int32_t weight[8];
  };
  struct Correction {
    uint16_t value[33];
  };

  static constexpr int kFirst[8] = {0, 64, 1088, 5184, 9280, 10304, 11136, 12160};
  static constexpr int kSlots = 13184;

  static int side(int code) { return code > 0 ? 1 : code < 0 ? 2 : 0; }

  static int dot(const Mixer& mixer, const int32_t* logits) {
    int32_t sum = 0;
    for (int j = 0; j < 8; ++j) sum += mixer.weight[j] * logits[j];
    return clamp(sum >> 14, -2047, 2047);
  }

  // |weight| < 2^16 and |logit| < 2^11, so that neither a product nor a sum overflows.
  static void learn(Mixer& mixer, const int32_t* logits, int error) {
    for (int j = 0; j < 8; ++j) {
      int weight = mixer.weight[j] + ((logits[j] * error + (1 << 16)) >> 17);
      mixer.weight[j] = clamp(weight, -65535, 65535);
    }
  }

  int mix(int bit, Probability** inputs, Mixer& first, Mixer& second, Correction& correction) {
    int32_t logits[8];
    for (int j = 0; j < 8; ++j) logits[j] = tables_.stretch(inputs[j]->value());
    int one = dot(first, logits), two = dot(second, logits);
    int both = (one + two) >> 1;
    int place = (both + 2048) * 32, lower = place >> 12, share = place & 4095;
    uint16_t* cell = correction.value + lower;
    int corrected = (cell[0] * (4096 - share) + cell[1] * share) >> 12;
    bit = coder_.code(bit, codable((corrected + tables_.squash(both)) >> 1));
    int target = bit ? 65535 : 0;
    learn(first, logits, target - tables_.squash(one));
    learn(second, logits, target - tables_.squash(two));
    for (int j = 0; j < 8; ++j) inputs[j]->update(bit);
    uint16_t& nearest = cell[share >= 2048];
    nearest = static_cast<uint16_t>(nearest + ((target - nearest) >> 7));
    return bit;
  }

  Coder& coder_;
  const Logistic& tables_ = logistic();
  std::vector<Probability> chances_, signs_;
  std::vector<Mixer> mixers_;
  std::vector<Correction> corrections_;
  Probability* slots_[8] = {};
  int level_ = 0, mixer_ = 0, correction_ = 0;
};

// Codes a matrix, or fills it with the codes decoded.
template <class Coder, class Model>
void code_matrix(Model& model, int32_t* codes, Shape shape) {
  if (shape.size() == 0) return;
  Neighbours near(shape);
  for (uint32_t row = 0; row < shape.rows; ++row) {
    near.start_row(row);
    for (uint32_t column = 0; column < shape.columns; ++column, ++codes) {
      near.look(column);
      model.look(near);
      int64_t known = Coder::kDecodes ? 0 : *codes;
      uint64_t size = static_cast<uint64_t>(known < 0 ? -known : known);
      uint64_t quotient = size >> near.shift;
      int i = 0;
      while (i < kFlags && model.flag(i, quotient > static_cast<uint64_t>(i))) ++i;
      uint64_t found = i;
      if (i == kFlags) found += model.tail.exp_golomb(quotient - kFlags);
      found = found << near.shift | model.tail.remainder(size, found, near.shift);
      if (found > 0x7fffffff) throw Malformed("holds a code of more than 32 bits");
      int64_t negative = found ? model.sign(near, known < 0, found) : 0;
      int64_t code = (static_cast<int64_t>(found) ^ -negative) + negative;
      if (Coder::kDecodes) *codes = static_cast<int32_t>(code);
      near.add(static_cast<int32_t>(code));
    }
  }
}

}  // namespace tersor
