// The arithmetic of bitsandbytes' 4-bit format, once, for the host and for the GPU.
//
// This is the only place where a value becomes a code and a code a value; nf4_host.cpp (and the
// GPU kernels) arrange loops, lanes and memory around it.  There are no tables here: codebook.py
// owns them and passes them in as nf4_codebook, so that no table is typed twice.
//
// Every float operation is rounded on its own, IEEE binary32, to nearest even: compile with
// -ffp-contract=off (host) or -fmad=false (device), never with fast-math, never with
// flush-to-zero (a block near 3e38 has a subnormal reciprocal, a float16 subnormal is decoded
// through a subnormal float).
//
// Functions are `static` on purpose: the host file is compiled once an instruction set, and a
// linker that merged those copies could put AVX-512 code where a baseline CPU finds it.
#ifndef NF4_CODEC_H
#define NF4_CODEC_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define NF4_FN static __host__ __device__ __forceinline__
#else
#define NF4_FN static inline __attribute__((always_inline))
#endif

// Source and destination element types; the numbers are part of the C ABI (engines/cpu.py).
enum nf4_dtype { NF4_F32 = 0, NF4_F16 = 1, NF4_BF16 = 2 };

// One 4-bit table, in ascending order of value (FP4's own code order is not ascending).
//   midpoints[i]  float32 (values[i] + values[i+1]) / 2; entry 15 is unused padding
//   values[i]     the i-th smallest decoded value
//   codes[i]      the 4-bit code stored for values[i]
//   decode[c]     the value of the stored code c
struct nf4_codebook {
  float midpoints[16];
  float values[16];
  float decode[16];
  uint8_t codes[16];
};

NF4_FN float nf4_float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

NF4_FN uint32_t nf4_bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// -- 16-bit floats, as raw bits ---------------------------------------------------------------

NF4_FN float nf4_f32_of_bf16(uint16_t raw) { return nf4_float_of_bits((uint32_t)raw << 16); }

// Exact: the exponent is moved by a multiplication with 2^112, which also normalises subnormals.
NF4_FN float nf4_f32_of_f16(uint16_t raw) {
  const uint32_t magnitude = (uint32_t)(raw & 0x7fffu) << 13;
  const uint32_t scaled = nf4_bits_of_float(nf4_float_of_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return nf4_float_of_bits(scaled | special | (uint32_t)(raw & 0x8000u) << 16);
}

// Round to nearest even; a NaN becomes torch's quiet NaN 0x7fc0, sign dropped as torch does.
NF4_FN uint16_t nf4_bf16_of_f32(float value) {
  const uint32_t bits = nf4_bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Round to nearest even, subnormals and overflow to infinity included; a NaN keeps its sign and
// becomes the quiet NaN 0x7e00.
NF4_FN uint16_t nf4_f16_of_f32(float value) {
  const uint32_t bits = nf4_bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 makes the FPU round at 2^-24.
  const uint32_t subnormal =
      nf4_bits_of_float(nf4_float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x47800000u ? 0x7c00u : out;
  out = magnitude > 0x7f800000u ? 0x7e00u : out;
  return (uint16_t)(sign | out);
}

// -- 4-bit ------------------------------------------------------------------------------------

// 1/absmax as bitsandbytes' default implementation forms it for a FULL block (1e-38 is its floor).
NF4_FN float nf4_reciprocal(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

// The rank (0..15) of a scaled value: how many midpoints lie below it.  A tie takes the lower.
NF4_FN int nf4_rank(float scaled, const float* midpoints) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += scaled > midpoints[i] ? 1 : 0;
  return rank;
}

NF4_FN float nf4_decode(float table_value, float absmax) { return table_value * absmax; }

// -- nested 8-bit (double quantization of the absmax vector) -----------------------------------

// The index of the nearest of 256 ascending values by their 255 midpoints, ties to the lower:
// eight of these steps, for bit 7 down to 0, from rank 0.
NF4_FN int nf4_nested_step(float scaled, const float* midpoints, int rank, int bit) {
  return rank + ((int)(scaled > midpoints[rank + (1 << bit) - 1]) << bit);
}

// Two roundings, never a fused one: bitsandbytes multiplies, stores, then adds the offset.
NF4_FN float nf4_nested_decode(float map_value, float nested_absmax, float offset) {
  const float product = map_value * nested_absmax;
  return product + offset;
}

#endif
