// The kernels of the CUDA engine; engines/nvrtc.py compiles them, engines/launches.py says how they
// are launched.
//
// NVRTC instantiates the templates by name, a module for each that a run needs.  The tests run the
// same source without a GPU: NVRTC's PTX translated to C++, and this file under g++.
//
// Compile with -fmad=false -ftz=false -prec-div=true: every float operation rounds on its own.
// All pointers are device memory, those of matrices of bytes aligned to 16; n counts elements.
// A grid of zero blocks must not be launched.
#include "gpu_load.cuh"
#include "gpu_scales.cuh"
#include "gpu_search.cuh"

// -- 4-bit quantization --

namespace nf4 {

// Return the largest value of `lanes` neighbouring threads, a power of two, 2 to 128.
NF4_FN float widest_of(float value, int lanes, float* warps) {
#pragma unroll 1
  for (int step = 1; step < lanes && step < kWarp; step *= 2)
    value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
  if (lanes > kWarp) {  // the same for the whole grid: blocks that several warps share
    const int warp = threadIdx.x / kWarp, count = lanes / kWarp, first = warp / count * count;
    if (threadIdx.x % kWarp == 0) warps[warp] = value;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < count; i++) value = fmaxf(value, warps[first + i]);
  }
  return value;
}

// What a thread's codes cost, for each of the blocks that its segment touches: column by column, in
// units of the block's absmax.
template <int kBlocks>
struct Squares {
  float error2[kBlocks][kHalf], value2[kBlocks][kHalf];
  float error_max[kBlocks];
};

// Write the unit of each block that a segment touches, from the elements x that a thread owns and
// those of the other threads of the block.
template <bool kTail, int kBlocks>
NF4_FN void measure(const float (*x)[kHalf], int lanes, float* warps, nf4_unit* units) {
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    float largest = 0.0f;
#pragma unroll
    for (int row = b * kRows / kBlocks; row < (b + 1) * kRows / kBlocks; row++)
#pragma unroll
      for (int k = 0; k < kHalf; k++) largest = fmaxf(largest, fabsf(x[row][k]));
    units[b] = nf4_unit_of<kTail>(widest_of(largest, lanes, warps));
  }
}

// Write the codes of the elements x that a thread owns, 8 nibbles a row, and what they cost.
// kBounded: in their units they lie in [-1, 1].
template <int kSteps, bool kTail, bool kBounded, int kBlocks>
NF4_FN void encode(const float (*x)[kHalf], const nf4_unit* units, const Book& book,
                   uint32_t* words, Squares<kBlocks>& squares) {
#pragma unroll
  for (int b = 0; b < kBlocks; b++) squares.error_max[b] = 0.0f;
#pragma unroll
  for (int row = 0; row < kRows; row++) {
    const int b = row * kBlocks / kRows;
    words[row] = 0;
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
      const float y = nf4_scaled<kTail>(x[row][k], units[b]);
      const Entry entry = search<kSteps, kBounded>(y, book);
      words[row] |=
          entry.code << (8 * (k / 2) + 4 * (1 - (k & 1)));  // the first in the high nibble
      const float error = y - entry.value;
      const bool first = row == b * kRows / kBlocks;  // 0 + x is x
      float &error2 = squares.error2[b][k], &value2 = squares.value2[b][k];
      error2 = first ? error * error : error2 + error * error;
      value2 = first ? y * y : value2 + y * y;
      squares.error_max[b] = fmaxf(squares.error_max[b], fabsf(error));
    }
  }
}

// Store the codes of a segment, of which a thread has half of each row.  Each thread stores 16
// bytes: the first of two all of rows 0 and 1, the second of rows 2 and 3.
//   whole  whether the bytes are all there are of the thread's two rows
NF4_FN void store_codes(const uint32_t* words, i64 n, i64 segment, int half, bool whole,
                        uint8_t* packed) {
  const uint32_t first = __shfl_xor_sync(kAll, half ? words[0] : words[2], 1);
  const uint32_t second = __shfl_xor_sync(kAll, half ? words[1] : words[3], 1);
  const uint4 bytes = half ? make_uint4(first, words[2], second, words[3])
                           : make_uint4(words[0], first, words[1], second);
  const i64 place = segment * (kSegment / 2) + half * kRow;  // in bytes
  if (!whole) {
    const uint32_t parts[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (place + i < (n + 1) / 2) packed[place + i] = (uint8_t)(parts[i / 4] >> (8 * (i & 3)));
  } else {
    if (2 * place < n) *reinterpret_cast<uint4*>(packed + place) = bytes;
  }
}

}  // namespace nf4

