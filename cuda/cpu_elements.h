// How the CPU engine reads and writes the elements of each dtype.
//
// In an anonymous namespace, as cpu_search.h.
#ifndef NF4_CPU_ELEMENTS_H
#define NF4_CPU_ELEMENTS_H

#include <type_traits>

#include "codec.h"

namespace {

// How the elements of a dtype are stored: exact to float32, rounded to nearest even from it.
template <int kDtype>
struct Element;
template <>
struct Element<NF4_F32> {
  typedef float Raw;
  static NF4_FN float load(Raw raw) { return raw; }
  static NF4_FN Raw store(float value) { return value; }
};
template <>
struct Element<NF4_F16> {
  typedef uint16_t Raw;
  static NF4_FN float load(Raw raw) { return nf4_f32_of_f16(raw); }
  static NF4_FN Raw store(float value) { return nf4_f16_of_f32(value); }
};
template <>
struct Element<NF4_BF16> {
  typedef uint16_t Raw;
  static NF4_FN float load(Raw raw) { return nf4_f32_of_bf16(raw); }
  static NF4_FN Raw store(float value) { return nf4_bf16_of_f32(value); }
};

// Return function(dtype), its number as a type: one copy of the function for each.
template <class Function>
auto with_dtype(int dtype, Function function) {
  switch (dtype) {
    case NF4_F32: return function(std::integral_constant<int, NF4_F32>());
    case NF4_F16: return function(std::integral_constant<int, NF4_F16>());
    default: return function(std::integral_constant<int, NF4_BF16>());
  }
}

// Return whether a value is neither infinite nor NaN.
inline bool is_finite(float value) { return nf4_magnitude(value) < kInfinityBits; }

}  // namespace

#endif
