// Rows of 16 in four NEON registers (aarch64): see cpu_vectors_avx512.h.
#ifndef NF4_CPU_VECTORS_NEON_H
#define NF4_CPU_VECTORS_NEON_H

#include <arm_neon.h>

#include "codec.h"

namespace {

constexpr int kParts = 4;  // registers of a row

// 16 floats, 16 integers of 32 bits, and tables of 16 bytes and of 16 halves.
struct Floats {
  float32x4_t part[kParts];
};
struct Ints {
  uint32x4_t part[kParts];
};
struct Bytes {
  uint8x16_t all;
};
struct Halves {
  uint8x16_t low, high;  // bytes
};

// Return function(part) of each part of a row.
template <class Row, class Function>
NF4_FN Row each(Function function) {
  return {function(0), function(1), function(2), function(3)};
}

// Return the values of a row of elements.
NF4_FN Floats load_f32(const float* x) {
  return each<Floats>([&](int p) { return vld1q_f32(x + 4 * p); });
}
NF4_FN Floats load_f16(const uint16_t* x) {
  return each<Floats>(
      [&](int p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + 4 * p))); });
}
NF4_FN Floats load_bf16(const uint16_t* x) {
  return each<Floats>(
      [&](int p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x + 4 * p), 16)); });
}

// Write a row.
NF4_FN void store(Floats x, float* to) {
  for (int p = 0; p < kParts; p++) vst1q_f32(to + 4 * p, x.part[p]);
}

// Return a table of 16 bytes.
NF4_FN Bytes load_bytes(const uint8_t* table) { return {vld1q_u8(table)}; }

// Return a table rounded to float16, to bfloat16; no entry may be a NaN.
NF4_FN Halves split_halves(uint16x8_t a, uint16x8_t b) {
  const uint8x16_t first = vreinterpretq_u8_u16(a), second = vreinterpretq_u8_u16(b);
  return {vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
}
NF4_FN uint16x4_t round_four_f16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
NF4_FN uint16x4_t round_four_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
}
NF4_FN Halves round_f16(Floats x) {
  return split_halves(vcombine_u16(round_four_f16(x.part[0]), round_four_f16(x.part[1])),
                      vcombine_u16(round_four_f16(x.part[2]), round_four_f16(x.part[3])));
}
NF4_FN Halves round_bf16(Floats x) {
  return split_halves(vcombine_u16(round_four_bf16(x.part[0]), round_four_bf16(x.part[1])),
                      vcombine_u16(round_four_bf16(x.part[2]), round_four_bf16(x.part[3])));
}

// Return 16 times the same value.
NF4_FN Floats spread(float x) {
  return each<Floats>([&](int) { return vdupq_n_f32(x); });
}

// Return a + b, a - b, a * b, |a|.
NF4_FN Floats add(Floats a, Floats b) {
  return each<Floats>([&](int p) { return vaddq_f32(a.part[p], b.part[p]); });
}
NF4_FN Floats subtract(Floats a, Floats b) {
  return each<Floats>([&](int p) { return vsubq_f32(a.part[p], b.part[p]); });
}
NF4_FN Floats multiply(Floats a, Floats b) {
  return each<Floats>([&](int p) { return vmulq_f32(a.part[p], b.part[p]); });
}
NF4_FN Floats magnitude(Floats a) {
  return each<Floats>([&](int p) { return vabsq_f32(a.part[p]); });
}

// Return a * b + c and c - a * b, rounded once: for guesses only, never for a result.
NF4_FN Floats fused(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int p) { return vfmaq_f32(c.part[p], a.part[p], b.part[p]); });
}
NF4_FN Floats fused_less(Floats a, Floats b, Floats c) {
  return each<Floats>([&](int p) { return vfmsq_f32(c.part[p], a.part[p], b.part[p]); });
}

// Return the bits of floats.
NF4_FN Ints bits(Floats a) {
  return each<Ints>([&](int p) { return vreinterpretq_u32_f32(a.part[p]); });
}

// Return the larger of magnitudes, compared as bits: a NaN is larger than infinity.
NF4_FN Floats larger(Floats a, Floats b) {
  const Ints x = bits(a), y = bits(b);
  return each<Floats>(
      [&](int p) { return vreinterpretq_f32_u32(vmaxq_u32(x.part[p], y.part[p])); });
}

// Return the largest magnitude of a row, as bits.
NF4_FN uint32_t largest_bits(Floats a) {
  const Ints x = bits(a);
  return vmaxvq_u32(vmaxq_u32(vmaxq_u32(x.part[0], x.part[1]), vmaxq_u32(x.part[2], x.part[3])));
}

