// Rows of 16 in AVX-512 registers (x86-64-v4): the operations that cpu_search.h is written in.
//
// cpu_vectors_avx2.h and cpu_vectors_neon.h hold the same functions.  In an anonymous namespace, as
// cpu_search.h.
#ifndef NF4_CPU_VECTORS_AVX512_H
#define NF4_CPU_VECTORS_AVX512_H

#include <immintrin.h>

#include "codec.h"
#include "cpu_vectors_x86.h"

namespace {

// 16 floats, 16 integers of 32 bits, and tables of 16 bytes and of 16 halves.
struct Floats {
  __m512 all;
};
struct Ints {
  __m512i all;
};
struct Bytes {
  __m512i all;  // four times the same
};
struct Halves {
  __m512i all;  // twice the same
};

// Return the values of a row of elements.
NF4_FN Floats load_f32(const float* x) { return {_mm512_loadu_ps(x)}; }
NF4_FN Floats load_f16(const uint16_t* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))};
}
NF4_FN Floats load_bf16(const uint16_t* x) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

// Write a row.
NF4_FN void store(Floats x, float* to) { _mm512_storeu_ps(to, x.all); }

// Return a table of 16 bytes.
NF4_FN Bytes load_bytes(const uint8_t* table) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table))};
}

// Return a table rounded to float16, to bfloat16; no entry may be a NaN.
NF4_FN Halves round_f16(Floats x) {
  return {_mm512_broadcast_i64x4(_mm512_cvtps_ph(x.all, _MM_FROUND_TO_NEAREST_INT))};
}
NF4_FN Halves round_bf16(Floats x) {
  const __m512i bits = _mm512_castps_si512(x.all);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return {_mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)))};
}

// Return 16 times the same value.
NF4_FN Floats spread(float x) { return {_mm512_set1_ps(x)}; }

// Return a + b, a - b, a * b, |a|.
NF4_FN Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.all, b.all)}; }
NF4_FN Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.all, b.all)}; }
NF4_FN Floats multiply(Floats a, Floats b) { return {_mm512_mul_ps(a.all, b.all)}; }
NF4_FN Floats magnitude(Floats a) { return {_mm512_abs_ps(a.all)}; }

// Return a * b + c and c - a * b, rounded once: for guesses only, never for a result.
NF4_FN Floats fused(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
NF4_FN Floats fused_less(Floats a, Floats b, Floats c) {
  return {_mm512_fnmadd_ps(a.all, b.all, c.all)};
}

// Return the larger of magnitudes, compared as bits: a NaN is larger than infinity.
NF4_FN Floats larger(Floats a, Floats b) {
  return {_mm512_castsi512_ps(
      _mm512_max_epu32(_mm512_castps_si512(a.all), _mm512_castps_si512(b.all)))};
}

// Return the largest magnitude of a row, as bits.
NF4_FN uint32_t largest_bits(Floats a) {
  return _mm512_reduce_max_epu32(_mm512_castps_si512(a.all));
}

// Return values limited to [-limit, limit].
NF4_FN Floats limited(Floats a, float limit) {
  return {_mm512_max_ps(_mm512_min_ps(a.all, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit))};
}

// Return the bits of floats.
NF4_FN Ints bits(Floats a) { return {_mm512_castps_si512(a.all)}; }

// Return the entries of a table of 16: only the low 4 bits of an index count.
NF4_FN Floats pick(Floats table, Ints index) {
  return {_mm512_permutexvar_ps(index.all, table.all)};
}

// Return the counts, one more where a > b.
NF4_FN Ints count_greater(Ints counts, Floats a, Floats b) {
  const __mmask16 greater = _mm512_cmp_ps_mask(a.all, b.all, _CMP_GT_OQ);
  return {_mm512_mask_sub_epi32(counts.all, greater, counts.all, _mm512_set1_epi32(-1))};
}

// Return the sums of two rows, each folded in halves.
NF4_FN void fold_two(Floats a, Floats b, float* sum_a, float* sum_b) {
  const __m512 eight = _mm512_add_ps(_mm512_shuffle_f32x4(a.all, b.all, 0x44),
                                     _mm512_shuffle_f32x4(a.all, b.all, 0xee));
  const __m256 four = _mm256_add_ps(_mm512_castps512_ps256(_mm512_shuffle_f32x4(eight, eight, 8)),
                                    _mm512_castps512_ps256(_mm512_shuffle_f32x4(eight, eight, 13)));
  const __m256 two = _mm256_add_ps(four, _mm256_permute_ps(four, 0xee));
  const __m256 one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
  *sum_a = _mm256_cvtss_f32(one);
  *sum_b = _mm_cvtss_f32(_mm256_extractf128_ps(one, 1));
}

// Write the codes of a row, or of four, two to a byte and the first one in the high nibble.  ranks:
// their low 4 bits, and no others below bit 16.
NF4_FN void pack_row(Ints ranks, Bytes codes, uint8_t* packed) {
  const __m128i bytes =
      _mm_shuffle_epi8(_mm512_castsi512_si128(codes.all), _mm512_cvtepi32_epi8(ranks.all));
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0110));
  _mm_storel_epi64((__m128i*)packed, _mm_packus_epi16(pairs, pairs));
}
NF4_FN void pack_rows(const Ints* ranks, Bytes codes, uint8_t* packed) {
  // A dword each of four rows' ranks (0, 2, 1, 3) becomes, in a lane, four ranks of each row.
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i words01 =
      _mm512_mask_blend_epi16(0xaaaaaaaau, ranks[0].all, _mm512_slli_epi32(ranks[1].all, 16));
  const __m512i words23 =
      _mm512_mask_blend_epi16(0xaaaaaaaau, ranks[2].all, _mm512_slli_epi32(ranks[3].all, 16));
  const __m512i all = _mm512_or_si512(words01, _mm512_slli_epi16(words23, 8));
  const __m512i rows = _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(all, order));
  const __m512i bytes = _mm512_shuffle_epi8(codes.all, rows);
  const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
  _mm256_storeu_si256((__m256i*)packed, _mm512_cvtepi16_epi8(pairs));
}

