// Loops over rows of 16-bit numbers, in plain C++ and with AVX2; both give the same integers.
#pragma once

#include <algorithm>
#include <atomic>

#include "common.hpp"

#if !defined(TERSOR_SCALAR) && defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TERSOR_AVX2
#include <immintrin.h>
#endif

namespace tersor {

inline bool has_avx2() {
#ifdef TERSOR_AVX2
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

// Whether AVX2 is used: where the processor has it, unless a test says no.
inline std::atomic<bool>& wide() {
  static std::atomic<bool> used{has_avx2()};
  return used;
}

inline int16_t clamp16(int value) { return static_cast<int16_t>(clamp(value, -32767, 32767)); }

#ifdef TERSOR_AVX2
__attribute__((target("avx2"))) inline uint32_t wide_dot(const int16_t* a, const int16_t* b,
                                                         size_t count) {
  __m256i sums = _mm256_setzero_si256();
  for (size_t i = 0; i < count; i += 16) {
    auto left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
    auto right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(left, right));
  }
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

__attribute__((target("avx2"))) inline void wide_add(int16_t* into, const int16_t* from,
                                                     int16_t times, size_t count) {
  __m256i factor = _mm256_set1_epi16(times);
  for (size_t i = 0; i < count; i += 16) {
    auto* at = reinterpret_cast<__m256i*>(into + i);
    auto more = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    more = _mm256_mulhrs_epi16(more, factor);
    _mm256_storeu_si256(at, _mm256_adds_epi16(_mm256_loadu_si256(at), more));
  }
}
#endif

// Sum of products modulo 2^32; count is a multiple of 16, and no two factors are -2^15.
inline uint32_t dot(const int16_t* a, const int16_t* b, size_t count) {
#ifdef TERSOR_AVX2
  if (wide().load(std::memory_order_relaxed)) return wide_dot(a, b, count);
#endif
  uint32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += static_cast<uint32_t>(int32_t{a[i]} * b[i]);
  return sum;
}

// into += from * times / 2^15, rounded and saturated; count is a multiple of 16.
inline void add_times(int16_t* into, const int16_t* from, int16_t times, size_t count) {
#ifdef TERSOR_AVX2
  if (wide().load(std::memory_order_relaxed)) return wide_add(into, from, times, count);
#endif
  for (size_t i = 0; i < count; ++i) {
    int more = (int32_t{from[i]} * times + (1 << 14)) >> 15;
    into[i] = static_cast<int16_t>(clamp(into[i] + more, -32768, 32767));
  }
}

}  // namespace tersor