// Return the largest magnitude of n floats of 16 bits, a multiple of 16, as bits.
NF4_FN uint32_t largest_half(const uint16_t* x, int n) {
  const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
  uint16x8_t all = vdupq_n_u16(0);
  for (int i = 0; i < n; i += 8) all = vmaxq_u16(all, vandq_u16(vld1q_u16(x + i), magnitude));
  return vmaxvq_u16(all);
}

// Return values limited to [-limit, limit].
NF4_FN Floats limited(Floats a, float limit) {
  const float32x4_t most = vdupq_n_f32(limit), least = vdupq_n_f32(-limit);
  return each<Floats>([&](int p) { return vmaxq_f32(vminq_f32(a.part[p], most), least); });
}

// Return the entries of a table of 16: only the low 4 bits of an index count.
NF4_FN Floats pick(Floats table, Ints index) {
  const uint8x16x4_t bytes = {
      {vreinterpretq_u8_f32(table.part[0]), vreinterpretq_u8_f32(table.part[1]),
       vreinterpretq_u8_f32(table.part[2]), vreinterpretq_u8_f32(table.part[3])}};
  return each<Floats>([&](int p) {
    const uint32x4_t entry = vandq_u32(index.part[p], vdupq_n_u32(15));
    const uint32x4_t place = vmlaq_u32(vdupq_n_u32(0x03020100), entry, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(place)));
  });
}

// Return the counts, one more where a > b.
NF4_FN Ints count_greater(Ints counts, Floats a, Floats b) {
  return each<Ints>(
      [&](int p) { return vsubq_u32(counts.part[p], vcgtq_f32(a.part[p], b.part[p])); });
}

// Return the sum of a row, folded in halves.
NF4_FN float fold(Floats a) {
  const float32x4_t four =
      vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// Return the sums of two rows, each folded in halves.
NF4_FN void fold_two(Floats a, Floats b, float* sum_a, float* sum_b) {
  *sum_a = fold(a);
  *sum_b = fold(b);
}

// Return the codes of a row.
NF4_FN uint8x16_t row_codes(Ints ranks, Bytes codes) {
  const uint16x8_t low =
      vuzp1q_u16(vreinterpretq_u16_u32(ranks.part[0]), vreinterpretq_u16_u32(ranks.part[1]));
  const uint16x8_t high =
      vuzp1q_u16(vreinterpretq_u16_u32(ranks.part[2]), vreinterpretq_u16_u32(ranks.part[3]));
  return vqtbl1q_u8(codes.all, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
}

// Write the codes of a row, or of four, two to a byte and the first one in the high nibble.  ranks:
// their low 4 bits, and no others below bit 16.
NF4_FN void pack_row(Ints ranks, Bytes codes, uint8_t* packed) {
  const uint8x16_t row = row_codes(ranks, codes);
  const uint8x16_t first = vuzp1q_u8(row, row), second = vuzp2q_u8(row, row);
  vst1_u8(packed, vget_low_u8(vsliq_n_u8(second, first, 4)));
}
NF4_FN void pack_rows(const Ints* ranks, Bytes codes, uint8_t* packed) {
  for (int i = 0; i < 4; i += 2) {
    const uint8x16_t a = row_codes(ranks[i], codes), b = row_codes(ranks[i + 1], codes);
    vst1q_u8(packed + 8 * i, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));
  }
}

// Write the entries that 8 bytes of two codes each name in a table of 16 floats.
template <bool kLowFirst>
NF4_FN void expand_floats(Floats table, const uint8_t* packed, float* out) {
  const uint8x8_t bytes = vld1_u8(packed);
  const uint8x8_t low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
  const uint8x8x2_t codes = kLowFirst ? vzip_u8(low, high) : vzip_u8(high, low);
  const uint16x8_t first = vmovl_u8(codes.val[0]), second = vmovl_u8(codes.val[1]);
  const Ints index = {{vmovl_u16(vget_low_u16(first)), vmovl_u16(vget_high_u16(first)),
                       vmovl_u16(vget_low_u16(second)), vmovl_u16(vget_high_u16(second))}};
  store(pick(table, index), out);
}

// Write the entries that 16 bytes of two codes each, the first one in the high nibble, name in a
// table of 16 halves.
NF4_FN void expand_halves(Halves table, const uint8_t* packed, uint16_t* out) {
  const uint8x16_t bytes = vld1q_u8(packed);
  const uint8x16_t first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(15));
  const uint8x16x2_t codes = vzipq_u8(first, second);
  for (int i = 0; i < 2; i++) {
    const uint8x16x2_t halves = {
        {vqtbl1q_u8(table.low, codes.val[i]), vqtbl1q_u8(table.high, codes.val[i])}};
    vst2q_u8((uint8_t*)(out + 16 * i), halves);
  }
}

}  // namespace

#endif
