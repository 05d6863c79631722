// How the GPU kernels choose a block's scale (cpu_scales.h defines the choice): two threads share a
// segment, and of the two candidates of a turn the first adds up the loss of the positive one, the
// second that of the negative one.
#ifndef NF4_GPU_SCALES_CUH
#define NF4_GPU_SCALES_CUH

#include "gpu_search.cuh"

namespace nf4 {

// A ladder as the kernels read it, made by engines/launches.py.
//   magnitudes  ascending, of the steps above zero and of those below it
//   count       of either
//   zero        the place of the step 0
//   log_run     log2 of the blocks that share a unit
//   low, high   as in nf4_ladder
struct Ladder {
  float magnitudes[2][kMaxSteps];
  int32_t count[2];
  int32_t zero, log_run;
  float low, high;
};

// The weight of each column of the matrix whose elements, from `first` on, are at hand.
//   first  below `columns`; first plus the elements at hand is below 2^32
struct Importance {
  const float* of_column;
  uint32_t columns, first;
};

// Copy a ladder to shared memory; whoever reads it waits for a barrier first.
NF4_FN void load_ladder(Ladder& shared, const Ladder* ladder) {
#pragma unroll 1
  for (int i = threadIdx.x; i < (int)(sizeof(Ladder) / 4); i += kThreads)
    reinterpret_cast<uint32_t*>(&shared)[i] = reinterpret_cast<const uint32_t*>(ladder)[i];
}

// Write the weights of the elements that a thread owns, zeros behind the end.
NF4_FN void load_weights(const Importance& importance, i64 n, i64 segment, int half,
                         float (*w)[kHalf]) {
#pragma unroll
  for (int row = 0; row < kRows; row++) {
    const i64 first = segment * kSegment + row * kRow + half * kHalf;
    const uint32_t place = importance.first + (uint32_t)first;
    uint32_t column = place - place / importance.columns * importance.columns;
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
      w[row][k] = first + k < n ? importance.of_column[column] : 0.0f;
      column = column + 1 == importance.columns ? 0 : column + 1;
    }
  }
}

// Shared memory of the threads that share a block: a number a thread, and a number a warp.
struct Board {
  float sums[kThreads];
  int counts[kThreads / kWarp];
};

// Wait for the threads that share a block; `lanes` of them, the same for the whole grid.
NF4_FN void wait_for(int lanes) {
  if (lanes > kWarp)
    __syncthreads();
  else
    __syncwarp();
}

// Return the sum of the values of the `lanes` threads that share a block.
NF4_FN int total_of(int value, int lanes, Board& board) {
#pragma unroll 1
  for (int step = 1; step < (lanes < kWarp ? lanes : kWarp); step *= 2)
    value += __shfl_xor_sync(kAll, value, step);
  if (lanes > kWarp) {
    const int warp = threadIdx.x / kWarp, count = lanes / kWarp, first = warp / count * count;
    if (threadIdx.x % kWarp == 0) board.counts[warp] = value;
    __syncthreads();
    value = 0;
#pragma unroll 1
    for (int i = 0; i < count; i++) value += board.counts[first + i];
    __syncthreads();
  }
  return value;
}

// Return the largest value of a warp; of all its warps where blocks are shared by several.
NF4_FN int most_of(int value, int lanes, Board& board) {
#pragma unroll 1
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_xor_sync(kAll, value, step);
    value = other > value ? other : value;
  }
  if (lanes > kWarp) {
    if (threadIdx.x % kWarp == 0) board.counts[threadIdx.x / kWarp] = value;
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kThreads / kWarp; i++)
      value = board.counts[i] > value ? board.counts[i] : value;
    __syncthreads();
  }
  return value;
}

// Return the sums of a block's segments, added in turn: to the first of each two threads that of
// their first values, to the second that of the second ones.
NF4_FN float in_turn(float sum, int lanes, Board& board) {
  if (lanes == 2) return sum;
  const int thread = threadIdx.x, first = thread / lanes * lanes;
  board.sums[thread] = sum;
  wait_for(lanes);
  float total = 0.0f;
#pragma unroll 1
  for (int i = thread & 1; i < lanes; i += 2) total = total + board.sums[first + i];
  wait_for(lanes);
  return total;
}

// Return, to the two threads of a segment (of a block of 32 in it: kCount rows), its loss under the
// positive candidate and under the negative one.
//   x, w     the thread's elements and, unless kPlain, their weights
//   inverse  of the thread's candidate
template <int kSteps, bool kPlain, int kCount>
NF4_FN float segment_loss(const float (*x)[kHalf], const float (*w)[kHalf], float inverse, int half,
                          const Book& book) {
  const float other = __shfl_xor_sync(kAll, inverse, 1);
  const float inverses[2] = {half ? other : inverse, half ? inverse : other};
  float sums[2][kHalf];
#pragma unroll
  for (int row = 0; row < kCount; row++) {
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
#pragma unroll
      for (int sign = 0; sign < 2; sign++) {
        const float y = x[row][k] * inverses[sign];
        const float error = y - search<kSteps, false>(y, book).value;
        const float weight = kPlain ? nf4_plain_weight(y) : w[row][k];
        const float loss = error * error * weight;
        sums[sign][k] = row ? sums[sign][k] + loss : loss;  // 0 + x is x
      }
    }
  }
  return fold(sums[0], sums[1], half);
}

// A step of a ladder: its value, and its place in it.
struct Step {
  float value;
  int place;
};

// Return the step of least loss for a block under absmax, in a run whose unit is `unit`; all of its
// `lanes` threads get the same.
//   x, w    the thread's elements and weights, see segment_loss
//   inside  whether there is such a block
template <int kSteps, bool kPlain, int kCount>
NF4_FN Step best_step(const float (*x)[kHalf], const float (*w)[kHalf], const Ladder& ladder,
                      float absmax, float unit, bool inside, int lanes, int half, const Book& book,
                      Board& board) {
  const float* magnitudes = ladder.magnitudes[half];
  const int count = ladder.count[half];
  const float least = ladder.low * absmax, most = nf4_most(ladder.high * absmax);
  const int first = nf4_first_step(magnitudes, count, unit, least);
  int last = first;  // of zeros the first candidate is as good as any
#pragma unroll 1
  while (absmax > 0.0f && last + 1 < count && magnitudes[last + 1] * unit <= most) last++;
  const int turns = most_of(inside ? last - first + 1 : 0, lanes, board);
  float smallest = nf4_float_of_bits(kInfinityBits);
  int best = 0;
#pragma unroll 1
  for (int i = 0; i < turns; i++) {  // a block that has no more candidates tries its last again
    const int place = first + i < last ? first + i : last;
    const float step = half ? -magnitudes[place] : magnitudes[place];
    const float inverse = nf4_signed_reciprocal(nf4_scale(step, unit));
    const float sum =
        in_turn(segment_loss<kSteps, kPlain, kCount>(x, w, inverse, half, book), lanes, board);
    const float loss = nf4_loss(sum, step, kPlain);
    if (loss < smallest) smallest = loss, best = place;
  }
  const float other_loss = __shfl_xor_sync(kAll, smallest, 1);
  const int other_best = __shfl_xor_sync(kAll, best, 1);
  const bool negative = half ? smallest < other_loss : other_loss < smallest;
  const int place = negative == (half == 1) ? best : other_best;
  const float magnitude = ladder.magnitudes[negative ? 1 : 0][place];
  return {negative ? -magnitude : magnitude,
          negative ? ladder.zero - 1 - place : ladder.zero + 1 + place};
}

}  // namespace nf4

#endif
