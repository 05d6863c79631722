// Rows of 16 in pairs of AVX2 registers (x86-64-v3): see cpu_vectors_avx512.h.
#ifndef NF4_CPU_VECTORS_AVX2_H
#define NF4_CPU_VECTORS_AVX2_H

#include <immintrin.h>

#include "codec.h"
#include "cpu_vectors_x86.h"

namespace {

// 16 floats, 16 integers of 32 bits, and tables of 16 bytes and of 16 halves.
struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Bytes {
  __m256i all;  // twice the same
};
struct Halves {
  __m256i low, high;  // the bytes of the table, each twice the same
};

// Return the values of a row of elements.
NF4_FN Floats load_f32(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
NF4_FN __m128i load_eight(const uint16_t* x) { return _mm_loadu_si128((const __m128i*)x); }
NF4_FN Floats load_f16(const uint16_t* x) {
  return {_mm256_cvtph_ps(load_eight(x)), _mm256_cvtph_ps(load_eight(x + 8))};
}
NF4_FN __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
NF4_FN Floats load_bf16(const uint16_t* x) {
  return {widen_bf16(load_eight(x)), widen_bf16(load_eight(x + 8))};
}

// Write a row.
NF4_FN void store(Floats x, float* to) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}

// Return a table of 16 bytes.
NF4_FN Bytes load_bytes(const uint8_t* table) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table))};
}
// Return a table of 16 halves: eight of a, eight of b.
NF4_FN Halves split_halves(__m128i a, __m128i b) {
  const __m128i byte = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

// Return a table rounded to float16, to bfloat16; no entry may be a NaN.
NF4_FN Halves round_f16(Floats x) {
  return split_halves(_mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT),
                      _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
NF4_FN __m256i round_eight(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_srli_epi32(up, 16);
}
NF4_FN Halves round_bf16(Floats x) {
  const __m256i mixed = _mm256_packus_epi32(round_eight(x.low), round_eight(x.high));
  const __m256i halves = _mm256_permute4x64_epi64(mixed, 0xd8);
  return split_halves(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// Return 16 times the same value.
NF4_FN Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

// Return a + b, a - b, a * b, |a|.
NF4_FN Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
NF4_FN Floats subtract(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
NF4_FN Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
NF4_FN Floats magnitude(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

// Return a * b + c and c - a * b, rounded once: for guesses only, never for a result.
NF4_FN Floats fused(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
NF4_FN Floats fused_less(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

// Return the larger of magnitudes, compared as bits: a NaN is larger than infinity.
NF4_FN __m256 larger(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
NF4_FN Floats larger(Floats a, Floats b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }

// Return the largest magnitude of a row, as bits.
NF4_FN uint32_t largest_bits(Floats a) {
  const __m256i eight = _mm256_castps_si256(larger(a.low, a.high));
  const __m128i four =
      _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xee));
  return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0x55)));
}

// Return values limited to [-limit, limit].
NF4_FN Floats limited(Floats a, float limit) {
  const __m256 most = _mm256_set1_ps(limit), least = _mm256_set1_ps(-limit);
  return {_mm256_max_ps(_mm256_min_ps(a.low, most), least),
          _mm256_max_ps(_mm256_min_ps(a.high, most), least)};
}

// Return the bits of floats.
NF4_FN Ints bits(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

// Return the entries of a table of 16: only the low 4 bits of an index count.
NF4_FN __m256 pick(Floats table, __m256i index) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                          _mm256_permutevar8x32_ps(table.high, index), upper);
}
NF4_FN Floats pick(Floats table, Ints index) {
  return {pick(table, index.low), pick(table, index.high)};
}

// Return the counts, one more where a > b.
NF4_FN __m256i count_greater(__m256i counts, __m256 a, __m256 b) {
  return _mm256_sub_epi32(counts, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
NF4_FN Ints count_greater(Ints counts, Floats a, Floats b) {
  return {count_greater(counts.low, a.low, b.low), count_greater(counts.high, a.high, b.high)};
}

// Return the sums of two rows, each folded in halves.
NF4_FN void fold_two(Floats a, Floats b, float* sum_a, float* sum_b) {
  const __m256 eight_a = _mm256_add_ps(a.low, a.high), eight_b = _mm256_add_ps(b.low, b.high);
  const __m256 four = _mm256_add_ps(_mm256_permute2f128_ps(eight_a, eight_b, 0x20),
                                    _mm256_permute2f128_ps(eight_a, eight_b, 0x31));
  const __m256 two = _mm256_add_ps(four, _mm256_permute_ps(four, 0xee));
  const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
  *sum_a = _mm256_cvtss_f32(one);
  *sum_b = _mm_cvtss_f32(_mm256_extractf128_ps(one, 1));
}

// Return pairs of codes, in words: those of 32 ranks in four vectors, a, b, c, d in each lane.
NF4_FN __m256i pair_codes(__m256i a, __m256i b, __m256i c, __m256i d, Bytes codes) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
  const __m256i ab = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
  const __m256i cd = _mm256_blend_epi16(c, _mm256_slli_epi32(d, 16), 0xaa);
  const __m256i ranks = _mm256_shuffle_epi8(_mm256_or_si256(ab, _mm256_slli_epi16(cd, 8)), order);
  return _mm256_maddubs_epi16(_mm256_shuffle_epi8(codes.all, ranks), _mm256_set1_epi16(0x0110));
}

// Write the codes of a row, or of four, two to a byte and the first one in the high nibble.  ranks:
// their low 4 bits, and no others below bit 16.
NF4_FN void pack_row(Ints ranks, Bytes codes, uint8_t* packed) {
  const __m256i words = pair_codes(ranks.low, ranks.high, ranks.low, ranks.high, codes);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64((__m128i*)packed, _mm_unpacklo_epi16(low, high));
}
NF4_FN void pack_rows(const Ints* ranks, Bytes codes, uint8_t* packed) {
  const __m256i bytes = _mm256_packus_epi16(
      pair_codes(ranks[0].low, ranks[0].high, ranks[1].low, ranks[1].high, codes),
      pair_codes(ranks[2].low, ranks[2].high, ranks[3].low, ranks[3].high, codes));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storeu_si128((__m128i*)packed, _mm_unpacklo_epi16(low, high));
  _mm_storeu_si128((__m128i*)(packed + 16), _mm_unpackhi_epi16(low, high));
}

// Write the entries that 8 bytes of two codes each name in a table of 16 floats.
template <bool kLowFirst>
NF4_FN void expand_floats(Floats table, const uint8_t* packed, float* out) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)packed);
  const __m128i twice = _mm_unpacklo_epi8(bytes, bytes);
  const __m256i shifts = _mm256_set1_epi64x(kLowFirst ? 0x400000000 : 4);
  const Ints index = {_mm256_srlv_epi32(_mm256_cvtepu8_epi32(twice), shifts),
                      _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(twice, 8)), shifts)};
  store(pick(table, index), out);
}

// Write the entries that 16 bytes of two codes each, the first one in the high nibble, name in a
// table of 16 halves.
NF4_FN void expand_halves(Halves table, const uint8_t* packed, uint16_t* out) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)packed), nibble = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m128i second = _mm_and_si128(bytes, nibble);
  const __m256i index =
      _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  const __m256i low = _mm256_shuffle_epi8(table.low, index);
  const __m256i high = _mm256_shuffle_epi8(table.high, index);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256((__m256i*)(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

}  // namespace

#endif
