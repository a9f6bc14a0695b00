// A weight predicted from those before it in its row, by what the rows above taught.
//
// Stochastic Gram-Schmidt: each weight is taken apart into what the weights before it predict and
// the rest, its innovation. Innovations are next to uncorrelated, so the coefficient of each can be
// learned without regard to the others. Kernels come first: a weight is predicted from its own
// kernel, by coefficients that all kernels share; what is left is predicted from what was left at
// the same place of the kernels before it in the row, by coefficients of its own column.
#pragma once

#include "neighbours.hpp"
#include "vectors.hpp"

namespace tersor {

constexpr uint32_t kWindow = 768, kTaps = 24, kMostTaps = 64;
constexpr int kCaution = 3;     // a coefficient is held back as by this many rows for each column
constexpr int kMostScale = 12;  // weights are scaled by 2^scale so that their mean is about 384
constexpr int64_t kUsual = 160000;  // mean square of scaled weights, before any is known

class Linear {
 public:
  // The scale for a mean magnitude of `sum` / `count` half steps.
  static int scale_for(uint64_t sum, uint64_t count) {
    int scale = 0;
    while (scale < kMostScale && (sum << scale) < 256 * count) ++scale;
    return scale;
  }

  Linear(Shape shape, int scale)
      : scale_(scale),
        kernel_(shape.kernel),
        taps_(kernel_ > 1 && kernel_ <= kMostTaps ? std::min(kernel_ - 1, kTaps) : 0),
        channels_(shape.columns / kernel_),
        // Few rows teach little, and a small matrix must not ask for a large memory.
        window_(rounded(std::min({channels_, kWindow, 4 * (std::min(shape.rows, kWindow) - 1)}))),
        by_column_(size_t{channels_} * window_, 0),
        innovations_(size_t{kernel_} * (channels_ + window_), 0),
        gains_(innovations_.size(), 0),
        energies_(channels_, 0),
        by_tap_(taps_ ? size_t{kernel_} * taps_ : 0, 0),
        tap_innovations_(taps_ ? kernel_ : 0, 0),
        tap_gains_(tap_innovations_.size(), 0),
        tap_energies_(tap_innovations_.size(), 0) {}

  // In units of magnitudes.
  int64_t predict(uint32_t column) {
    channel_ = kernel_ > 1 ? column / kernel_ : column;
    place_ = column - channel_ * kernel_;
    if (column == 0 && count_) usual_ = energy_ / count_ + 1;
    int64_t sum = 0;
    const int32_t* tap = by_tap_.data() + size_t{place_} * taps_;
    first_ = place_ > taps_ ? place_ - taps_ : 0;
    for (uint32_t i = first_; i < place_; ++i) sum += int64_t{*tap++} * tap_innovations_[i];
    from_taps_ = static_cast<int>(sum >> 16);
    // The window ends before this channel; before the first one lie zeros.
    width_ = std::min(window_, rounded(channel_));
    size_t start = size_t{place_} * (channels_ + window_) + window_ + channel_ - width_;
    column_ = by_column_.data() + size_t{channel_} * window_ + (window_ - width_);
    known_ = innovations_.data() + start;
    known_gains_ = gains_.data() + start;
    from_channels_ = static_cast<int32_t>(dot(column_, known_, width_)) >> 15;
    return (int64_t{from_taps_} + from_channels_) * (kUnit / 2) >> scale_;
  }

  // The weight at the column that was predicted, in half steps.
  void add(int halves) {
    int own = clamp16(halves * (1 << scale_) - from_taps_);
    int rest = clamp16(own - from_channels_);
    if (taps_) learn_taps(own);
    add_times(column_, known_gains_, static_cast<int16_t>(rest), width_);
    int64_t& energy = energies_[channel_];
    energy += rest * rest;
    known_[width_] = static_cast<int16_t>(rest);
    int64_t caution = usual_ * (kCaution * std::min(channels_, kWindow));
    int64_t gain = rest * (int64_t{1} << 30) / (caution + energy);
    known_gains_[width_] = static_cast<int16_t>(std::clamp<int64_t>(gain, -32767, 32767));
    energy_ += own * own;
    ++count_;
  }

 private:
  void learn_taps(int own) {
    int32_t* tap = by_tap_.data() + size_t{place_} * taps_;
    for (uint32_t i = first_; i < place_; ++i) {
      int64_t step = (own * tap_gains_[i] + (1 << 15)) >> 16;
      *tap = static_cast<int32_t>(std::clamp<int64_t>(*tap + step, -kMostTap, kMostTap));
      ++tap;
    }
    tap_innovations_[place_] = own;
    int64_t& energy = tap_energies_[place_];
    energy += own * own;
    tap_gains_[place_] = own * (int64_t{1} << 32) / (usual_ * (kCaution * kernel_) + energy);
  }

  static uint32_t rounded(uint32_t count) { return (count + 15) & ~15u; }

  static constexpr int64_t kMostTap = 1 << 20;

  int scale_;
  uint32_t kernel_, taps_, channels_, window_;
  std::vector<int16_t> by_column_, innovations_, gains_;
  std::vector<int64_t> energies_;
  std::vector<int32_t> by_tap_, tap_innovations_;
  std::vector<int64_t> tap_gains_, tap_energies_;
  int64_t energy_ = 0, count_ = 0, usual_ = kUsual;
  uint32_t channel_ = 0, place_ = 0, first_ = 0, width_ = 0;
  int from_taps_ = 0, from_channels_ = 0;
  int16_t *column_ = nullptr, *known_ = nullptr, *known_gains_ = nullptr;
};

}  // namespace tersor
