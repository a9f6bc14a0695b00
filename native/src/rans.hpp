// Static rANS: 8 or 32 interleaved 32-bit states, 16-bit words, up to 16 tables by position.
#pragma once

#include "layout.hpp"

namespace tersor {

constexpr int kFewLanes = 8, kManyLanes = 32;
constexpr size_t kManySymbols = 1u << 16;  // from here on 32 lanes cost less than 0.5 %
constexpr uint32_t kStateBottom = 1u << 16;

inline int lanes_of(size_t count) { return count < kManySymbols ? kFewLanes : kManyLanes; }

inline uint32_t load16(const uint8_t* at) { return at[0] | uint32_t{at[1]} << 8; }

inline uint32_t load32(const uint8_t* at) { return load16(at) | load16(at + 2) << 16; }

// The words of symbols (one byte each), from last to first; `frequency` is tables x symbols.
inline Bytes rans_encode(const uint8_t* symbols, const uint8_t* tables, size_t count,
                         const uint32_t* frequency, uint32_t table_count, uint32_t symbol_count,
                         int table_bits) {
  std::vector<uint32_t> start(size_t{table_count} * symbol_count);
  for (size_t table = 0; table < table_count; ++table) {
    uint32_t sum = 0;
    for (size_t symbol = 0; symbol < symbol_count; ++symbol) {
      start[table * symbol_count + symbol] = sum;
      sum += frequency[table * symbol_count + symbol];
    }
    if (sum != 1u << table_bits) throw std::invalid_argument("frequencies do not fill a table");
  }
  std::vector<uint16_t> words;
  words.reserve(count / 2 + 16);
  const size_t lanes = lanes_of(count);
  std::vector<uint32_t> state(lanes, kStateBottom);
  for (size_t i = count; i-- > 0;) {
    if (symbols[i] >= symbol_count || tables[i] >= table_count) {
      throw std::invalid_argument("a symbol is not in its table");
    }
    size_t cell = size_t{tables[i]} * symbol_count + symbols[i];
    uint32_t& x = state[i % lanes];
    uint32_t many = frequency[cell];
    if (many == 0) throw std::invalid_argument("a symbol has no frequency");
    if (x >= uint64_t{many} << (32 - table_bits)) {
      words.push_back(static_cast<uint16_t>(x));
      x >>= 16;
    }
    x = (x / many << table_bits) + x % many + start[cell];
  }
  Bytes out;
  out.reserve(lanes * 4 + words.size() * 2);
  for (uint32_t x : state) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<uint8_t>(x >> shift));
  }
  for (size_t i = words.size(); i-- > 0;) {
    out.push_back(static_cast<uint8_t>(words[i]));
    out.push_back(static_cast<uint8_t>(words[i] >> 8));
  }
  return out;
}

// What decoders share: the tables, and the lanes' states.
//
// A slot of a table of at most 2^12 holds all that a lane needs: the symbol, its frequency less one
// and how far the slot lies from the symbol's first. Larger tables hold the symbol alone.
class RansTables {
 public:
  static constexpr int kFullBits = 12;

  RansTables(const std::vector<uint32_t>& weights, uint32_t tables, uint32_t symbols, int bits)
      : bits(bits), slots(size_t{tables} << bits), spans(size_t{tables} * 256) {
    for (uint32_t table = 0; table < tables; ++table) {
      auto first = weights.begin() + size_t{table} * symbols;
      auto many = frequencies({first, first + symbols}, 1u << bits);
      uint32_t* slot = slots.data() + (size_t{table} << bits);
      for (uint32_t symbol = 0, start = 0; symbol < symbols; start += many[symbol++]) {
        for (uint32_t i = 0; i < many[symbol]; ++i) {
          *slot++ = symbol << 24 | (full() ? i << 12 | (many[symbol] - 1) : 0);
        }
        spans[size_t{table} * 256 + symbol] = start << 16 | many[symbol];
      }
    }
  }

  bool full() const { return bits <= kFullBits; }

  // The next symbol of a lane, whose state may then need a word.
  template <bool kFull>
  uint32_t step(uint32_t& x, size_t table) const {
    uint32_t slot = x & ((1u << bits) - 1), found = slots[(table << bits) + slot];
    if (kFull) {
      x = ((found & 0xfff) + 1) * (x >> bits) + (found >> 12 & 0xfff);
    } else {
      uint32_t span = spans[table * 256 + (found >> 24)];
      x = (span & 0xffff) * (x >> bits) + slot - (span >> 16);
    }
    return found >> 24;
  }

