// The meaning of the PTX instructions that ptx.py emits.  Registers hold raw bits.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "runtime.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

template <class T>
using raw = std::conditional_t<
    sizeof(T) == 1, u8,
    std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>>;

template <class T>
T as(u64 bits) {
  return std::bit_cast<T>((raw<T>)bits);
}
template <class T>
raw<T> bits(T value) {  // of an arithmetic result: PTX has one NaN a format
  if constexpr (std::is_same_v<T, float>)
    if (value != value) return 0x7fffffffu;
  return std::bit_cast<raw<T>>(value);
}

// Integers wrap; floats round to nearest even (-ffp-contract=off).
template <class T>
using arithmetic = std::conditional_t<std::is_floating_point_v<T>, T, raw<T>>;
template <class T>
raw<T> add(u64 a, u64 b) {
  return bits<T>((T)(as<arithmetic<T>>(a) + as<arithmetic<T>>(b)));
}
template <class T>
raw<T> sub(u64 a, u64 b) {
  return bits<T>((T)(as<arithmetic<T>>(a) - as<arithmetic<T>>(b)));
}
template <class T>
raw<T> mul(u64 a, u64 b) {
  return bits<T>((T)(as<arithmetic<T>>(a) * as<arithmetic<T>>(b)));
}
template <class T, class Wide>
raw<Wide> mul_wide(u64 a, u64 b) {
  return (raw<Wide>)((Wide)as<T>(a) * (Wide)as<T>(b));
}
template <class T>
raw<T> div(u64 a, u64 b) {
  if constexpr (std::is_integral_v<T>)
    if (!as<T>(b)) return (raw<T>)~0ull;
  return bits<T>((T)(as<T>(a) / as<T>(b)));
}
template <class T>
raw<T> rem(u64 a, u64 b) {
  if (!as<T>(b)) emu::trap("remainder of a division by zero", a);
  return (raw<T>)(as<T>(a) % as<T>(b));
}
inline u32 fused(u64 a, u64 b, u64 c) {
  return bits<f32>(std::fmaf(as<f32>(a), as<f32>(b), as<f32>(c)));
}
inline u32 rcp(u64 a) { return bits<f32>(1.0f / as<f32>(a)); }
inline u32 magnitude(u64 a) { return (u32)a & 0x7fffffffu; }
template <class T>
raw<T> neg(u64 a) {
  if constexpr (std::is_floating_point_v<T>) return bits<T>(-as<T>(a));
  return (raw<T>)(0 - (raw<T>)a);
}
inline u32 max(u64 a, u64 b) {  // of floats: a NaN loses, -0 < +0
  const f32 x = as<f32>(a), y = as<f32>(b);
  if (x != x) return bits<f32>(y);
  if (y != y || x > y) return (u32)a;
  if (x == y) return std::signbit(x) ? (u32)b : (u32)a;
  return (u32)b;
}
inline u32 least(u64 a, u64 b) {  // of floats, in the same way
  const f32 x = as<f32>(a), y = as<f32>(b);
  if (x != x) return bits<f32>(y);
  if (y != y || x < y) return (u32)a;
  if (x == y) return std::signbit(x) ? (u32)a : (u32)b;
  return (u32)b;
}
template <class T>
raw<T> shl(u64 a, u64 n) {
  return (u32)n >= 8 * sizeof(T) ? 0 : (raw<T>)((raw<T>)a << (u32)n);
}
template <class T>
raw<T> shr(u64 a, u64 n) {
  const unsigned count = (u32)n, width = 8 * sizeof(T);
  if (count >= width) return std::is_signed_v<T> && as<T>(a) < 0 ? (raw<T>)~0ull : 0;
  return (raw<T>)(as<T>(a) >> count);
}
template <class T>
raw<T> bfi(u64 a, u64 b, u64 position, u64 length) {
  raw<T> out = (raw<T>)b;
  for (unsigned i = 0; i < (u8)length && i + (u8)position < 8 * sizeof(T); i++) {
    const raw<T> bit = (raw<T>)1 << (i + (u8)position);
    out = (a >> i & 1) ? out | bit : out & ~bit;
  }
  return out;
}
template <class T>
raw<T> smaller(u64 a, u64 b) {  // of integers
  return as<T>(a) < as<T>(b) ? (raw<T>)a : (raw<T>)b;
}
template <class T>
raw<T> larger(u64 a, u64 b) {
  return as<T>(a) > as<T>(b) ? (raw<T>)a : (raw<T>)b;
}
inline u32 clz(u64 a) { return (u32)std::countl_zero((u32)a); }

// Comparisons of floats are false with a NaN; the unordered ones, which end in u, are true.
template <class T>
bool eq(u64 a, u64 b) {
  return as<T>(a) == as<T>(b);
}
template <class T>
bool ne(u64 a, u64 b) {
  if constexpr (std::is_floating_point_v<T>)
    return as<T>(a) < as<T>(b) || as<T>(a) > as<T>(b);
  else
    return as<T>(a) != as<T>(b);
}
template <class T>
bool lt(u64 a, u64 b) {
  return as<T>(a) < as<T>(b);
}
template <class T>
bool le(u64 a, u64 b) {
  return as<T>(a) <= as<T>(b);
}
template <class T>
bool gt(u64 a, u64 b) {
  return as<T>(a) > as<T>(b);
}
template <class T>
bool ge(u64 a, u64 b) {
  return as<T>(a) >= as<T>(b);
}
template <class T>
bool geu(u64 a, u64 b) {  // or a NaN
  return !lt<T>(a, b);
}
template <class T>
bool leu(u64 a, u64 b) {
  return !gt<T>(a, b);
}
template <class T>
bool neu(u64 a, u64 b) {
  return !eq<T>(a, b);
}
template <class T>
bool gtu(u64 a, u64 b) {
  return !le<T>(a, b);
}
template <class T>
bool ltu(u64 a, u64 b) {
  return !ge<T>(a, b);
}

// -- conversions --

inline u32 f32_of_f16(u64 raw16) {
  const int exponent = raw16 >> 10 & 31, mantissa = raw16 & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : INFINITY;
  else
    value =
        exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
  return bits<f32>(raw16 & 0x8000 ? -value : value);
}
inline u64 f64_of_s32(u64 a) { return std::bit_cast<u64>((double)as<s32>(a)); }
inline u32 s32_of_f32(u64 a) {  // towards zero; what does not fit takes the nearest, a NaN 0
  const f32 value = as<f32>(a);
  if (!(value >= -2147483648.0f)) return value < 0 ? 0x80000000u : 0u;
  return value >= 2147483648.0f ? 0x7fffffffu : (u32)(s32)value;
}
inline u64 f64_of_f32(u64 a) { return std::bit_cast<u64>((double)as<f32>(a)); }

// -- memory: alignment as a GPU checks it; bounds are the sanitizers' and the guards' business --

inline u8* global(u64 address, unsigned bytes) {
  if (address & (bytes - 1)) emu::trap("misaligned access", address);
  if (address < 4096) emu::trap("access to null", address);
  return reinterpret_cast<u8*>(address);
}
inline u8* shared(u8* base, u64 offset, unsigned bytes, u64 size) {
  if (offset & (bytes - 1)) emu::trap("misaligned shared access", offset);
  if (offset + bytes > size) emu::trap("shared access out of bounds", offset);
  return base + offset;
}
template <class T>
raw<T> load(const u8* at) {
  return *reinterpret_cast<const raw<T>*>(at);
}
template <class T>
void store(u8* at, u64 value) {
  *reinterpret_cast<raw<T>*>(at) = (raw<T>)value;
}

}  // namespace ptx
