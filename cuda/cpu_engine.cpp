// The CPU engine: loops around codec.h behind a C ABI (called through ctypes by
// nf4cli/engines/cpu.py, which drops the GIL for the length of a call).
//
// CMake compiles this file once an instruction set, with -DNF4_ISA=generic|avx2|avx512 and the
// matching -march; the symbol names carry the suffix and Python picks the best one the machine
// has.  The generic copy is plain loops that any C++17 compiler vectorises as it can.  The other
// two search the 15 midpoints as a tree with register look-ups (GCC's vector extensions); they
// evaluate the same comparisons as nf4_rank and the tests hold them to the same bytes.
//
// Buffers are contiguous, n counts ELEMENTS, nothing is allocated, nothing is retained.

#include <cfenv>
#include <cstdint>
#include <type_traits>

#include "cpu_scales.h"

#define NF4_JOIN2(a, b) a##_##b
#define NF4_JOIN(a, b) NF4_JOIN2(a, b)
#define NF4_EXPORT(name) \
  extern "C" __attribute__((visibility("default"))) NF4_JOIN(name, NF4_ISA)

namespace {

typedef int64_t i64;

constexpr i64 kGranule = 65536;   // elements that share one entry of the error sums
constexpr uint32_t kInfBits = 0x7f800000u;

// A library loaded elsewhere in the process may have left this thread in flush-to-zero mode,
// which would change bytes: run every call in the default floating-point environment.
struct DefaultFloatEnvironment {
  fenv_t saved;
  DefaultFloatEnvironment() {
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { fesetenv(&saved); }
};

template <int kDtype>
struct Element;
template <>
struct Element<NF4_F32> {
  typedef float Raw;
  NF4_FN float load(Raw raw) { return raw; }
  NF4_FN Raw store(float value) { return value; }
};
template <>
struct Element<NF4_F16> {
  typedef uint16_t Raw;
  NF4_FN float load(Raw raw) { return nf4_f32_of_f16(raw); }
  NF4_FN Raw store(float value) { return nf4_f16_of_f32(value); }
};
template <>
struct Element<NF4_BF16> {
  typedef uint16_t Raw;
  NF4_FN float load(Raw raw) { return nf4_f32_of_bf16(raw); }
  NF4_FN Raw store(float value) { return nf4_bf16_of_f32(value); }
};

// -- 4-bit quantization -------------------------------------------------------------------------

template <int kDtype>
NF4_FN uint32_t load_block(const typename Element<kDtype>::Raw* src, int n, float* x) {
  uint32_t largest = 0;
  for (int i = 0; i < n; i++) {
    x[i] = Element<kDtype>::load(src[i]);
    const uint32_t magnitude = nf4_bits_of_float(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// One full block.  Returns false when it is not finite.
template <int kDtype>
NF4_FN bool quantize_block(const typename Element<kDtype>::Raw* src, int blocksize,
                           const Search& search, uint8_t* packed, float* absmax, Sums& sums,
                           Worst& worst) {
  alignas(64) float x[kMaxBlock];
  const uint32_t largest = load_block<kDtype>(src, blocksize, x);
  *absmax = nf4_float_of_bits(largest);
  if (largest >= kInfBits) return false;
  search_block(search, x, blocksize, nf4_reciprocal(*absmax), *absmax, 1.0f, packed, sums,
               worst);
  if (nf4_outlier(sums.block, blocksize, *absmax) && between(x, blocksize, *absmax))
    sums.outliers++;
  return true;
}

// The last, partial block: a division instead of the reciprocal, and a floored absmax, as
// bitsandbytes' default implementation has it.  An odd n pads one nibble with the code of 0.0.
template <int kDtype>
bool quantize_tail(const typename Element<kDtype>::Raw* src, int n, const Search& search,
                   uint8_t* packed, float* absmax, Sums& sums, Worst& worst) {
  alignas(64) float x[kMaxBlock];
  uint8_t bytes[kMaxBlock / 2];
  const uint32_t largest = load_block<kDtype>(src, n, x);
  *absmax = nf4_float_of_bits(largest);
  if (largest >= kInfBits) return false;
  if (*absmax < 1e-38f) *absmax = 1e-38f;
  const bool lost = between(x, n, *absmax);
  for (int i = 0; i < n; i++) x[i] = x[i] / *absmax;
  const int padded = (n + kRow - 1) / kRow * kRow;
  for (int i = n; i < padded; i++) x[i] = 0.0f;
  search_block(search, x, padded, 1.0f, *absmax, 1.0f, bytes, sums, worst);
  if (lost && nf4_outlier(sums.block, n, *absmax)) sums.outliers++;
  memcpy(packed, bytes, (size_t)(n + 1) / 2);
  return true;
}

template <int kDtype>
i64 first_nonfinite(const typename Element<kDtype>::Raw* src, i64 from) {
  i64 i = from;
  while ((nf4_bits_of_float(Element<kDtype>::load(src[i])) & 0x7fffffffu) < kInfBits) i++;
  return i;
}

template <int kDtype, int kBlocksize>
i64 quantize_blocks(const typename Element<kDtype>::Raw* src, i64 n, int any_blocksize,
                    const nf4_codebook& book, uint8_t* packed, float* absmax, double* stats) {
  const int blocksize = kBlocksize ? kBlocksize : any_blocksize;
  const Search search(book);
  for (i64 granule = 0; granule < n; granule += kGranule, stats += 4) {
    const i64 stop = n - granule < kGranule ? n : granule + kGranule;
    Sums sums;
    Worst worst;
    i64 i = granule;
    for (; i + blocksize <= stop; i += blocksize)
      if (!quantize_block<kDtype>(src + i, blocksize, search, packed + i / 2, absmax++, sums, worst))
        return first_nonfinite<kDtype>(src, i);
    if (i < stop && !quantize_tail<kDtype>(src + i, (int)(stop - i), search, packed + i / 2,
                                           absmax++, sums, worst))
      return first_nonfinite<kDtype>(src, i);
    stats[0] = sums.error2;
    stats[1] = sums.value2;
    stats[2] = Worst::of(worst);
    stats[3] = (double)sums.outliers;
  }
  return -1;
}

template <int kDtype>
i64 quantize(const void* src, i64 n, i64 blocksize, const nf4_codebook* book, uint8_t* packed,
             float* absmax, double* stats) {
  const auto* raw = static_cast<const typename Element<kDtype>::Raw*>(src);
  // 64 is bitsandbytes' default; a constant lets the compiler unroll the block.
  if (blocksize == 64)
    return quantize_blocks<kDtype, 64>(raw, n, 64, *book, packed, absmax, stats);
  return quantize_blocks<kDtype, 0>(raw, n, (int)blocksize, *book, packed, absmax, stats);
}

// -- 4-bit quantization under chosen scales -------------------------------------------------------

// One block under its best scale; x is its values, padded with zeros.  Returns the step.
template <bool kPlain>
NF4_FN int scale_block(const Search& search, const Ladder& ladder, const float* x, const float* w,
                       int count, int padded, float absmax, float unit, uint8_t* packed,
                       Sums& sums, Worst& worst) {
  const int best = best_step<kPlain>(search, ladder, x, w, padded, absmax, unit);
  const float scale = nf4_nested_decode(ladder.steps[best], unit, 0.0f);
  const float size = scale < 0.0f ? -scale : scale;
  const float ratio = size * nf4_reciprocal(absmax);
  search_block(search, x, padded, nf4_signed_reciprocal(scale), size, ratio * ratio, packed, sums,
               worst);
  if (nf4_outlier(sums.block, count, absmax) && between(x, count, absmax)) sums.outliers++;
  return best;
}

template <int kDtype, bool kPlain>
i64 search_scales(const typename Element<kDtype>::Raw* src, i64 n, int blocksize,
                  const nf4_codebook& book, const Ladder& ladder, Importance importance,
                  uint8_t* packed, uint8_t* index, float* unit, double* stats) {
  const Search search(book);
  alignas(64) float x[kMaxBlock + kRow], w[kMaxBlock + kRow];
  alignas(64) uint8_t bytes[kMaxBlock / 2 + kRow];
  float absmax[kMaxRun];
  Sums sums;
  Worst worst;
  const i64 run = (i64)ladder.run * blocksize;
  for (i64 start = 0; start < n; start += run) {
    const i64 stop = n - start < run ? n : start + run;
    float largest = 0.0f;
    for (i64 i = start, b = 0; i < stop; i += blocksize, b++) {
      const uint32_t bits = load_block<kDtype>(src + i, (int)(stop - i < blocksize ? stop - i : blocksize), x);
      if (bits >= kInfBits) return first_nonfinite<kDtype>(src, i);
      absmax[b] = nf4_float_of_bits(bits);
      largest = absmax[b] > largest ? absmax[b] : largest;
    }
    *unit = largest;
    for (i64 i = start, b = 0; i < stop; i += blocksize, b++) {
      const int count = (int)(stop - i < blocksize ? stop - i : blocksize);
      const int padded = (count + kRow - 1) / kRow * kRow;
      load_block<kDtype>(src + i, count, x);
      for (int j = count; j < padded; j++) x[j] = 0.0f;
      if (!kPlain) Importance::fill(importance, i, count, padded, w);
      // 64 is the default blocksize; a constant lets the compiler keep the block in registers.
      const int best =
          count == 64 ? scale_block<kPlain>(search, ladder, x, w, 64, 64, absmax[b], *unit, bytes,
                                            sums, worst)
                      : scale_block<kPlain>(search, ladder, x, w, count, padded, absmax[b], *unit,
                                            bytes, sums, worst);
      memcpy(packed + i / 2, bytes, (size_t)(count + 1) / 2);
      *index++ = (uint8_t)best;
      if ((i + blocksize) % kGranule == 0 || i + blocksize >= n) {
        stats[0] = sums.error2;
        stats[1] = sums.value2;
        stats[2] = Worst::of(worst);
        stats[3] = (double)sums.outliers;
        stats += 4;
        sums = Sums();
        worst = Worst();
      }
    }
    unit++;
  }
  return -1;
}

// -- 4-bit dequantization -----------------------------------------------------------------------

template <int kDtype, int kBlocksize>
void dequantize_blocks(const uint8_t* packed, i64 n, int any_blocksize, const Lookup& lookup,
                       const float* absmax, typename Element<kDtype>::Raw* out) {
  const int blocksize = kBlocksize ? kBlocksize : any_blocksize;
  alignas(64) int32_t codes[kMaxBlock + kRow];
  alignas(64) float values[kMaxBlock + kRow];
  for (i64 b = 0; b * blocksize < n; b++) {
    const i64 start = b * blocksize;
    const int count = (int)(n - start < blocksize ? n - start : blocksize);
    const uint8_t* bytes = packed + start / 2;
    for (int i = 0; i < (count + 1) / 2; i++) {
      codes[2 * i] = bytes[i] >> 4;
      codes[2 * i + 1] = bytes[i] & 15;
    }
    const int padded = (count + kRow - 1) / kRow * kRow;
    for (int i = (count + 1) / 2 * 2; i < padded; i++) codes[i] = 0;
    Lookup::run(lookup, codes, padded, absmax[b], values);
    for (int i = 0; i < count; i++) out[start + i] = Element<kDtype>::store(values[i]);
  }
}

template <int kDtype>
void dequantize(const uint8_t* packed, i64 n, i64 blocksize, const nf4_codebook* book,
                const float* absmax, void* out) {
  auto* raw = static_cast<typename Element<kDtype>::Raw*>(out);
  const Lookup lookup(*book);
  if (blocksize == 64)
    dequantize_blocks<kDtype, 64>(packed, n, 64, lookup, absmax, raw);
  else
    dequantize_blocks<kDtype, 0>(packed, n, (int)blocksize, lookup, absmax, raw);
}

// -- casts of kept tensors ------------------------------------------------------------------------

template <int kFrom, int kTo>
i64 cast(const void* src, void* dst, i64 n) {
  const auto* in = static_cast<const typename Element<kFrom>::Raw*>(src);
  auto* out = static_cast<typename Element<kTo>::Raw*>(dst);
  uint32_t overflow = 0;
  for (i64 i = 0; i < n; i++) {
    const float value = Element<kFrom>::load(in[i]);
    out[i] = Element<kTo>::store(value);
    const uint32_t before = nf4_bits_of_float(value) & 0x7fffffffu;
    const uint32_t after = nf4_bits_of_float(Element<kTo>::load(out[i])) & 0x7fffffffu;
    overflow |= (uint32_t)(before < kInfBits) & (uint32_t)(after >= kInfBits);
  }
  if (!overflow) return -1;
  for (i64 i = 0;; i++) {
    const uint32_t before = nf4_bits_of_float(Element<kFrom>::load(in[i])) & 0x7fffffffu;
    const uint32_t after = nf4_bits_of_float(Element<kTo>::load(out[i])) & 0x7fffffffu;
    if (before < kInfBits && after >= kInfBits) return i;
  }
}

template <int kFrom>
i64 cast_from(const void* src, int to, void* dst, i64 n) {
  switch (to) {
    case NF4_F32: return cast<kFrom, NF4_F32>(src, dst, n);
    case NF4_F16: return cast<kFrom, NF4_F16>(src, dst, n);
    default: return cast<kFrom, NF4_BF16>(src, dst, n);
  }
}

// -- FP8 weights with scales -----------------------------------------------------------------------

// Elements [first, first + n) of a row-major matrix, one scale each block_rows x block_columns.
template <int kTo>
i64 decode_float8(const uint8_t* src, i64 first, i64 n, i64 columns, const float* table,
                  const float* scale, i64 block_rows, i64 block_columns, void* dst) {
  auto* out = static_cast<typename Element<kTo>::Raw*>(dst);
  const i64 scale_columns = (columns + block_columns - 1) / block_columns;
  for (i64 i = 0; i < n;) {
    const i64 row = (first + i) / columns, column = (first + i) % columns;
    const i64 block = column / block_columns;
    const float unit = scale[row / block_rows * scale_columns + block];
    const i64 edge = (block + 1) * block_columns < columns ? (block + 1) * block_columns : columns;
    const i64 stop = n - i < edge - column ? n : i + edge - column;
    const i64 begin = i;
    uint32_t largest = 0;
    for (; i < stop; i++) {
      out[i] = Element<kTo>::store(table[src[i]] * unit);
      const uint32_t bits = nf4_bits_of_float(Element<kTo>::load(out[i])) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    if (largest >= kInfBits) return first_nonfinite<kTo>(out, begin);
  }
  return -1;
}

}  // namespace

// -- the C ABI --------------------------------------------------------------------------------

// src: n elements of `dtype`, the start of a tensor or a whole number of granules into it.
// packed: (n+1)/2 bytes, first element in the high nibble.  absmax: ceil(n/blocksize) floats.
// stats: 4 doubles a granule of 65,536 elements: sum of squared error, sum of squared value and
// largest error, under the block's own float32 absmax; outlier blocks (codec.h).
// Returns -1, or the index of the first NaN or infinity (the outputs are then undefined).
NF4_EXPORT(int64_t nf4_quantize)
(const void* src, int dtype, i64 n, i64 blocksize, const nf4_codebook* book, uint8_t* packed,
 float* absmax, double* stats) {
  const DefaultFloatEnvironment environment;
  switch (dtype) {
    case NF4_F32: return quantize<NF4_F32>(src, n, blocksize, book, packed, absmax, stats);
    case NF4_F16: return quantize<NF4_F16>(src, n, blocksize, book, packed, absmax, stats);
    default: return quantize<NF4_BF16>(src, n, blocksize, book, packed, absmax, stats);
  }
}

// The same under chosen scales: index[i] is the step of the ladder that block i takes, so that its
// scale is ladder->steps[index[i]] * unit[i / ladder->run], and unit the largest magnitude of a run.
// src: starts at a multiple of a granule and of a run.  importance: `columns` floats, the weight of
// each column of the matrix that src is rows of, from element `first` of it on; null for none.
// index: ceil(n/blocksize) bytes.  unit: ceil of that / ladder->run floats.  stats as above, but
// under the scales as they are decoded.
NF4_EXPORT(int64_t nf4_search)
(const void* src, int dtype, i64 n, i64 blocksize, const nf4_codebook* book,
 const nf4_ladder* ladder, const float* importance, i64 columns, i64 first, uint8_t* packed,
 uint8_t* index, float* unit, double* stats) {
  const DefaultFloatEnvironment environment;
  const auto run = [&](auto kind) {
    constexpr int kDtype = decltype(kind)::value;
    const auto* raw = static_cast<const typename Element<kDtype>::Raw*>(src);
    const auto search = importance ? search_scales<kDtype, false> : search_scales<kDtype, true>;
    return search(raw, n, (int)blocksize, *book, Ladder(*ladder), {importance, columns, first},
                  packed, index, unit, stats);
  };
  switch (dtype) {
    case NF4_F32: return run(std::integral_constant<int, NF4_F32>());
    case NF4_F16: return run(std::integral_constant<int, NF4_F16>());
    default: return run(std::integral_constant<int, NF4_BF16>());
  }
}

// packed, absmax as above -> out: n elements of `dtype`.
NF4_EXPORT(void nf4_dequantize)
(const uint8_t* packed, i64 n, i64 blocksize, const nf4_codebook* book, const float* absmax,
 int dtype, void* out) {
  const DefaultFloatEnvironment environment;
  switch (dtype) {
    case NF4_F32: return dequantize<NF4_F32>(packed, n, blocksize, book, absmax, out);
    case NF4_F16: return dequantize<NF4_F16>(packed, n, blocksize, book, absmax, out);
    default: return dequantize<NF4_BF16>(packed, n, blocksize, book, absmax, out);
  }
}

// carry + values[0] + values[1] + ... in float64, strictly in this order: chunks of one vector
// give the same sum as the whole vector.
NF4_EXPORT(double nf4_sum)(const float* values, i64 n, double carry) {
  const DefaultFloatEnvironment environment;
  for (i64 i = 0; i < n; i++) carry += values[i];
  return carry;
}

// absmax[n] -> codes[n] of (absmax - offset) in runs of 256, nested_absmax[ceil(n/256)].
// n is a whole number of runs except at the vector's end.  midpoints: 255 floats, ascending.
NF4_EXPORT(void nf4_nested_quantize)
(const float* absmax, i64 n, float offset, const float* midpoints, uint8_t* codes,
 float* nested_absmax) {
  const DefaultFloatEnvironment environment;
  constexpr int kRun = 256;
  for (i64 start = 0; start < n; start += kRun) {
    const int count = (int)(n - start < kRun ? n - start : kRun);
    float x[kRun];
    uint32_t bits = 0;
    for (int i = 0; i < count; i++) {
      x[i] = absmax[start + i] - offset;
      const uint32_t magnitude = nf4_bits_of_float(x[i]) & 0x7fffffffu;
      bits = magnitude > bits ? magnitude : bits;
    }
    float largest = nf4_float_of_bits(bits);
    if (count == kRun) {
      const float scale = nf4_reciprocal(largest);
      for (int i = 0; i < count; i++) x[i] = x[i] * scale;
    } else {
      if (largest < 1e-38f) largest = 1e-38f;
      for (int i = 0; i < count; i++) x[i] = x[i] / largest;
    }
    nested_absmax[start / kRun] = largest;
    int rank[kRun] = {0};
    for (int bit = 7; bit >= 0; bit--)
      for (int i = 0; i < count; i++) rank[i] = nf4_search_step(x[i], midpoints, rank[i], bit);
    for (int i = 0; i < count; i++) codes[start + i] = (uint8_t)rank[i];
  }
}

// The inverse: absmax[n] = map[codes] * nested_absmax + offset, two roundings.
NF4_EXPORT(void nf4_nested_dequantize)
(const uint8_t* codes, i64 n, i64 nested_blocksize, const float* map, const float* nested_absmax,
 float offset, float* absmax) {
  const DefaultFloatEnvironment environment;
  for (i64 start = 0; start < n; start += nested_blocksize) {
    const i64 stop = n - start < nested_blocksize ? n : start + nested_blocksize;
    const float unit = nested_absmax[start / nested_blocksize];
    for (i64 i = start; i < stop; i++) absmax[i] = nf4_nested_decode(map[codes[i]], unit, offset);
  }
}

// src: n elements of dtype `from` -> dst: n elements of `to`, rounded to nearest even.
// Returns -1, or the index of the first finite value that became infinite.
NF4_EXPORT(int64_t nf4_cast)(const void* src, int from, void* dst, int to, i64 n) {
  const DefaultFloatEnvironment environment;
  switch (from) {
    case NF4_F32: return cast_from<NF4_F32>(src, to, dst, n);
    case NF4_F16: return cast_from<NF4_F16>(src, to, dst, n);
    default: return cast_from<NF4_BF16>(src, to, dst, n);
  }
}

// src: elements [first, first + n) of a row-major float8 matrix of `columns` columns.
// table: the 256 values of the format.  scale: one float each block of block_rows x block_columns,
// row-major, partial blocks at the edges included.  dst: n elements of `to`: value * scale in
// float32, rounded once.  Returns -1, or the index of the first result that is not finite.
NF4_EXPORT(int64_t nf4_decode_float8)
(const uint8_t* src, i64 first, i64 n, i64 columns, const float* table, const float* scale,
 i64 block_rows, i64 block_columns, int to, void* dst) {
  const DefaultFloatEnvironment environment;
  const auto run = to == NF4_F32   ? decode_float8<NF4_F32>
                   : to == NF4_F16 ? decode_float8<NF4_F16>
                                   : decode_float8<NF4_BF16>;
  return run(src, first, n, columns, table, scale, block_rows, block_columns, dst);
}