  int bits;
  std::vector<uint32_t> slots, spans;
};

template <class Value>
class RansDecoder {
 public:
  explicit RansDecoder(const RansTables& tables) : tables_(tables) {}

  // Hands the symbols' values on in blocks: give(first) says where the next is to be written,
  // take(first, size) that it was.
  template <class Give, class Take>
  void decode(Span data, Positions& positions, bool many_tables, size_t count, Give give,
              Take take) {
    const size_t lanes = lanes_of(count);
    if (data.size < lanes * 4 || data.size % 2) throw Malformed("ends too early");
    for (size_t lane = 0; lane < lanes; ++lane) {
      state_[lane] = load32(data.data + 4 * lane);
      if (state_[lane] < kStateBottom) throw Malformed("starts in an impossible state");
    }
    next_ = data.data + lanes * 4;
    end_ = data.data + data.size;
    uint8_t places[kBlock] = {};
    for (size_t done = 0; done < count;) {
      size_t now = std::min(kBlock, count - done);
      if (many_tables) positions.fill(places, now);
      Value* out = give(done);
      size_t i = 0;
      while (i + lanes <= now && size_t(end_ - next_) >= 2 * lanes) {
        size_t sure = std::min<size_t>((now - i) / lanes, size_t(end_ - next_) / (2 * lanes));
        run(lanes, many_tables, places + i, out + i, sure);
        i += sure * lanes;
      }
      for (; i < now; ++i) out[i] = careful(state_[i % lanes], places[i]);
      take(done, now);
      done += now;
    }
    if (next_ != end_) throw Malformed("goes on after its last symbol");
    for (size_t lane = 0; lane < lanes; ++lane) {
      if (state_[lane] != kStateBottom) throw Malformed("ends in an impossible state");
    }
  }

  static constexpr size_t kBlock = 4096;

 private:
  // Decodes `groups` times `lanes` symbols, for which there are words enough in any case.
  void run(size_t lanes, bool many_tables, const uint8_t* places, Value* out, size_t groups) {
    auto with = [&](auto full, auto many) {
#ifdef TERSOR_AVX2
      if (wide().load(std::memory_order_relaxed)) {
        lanes == kManyLanes ? vectors<kManyLanes / 8, full, many>(places, out, groups)
                            : vectors<kFewLanes / 8, full, many>(places, out, groups);
        return;
      }
#endif
      lanes == kManyLanes ? scalars<kManyLanes, full, many>(places, out, groups)
                          : scalars<kFewLanes, full, many>(places, out, groups);
    };
    using std::false_type, std::true_type;
    if (tables_.full()) {
      many_tables ? with(true_type{}, true_type{}) : with(true_type{}, false_type{});
    } else {
      many_tables ? with(false_type{}, true_type{}) : with(false_type{}, false_type{});
    }
  }

