// The model of `max`: contexts mixed by their logits with weights that learn, then corrected by
// what came of the mixture before.
#pragma once

#include <cstring>

#include "models.hpp"

#if defined(__SSE2__) && !defined(TERSOR_SCALAR)
#define TERSOR_SSE2
#include <emmintrin.h>
#endif

namespace tersor {

constexpr int kInputs = 8;
constexpr int kLeast = 16;  // of 65536: no bit is taken for more certain than this

// Weights of the inputs: as many as fit a vector that every processor has.
struct alignas(16) Inputs {
  int16_t at[kInputs] = {};
};

#ifdef TERSOR_SSE2
using Logits = __m128i;

inline __m128i vector_of(const Inputs& from) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(from.at));
}
#else
using Logits = Inputs;
#endif

// What the inputs' chances are as logits; those beyond `count` are 0.
template <int count>
TERSOR_INLINE Logits logits_of(const Logistic& tables, Probability* const* chances) {
#ifdef TERSOR_SSE2
  // Written one by one to memory, they could not be read as a vector at once.
  auto logit = [&](int i) { return i < count ? tables.stretch(chances[i]->value) : 0; };
  __m128i found = _mm_cvtsi32_si128(logit(0) & 0xffff);
  found = _mm_insert_epi16(found, logit(1), 1);
  found = _mm_insert_epi16(found, logit(2), 2);
  found = _mm_insert_epi16(found, logit(3), 3);
  if (count > 4) found = _mm_insert_epi16(found, logit(4), 4);
  if (count > 5) found = _mm_insert_epi16(found, logit(5), 5);
  return found;
#else
  Logits found;
  for (int i = 0; i < count; ++i) {
    found.at[i] = static_cast<int16_t>(tables.stretch(chances[i]->value));
  }
  return found;
#endif
}

// The logit that the sum of two sets of weights (1 is 2^15) makes of the inputs.
TERSOR_INLINE int mixed(const Inputs& first, const Inputs& second, const Logits& logits) {
#ifdef TERSOR_SSE2
  __m128i sums = _mm_add_epi32(_mm_madd_epi16(vector_of(first), logits),
                               _mm_madd_epi16(vector_of(second), logits));
  sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1));
  int sum = _mm_cvtsi128_si32(sums);
#else
  int sum = 0;
  for (int i = 0; i < kInputs; ++i) sum += (first.at[i] + second.at[i]) * logits.at[i];
#endif
  return clamp(sum >> 15, -2047, 2047);
}

// Moves the weights by logit * error / 2^16, rounded and saturated; |error| < 2^15.
TERSOR_INLINE void learn(Inputs& weights, const Logits& logits, int error) {
#ifdef TERSOR_SSE2
  __m128i step = _mm_mulhi_epi16(_mm_add_epi16(logits, logits),
                                 _mm_set1_epi16(static_cast<int16_t>(error)));
  step = _mm_srai_epi16(_mm_add_epi16(step, _mm_set1_epi16(1)), 1);
  _mm_store_si128(reinterpret_cast<__m128i*>(weights.at),
                  _mm_adds_epi16(vector_of(weights), step));
#else
  for (int i = 0; i < kInputs; ++i) {
    int step = (((2 * logits.at[i] * error) >> 16) + 1) >> 1;
    weights.at[i] = static_cast<int16_t>(clamp(weights.at[i] + step, -32768, 32767));
  }
#endif
}

#ifdef TERSOR_SSE2
// Up to four chances from the one at `start` on, of `count`.
template <int start, int count>
__m128i loaded(Probability* const* from) {
  auto load = [&](int i) {
    int32_t both = 0;
    if (i < count) std::memcpy(&both, from[i], sizeof(both));
    return _mm_cvtsi32_si128(both);
  };
  return _mm_unpacklo_epi64(_mm_unpacklo_epi32(load(start), load(start + 1)),
                            _mm_unpacklo_epi32(load(start + 2), load(start + 3)));
}
#endif

