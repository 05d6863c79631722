// The arithmetic of bitsandbytes' 4-bit format, once, for the host and for the GPU.
//
// This is the only place where a value becomes a code and a code a value; cpu_engine.cpp (and the
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

#if defined(__CUDACC_RTC__)  // NVRTC: no system headers, and none of CUDA's own are needed
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
#define NF4_FN static __device__ __forceinline__
#else
#include <stdint.h>
#include <string.h>
#define NF4_FN static inline __attribute__((always_inline))
#endif

// Element types; the numbers are part of the C ABI and of the kernels' names (engines/).
enum nf4_dtype { NF4_F32 = 0, NF4_F16 = 1, NF4_BF16 = 2, NF4_E4M3 = 3 };

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

// The scales that a block may take: steps[i] times the unit of its run.
//   steps      ascending, of both signs, steps[zero] == 0
//   size       of them
//   run        blocks that share a unit, which is the largest magnitude of their elements
//   low, high  in units of the block's own absmax: how small and how large a scale may be, where
//              there is a step between them; otherwise it is the first step above
struct nf4_ladder {
  float steps[256];
  int32_t size, zero, run;
  float low, high;
};

#if defined(__CUDACC_RTC__)
NF4_FN float nf4_float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
NF4_FN uint32_t nf4_bits_of_float(float value) { return __float_as_uint(value); }
#else
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
#endif

// -- 16-bit floats, as raw bits ---------------------------------------------------------------

NF4_FN float nf4_f32_of_bf16(uint16_t raw) { return nf4_float_of_bits((uint32_t)raw << 16); }

// Exact: the exponent is moved by a multiplication with 2^112, which also normalises subnormals.
// (A GPU has an instruction for it; the two differ in the payload of a NaN only, which no code has.)
NF4_FN float nf4_f32_of_f16(uint16_t raw) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(raw));
  return value;
#else
  const uint32_t magnitude = (uint32_t)(raw & 0x7fffu) << 13;
  const uint32_t scaled = nf4_bits_of_float(nf4_float_of_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return nf4_float_of_bits(scaled | special | (uint32_t)(raw & 0x8000u) << 16);
#endif
}

// float8 e4m3fn, exact, by the same trick: 2^120 puts its exponent (bias 7) where float32 has it.
// The values are those of codebook.float8_e4m3(), NaN (0x7f and 0xff) included.
NF4_FN float nf4_f32_of_e4m3(uint8_t raw) {
  const uint32_t magnitude = (uint32_t)(raw & 0x7fu) << 20;
  const uint32_t scaled = nf4_bits_of_float(nf4_float_of_bits(magnitude) * 0x1p120f);
  const uint32_t special = magnitude == 0x07f00000u ? 0x7ff00000u : 0u;
  return nf4_float_of_bits(scaled | special | (uint32_t)(raw & 0x80u) << 24);
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
// Engines search as their machine likes (a tree in registers, one in shared memory); every search
// asks `scaled > midpoint`, of midpoints in ascending order, and nothing else.
NF4_FN int nf4_rank(float scaled, const float* midpoints) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += scaled > midpoints[i] ? 1 : 0;
  return rank;
}

NF4_FN float nf4_decode(float table_value, float absmax) { return table_value * absmax; }

// -- chosen scales ------------------------------------------------------------------------------

// Every loader multiplies a code's value by the block's scale, so any number may stand there, a
// negative one as well: the table is not symmetric.  `--scale search` takes, of the scales that the
// format can store (ladder[i] * unit), the one with the smallest loss.

// 1/scale with the floor of nf4_reciprocal.
NF4_FN float nf4_signed_reciprocal(float scale) {
  return scale < 0.0f ? -nf4_reciprocal(-scale) : nf4_reciprocal(scale);
}

// The largest scale that is tried: a finite one.
NF4_FN float nf4_most(float scale) { return scale < 0x1.fffffep127f ? scale : 0x1.fffffep127f; }

// What the loss of an element is multiplied by, its value in units of the scale.
NF4_FN float nf4_plain_weight(float scaled) { return scaled < 0.0f ? -scaled : scaled; }

// The sum over a block of weight * (scaled - value)^2, in units of its run instead of the scale at
// hand: nf4_plain_weight is itself one of them.
NF4_FN float nf4_loss(float sum, float step, bool plain) {
  const float square = sum * (step * step);
  return plain ? square * (step < 0.0f ? -step : step) : square;
}

// -- outlier blocks -----------------------------------------------------------------------------

// A block is an outlier block when its absmax is more than 10 times the root mean square of its other
// elements, and some element lies between zero and absmax: those two are exact in 4 bits, so that a
// block of them loses nothing.  Counted in integers, which any order adds up to the same: a segment's
// sum of squares, in units of absmax, is first rounded down to a multiple of 2^-16.
NF4_FN int32_t nf4_units(float value2) {
  return value2 < 128.0f ? (int32_t)(value2 * 65536.0f) : 1 << 23;
}

// The first half of that: units over n elements, of which the largest has 65,536.  absmax at or below
// 1e-38, the floor of the reciprocal, is no unit; such blocks do not count.
NF4_FN bool nf4_outlier(int32_t units, int32_t n, float absmax) {
  const int32_t hundredth = 655;  // of 2^16
  return absmax > 1e-38f && units - 65536 < hundredth * (n - 1);
}

// -- nested 8-bit (double quantization of the absmax vector) -----------------------------------

// One step of the search for the nearest of 2^k ascending values by their midpoints, ties to the
// lower: from rank 0, for bit k-1 down to 0.
NF4_FN int nf4_search_step(float scaled, const float* midpoints, int rank, int bit) {
  return rank + ((int)(scaled > midpoints[rank + (1 << bit) - 1]) << bit);
}

// The same on a heap (node 1 is the root, node k has children 2k and 2k+1): from node 1, k of these
// steps end at node 2^k + rank.
NF4_FN int nf4_heap_step(float scaled, const float* heap, int node) {
  return 2 * node + (int)(scaled > heap[node]);
}

// Two roundings, never a fused one: bitsandbytes multiplies, stores, then adds the offset.
NF4_FN float nf4_nested_decode(float map_value, float nested_absmax, float offset) {
  const float product = map_value * nested_absmax;
  return product + offset;
}

#endif
