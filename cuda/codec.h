// The arithmetic of bitsandbytes' 4-bit format, once, for the CPU engine and for the GPU kernels.
//
// This is the only place where a value becomes a code and a code a value, and the only one that
// says a constant of the format; cpu_*.{h,cpp} and gpu_*.{cuh,cu} arrange loops, lanes and memory
// around it.  There are no tables here: codebook.py owns them and passes them in as nf4_codebook,
// so that no table is typed twice.  Python holds what it needs of the constants under names of its
// own; tests/engines/test_native_constants.py has a compiler compare them.
//
// Every float operation is rounded on its own, IEEE binary32, to nearest even: compile with
// -ffp-contract=off (CPU) or -fmad=false (GPU), never with fast-math, never with flush-to-zero (a
// block near 3e38 has a subnormal reciprocal, a float16 subnormal is decoded through a subnormal
// float).
//
// Functions are `static` on purpose: the CPU engine is compiled once an instruction set, and a
// linker that merged those copies could put AVX-512 code where a baseline CPU finds it.
#ifndef NF4_CODEC_H
#define NF4_CODEC_H

#if defined(__CUDACC_RTC__)  // NVRTC: no system headers, and none of CUDA's own are needed
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef long long int64_t;
#define NF4_FN __device__ __forceinline__
#else
#include <stdint.h>
#include <string.h>
#define NF4_FN inline __attribute__((always_inline))
#endif

// Element types; the numbers are part of the C ABI and of the kernels' names (engines/).
enum nf4_dtype {
  NF4_F32 = 0,
  NF4_F16 = 1,
  NF4_BF16 = 2,
  NF4_E4M3 = 3,  // from here on: codes of quantized sources, but for F64
  NF4_F64 = 4,
  NF4_E2M1 = 5,
  NF4_OFFSET4 = 6,
  NF4_OFFSET8 = 7,
  NF4_E5M2 = 8,
  NF4_INT8 = 9,
};

constexpr float kAbsmaxFloor = 1e-38f;  // the least that bitsandbytes' own code divides by
constexpr int kMaxBlock = 4096;         // elements: the largest blocksize that bitsandbytes accepts
constexpr int kNestedRun = 256;         // elements of the absmax vector that share a nested_absmax
constexpr int kNestedBits = 8;          // of their codes
constexpr int kMaxSteps = 256;          // of a ladder
constexpr uint32_t kInfinityBits = 0x7f800000u;

// The error sums, and the order of their additions, which is part of the contract between engines.
//
// A row of kStats float64 tells of a granule: kGranule elements, the last one fewer.  Within a
// segment (kSegment elements, or a block of 32), in units of its block's absmax, partial sum j
// takes the elements j, j + 16, j + 32, ... in turn; then the kRow = 16 partial sums are folded in
// halves (j += j + 8, j + 4, j + 2, j + 1).  Segments are added in turn, in float64, times the
// absmax squared.
constexpr int kRow = 16;
constexpr int kSegment = 64;
constexpr int kGranule = 65536;
enum nf4_stat {
  kErrorSquares = 0,  // sum of squared errors
  kValueSquares = 1,  // sum of squared values
  kLargestError = 2,
  kOutliers = 3,  // outlier blocks, see nf4_outlier
  kStats = 4,
};

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
  float steps[kMaxSteps];
  int32_t size, zero, run;
  float low, high;
};

// Return the float of these bits, the bits of a float, and the place of the highest bit of a value
// that is not 0.
#if defined(__CUDACC_RTC__)
static NF4_FN float nf4_float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
static NF4_FN uint32_t nf4_bits_of_float(float value) { return __float_as_uint(value); }
static NF4_FN int nf4_log2(uint32_t value) { return 31 - __clz(value); }
#else
static NF4_FN float nf4_float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static NF4_FN uint32_t nf4_bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static NF4_FN int nf4_log2(uint32_t value) { return 31 - __builtin_clz(value); }
#endif

// Return the bits of |value|: they order like magnitudes, with NaN above kInfinityBits.
static NF4_FN uint32_t nf4_magnitude(float value) { return nf4_bits_of_float(value) & 0x7fffffffu; }

