// What cpu_vectors_avx2.h and cpu_vectors_avx512.h share: operations that AVX-512 would not speed
// up.
#ifndef NF4_CPU_VECTORS_X86_H
#define NF4_CPU_VECTORS_X86_H

#include <immintrin.h>

#include "codec.h"

namespace {

// Return the largest magnitude of n floats of 16 bits, a multiple of 16, as bits.
NF4_FN uint32_t largest_half(const uint16_t* x, int n) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i all = _mm256_setzero_si256();
  for (int i = 0; i < n; i += kRow) {
    const __m256i row = _mm256_loadu_si256((const __m256i*)(x + i));
    all = _mm256_max_epu16(all, _mm256_and_si256(row, magnitude));
  }
  const __m128i eight =
      _mm_max_epu16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  // The smallest of what they lack to 0xffff.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
  return 0xffffu - (uint32_t)_mm_extract_epi16(least, 0);
}

}  // namespace

#endif