using namespace nf4;

// Quantize n elements.
//   log_lanes  log2 of the threads that share a block, blocksize / kOwn (2 for kSmall)
//   table      of the quant_type, which decides kSteps
//   packed     out, (n+1)/2 bytes
//   absmax     out, a float a block
//   sums       out, [entries][2]: squared errors and squared values in units of the block's absmax
//   worst      out, [entries]: the largest error
// An entry is a segment, or a block where blocks are smaller (kSmall: 32 elements); fold_errors
// takes them.  A NaN or an infinity makes its block's sum of squared errors NaN.
//
// kTail: a single CTA for the one partial block at a tensor's end, n < blocksize.  Otherwise n is a
// whole number of blocks.
template <int kFrom, int kTo, int kSteps, bool kSmall, bool kTail>
__global__ void __launch_bounds__(kThreads, 3)
    quantize(const void* __restrict__ src, i64 n, int log_lanes, const Book* __restrict__ table,
             Codes codes, uint8_t* __restrict__ packed, float* __restrict__ absmax,
             float* __restrict__ sums, float* __restrict__ worst) {
  constexpr int kBlocks = kSmall ? 2 : 1;  // blocks that a segment touches
  __shared__ Book book;
  __shared__ float warps[kThreads / kWarp];
  const i64 thread = (i64)blockIdx.x * kThreads + threadIdx.x;
  const i64 segment = thread >> 1;
  const int half = (int)(thread & 1);
  const bool inside = segment * kSegment < n;
  const int lanes = 1 << log_lanes;

  float x[kRows][kHalf];
  if constexpr (kTail) {
    load_tail<kFrom>(src, n, segment, half, x);
  } else {
    load<kFrom, kTo, kSmall>(src, n, segment, half, codes, x);
  }
  load_book(book, table);

  nf4_unit units[kBlocks];
  measure<kTail, kBlocks>(x, lanes, warps, units);
  uint32_t words[kRows];
  Squares<kBlocks> squares;
  encode<kSteps, kTail, true, kBlocks>(x, units, book, words, squares);
  store_codes(words, n, segment, half, !kTail, packed);

#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const i64 entry = segment * kBlocks + b;
    const float sum = fold(squares.error2[b], squares.value2[b], half);
    const float mine = squares.error_max[b];
    const float error = fmaxf(mine, __shfl_xor_sync(kAll, mine, 1));
    if (kSmall ? entry * kSegment / 2 >= n : !inside) continue;
    sums[2 * entry + half] = sum;
    if (half == 0) worst[entry] = error * units[b].absmax;
    if (kSmall) {
      if (half == 0) absmax[entry] = units[b].absmax;
    } else if ((thread & (lanes - 1)) == 0) {
      absmax[thread >> log_lanes] = units[b].absmax;
    }
  }
}

namespace nf4 {

// That some element of a block lies between zero and absmax shows in its squared errors: all others
// together have less than kLost.  Where it does not show, the count of a granule is -1, and whoever
// has the elements must look at them: a block of zeros and one value, or a value 10^6 times the
// others.
constexpr float kLost = 0x1p-36f;
constexpr int kUnclear = 1 << 16;  // more than a granule has blocks

// Return the elements of a block; left: from its first one on.
NF4_FN int size_of(i64 left, int log_block) {
  return left >> log_block ? 1 << log_block : (int)left;
}

// Return, to the first of the lanes that share a block, what it counts as an outlier block: 0, 1 or
// kUnclear; 0 to the others.
//   units, lost  the lane's part of the block's nf4_units, and whether it has elements in between
//   left         elements from the block's first one on
NF4_FN int judge(int units, int lost, int lanes, i64 left, int log_block, const float* absmax) {
  const int lane = threadIdx.x;
  for (int step = 1; step < lanes; step *= 2) {
    units += __shfl_xor_sync(kAll, units, step);
    lost |= __shfl_xor_sync(kAll, lost, step);
  }
  if (left > 0 && (lane & (lanes - 1)) == 0) {
    if (nf4_outlier(units, size_of(left, log_block), *absmax)) return lost ? 1 : kUnclear;
  }
  return 0;
}

}  // namespace nf4

