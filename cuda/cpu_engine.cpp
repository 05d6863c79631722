// The CPU engine behind a C ABI: nf4cli/engines/cpu.py calls it through ctypes, which drops the GIL
// for the length of a call.
//
// CMake compiles this file once an instruction set, with -DNF4_ISA=generic|avx2|avx512 and the
// matching -march; the symbol names carry the suffix and Python picks the best one the machine has.
// The inner loops are those of cpu_search.h; the tests hold all copies to the same bytes.
//
// Buffers are contiguous, n counts ELEMENTS, nothing is allocated, nothing is retained.

#include <cfenv>
#include <cstdint>

#include "cpu_elements.h"
#include "cpu_feedback.h"
#include "cpu_nested.h"
#include "cpu_product.h"
#include "cpu_scales.h"

#define NF4_JOIN2(a, b) a##_##b
#define NF4_JOIN(a, b) NF4_JOIN2(a, b)
#define NF4_EXPORT(name) extern "C" __attribute__((visibility("default"))) NF4_JOIN(name, NF4_ISA)

namespace {

typedef int64_t i64;

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

// Return the smaller one, which is no larger than a block.
inline int smaller(i64 a, i64 b) { return (int)(a < b ? a : b); }

// Return n elements in whole rows, which the loops of cpu_search.h take.
inline int whole_rows(int n) { return (n + kRow - 1) / kRow * kRow; }

// -- 4-bit quantization --

constexpr int kGroup = 16;  // blocks that are measured together

// Quantize `count` full blocks, at most kGroup.  Return false when one is not finite.  All are
// measured before the first is encoded, so that no block waits for its own absmax.
template <int kDtype>
NF4_FN bool quantize_group(const typename Element<kDtype>::Raw* src, int count, int blocksize,
                           const Search& search, uint8_t* packed, float* absmax, Errors& errors) {
  float inverse[kGroup];
  uint32_t largest[kGroup], most = 0;
  for (int b = 0; b < count; b++) {
    largest[b] = largest_of<kDtype>(src + b * blocksize, blocksize);
    most = largest[b] > most ? largest[b] : most;
  }
  if (most >= kInfinityBits) return false;
  for (int b = 0; b < count; b++) {
    const nf4_unit unit = nf4_unit_of<false>(nf4_float_of_bits(largest[b]));
    absmax[b] = unit.absmax;
    inverse[b] = unit.inverse;
  }
  for (int b = 0; b < count; b++) {
    const auto* block = src + b * blocksize;
    errors.encode<kDtype, true>(search, block, blocksize, inverse[b], absmax[b], 1.0f,
                                packed + b * blocksize / 2);
    errors.judge<kDtype>(block, blocksize, absmax[b]);
  }
  return true;
}

// Quantize the last, partial block.  An odd n pads one nibble with the code of 0.0.  Return false
// when it is not finite.
template <int kDtype>
bool quantize_tail(const typename Element<kDtype>::Raw* src, int n, const Search& search,
                   uint8_t* packed, float* absmax, Errors& errors) {
  alignas(64) float x[kMaxBlock], scaled[kMaxBlock];
  uint8_t bytes[kMaxBlock / 2];
  const uint32_t largest = load_block<kDtype>(src, n, x);
  const nf4_unit unit = nf4_unit_of<true>(nf4_float_of_bits(largest));
  *absmax = unit.absmax;
  if (largest >= kInfinityBits) return false;
  const int padded = whole_rows(n);
  for (int i = 0; i < padded; i++) scaled[i] = i < n ? nf4_scaled<true>(x[i], unit) : 0.0f;
  errors.encode<NF4_F32, true>(search, scaled, padded, unit.inverse, unit.absmax, 1.0f, bytes);
  errors.judge<NF4_F32>(x, n, unit.absmax);
  memcpy(packed, bytes, (size_t)(n + 1) / 2);
  return true;
}

// Return the index of the first element from `from` on that is not finite; there is one.
template <int kDtype>
i64 first_nonfinite(const typename Element<kDtype>::Raw* src, i64 from) {
  i64 i = from;
  while (is_finite(Element<kDtype>::load(src[i]))) i++;
  return i;
}

// Quantize n elements, granule by granule; kBlocksize: 0 for any_blocksize.  Return as
// nf4_quantize.
template <int kDtype, int kBlocksize>
i64 quantize_blocks(const typename Element<kDtype>::Raw* src, i64 n, int any_blocksize,
                    const nf4_codebook& book, uint8_t* packed, float* absmax, double* stats) {
  const int blocksize = kBlocksize ? kBlocksize : any_blocksize;
  const Search search(book);
  for (i64 granule = 0; granule < n; granule += kGranule, stats += kStats) {
    const i64 stop = n - granule < kGranule ? n : granule + kGranule;
    Errors errors;
    i64 i = granule;
    while (i + blocksize <= stop) {
      const int count = smaller((stop - i) / blocksize, kGroup);
      if (!quantize_group<kDtype>(src + i, count, blocksize, search, packed + i / 2, absmax,
                                  errors))
        return first_nonfinite<kDtype>(src, i);
      absmax += count;
      i += (i64)count * blocksize;
    }
    if (i < stop &&
        !quantize_tail<kDtype>(src + i, (int)(stop - i), search, packed + i / 2, absmax++, errors))
      return first_nonfinite<kDtype>(src, i);
    errors.store(stats);
  }
  return -1;
}

// Quantize n elements.  Return as nf4_quantize.
template <int kDtype>
i64 quantize(const void* src, i64 n, i64 blocksize, const nf4_codebook* book, uint8_t* packed,
             float* absmax, double* stats) {
  const auto* raw = static_cast<const typename Element<kDtype>::Raw*>(src);
  // 64 is bitsandbytes' default; a constant lets the compiler unroll the block.
  if (blocksize == 64) return quantize_blocks<kDtype, 64>(raw, n, 64, *book, packed, absmax, stats);
  return quantize_blocks<kDtype, 0>(raw, n, (int)blocksize, *book, packed, absmax, stats);
}

// -- 4-bit quantization under chosen scales --

// Quantize a block under its best scale: `count` values x, padded with zeros.  Return the step.
template <bool kPlain>
NF4_FN int scale_block(const Search& search, const Ladder& ladder, const float* x, const float* w,
                       int count, int padded, float absmax, float unit, uint8_t* packed,
                       Errors& errors) {
  const int best = best_step<kPlain>(search, ladder, x, w, padded, absmax, unit);
  const float scale = nf4_scale(ladder.steps[best], unit);
  const float size = nf4_abs(scale);
  const float ratio = size * nf4_reciprocal(absmax);
  errors.encode<NF4_F32, false>(search, x, padded, nf4_signed_reciprocal(scale), size,
                                ratio * ratio, packed);
  errors.judge<NF4_F32>(x, count, absmax);
  return best;
}

// Write the absmax of each block of a run of n elements, and the largest of them to *unit.  Return
// the start of the first block that is not finite, or -1.
template <int kDtype>
i64 measure_run(const typename Element<kDtype>::Raw* src, i64 n, int blocksize, float* absmax,
                float* unit) {
  alignas(64) float x[kMaxBlock];
  float largest = 0.0f;
  for (i64 i = 0; i < n; i += blocksize, absmax++) {
    const uint32_t bits = load_block<kDtype>(src + i, smaller(n - i, blocksize), x);
    if (bits >= kInfinityBits) return i;
    *absmax = nf4_float_of_bits(bits);
    largest = *absmax > largest ? *absmax : largest;
  }
  *unit = largest;
  return -1;
}

// Quantize n elements under chosen scales, run by run; kPlain: without importance.  Return as
// nf4_quantize.
template <int kDtype, bool kPlain>
i64 search_scales(const typename Element<kDtype>::Raw* src, i64 n, int blocksize,
                  const nf4_codebook& book, const Ladder& ladder, Importance importance,
                  uint8_t* packed, uint8_t* index, float* unit, double* stats) {
  const Search search(book);
  alignas(64) float x[kMaxBlock], w[kMaxBlock];
  alignas(64) uint8_t bytes[kMaxBlock / 2];
  float absmax[kNestedRun];
  Errors errors;
  const i64 run = (i64)ladder.run * blocksize;
  for (i64 start = 0; start < n; start += run, unit++) {
    const i64 stop = n - start < run ? n : start + run;
    const i64 bad = measure_run<kDtype>(src + start, stop - start, blocksize, absmax, unit);
    if (bad >= 0) return first_nonfinite<kDtype>(src, start + bad);
    for (i64 i = start, b = 0; i < stop; i += blocksize, b++) {
      const int count = smaller(stop - i, blocksize), padded = whole_rows(count);
      load_block<kDtype>(src + i, count, x);
      for (int j = count; j < padded; j++) x[j] = 0.0f;
      if (!kPlain) importance.fill(i, count, padded, w);
      // 64 is the default blocksize; a constant lets the compiler keep the block in registers.
      const int best = count == 64 ? scale_block<kPlain>(search, ladder, x, w, 64, 64, absmax[b],
                                                         *unit, bytes, errors)
                                   : scale_block<kPlain>(search, ladder, x, w, count, padded,
                                                         absmax[b], *unit, bytes, errors);
      memcpy(packed + i / 2, bytes, (size_t)(count + 1) / 2);
      *index++ = (uint8_t)best;
      if ((i + blocksize) % kGranule == 0 || i + blocksize >= n) {
        errors.store(stats);
        stats += kStats;
        errors = Errors();
      }
    }
  }
  return -1;
}

// -- 4-bit dequantization --

// Write n elements, block by block.
template <int kDtype>
void dequantize(const uint8_t* packed, i64 n, i64 blocksize, const nf4_codebook* book,
                const float* absmax, void* out) {
  auto* raw = static_cast<typename Element<kDtype>::Raw*>(out);
  for (i64 i = 0; i < n; i += blocksize, absmax++) {
    // 64 is the default blocksize; a constant lets the compiler unroll the block.
    const int count = smaller(n - i, blocksize);
    if (count == 64)
      decode_block<kDtype>(book->decode, *absmax, packed + i / 2, 64, raw + i);
    else
      decode_block<kDtype>(book->decode, *absmax, packed + i / 2, count, raw + i);
  }
}

// -- double quantization of the absmax vector --

// Write the codes of a run: n values of absmax - offset.  Return its nested_absmax.
template <bool kTail>
float nested_quantize_run(const float* absmax, int n, float offset, const NestedSearch& search,
                          uint8_t* codes) {
  float x[kNestedRun];
  uint32_t bits = 0;
  for (int i = 0; i < n; i++) {
    x[i] = absmax[i] - offset;
    const uint32_t magnitude = nf4_magnitude(x[i]);
    bits = magnitude > bits ? magnitude : bits;
  }
  const nf4_unit unit = nf4_unit_of<kTail>(nf4_float_of_bits(bits));
  for (int i = 0; i < n; i++) x[i] = nf4_scaled<kTail>(x[i], unit);
  search.run(x, n, codes);
  return unit.absmax;
}

// -- casts of kept tensors --

// Round n elements.  Return the index of the first finite one that became infinite, or -1.
template <int kFrom, int kTo>
i64 cast(const void* src, void* dst, i64 n) {
  const auto* in = static_cast<const typename Element<kFrom>::Raw*>(src);
  auto* out = static_cast<typename Element<kTo>::Raw*>(dst);
  const auto overflows = [](float value, typename Element<kTo>::Raw stored) {
    return (uint32_t)is_finite(value) & (uint32_t)!is_finite(Element<kTo>::load(stored));
  };
  uint32_t overflow = 0;
  for (i64 i = 0; i < n; i++) {
    const float value = Element<kFrom>::load(in[i]);
    out[i] = Element<kTo>::store(value);
    overflow |= overflows(value, out[i]);
  }
  if (!overflow) return -1;
  i64 i = 0;
  while (!overflows(Element<kFrom>::load(in[i]), out[i])) i++;
  return i;
}

// Return the float32 that a float64 rounds to, its last bit set where it is not exact ("to odd").
// Rounding that to a dtype with fewer bits gives what rounding the float64 once would give.
NF4_FN float to_odd(double value) {
  const float near = (float)value;
  const double distance = (double)near - value;
  if (distance == 0.0 || distance != distance) return near;  // exact; infinite or NaN
  const bool away = value > 0.0 ? distance > 0.0 : distance < 0.0;
  return nf4_float_of_bits((nf4_bits_of_float(near) - (uint32_t)away) | 1u);
}

// Round n float64 once.  Return as `cast`.
template <int kTo>
i64 cast_f64(const void* src, void* dst, i64 n) {
  const auto* in = static_cast<const double*>(src);
  auto* out = static_cast<typename Element<kTo>::Raw*>(dst);
  i64 first = -1;
  for (i64 i = 0; i < n; i++) {
    out[i] = Element<kTo>::store(kTo == NF4_F32 ? (float)in[i] : to_odd(in[i]));
    const bool finite = in[i] - in[i] == 0.0;
    if (first < 0 && finite && !is_finite(Element<kTo>::load(out[i]))) first = i;
  }
  return first;
}

// -- weights stored as codes with factors --

// What a matrix of codes decodes with: a table of 2^bits values, and for each block of block_rows x
// block_columns a factor and, unless `zero` is null, a zero point.
struct Factors {
  i64 columns;
  const float *scale, *zero;
  i64 block_rows, block_columns, scale_columns;
  // Return the index of the factor of a row's first block.
  i64 row(i64 row) const { return row / block_rows * scale_columns; }
};

// Write `count` values: those of the codes from element i of src on, an even one for 4-bit codes,
// of which the first is in the low nibble.
template <int kBits>
NF4_FN void code_values(const uint8_t* src, i64 i, int count, const float* table, float* values) {
  if constexpr (kBits == 8)
    for (int j = 0; j < count; j++) values[j] = table[src[i + j]];
  else
    decode_floats<true>(table, src + i / 2, count, values);
}

// Write the factor, or zero point, of each of `count` elements of a row from `column` on; place: of
// the row's first block.  Return where they are: in `room`, or in the table itself.
inline const float* spread(const Factors& f, const float* table, i64 place, i64 column, int count,
                           float* room) {
  if (f.block_columns == 1) return table + place + column;  // a factor for each column
  i64 block = column / f.block_columns;
  i64 edge = (block + 1) * f.block_columns - column;
  for (int j = 0; j < count; block++, edge += f.block_columns) {
    const float value = table[place + block];
    const int stop = edge < count ? (int)edge : count;
    for (; j < stop; j++) room[j] = value;
  }
  return room;
}

// Write `count` elements, with a factor and a zero point for each, or one for all (kOne).  Return
// the largest magnitude, as bits.
template <int kTo, bool kZero, bool kOne>
NF4_FN uint32_t multiply(int count, const float* values, const float* unit, const float* zero,
                         typename Element<kTo>::Raw* out) {
  uint32_t largest = 0;
  for (int j = 0; j < count; j++) {
    const int k = kOne ? 0 : j;
    out[j] = Element<kTo>::store((kZero ? values[j] - zero[k] : values[j]) * unit[k]);
    const uint32_t bits = nf4_magnitude(Element<kTo>::load(out[j]));
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Decode the elements [first, first + n) of a row-major matrix, a piece of a row at a time.  Return
// as nf4_decode_codes.
template <int kTo, int kBits, bool kZero>
i64 decode_codes(const uint8_t* src, i64 first, i64 n, const float* table, const Factors& f,
                 void* dst) {
  auto* out = static_cast<typename Element<kTo>::Raw*>(dst);
  alignas(64) float values[kMaxBlock], units[kMaxBlock], zeros[kZero ? kMaxBlock : 1];
  // Short blocks are better multiplied together, factor by factor.
  const bool wide = f.block_columns >= 512 && f.block_columns % 2 == 0;
  i64 row = first / f.columns, column = first % f.columns;
  for (i64 i = 0; i < n;) {
    const i64 rest = f.columns - column < n - i ? f.columns - column : n - i;
    const i64 block = column / f.block_columns, edge = (block + 1) * f.block_columns - column;
    const int count = smaller(wide && edge < rest ? edge : rest, kMaxBlock);
    code_values<kBits>(src, i, count, table, values);
    uint32_t largest;
    if (wide) {
      const i64 place = f.row(row) + block;
      const float* zero = kZero ? f.zero + place : f.scale;
      largest = multiply<kTo, kZero, true>(count, values, f.scale + place, zero, out + i);
    } else {
      const float* unit = spread(f, f.scale, f.row(row), column, count, units);
      const float* zero = kZero ? spread(f, f.zero, f.row(row), column, count, zeros) : unit;
      largest = multiply<kTo, kZero, false>(count, values, unit, zero, out + i);
    }
    if (largest >= kInfinityBits) return first_nonfinite<kTo>(out, i);
    i += count;
    column += count;
    if (column == f.columns) row++, column = 0;
  }
  return -1;
}

}  // namespace

// -- the C ABI --

// Quantize n elements.
//   src      elements of `dtype`, the start of a tensor or a whole number of granules into it
//   packed   out, (n+1)/2 bytes, the first element in the high nibble
//   absmax   out, ceil(n/blocksize) floats
//   stats    out, [ceil(n/kGranule)][kStats], under the block's own float32 absmax, see codec.h
// Return -1, or the index of the first NaN or infinity (the outputs are then undefined).
NF4_EXPORT(int64_t nf4_quantize)
(const void* src, int dtype, i64 n, i64 blocksize, const nf4_codebook* book, uint8_t* packed,
 float* absmax, double* stats) {
  const DefaultFloatEnvironment environment;
  return with_dtype(dtype, [&](auto kind) {
    return quantize<kind()>(src, n, blocksize, book, packed, absmax, stats);
  });
}

// Quantize n elements under chosen scales: block i is decoded with the scale
// ladder->steps[index[i]] * unit[i / ladder->run].
//   src         starts at a multiple of a granule and of a run
//   importance  `columns` floats, the weight of each column of the matrix that src is rows of, from
//               element `first` of it on; null for none
//   index       out, ceil(n/blocksize) bytes
//   unit        out, a float a run: the largest magnitude of its elements
//   stats       out, as for nf4_quantize, but under the scales as they are decoded
// Return as nf4_quantize.
NF4_EXPORT(int64_t nf4_search)
(const void* src, int dtype, i64 n, i64 blocksize, const nf4_codebook* book,
 const nf4_ladder* ladder, const float* importance, i64 columns, i64 first, uint8_t* packed,
 uint8_t* index, float* unit, double* stats) {
  const DefaultFloatEnvironment environment;
  return with_dtype(dtype, [&](auto kind) {
    const auto* raw = static_cast<const typename Element<kind()>::Raw*>(src);
    const auto search = importance ? search_scales<kind(), false> : search_scales<kind(), true>;
    return search(raw, n, (int)blocksize, *book, Ladder(*ladder), {importance, columns, first},
                  packed, index, unit, stats);
  });
}

// Write n elements of `dtype`, decoded from packed and absmax as nf4_quantize leaves them.
NF4_EXPORT(void nf4_dequantize)
(const uint8_t* packed, i64 n, i64 blocksize, const nf4_codebook* book, const float* absmax,
 int dtype, void* out) {
  const DefaultFloatEnvironment environment;
  with_dtype(dtype,
             [&](auto kind) { dequantize<kind()>(packed, n, blocksize, book, absmax, out); });
}

// Return carry + values[0] + values[1] + ... in float64, strictly in this order: chunks of one
// vector give the same sum as the whole vector.
NF4_EXPORT(double nf4_sum)(const float* values, i64 n, double carry) {
  const DefaultFloatEnvironment environment;
  for (i64 i = 0; i < n; i++) carry += values[i];
  return carry;
}

// Write the codes of n values of absmax - offset in runs of kNestedRun, and a nested_absmax a run.
//   absmax     whole runs, except at the vector's end
//   midpoints  kNestedRun - 1 floats, ascending
NF4_EXPORT(void nf4_nested_quantize)
(const float* absmax, i64 n, float offset, const float* midpoints, uint8_t* codes,
 float* nested_absmax) {
  const DefaultFloatEnvironment environment;
  const NestedSearch search(midpoints);
  i64 start = 0;
  for (; start + kNestedRun <= n; start += kNestedRun)
    *nested_absmax++ =
        nested_quantize_run<false>(absmax + start, kNestedRun, offset, search, codes + start);
  if (start < n)
    *nested_absmax =
        nested_quantize_run<true>(absmax + start, (int)(n - start), offset, search, codes + start);
}

// Write the inverse: absmax[i] = map[codes[i]] * nested_absmax[i / nested_blocksize] + offset.
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

// Round n elements of dtype `from`, which may be NF4_F64, to n elements of `to`, once, to nearest
// even.
// Return -1, or the index of the first finite value that became infinite.
NF4_EXPORT(int64_t nf4_cast)(const void* src, int from, void* dst, int to, i64 n) {
  const DefaultFloatEnvironment environment;
  if (from == NF4_F64)
    return with_dtype(to, [&](auto to_kind) { return cast_f64<to_kind()>(src, dst, n); });
  return with_dtype(from, [&](auto from_kind) {
    return with_dtype(to, [&](auto to_kind) { return cast<from_kind(), to_kind()>(src, dst, n); });
  });
}

// Decode codes of a row-major matrix of `columns` columns: (value - zero) * scale in float32,
// rounded once.
//   src    the elements [first, first + n): bytes, or nibbles with the first one in the low bits;
//          `first` and `columns` are then even
//   bits   of a code, 8 or 4
//   table  the 2^bits values of the codes
//   scale  a float for each block of block_rows x block_columns, row-major, partial blocks at the
//          edges included
//   zero   a float for each block as well, or null; value - zero has to be exact
//   dst    out, n elements of `to`
// Return -1, or the index of the first result that is not finite.
NF4_EXPORT(int64_t nf4_decode_codes)
(const uint8_t* src, int bits, i64 first, i64 n, i64 columns, const float* table,
 const float* scale, const float* zero, i64 block_rows, i64 block_columns, int to, void* dst) {
  const DefaultFloatEnvironment environment;
  const Factors factors = {columns,       scale,
                           zero,          block_rows,
                           block_columns, (columns + block_columns - 1) / block_columns};
  return with_dtype(to, [&](auto kind) {
    constexpr int kTo = kind();
    if (bits == 4)
      return zero ? decode_codes<kTo, 4, true>(src, first, n, table, factors, dst)
                  : decode_codes<kTo, 4, false>(src, first, n, table, factors, dst);
    return zero ? decode_codes<kTo, 8, true>(src, first, n, table, factors, dst)
                : decode_codes<kTo, 8, false>(src, first, n, table, factors, dst);
  });
}

// Add scale * (left . right) to n elements of a row-major matrix of `columns` columns.
//   values  elements [first, first + n) of the rows that `left` has
//   left    rank floats for each of these rows
//   panels  the right matrix in panels of 16 columns, each rank x 16, the last one padded
NF4_EXPORT(void nf4_add_product)
(float* values, i64 first, i64 n, i64 columns, const float* left, i64 rank, const float* panels,
 float scale) {
  const DefaultFloatEnvironment environment;
  const i64 last = first + n;
  float* origin = values - first;
  for (i64 row = 0; row * columns < last;) {
    const i64 start = row * columns, from = first > start ? first - start : 0;
    float* at = origin + start;
    if (from == 0 && start + kPanelRows * columns <= last) {
      add_rows<kPanelRows>(at, columns, 0, columns, left + row * rank, rank, panels, scale);
      row += kPanelRows;
      continue;
    }
    const i64 to = last - start < columns ? last - start : columns;
    add_rows<1>(at, columns, from, to, left + row * rank, rank, panels, scale);
    row++;
  }
}

// Write the sum of the squares of each row.
NF4_EXPORT(void nf4_square_sums)(const float* values, i64 rows, i64 columns, double* sums) {
  const DefaultFloatEnvironment environment;
  for (i64 row = 0; row < rows; row++) sums[row] = square_sum(values + row * columns, columns);
}

// Round rows of `width` columns with error feedback: see round_columns of cpu_feedback.h.
NF4_EXPORT(void nf4_round_columns)
(float* values, const float* scale, i64 stride, i64 rows, i64 width, const float* factor,
 const float* shares, const nf4_codebook* book, uint8_t* ranks, float* errors) {
  const DefaultFloatEnvironment environment;
  round_columns(values, scale, stride, rows, width, factor, shares, *book, ranks, errors);
}