// Return |value|; on a CPU -0.0 stays -0.0, which no sum or product here tells from 0.0.
static NF4_FN float nf4_abs(float value) {
#if defined(__CUDA_ARCH__)
  return fabsf(value);  // costs no instruction of its own
#else
  return value < 0.0f ? -value : value;
#endif
}

// -- 16-bit and 8-bit floats, as raw bits --

// Return the value of a bfloat16: exact.
static NF4_FN float nf4_f32_of_bf16(uint16_t raw) { return nf4_float_of_bits((uint32_t)raw << 16); }

// Return the value of a float16, exact: a multiplication with 2^112 moves the exponent, and also
// normalises subnormals.  (A GPU has an instruction for it; the two differ in the payload of a NaN
// only, which no code has.)
static NF4_FN float nf4_f32_of_f16(uint16_t raw) {
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

// Return the value of a float8 e4m3fn, exact, in the same way: 2^120 puts its exponent (bias 7)
// where float32 has it.  The values are those of codebook.float8_e4m3(), NaN (0x7f and 0xff)
// included.
static NF4_FN float nf4_f32_of_e4m3(uint8_t raw) {
  const uint32_t magnitude = (uint32_t)(raw & 0x7fu) << 20;
  const uint32_t scaled = nf4_bits_of_float(nf4_float_of_bits(magnitude) * 0x1p120f);
  const uint32_t special = magnitude == 0x07f00000u ? 0x7ff00000u : 0u;
  return nf4_float_of_bits(scaled | special | (uint32_t)(raw & 0x80u) << 24);
}

// Return the value of a 4-bit float e2m1, exact, in the same way.
static NF4_FN float nf4_f32_of_e2m1(uint32_t code) {
  const float magnitude = nf4_float_of_bits((code & 7u) << 22) * 0x1p126f;
  return nf4_float_of_bits(nf4_bits_of_float(magnitude) | (code & 8u) << 28);
}

// Round to the nearest bfloat16, ties to even; a NaN becomes torch's quiet NaN 0x7fc0, without its
// sign, as in torch.
static NF4_FN uint16_t nf4_bf16_of_f32(float value) {
  const uint32_t bits = nf4_bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Round to the nearest float16, ties to even, subnormals and overflow to infinity included; a NaN
// keeps its sign and becomes the quiet NaN 0x7e00.
static NF4_FN uint16_t nf4_f16_of_f32(float value) {
  const uint32_t bits = nf4_bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 makes the FPU round at 2^-24.
  const uint32_t subnormal = nf4_bits_of_float(nf4_float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x47800000u ? 0x7c00u : out;
  out = magnitude > 0x7f800000u ? 0x7e00u : out;
  return (uint16_t)(sign | out);
}

// -- units: a block's elements over its absmax --

// Return the absmax that a block is divided by at least.
static NF4_FN float nf4_floored(float absmax) {
  return absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax;
}

// Return 1/absmax as a full block has it.
static NF4_FN float nf4_reciprocal(float absmax) { return 1.0f / nf4_floored(absmax); }

// Return the same of a scale of either sign.
static NF4_FN float nf4_signed_reciprocal(float scale) {
  return scale < 0.0f ? -nf4_reciprocal(-scale) : nf4_reciprocal(scale);
}

// What turns elements into units, and the absmax that is stored.  bitsandbytes' default
// implementation multiplies a full block by the rounded reciprocal; the partial one at the end of a
// vector (kTail) it divides, and stores the floored absmax.  So for the weights, and for the absmax
// vector in runs.
struct nf4_unit {
  float absmax, inverse;
};

// Return the unit of a block whose largest magnitude is `largest`.
template <bool kTail>
static NF4_FN nf4_unit nf4_unit_of(float largest) {
  nf4_unit unit = {largest, 1.0f};
  if (kTail)
    unit.absmax = nf4_floored(largest);
  else
    unit.inverse = nf4_reciprocal(largest);
  return unit;
}

// Return a value in units of its block.
template <bool kTail>
static NF4_FN float nf4_scaled(float value, nf4_unit unit) {
  return kTail ? value / unit.absmax : value * unit.inverse;
}

// -- ranks and codes --

// Return the rank (0..15) of a scaled value: how many midpoints lie below it.  A tie takes the
// lower.  Engines search as their machine likes (a tree in registers, cells in shared memory);
// every search asks `scaled > midpoint`, of midpoints in ascending order, and nothing else.
static NF4_FN int nf4_rank(float scaled, const float* midpoints) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += scaled > midpoints[i] ? 1 : 0;
  return rank;
}

// A search tree of 2^levels - 1 ascending midpoints as a heap: node 1 is the root, node k has the
// children 2k and 2k + 1.  `levels` steps from node 1 end at node 2^levels + rank.

// Return which of the midpoints stands at a node.
static NF4_FN int nf4_heap_midpoint(int node, int levels) {
  const int depth = nf4_log2((uint32_t)node), place = node - (1 << depth);
  return ((2 * place + 1) << (levels - 1 - depth)) - 1;
}

// Return the child of a node that a scaled value goes to.
static NF4_FN int nf4_heap_step(float scaled, const float* heap, int node) {
  return 2 * node + (int)(scaled > heap[node]);
}

// Return the value of a code, by its entry in the table.
static NF4_FN float nf4_decode(float table_value, float absmax) { return table_value * absmax; }

// Return the absmax that double quantization stored: two roundings, never a fused one, because
// bitsandbytes multiplies, stores, then adds the offset.
static NF4_FN float nf4_nested_decode(float map_value, float nested_absmax, float offset) {
  const float product = map_value * nested_absmax;
  return product + offset;
}

// -- chosen scales --

// Every loader multiplies a code's value by the block's scale, so any number may stand there, a
// negative one as well: the table is not symmetric.  `--scale search` takes, of the scales that the
// format can store (a ladder's steps times a unit), the one with the smallest loss.

// Return the scale of a step.
static NF4_FN float nf4_scale(float step, float unit) {
  return nf4_nested_decode(step, unit, 0.0f);
}

// Return the largest scale that is tried: a finite one.
static NF4_FN float nf4_most(float scale) {
  return scale < 0x1.fffffep127f ? scale : 0x1.fffffep127f;
}

// Return what an element's squared error is multiplied by where no importance is given.
static NF4_FN float nf4_plain_weight(float scaled) { return nf4_abs(scaled); }

// Return a block's sum of weight * (scaled - value)^2 in units of its run instead of the scale at
// hand.  plain: nf4_plain_weight is itself in units of the scale.
static NF4_FN float nf4_loss(float sum, float step, bool plain) {
  const float square = sum * (step * step);
  return plain ? square * nf4_abs(step) : square;
}

// Return the first of n > 0 ascending magnitudes that times unit is not below least; the last if
// none is.
static NF4_FN int nf4_first_step(const float* magnitudes, int n, float unit, float least) {
  int from = 0, to = n - 1;
  while (from < to) {
    const int middle = (from + to) / 2;
    if (magnitudes[middle] * unit < least)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

// -- outlier blocks --

// A block is an outlier block when its absmax is more than 10 times the root mean square of its
// other elements, and some element lies between zero and absmax: those two are exact in 4 bits, so
// that a block of them loses nothing.  Counted in integers, which any order adds up to the same: a
// segment's sum of squares, in units of absmax squared, is first rounded down to a multiple of
// 1/kOutlierUnit.
constexpr int32_t kOutlierUnit = 65536;
constexpr int32_t kOutlierShare = 655;  // a hundredth of it: 10 times, squared
constexpr int32_t kOutlierMost = 128;   // squared absmax that a segment is counted for at most

// Return a segment's squares as such an integer.
static NF4_FN int32_t nf4_units(float value2) {
  return value2 < (float)kOutlierMost ? (int32_t)(value2 * (float)kOutlierUnit)
                                      : kOutlierMost * kOutlierUnit;
}

// Return the first half of that: units is the sum over a block's n elements, of which the largest
// has kOutlierUnit.  An absmax at or below the floor is no unit; such blocks do not count.
static NF4_FN bool nf4_outlier(int32_t units, int32_t n, float absmax) {
  return absmax > kAbsmaxFloor && units - kOutlierUnit < kOutlierShare * (n - 1);
}

#endif