// Write the error sums of n elements, in blocks of 2^log_block, from what `quantize` or
// `search_scales` left of them.
//   scale    the magnitude of each block's scale, which its sums are in units of
//   outlier  whether each block counts as an outlier block; null where `scale` is the absmax, which
//            tells
//   stats    out, [granules][kStats], in the order of additions that codec.h defines
// A warp takes a granule: its lanes square and scale, two of them add in turn.
extern "C" __global__ void __launch_bounds__(kWarp)
    fold_errors(const float* __restrict__ sums, const float* __restrict__ worst,
                const float* __restrict__ scale, const uint8_t* __restrict__ outlier, i64 n,
                int log_block, double* __restrict__ stats) {
  __shared__ double terms[kWarp][2];
  const int lane = threadIdx.x;
  const int log_entry = log_block < kLogSegment ? log_block : kLogSegment;
  const int shift = log_block - log_entry;
  const i64 entries = (n + (1 << log_entry) - 1) >> log_entry;
  const int per_granule = kGranule >> log_entry;
  const int lanes = shift < 5 ? 1 << shift : kWarp;  // that share a block
  const i64 first = (i64)blockIdx.x * per_granule;
  double total = 0.0;
  float largest = 0.0f;
  int units = 0, lost = 0, outliers = 0;
#pragma unroll 1
  for (int base = 0; base < per_granule; base += kWarp) {
    const i64 entry = first + base + lane, block = entry >> shift;
    terms[lane][0] = terms[lane][1] = 0.0;
    if (entry < entries) {
      const double unit = scale[block];
      const double square = unit * unit;
      const float error2 = sums[2 * entry], value2 = sums[2 * entry + 1];
      terms[lane][0] = square * error2;
      terms[lane][1] = square * value2;
      largest = fmaxf(largest, worst[entry]);
      units += nf4_units(value2);
      lost |= error2 > kLost ? 1 : 0;
      if (outlier && block << shift == entry) outliers += outlier[block];
    }
    __syncwarp();
    if (lane < 2)
#pragma unroll
      for (int i = 0; i < kWarp; i++) total = total + terms[i][lane];
    __syncwarp();
    if (outlier) continue;
    if (shift > 5 && (base & kWarp) == 0) continue;  // half of a block: the next turn has the rest
    outliers += judge(units, lost, lanes, n - (block << log_block), log_block, scale + block);
    units = lost = 0;
  }
  for (int step = 1; step < kWarp; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
  for (int step = 1; step < kWarp; step *= 2) outliers += __shfl_xor_sync(kAll, outliers, step);
  double* row = stats + kStats * (i64)blockIdx.x;
  static_assert(kErrorSquares == 0 && kValueSquares == 1, "as the lanes that add them");
  if (lane < 2) row[lane] = total;
  if (lane == 2) row[kLargestError] = (double)largest;
  if (lane == 3) row[kOutliers] = outliers < kUnclear ? (double)outliers : -1.0;
}

// -- 4-bit quantization under chosen scales --

namespace nf4 {

// Write the elements that a thread owns, zeros behind the end.
template <int kFrom>
NF4_FN void load_any(const void* src, i64 n, i64 segment, int half, float (*x)[kHalf]) {
  if ((segment + 1) * kSegment <= n)
    load<kFrom, kFrom, false>(src, n, segment, half, Codes{}, x);
  else
    load_tail<kFrom>(src, n, segment, half, x);
}

}  // namespace nf4

// Write the largest magnitude of each block of n elements; those of a thread's block are shared by
// 2^log_lanes threads, see `quantize`.  A NaN has none, which the error sums tell.
template <int kFrom, bool kSmall>
__global__ void __launch_bounds__(kThreads)
    measure_blocks(const void* __restrict__ src, i64 n, int log_lanes, float* __restrict__ absmax) {
  constexpr int kBlocks = kSmall ? 2 : 1;
  __shared__ float warps[kThreads / kWarp];
  const i64 thread = (i64)blockIdx.x * kThreads + threadIdx.x;
  const i64 segment = thread >> 1;
  const int half = (int)(thread & 1), lanes = 1 << log_lanes;
  float x[kRows][kHalf];
  load_any<kFrom>(src, n, segment, half, x);
  nf4_unit units[kBlocks];
  measure<false, kBlocks>(x, lanes, warps, units);
  if ((thread & (lanes - 1)) != 0) return;
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const i64 first = segment * kSegment + b * (kSegment / kBlocks);
    if (first < n) absmax[(thread >> log_lanes) * kBlocks + b] = units[b].absmax;
  }
}

