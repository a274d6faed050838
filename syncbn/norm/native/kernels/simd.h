// Vectors of 64 bytes (16 floats or 8 doubles) on every machine, in pieces of VECTOR_BYTES. The number of lanes is fixed so
// that sums have the same order, and so the same bits, on every machine.
#pragma once

#include <stdint.h>

#include <type_traits>

#if VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// Storage of the half types; their arithmetic is done in float.
struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// The dtype of an input's statistics and arithmetic, and the integer of the same size.
template <class T> using Statistics = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class A> using Integer = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

template <class A> struct Pack {
  static constexpr int lanes = 64 / sizeof(A);
  static constexpr int pieces = 64 / VECTOR_BYTES;
  typedef A Piece __attribute__((vector_size(VECTOR_BYTES)));
  typedef Integer<A> Bits __attribute__((vector_size(VECTOR_BYTES)));
  Piece piece[pieces];
};

// f applied to the corresponding pieces of packs.
template <class A, class F, class... P> INLINE Pack<A> map(F f, const Pack<A>& first, const P&... rest) {
  Pack<A> result;
#pragma GCC unroll 4
  for (int i = 0; i < Pack<A>::pieces; ++i) result.piece[i] = f(first.piece[i], rest.piece[i]...);
  return result;
}

#define LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

template <class A> INLINE Pack<A> operator+(const Pack<A>& a, const Pack<A>& b) {
  return map<A>(LAMBDA(auto u, auto v) { return u + v; }, a, b);
}
template <class A> INLINE Pack<A> operator-(const Pack<A>& a, const Pack<A>& b) {
  return map<A>(LAMBDA(auto u, auto v) { return u - v; }, a, b);
}
template <class A> INLINE Pack<A> operator*(const Pack<A>& a, const Pack<A>& b) {
  return map<A>(LAMBDA(auto u, auto v) { return u * v; }, a, b);
}

template <class A> INLINE Pack<A> broadcast(A value) {
  return map<A>(LAMBDA(auto zero) { return value - zero; }, Pack<A>{});
}

// A value of another type with the same bits.
template <class To, class From> INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// ---- float from and to the half types, a piece at a time -----------------------------------------------------

constexpr int FLOATS = VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE Words widened(const void* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
}

INLINE void store_narrowed(void* to, Words words) {
  const Halves halves = __builtin_convertvector(words, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}

#if VECTOR_BYTES == 64
// Each half goes to the upper half of its word in one step, where widening takes another to shift.
INLINE Floats load_piece(const Bfloat16* from) {
  const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
  const __m512i targets = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16);
  return (Floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, targets, halves);
}
#else
INLINE Floats load_piece(const Bfloat16* from) { return bits_as<Floats>(widened(from) << 16); }
#endif

// Round to nearest, ties to even; NaN stays NaN.
INLINE Words rounded_up(Floats value) {
  const Words bits = bits_as<Words>(value);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
INLINE void store_piece(Bfloat16* to, Floats value) {
  store_narrowed(to, value == value ? rounded_up(value) >> 16 : Words{} + 0x7fc0u);
}
#if VECTOR_BYTES == 64
// Two pieces in one store of a whole cache line, in half the steps, if neither holds a NaN.
INLINE bool store_both(Bfloat16* to, Floats first, Floats second) {
  if (__builtin_expect(_mm512_cmp_ps_mask((__m512)first, (__m512)second, _CMP_UNORD_Q) != 0, 0)) return false;
  const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23,
                                         21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)rounded_up(first), upper, (__m512i)rounded_up(second)));
  return true;
}

