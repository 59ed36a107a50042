// Vectors of fp32 numbers, as wide as the instruction set that the compiler is told to use.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#else
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const uint16_t* p) {  // a bf16 number is the upper half of an fp32 number
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline float number(float x) { return x; }

inline float number(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint16_t to_bf16(float x) {  // to the nearest, ties to even, as torch does
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class W>
Floats load_some(const W* p, int64_t count) {  // count < LANES numbers, then zeros
  W numbers[LANES] = {};
  std::copy(p, p + count, numbers);
  return load(numbers);
}

#if defined(__AVX512F__)
inline __mmask16 first_of(int64_t count) { return __mmask16((1u << count) - 1); }

inline Floats load_some(const float* p, int64_t count) {
  return (Floats)_mm512_maskz_loadu_ps(first_of(count), p);
}

inline void store_some(float* p, Floats v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_of(count), (__m512)v);
}
#elif defined(__AVX__)
inline __m256i first_of(int64_t count) {
  return (__m256i)(Words{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(count));
}

inline Floats load_some(const float* p, int64_t count) {
  return (Floats)_mm256_maskload_ps(p, first_of(count));
}

inline void store_some(float* p, Floats v, int64_t count) {
  _mm256_maskstore_ps(p, first_of(count), (__m256)v);
}
#else
inline void store_some(float* p, Floats v, int64_t count) {
  float numbers[LANES];
  store(numbers, v);
  std::copy(numbers, numbers + count, p);
}
#endif

// f(i, load, store) for every LANES numbers from i on; of the last, fewer are read and written.
template <class F>
inline void over(int64_t count, F f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    f(i, [](const float* p) { return load(p); }, [](float* p, Floats v) { store(p, v); });
  int64_t rest = count - i;
  if (rest)
    f(i, [rest](const float* p) { return load_some(p, rest); },
      [rest](float* p, Floats v) { store_some(p, v, rest); });
}

// a b + c. The build turns off the compiler's own contraction: it would round the same sum in one
// way in one tile and in another way in the next.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Floats fill(float x) { return Floats{} + x; }

#if defined(__AVX512F__)
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), \
                     f(12), f(13), f(14), f(15)
#elif defined(__AVX__)
#define EACH_LANE(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define EACH_LANE(f) f(0), f(1), f(2), f(3)
#endif

// Reduces the lanes of a vector by halves, each half as a vector.
template <int HALF = LANES / 2, class F>
inline float reduce(Floats v, F f) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
#define OTHER(lane) (lane ^ HALF)
    return reduce<HALF / 2>(f(v, SHUFFLE(v, v, EACH_LANE(OTHER))), f);
#undef OTHER
  }
}

inline float total(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return a + b; });
}

inline float largest(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return a > b ? a : b; });
}

// Transposes LANES vectors in place: blocks of 1, 2, 4, ... lanes change sides.
template <int BLOCK = 1>
inline void transpose(Floats (&rows)[LANES]) {
  if constexpr (BLOCK < LANES) {
    UNROLL for (int i = 0; i < LANES; i++) {
      if (i & BLOCK) continue;
      Floats a = rows[i], b = rows[i + BLOCK];
#define UPPER(lane) (lane & BLOCK ? LANES + lane - BLOCK : lane)
#define LOWER(lane) (lane & BLOCK ? LANES + lane : lane + BLOCK)
      rows[i] = SHUFFLE(a, b, EACH_LANE(UPPER));
      rows[i + BLOCK] = SHUFFLE(a, b, EACH_LANE(LOWER));
#undef UPPER
#undef LOWER
    }
    transpose<BLOCK * 2>(rows);
  }
}

// exp(x) to about 1e-7, 0 below -87: 2^n exp(r) with |r| <= ln(2) / 2 and exp(r)'s Taylor series.
inline Floats exp_of(Floats x) {
  const Floats low = fill(-87.0f), high = fill(88.0f), magic = fill(12582912.0f);
  Words is_zero = x < low;
  x = is_zero ? low : x;
  x = x > high ? high : x;
  Floats rounded = x * 1.44269504f + magic;  // its low bits hold n
  Floats n = rounded - magic;
  Floats r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Floats y = fill(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, fill(c));
  return (Floats)(((Words)y + ((Words)rounded << 23)) & ~is_zero);
}

}  // namespace