// Write the largest absmax of each run of `run` blocks, a warp a run.
extern "C" __global__ void __launch_bounds__(kWarp)
    widest_of_runs(const float* __restrict__ absmax, i64 blocks, int run,
                   float* __restrict__ unit) {
  const i64 first = (i64)blockIdx.x * run;
  float largest = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < run; i += kWarp)
    if (first + i < blocks) largest = fmaxf(largest, absmax[first + i]);
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
  if (threadIdx.x == 0) unit[blockIdx.x] = largest;
}

// Quantize n elements under chosen scales.
//   log_lanes, table, packed, sums, worst  as for `quantize`; units are the chosen scales
//   steps       the ladder
//   importance  the weights of columns; not read if kPlain
//   absmax      of each block
//   unit        of each run of blocks
//   index       out, the step of each block
//   scale       out, the magnitude of the scale of each block
//   outlier     out, for each block 1 if it counts as an outlier block, or 0
// The last block may be a partial one.
template <int kFrom, int kSteps, bool kSmall, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2)
    search_scales(const void* __restrict__ src, i64 n, int log_lanes,
                  const Book* __restrict__ table, const Ladder* __restrict__ steps,
                  Importance importance, const float* __restrict__ absmax,
                  const float* __restrict__ unit, uint8_t* __restrict__ packed,
                  uint8_t* __restrict__ index, float* __restrict__ scale,
                  uint8_t* __restrict__ outlier, float* __restrict__ sums,
                  float* __restrict__ worst) {
  constexpr int kBlocks = kSmall ? 2 : 1;  // blocks that a segment touches
  constexpr int kCount = kRows / kBlocks;  // rows of each
  __shared__ Book book;
  __shared__ Ladder ladder;
  __shared__ Board board;
  const i64 thread = (i64)blockIdx.x * kThreads + threadIdx.x;
  const i64 segment = thread >> 1;
  const int half = (int)(thread & 1), lanes = 1 << log_lanes;

  float x[kRows][kHalf], w[kPlain ? 1 : kRows][kHalf];
  load_any<kFrom>(src, n, segment, half, x);
  if constexpr (!kPlain) load_weights(importance, n, segment, half, w);
  load_ladder(ladder, steps);
  load_book(book, table);

  const i64 first_block = (thread >> log_lanes) * kBlocks;
  const int log_block = kSmall ? kLogSegment - 1 : log_lanes + kLogSegment - 1;
  nf4_unit chosen[kBlocks];
  float largest[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const i64 block = first_block + b;
    const bool inside = block << log_block < n;
    largest[b] = inside ? absmax[block] : 0.0f;
    const float widest = inside ? unit[block >> ladder.log_run] : 0.0f;
    const Step best =
        best_step<kSteps, kPlain, kCount>(x + b * kCount, kPlain ? w : w + b * kCount, ladder,
                                          largest[b], widest, inside, lanes, half, book, board);
    const float signed_scale = nf4_scale(best.value, widest);
    chosen[b] = {nf4_abs(signed_scale), nf4_signed_reciprocal(signed_scale)};
    if (inside && (thread & (lanes - 1)) == 0) {
      index[block] = (uint8_t)best.place;
      scale[block] = chosen[b].absmax;
    }
  }

  uint32_t words[kRows];
  Squares<kBlocks> squares;
  encode<kSteps, false, false, kBlocks>(x, chosen, book, words, squares);
  store_codes(words, n, segment, half, (segment + 1) * kSegment <= n, packed);
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const i64 entry = segment * kBlocks + b, block = first_block + b;
    const float sum = fold(squares.error2[b], squares.value2[b], half);
    const float mine = squares.error_max[b];
    const float error = fmaxf(mine, __shfl_xor_sync(kAll, mine, 1));
    int between = 0;
#pragma unroll
    for (int row = b * kCount; row < (b + 1) * kCount; row++)
#pragma unroll
      for (int k = 0; k < kHalf; k++)
        between |= x[row][k] != 0.0f && fabsf(x[row][k]) != largest[b] ? 1 : 0;
    const float ratio = chosen[b].absmax * nf4_reciprocal(largest[b]);
    const int units = total_of(half ? nf4_units(sum * (ratio * ratio)) : 0, lanes, board);
    between = total_of(between, lanes, board);
    if (entry * (kSegment / kBlocks) >= n) continue;
    sums[2 * entry + half] = sum;
    if (half == 0) worst[entry] = error * chosen[b].absmax;
    if ((thread & (lanes - 1)) == 0) {
      const int size = size_of(n - (block << log_block), log_block);
      outlier[block] = between && nf4_outlier(units, size, largest[b]) ? 1 : 0;
    }
  }
}