// All see the same bit.
template <int count>
TERSOR_INLINE void update(Probability* const* chances, int bit) {
#ifdef TERSOR_SSE2
  __m128i low = loaded<0, count>(chances), high = loaded<4, count>(chances);
  // Values and rates lie next to each other: sort them into two vectors.
  __m128i values = _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(low, 16), 16),
                                   _mm_srai_epi32(_mm_slli_epi32(high, 16), 16));
  __m128i rates = _mm_packs_epi32(_mm_srai_epi32(low, 16), _mm_srai_epi32(high, 16));
  __m128i flip = _mm_set1_epi16(static_cast<int16_t>(-bit)), gaps = _mm_xor_si128(values, flip);
  gaps = _mm_sub_epi16(gaps, _mm_mulhi_epu16(gaps, rates));
  values = _mm_xor_si128(gaps, flip);
  rates = _mm_sub_epi16(rates, _mm_srli_epi16(_mm_mulhi_epu16(rates, rates), 1));
  alignas(16) Probability after[kInputs];
  _mm_store_si128(reinterpret_cast<__m128i*>(after), _mm_unpacklo_epi16(values, rates));
  _mm_store_si128(reinterpret_cast<__m128i*>(after + 4), _mm_unpackhi_epi16(values, rates));
  for (int i = 0; i < count; ++i) *chances[i] = after[i];
#else
  for (int i = 0; i < count; ++i) chances[i]->update(bit);
#endif
}

class Mixed {
 public:
  Mixed()
      : chances_(2 * kSlots), signs_(4 * 1024), mixers_(256 + 1024 + 2 + 64),
        corrections_(2048 + 64) {
    for (Inputs& mixer : mixers_) std::fill(mixer.at, mixer.at + kInputs, int16_t{4096});
    for (Correction& correction : corrections_) {
      for (int i = 0; i < 33; ++i) {
        correction.value[i] = tables_.squashed[std::min(4095, i * 128)];
      }
    }
  }

  Tail tail;

  // A matrix begins with the scale of its weights, in four bits.
  template <class Coder>
  void start(Coder& coder, Rows& rows, Shape shape) {
    int scale = Coder::kDecodes ? 0 : scale_of(rows, shape);
    scale = static_cast<int>(coder.plain(static_cast<uint32_t>(scale), 4));
    if (scale > kMostScale) throw Malformed("scales its weights too much");
    linear_ = std::make_unique<Linear>(shape, scale);
  }

  template <class Near>
  void look(const Near& near) {
    expect(near);
    int around = magnitude(near.above(-1)) + magnitude(near.above(1));
    place_ = near.spatial ? std::min(near.position, 24) : level(around, 2, 31);
    int size = aim_ < 0 ? -aim_ : aim_;
    int finely = finely_ < 0 ? -finely_ : finely_;
    chances(0, level_);
    chances(1, 64 + level(near.missed_row, 2, 31) * 32 + level(near.missed_column, 2, 31));
    chances(2, 1088 + (level(near.previous, 2, 15) * 16 + level(near.upward, 2, 15)) * 16 +
                   level(magnitude(near.here(2)), 2, 15));
    chances(3, 5184 + place_ * 32 + level_ / 2);
    chances(4, 6208 + size * 64 + level_);
    chances(5, 9216 + finely * 16 + std::min(15, level_ / 3));
    mixer_ = near.spatial * 128 + std::min(near.shift, 7);
    correction_ = (odd_ * 64 + size) * 16;
  }

  template <class Coder>
  TERSOR_INLINE int flag(Coder& coder, int i, int value) {
    Probability* inputs[6];
    for (int j = 0; j < 6; ++j) inputs[j] = slots_[j] + i;
    return mix<6>(coder, value, inputs, mixers_[mixer_ + i * 8], mixers_[256 + level_ * 16 + i],
                  corrections_[correction_ + i]);
  }