// Write the entries that 8 bytes of two codes each name in a table of 16 floats.
template <bool kLowFirst>
NF4_FN void expand_floats(Floats table, const uint8_t* packed, float* out) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)packed);
  const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
  const __m512i shifts = _mm512_set1_epi64(kLowFirst ? 0x400000000 : 4);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_srlv_epi32(twice, shifts), table.all));
}

// Write the entries that 16 bytes of two codes each, the first one in the high nibble, name in a
// table of 16 halves.
NF4_FN void expand_halves(Halves table, const uint8_t* packed, uint16_t* out) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)packed));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table.all));
}

// A heap of 256 floats: node k has the children 2k and 2k + 1, the root is node 1.
struct Tree {
  __m512 top[5];      // the first five levels, each repeated to 16
  __m512 levels[14];  // the nodes 32..255
};

// Return a heap.
NF4_FN Tree load_tree(const float* heap) {
  Tree tree;
  for (int level = 0; level < 5; level++) {
    float repeated[kRow];
    for (int i = 0; i < kRow; i++) repeated[i] = heap[(1 << level) + (i & ((1 << level) - 1))];
    tree.top[level] = _mm512_loadu_ps(repeated);
  }
  for (int i = 0; i < 14; i++) tree.levels[i] = _mm512_loadu_ps(heap + 32 + i * kRow);
  return tree;
}

// Return the nodes of a level of 32, 64 or 128 at these places.
NF4_FN __m512 nodes_of_32(const __m512* level, __m512i place) {
  return _mm512_permutex2var_ps(level[0], place, level[1]);
}
NF4_FN __m512 nodes_of_64(const __m512* level, __m512i place) {
  const __mmask16 upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(32));
  return _mm512_mask_blend_ps(upper, nodes_of_32(level, place), nodes_of_32(level + 2, place));
}
NF4_FN __m512 nodes_of_128(const __m512* level, __m512i place) {
  const __mmask16 upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(64));
  return _mm512_mask_blend_ps(upper, nodes_of_64(level, place), nodes_of_64(level + 4, place));
}

// Write where values end below the last level, 0..255, of rows that do not wait for each other.
template <int kRows>
NF4_FN void descend(const Tree& tree, const float* x, uint8_t* places) {
  Floats row[kRows];
  Ints place[kRows];
  for (int i = 0; i < kRows; i++) row[i] = load_f32(x + i * kRow);
  for (int i = 0; i < kRows; i++) place[i] = {_mm512_setzero_si512()};
  const auto step = [&](auto nodes) {
    for (int i = 0; i < kRows; i++)
      place[i] = count_greater({_mm512_add_epi32(place[i].all, place[i].all)}, row[i],
                               {nodes(place[i].all)});
  };
  step([&](__m512i at) { return _mm512_permutexvar_ps(at, tree.top[0]); });
  step([&](__m512i at) { return _mm512_permutexvar_ps(at, tree.top[1]); });
  step([&](__m512i at) { return _mm512_permutexvar_ps(at, tree.top[2]); });
  step([&](__m512i at) { return _mm512_permutexvar_ps(at, tree.top[3]); });
  step([&](__m512i at) { return _mm512_permutexvar_ps(at, tree.top[4]); });
  step([&](__m512i at) { return nodes_of_32(tree.levels, at); });
  step([&](__m512i at) { return nodes_of_64(tree.levels + 2, at); });
  step([&](__m512i at) { return nodes_of_128(tree.levels + 6, at); });
  for (int i = 0; i < kRows; i++)
    _mm_storeu_si128((__m128i*)(places + i * kRow), _mm512_cvtepi32_epi8(place[i].all));
}

}  // namespace

#endif