// -- double quantization of the absmax vector --

namespace nf4 {

constexpr int kRunValues = 16;                      // neighbouring values that a lane takes
constexpr int kRunLanes = kNestedRun / kRunValues;  // of a run

// Write the values of absmax - offset that a lane takes, zeros behind the end (kTail).
template <bool kTail>
NF4_FN void load_absmax(const float* absmax, i64 n, i64 first, float offset, float* x) {
#pragma unroll
  for (int i = 0; i < kRunValues; i += 4) {
    float4 raw = make_float4(offset, offset, offset, offset);
    if constexpr (kTail) {
      if (first + i < n) raw.x = absmax[first + i];
      if (first + i + 1 < n) raw.y = absmax[first + i + 1];
      if (first + i + 2 < n) raw.z = absmax[first + i + 2];
      if (first + i + 3 < n) raw.w = absmax[first + i + 3];
    } else {
      if (first < n) raw = *reinterpret_cast<const float4*>(absmax + first + i);
    }
    x[i] = raw.x - offset, x[i + 1] = raw.y - offset;
    x[i + 2] = raw.z - offset, x[i + 3] = raw.w - offset;
  }
}

}  // namespace nf4

// Write the codes of n values of absmax - offset in runs of kNestedRun, and a nested_absmax a run.
//   midpoints  kNestedRun - 1 floats, ascending
// kTail: a single CTA for the partial run at the vector's end.  Otherwise n is a whole number of
// runs.
template <bool kTail>
__global__ void __launch_bounds__(kThreads)
    nested_quantize(const float* __restrict__ absmax, i64 n, float offset,
                    const float* __restrict__ midpoints, uint8_t* __restrict__ codes,
                    float* __restrict__ nested_absmax) {
  // In the order of a heap a level lies in neighbouring words, so its look-ups meet few bank
  // conflicts; the sorted order has 16 of its nodes in two banks.
  __shared__ float heap[1 << kNestedBits];
  static_assert(1 << kNestedBits == kThreads, "a node a thread");
  if (threadIdx.x > 0)
    heap[threadIdx.x] = midpoints[nf4_heap_midpoint((int)threadIdx.x, kNestedBits)];
  __syncthreads();

  const i64 thread = (i64)blockIdx.x * kThreads + threadIdx.x;
  const i64 first = thread * kRunValues;
  float x[kRunValues];
  load_absmax<kTail>(absmax, n, first, offset, x);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kRunValues; i++) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
  for (int step = 1; step < kRunLanes; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, step));
  const nf4_unit unit = nf4_unit_of<kTail>(largest);

  uint32_t words[kRunValues / 4] = {};
#pragma unroll
  for (int i = 0; i < kRunValues; i++) {
    const float y = nf4_scaled<kTail>(x[i], unit);
    int node = 1;
#pragma unroll
    for (int level = 0; level < kNestedBits; level++) node = nf4_heap_step(y, heap, node);
    words[i / 4] |= (uint32_t)(node - (1 << kNestedBits)) << (8 * (i & 3));
  }
  if (first >= n) return;
  if constexpr (kTail) {
#pragma unroll
    for (int i = 0; i < kRunValues; i++)
      if (first + i < n) codes[first + i] = (uint8_t)(words[i / 4] >> (8 * (i & 3)));
  } else {
    *reinterpret_cast<uint4*>(codes + first) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (thread % kRunLanes == 0) nested_absmax[thread / kRunLanes] = unit.absmax;
}