  template <class Coder, class Near>
  TERSOR_INLINE int sign(Coder& coder, const Near& near, int value) {
    int aim = aim_ + kAims, spatial = near.spatial;
    int around = static_cast<int>(near.column % 1024);
    if (spatial) {
      around = ((side(near.left) * 3 + side(near.up)) * 3 + side(near.diagonal)) * 3 +
               side(near.other);
    }
    Probability* inputs[4] = {
        &signs_[around],
        &signs_[1024 + odd_ * 32 + aim],
        &signs_[2048 + (finely_ + 2 * kAims) * 16 + std::min(15, level_ / 4)],
        &signs_[3072 + place_ * 32 + aim],
    };
    value = mix<4>(coder, value, inputs, mixers_[1280 + spatial],
                   mixers_[1282 + spatial * 32 + place_], corrections_[2048 + spatial * 32 + aim]);
    // From here on the sign is known, and says on which side of the prediction larger codes lie.
    int size = (value ? -aim_ : aim_) + kAims;
    chances(4, 6208 + (16 + size) * 64 + level_);
    chances(5, 9216 + (31 + (value ? -finely_ : finely_) + 2 * kAims) * 16 +
                   std::min(15, level_ / 3));
    correction_ = (odd_ * 64 + 16 + size) * 16;
    return value;
  }

  void add(int halves) { linear_->add(halves); }
  static constexpr bool kPredicts = true;
  int predicted() const { return predicted_; }

 private:
  static constexpr int kAims = 15;
  static constexpr int kSlots = 10752;
  struct alignas(64) Flags {
    Probability at[16];
  };
  struct Correction {
    uint16_t value[33];
  };

  static int scale_of(Rows& rows, Shape shape) {
    uint64_t sum = 0;
    for (uint32_t row = 0; row < shape.rows; ++row) {
      const int32_t* codes = rows.open(row);
      for (uint32_t i = 0; i < shape.columns; ++i) {
        sum += 2 * static_cast<uint64_t>(std::abs(clamp(codes[i], -kCap, kCap)));
      }
    }
    return Linear::scale_for(sum, shape.size());
  }

  template <class Near>
  void expect(const Near& near) {
    level_ = level(near.expected, 4, kMostLevel);
    odd_ = near.odd;
    int64_t most = 2 * kCap * kUnit;
    predicted_ = static_cast<int>(std::clamp(linear_->predict(near.column), -most, most));
    uint32_t inverse = near.inverse();
    aim_ = relative(predicted_, inverse, 1, kAims);
    finely_ = relative(predicted_, inverse, 2, 2 * kAims);
  }

  void chances(int i, int context) { slots_[i] = chances_[odd_ * kSlots + context].at; }

  static int side(int code) { return code > 0 ? 1 : code < 0 ? 2 : 0; }

  template <int count, class Coder>
  TERSOR_INLINE int mix(Coder& coder, int bit, Probability* const* inputs, Inputs& first,
                        Inputs& second, Correction& correction) {
    Logits logits = logits_of<count>(tables_, inputs);
    int both = mixed(first, second, logits);
    int place = (both + 2048) * 32, lower = place >> 12, share = place & 4095;
    uint16_t* cell = correction.value + lower;
    int corrected = (cell[0] * (4096 - share) + cell[1] * share) >> 12;
    int plain = tables_.squash(both);
    int chance = clamp((corrected + plain) >> 1, kLeast, 65536 - kLeast);
    bit = coder.code(bit, static_cast<uint32_t>(chance));
    int target = bit ? 65535 : 0, error = (target - plain) >> 2;
    learn(first, logits, error);
    learn(second, logits, error);
    update<count>(inputs, bit);
    uint16_t& nearest = cell[share >= 2048];
    nearest = static_cast<uint16_t>(nearest + ((target - nearest) >> 7));
    return bit;
  }

  const Logistic& tables_ = logistic();
  std::vector<Flags> chances_;
  std::vector<Probability> signs_;
  std::vector<Inputs> mixers_;
  std::vector<Correction> corrections_;
  std::unique_ptr<Linear> linear_;
  Probability* slots_[6] = {};
  int level_ = 0, odd_ = 0, mixer_ = 0, correction_ = 0;
  int predicted_ = 0, aim_ = 0, finely_ = 0, place_ = 0;
};

}  // namespace tersor