INLINE Floats load_piece(const Float16* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
INLINE void store_piece(Float16* to, Floats value) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif VECTOR_BYTES == 32
INLINE Floats load_piece(const Float16* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
INLINE void store_piece(Float16* to, Floats value) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// An addition rebiases the exponent, a second one that of infinity and NaN; a subtraction makes subnormals normal.
INLINE Floats load_piece(const Float16* from) {
  const Words half = widened(from), shifted = (half & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
  const Words normal = shifted + (112u << 23), infinite = normal + (112u << 23);
  const Floats small = bits_as<Floats>(normal + (1u << 23)) - 6.103515625e-05f;
  Words bits = exponent == 0x0f800000u ? infinite : normal;
  bits = exponent == 0u ? bits_as<Words>(small) : bits;
  return bits_as<Floats>(bits | (half & 0x8000u) << 16);
}
// Below 2^-14 the addition of 0.5 rounds to the subnormals' spacing; above, adding to the bits rounds to even.
INLINE void store_piece(Float16* to, Floats value) {
  const Words bits = bits_as<Words>(value), sign = bits & 0x80000000u, size = bits ^ sign;
  const Words normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const Words small = bits_as<Words>(bits_as<Floats>(size) + 0.5f) - (126u << 23);
  Words half = size < (113u << 23) ? small : normal;
  half = size >= (143u << 23) ? Words{} + 0x7c00u : half;
  half = size > (255u << 23) ? Words{} + 0x7e00u : half;
  store_narrowed(to, half | (sign >> 16));
}
#endif

// ---- packs from and to memory of any alignment ---------------------------------------------------------------

// Full-width dtypes go piece by piece: a copy of a whole pack goes through the stack where it has several pieces.
template <class T> INLINE Pack<Statistics<T>> load(const T* from) {
  using A = Statistics<T>;
  Pack<A> result;
#pragma GCC unroll 4
  for (int i = 0; i < Pack<A>::pieces; ++i) {
    const T* const piece = from + i * (VECTOR_BYTES / int(sizeof(A)));
    if constexpr (sizeof(T) == 2) result.piece[i] = load_piece(piece);
    else __builtin_memcpy(&result.piece[i], piece, VECTOR_BYTES);
  }
  return result;
}
template <class T> INLINE void store(T* to, const Pack<Statistics<T>>& value) {
  using A = Statistics<T>;
#pragma GCC unroll 4
  for (int i = 0; i < Pack<A>::pieces; ++i) {
    T* const piece = to + i * (VECTOR_BYTES / int(sizeof(A)));
    if constexpr (sizeof(T) == 2) store_piece(piece, value.piece[i]);
    else __builtin_memcpy(piece, &value.piece[i], VECTOR_BYTES);
  }
}

// Two packs, one after the other in memory.
template <class T, class A> INLINE void store(T* to, const Pack<A>& first, const Pack<A>& second) {
#if VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, Bfloat16>)
    if (store_both(to, first.piece[0], second.piece[0])) return;
#endif
  store(to, first);
  store(to + Pack<A>::lanes, second);
}

// `value` with all but its last `count` lanes 0.
template <class A> INLINE Pack<A> keep_last(const Pack<A>& value, int64_t count) {
  using Bits = typename Pack<A>::Bits;
  static const Integer<A> keep[2 * 16] = {
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const Pack<A> mask = load((const A*)(keep + 16 - Pack<A>::lanes + count));
  return map<A>(LAMBDA(auto u, auto v) { return bits_as<decltype(u)>(bits_as<Bits>(u) & bits_as<Bits>(v)); }, value, mask);
}

// The sum of all lanes in float64, by adding halves as vectors: a loop over lanes goes through memory and takes half the
// time of the moments of 7x7 planes.
template <class Half, class Whole> INLINE Half halved(const Whole& value) {
  Half half[2];
  static_assert(sizeof half == sizeof value, "two halves");
  __builtin_memcpy(half, &value, sizeof half);
  return half[0] + half[1];
}
INLINE double total(const Pack<double>& value) {
  typedef double Doubles2 __attribute__((vector_size(16)));
  typedef double Doubles4 __attribute__((vector_size(32)));
  const Doubles2 pair = halved<Doubles2>(halved<Doubles4>(value));
  return pair[0] + pair[1];
}
INLINE double total(const Pack<float>& value) {
  typedef float Floats8 __attribute__((vector_size(32)));
  typedef double Doubles8 __attribute__((vector_size(64)));
  Floats8 half[2];
  __builtin_memcpy(half, &value, sizeof half);
  const Doubles8 sum = __builtin_convertvector(half[0], Doubles8) + __builtin_convertvector(half[1], Doubles8);
  return total(bits_as<Pack<double>>(sum));
}

}  // namespace