  template <int lanes, bool full, bool many_tables>
  void scalars(const uint8_t* places, Value* out, size_t groups) {
    uint32_t x[lanes];
    std::copy(state_, state_ + lanes, x);
    const uint8_t* next = next_;
    for (; groups; --groups, out += lanes, places += lanes) {
#pragma GCC unroll 8
      for (int lane = 0; lane < lanes; ++lane) {
        uint32_t state = x[lane];
        uint32_t symbol = tables_.step<full>(state, many_tables ? places[lane] : 0);
        out[lane] = static_cast<Value>(signed_value(symbol));
        // Written without a condition, or compilers branch on what no one can predict.
        uint32_t low = state < kStateBottom;
        x[lane] = state << (16 * low) | (load16(next) & (0u - low));
        next += 2 * low;
      }
    }
    std::copy(x, x + lanes, state_);
    next_ = next;
  }

#ifdef TERSOR_AVX2
  // `count` vectors of eight lanes.
  template <int count, bool full, bool many_tables>
  __attribute__((target("avx2"))) void vectors(const uint8_t* places, Value* out, size_t groups) {
    __m256i x[count], values[count];
    for (int i = 0; i < count; ++i) {
      x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(state_ + 8 * i));
    }
    const uint8_t* next = next_;
    const auto* slots = reinterpret_cast<const int*>(tables_.slots.data());
    const auto* spans = reinterpret_cast<const int*>(tables_.spans.data());
    const auto& orders = word_orders();
    const __m128i bits = _mm_cvtsi32_si128(tables_.bits);
    const __m256i mask = _mm256_set1_epi32((1 << tables_.bits) - 1);
    const __m256i low12 = _mm256_set1_epi32(0xfff), low16 = _mm256_set1_epi32(0xffff);
    const __m256i one = _mm256_set1_epi32(1), zero = _mm256_setzero_si256();
    for (; groups; --groups, out += 8 * count, places += 8 * count) {
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        __m256i slot = _mm256_and_si256(x[i], mask), place = slot, table = zero;
        if (many_tables) {
          table = _mm256_cvtepu8_epi32(
              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places + 8 * i)));
          place = _mm256_add_epi32(place, _mm256_sll_epi32(table, bits));
        }
        __m256i found = _mm256_i32gather_epi32(slots, place, 4), times, add;
        __m256i symbol = _mm256_srli_epi32(found, 24);
        if (full) {
          times = _mm256_add_epi32(_mm256_and_si256(found, low12), one);
          add = _mm256_and_si256(_mm256_srli_epi32(found, 12), low12);
        } else {
          __m256i cell = _mm256_or_si256(symbol, _mm256_slli_epi32(table, 8));
          __m256i span = _mm256_i32gather_epi32(spans, cell, 4);
          times = _mm256_and_si256(span, low16);
          add = _mm256_sub_epi32(slot, _mm256_srli_epi32(span, 16));
        }
        __m256i state = _mm256_mullo_epi32(times, _mm256_srl_epi32(x[i], bits));
        state = _mm256_add_epi32(state, add);
        __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(state, 16), zero);
        int lows = _mm256_movemask_ps(_mm256_castsi256_ps(low));
        __m256i words = _mm256_cvtepu16_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(next)));
        __m256i order = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(orders[lows].data())));
        words = _mm256_permutevar8x32_epi32(words, order);
        __m256i fed = _mm256_or_si256(_mm256_slli_epi32(state, 16), words);
        x[i] = _mm256_blendv_epi8(state, fed, low);
        next += 2 * __builtin_popcount(static_cast<unsigned>(lows));
        values[i] = _mm256_xor_si256(_mm256_srli_epi32(symbol, 1),
                                     _mm256_sub_epi32(zero, _mm256_and_si256(symbol, one)));
      }
      store<count>(values, out);
    }
    for (int i = 0; i < count; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(state_ + 8 * i), x[i]);
    }
    next_ = next;
  }

  // Values from -128 to 127, narrowed.
  template <int count>
  __attribute__((target("avx2"))) static void store(const __m256i* values, Value* out) {
    if constexpr (count == 4 && sizeof(Value) == 1) {
      __m256i low = _mm256_packs_epi32(values[0], values[1]);
      __m256i packed = _mm256_packs_epi16(low, _mm256_packs_epi32(values[2], values[3]));
      packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
    } else {
      alignas(32) int32_t wide[8];
      for (int i = 0; i < count; ++i) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(wide), values[i]);
        for (int j = 0; j < 8; ++j) out[8 * i + j] = static_cast<Value>(wide[j]);
      }
    }
  }

  // For each set of lanes that take a word: which of the next eight words each takes.
  static const std::array<std::array<uint8_t, 8>, 256>& word_orders() {
    static const auto orders = [] {
      std::array<std::array<uint8_t, 8>, 256> made{};
      for (int set = 0; set < 256; ++set) {
        for (int lane = 0, taken = 0; lane < 8; ++lane) {
          if (set >> lane & 1) made[set][lane] = static_cast<uint8_t>(taken++);
        }
      }
      return made;
    }();
    return orders;
  }
#endif

  Value careful(uint32_t& x, size_t table) {
    uint32_t symbol = tables_.full() ? tables_.step<true>(x, table) : tables_.step<false>(x, table);
    if (x < kStateBottom) {
      if (next_ == end_) throw Malformed("ends too early");
      x = x << 16 | load16(next_);
      next_ += 2;
    }
    return static_cast<Value>(signed_value(symbol));
  }

  const RansTables& tables_;
  uint32_t state_[kManyLanes] = {};
  const uint8_t* next_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace tersor
