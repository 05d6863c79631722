// How the GPU kernels read a source: threads, the elements that each owns, float formats, codes.
#ifndef NF4_GPU_LOAD_CUH
#define NF4_GPU_LOAD_CUH

#include "codec.h"

namespace nf4 {

typedef int64_t i64;

constexpr int kThreads = 256;  // a CTA of every kernel but fold_errors
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// A segment (codec.h) is worked on by two threads: each owns 8 of its 16 columns, in all 4 rows.
constexpr int kRows = kSegment / kRow;
constexpr int kHalf = kRow / 2;
constexpr int kOwn = kRows * kHalf;  // 32 elements
constexpr int kLogSegment = 6;
static_assert(1 << kLogSegment == kSegment && 2 * kOwn == kSegment, "a segment and its halves");

// -- reading the source: 8 elements of each of the 4 rows of a thread's half segment --

// What turns codes into values: a piece of a row-major matrix that starts in `row` at `column`, and
// for each block of block_rows x block_columns one factor and, unless `zero` is null, one zero
// point.
struct Codes {
  uint32_t row, column, columns, block_rows, block_columns, scale_columns;
  const float *scale, *zero;
};

// The bits of a code of kFrom; 0 for a float format.
template <int kFrom>
constexpr int kCodeBits = kFrom == NF4_E2M1 || kFrom == NF4_OFFSET4   ? 4
                          : kFrom == NF4_E4M3 || kFrom >= NF4_OFFSET8 ? 8
                                                                      : 0;

// Whether codes of kFrom are integers, which may have zero points.
template <int kFrom>
constexpr bool kIntegers = kFrom == NF4_OFFSET4 || kFrom == NF4_OFFSET8 || kFrom == NF4_INT8;

// Return the value of a code.  Integers go into the lowest bits of 2^23; those with a sign are
// those with an offset, but for the first bit.
template <int kFrom>
NF4_FN float code_value(uint32_t code) {
  if (kFrom == NF4_E4M3) return nf4_f32_of_e4m3((uint8_t)code);
  if (kFrom == NF4_E5M2) return nf4_f32_of_f16((uint16_t)(code << 8));
  if (kFrom == NF4_E2M1) return nf4_f32_of_e2m1(code);
  const uint32_t bits = kFrom == NF4_INT8 ? code ^ 0x80u : code;
  return nf4_float_of_bits(0x4b000000u | bits) - (0x1p23f + (kFrom == NF4_OFFSET4 ? 8.0f : 128.0f));
}

// Write the 8 halves of 16 bytes.
NF4_FN void unpack16(const uint4& raw, uint16_t* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = (uint16_t)(words[i / 2] >> (16 * (i & 1)));
}

// Return the value that kTo stores.
template <int kTo>
NF4_FN float rounded(float value) {
  if (kTo == NF4_BF16) return nf4_f32_of_bf16(nf4_bf16_of_f32(value));
  if (kTo == NF4_F16) return nf4_f32_of_f16(nf4_f16_of_f32(value));
  return value;
}

// What reads the elements of kFrom: one, or the 8 neighbours from element i on.
template <int kFrom>
struct Source;

template <>
struct Source<NF4_F32> {
  static NF4_FN float one(const void* src, i64 i) { return static_cast<const float*>(src)[i]; }
  static NF4_FN void row(const void* src, i64 i, float* x) {
    const float4* at = reinterpret_cast<const float4*>(static_cast<const float*>(src) + i);
    const float4 a = at[0], b = at[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
};

template <int kFrom>  // of 16 bits
struct Source16 {
  static NF4_FN float value(uint16_t raw) {
    return kFrom == NF4_F16 ? nf4_f32_of_f16(raw) : nf4_f32_of_bf16(raw);
  }
  static NF4_FN float one(const void* src, i64 i) {
    return value(static_cast<const uint16_t*>(src)[i]);
  }
  static NF4_FN void row(const void* src, i64 i, float* x) {
    uint16_t raw[8];
    unpack16(*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(src) + i), raw);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = value(raw[k]);
  }
};
template <>
struct Source<NF4_F16> : Source16<NF4_F16> {};
template <>
struct Source<NF4_BF16> : Source16<NF4_BF16> {};

// Return the index of the factor of the element `at` elements into the piece, and of all behind it
// up to its block's edge.
NF4_FN i64 factor(const Codes& f, uint32_t at) {
  const uint32_t place = f.column + at, lines = place / f.columns;
  const uint32_t row = (f.row + lines) / f.block_rows;
  const uint32_t column = (place - lines * f.columns) / f.block_columns;
  return (i64)row * f.scale_columns + column;
}

// Write 8 neighbours, which share a factor: columns and block_columns are multiples of 8 (other
// shapes stay with the CPU engine).
template <int kFrom, int kTo>
NF4_FN void decode8(const Codes& f, i64 at, const uint32_t* words, float* x) {
  constexpr int kBits = kCodeBits<kFrom>, kPerWord = 32 / kBits;
  constexpr bool kZero = kIntegers<kFrom>;
  const i64 place = factor(f, (uint32_t)at);
  const float unit = f.scale[place], zero = kZero && f.zero ? f.zero[place] : 0.0f;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const uint32_t code = words[k / kPerWord] >> (kBits * (k % kPerWord)) & ((1u << kBits) - 1);
    const float value = code_value<kFrom>(code);
    x[k] = rounded<kTo>((kZero ? value - zero : value) * unit);
  }
}

// Write the kOwn elements of a thread to x.  Two threads share each row, so a 2-byte row is 16
// bytes for each; of rows of codes, each loads two whole ones and passes on the half that the other
// owns.  For a segment behind the end it is those of the first one, which nobody stores; of a half
// segment (kSmall) nobody stores the missing rows, which are zeros, or what code 0 stands for.
template <int kFrom, int kTo, bool kSmall>
NF4_FN void load(const void* src, i64 n, i64 segment, int half, const Codes& f, float (*x)[kHalf]) {
  const i64 first = segment * kSegment < n ? segment * kSegment : 0;
  const bool whole = !kSmall || first + kSegment <= n;
  if constexpr (kCodeBits<kFrom> == 8) {
    uint4 raw[2] = {};
    const uint4* at =
        reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(src) + first) + 2 * half;
    if (whole || half == 0) raw[0] = at[0], raw[1] = at[1];
    uint32_t words[kRows][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t give_x = half ? raw[i].x : raw[i].z, give_y = half ? raw[i].y : raw[i].w;
      const uint32_t x = __shfl_xor_sync(kAll, give_x, 1), y = __shfl_xor_sync(kAll, give_y, 1);
      words[i][0] = half ? x : raw[i].x;
      words[i][1] = half ? y : raw[i].y;
      words[i + 2][0] = half ? raw[i].z : x;
      words[i + 2][1] = half ? raw[i].w : y;
    }
#pragma unroll
    for (int row = 0; row < kRows; row++)
      decode8<kFrom, kTo>(f, first + row % (whole ? kRows : kRows / 2) * kRow + half * kHalf,
                          words[row], x[row]);
  } else if constexpr (kCodeBits<kFrom> == 4) {
    uint4 raw = {};
    if (whole || half == 0)
      raw = reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(src) + first / 2)[half];
    const uint32_t above = __shfl_xor_sync(kAll, half ? raw.x : raw.y, 1);
    const uint32_t below = __shfl_xor_sync(kAll, half ? raw.z : raw.w, 1);
    const uint32_t words[kRows] = {half ? above : raw.x, half ? below : raw.z, half ? raw.y : above,
                                   half ? raw.w : below};
#pragma unroll
    for (int row = 0; row < kRows; row++)
      decode8<kFrom, kTo>(f, first + row % (whole ? kRows : kRows / 2) * kRow + half * kHalf,
                          words + row, x[row]);
  } else {
#pragma unroll
    for (int row = 0; row < kRows; row++) {
      if (!kSmall || row < kRows / 2 || whole) {
        Source<kFrom>::row(src, first + row * kRow + half * kHalf, x[row]);
      } else {
#pragma unroll
        for (int k = 0; k < kHalf; k++) x[row][k] = 0.0f;
      }
    }
  }
}

// Write the same of the tensor's last, partial block: element by element, zeros behind the end.
// (Codes with such a block stays with the CPU engine.)
template <int kFrom>
NF4_FN void load_tail(const void* src, i64 n, i64 segment, int half, float (*x)[kHalf]) {
#pragma unroll
  for (int row = 0; row < kRows; row++) {
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
      const i64 i = segment * kSegment + row * kRow + half * kHalf + k;
      x[row][k] = i < n ? Source<kFrom>::one(src, i) : 0.0f;
    }
  }
}

}  // namespace nf4

#endif