// -- 4-bit dequantization --

namespace nf4 {

constexpr int kTile = 1024;  // elements that a warp decodes at a time

// Where the decoded absmax of a block comes from: absmax itself, or, with kNested, codes of it.
// first: the first block's place in its run of nested_blocksize blocks, whose unit is
// nested_absmax[0].
struct Scales {
  const float* absmax;
  const uint8_t* codes;
  const float* nested_map;
  const float* nested_absmax;
  float offset;
  int nested_blocksize, first;
};

// Return the absmax of a block.
template <bool kNested>
NF4_FN float absmax_of(const Scales& s, i64 block) {
  if constexpr (!kNested) return s.absmax[block];
  const uint32_t run = (uint32_t)(s.first + block) / (uint32_t)s.nested_blocksize;
  return nf4_nested_decode(s.nested_map[s.codes[block]], s.nested_absmax[run], s.offset);
}

// How the elements of kTo are stored: rounded to nearest even, as raw bits.
template <int kTo>
struct Target;
template <>
struct Target<NF4_F32> {
  typedef uint32_t Raw;
  static NF4_FN Raw store(float value) { return nf4_bits_of_float(value); }
};
template <>
struct Target<NF4_F16> {
  typedef uint16_t Raw;
  static NF4_FN Raw store(float value) { return nf4_f16_of_f32(value); }
};
template <>
struct Target<NF4_BF16> {
  typedef uint16_t Raw;
  static NF4_FN Raw store(float value) { return nf4_bf16_of_f32(value); }
};

}  // namespace nf4

// Write n elements of kTo.  A warp takes a tile of 512 packed bytes: a 16-byte load a lane, then,
// through shared memory, as many 16-byte stores as the elements fill, neighbouring lanes side by
// side.
//   shift  log2 of the blocksize
template <int kTo, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize(const uint8_t* __restrict__ packed, i64 n, int shift, const Book* __restrict__ table,
               Scales scales, void* __restrict__ out) {
  typedef typename Target<kTo>::Raw Raw;
  constexpr int kStore = 16 / (int)sizeof(Raw);  // elements a store
  __shared__ float decode[16];
  __shared__ __align__(16) uint8_t tiles[kThreads / kWarp][kTile / 2];
  if (threadIdx.x < 16) decode[threadIdx.x] = table->decode[threadIdx.x];
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const i64 first = ((i64)blockIdx.x * (kThreads / kWarp) + warp) * kTile;
  Raw* to = static_cast<Raw*>(out) + first;
  if (first + kTile > n) {  // the last, partial tile: element by element
#pragma unroll 1
    for (int i = lane; first + i < n; i += kWarp) {
      const uint32_t code = packed[(first + i) / 2] >> (4 * (1 - (i & 1))) & 15u;
      const float absmax = absmax_of<kNested>(scales, (first + i) >> shift);
      to[i] = Target<kTo>::store(nf4_decode(decode[code], absmax));
    }
    return;
  }
  uint8_t* tile = tiles[warp];
  reinterpret_cast<uint4*>(tile)[lane] = reinterpret_cast<const uint4*>(packed + first / 2)[lane];
  __syncwarp();
#pragma unroll
  for (int part = 0; part < kTile / kStore / kWarp; part++) {
    const int place = (part * kWarp + lane) * kStore;  // elements into the tile
    const float absmax = absmax_of<kNested>(scales, (first + place) >> shift);
    uint32_t codes;
    if constexpr (kStore == 8) {
      codes = *reinterpret_cast<const uint32_t*>(tile + place / 2);
    } else {
      codes = *reinterpret_cast<const uint16_t*>(tile + place / 2);
    }
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kStore; i++) {
      const uint32_t code = codes >> (8 * (i / 2) + 4 * (1 - (i & 1))) & 15u;
      const uint32_t raw = Target<kTo>::store(nf4_decode(decode[code], absmax));
      words[i * 4 / kStore] |= raw << (kStore == 8 ? 16 * (i & 1) : 0);
    }
    *reinterpret_cast<uint4*>(to + place) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
