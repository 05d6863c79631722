// The choice of a block's scale: of those on the ladder the one with the smallest loss (codec.h).
//
// Which ones are tried, and in which order, is part of the contract between engines: upwards from
// the first positive step of at least `low`, then the same among the negative ones.  Of equal
// losses the first counts.
#ifndef NF4_CPU_SCALES_H
#define NF4_CPU_SCALES_H

#include "cpu_search.h"

namespace {

// The weight of each element: that of the matrix's column that it lies in.
//   columns  of the matrix
//   first    elements of the row-major matrix before those at hand
struct Importance {
  const float* of_column;
  int64_t columns, first;

  // Write the weights of `count` elements from `start` on, and zeros up to `padded`.
  NF4_FN void fill(int64_t start, int count, int padded, float* w) const {
    int64_t column = (first + start) % columns;
    for (int i = 0; i < count; i++) {
      w[i] = of_column[column];
      if (++column == columns) column = 0;
    }
    for (int i = count; i < padded; i++) w[i] = 0.0f;
  }
};

// A ladder with its negative half mirrored: both are ascending magnitudes.
struct Ladder {
  const float* steps;
  int zero, run, above, below;  // steps above zero and below it
  float low, high;
  float mirrored[kMaxSteps];

  explicit Ladder(const nf4_ladder& l)
      : steps(l.steps),
        zero(l.zero),
        run(l.run),
        above(l.size - l.zero - 1),
        below(l.zero),
        low(l.low),
        high(l.high) {
    for (int i = 0; i < below; i++) mirrored[i] = -l.steps[l.zero - 1 - i];
  }
};

// Return the step of least loss for a block: x[n] under absmax, in a run whose unit is `unit`.
template <bool kPlain>
NF4_FN int best_step(const Search& search, const Ladder& ladder, const float* x, const float* w,
                     int n, float absmax, float unit) {
  const float least = ladder.low * absmax, most = nf4_most(ladder.high * absmax);
  float smallest = nf4_float_of_bits(kInfinityBits);
  int best = ladder.zero + 1;
  for (int sign = 0; sign < 2; sign++) {
    const float* magnitudes = sign ? ladder.mirrored : ladder.steps + ladder.zero + 1;
    const int count = sign ? ladder.below : ladder.above;
    const int first = nf4_first_step(magnitudes, count, unit, least);
    for (int i = first; i < count && (i == first || magnitudes[i] * unit <= most); i++) {
      const float step = sign ? -magnitudes[i] : magnitudes[i];
      const float scale = nf4_scale(step, unit);
      const float sum = block_loss<kPlain>(search, x, w, n, nf4_signed_reciprocal(scale));
      const float loss = nf4_loss(sum, step, kPlain);
      if (loss < smallest) {
        smallest = loss;
        best = sign ? ladder.zero - 1 - i : ladder.zero + 1 + i;
      }
    }
  }
  return best;
}

}  // namespace

#endif
