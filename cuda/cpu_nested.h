// The codes of double quantization: the rank of a value among 255 ascending midpoints.
//
// A tree in AVX-512 registers; elsewhere a guess from the value's leading bits and comparisons, in
// plain loops: gathers are slower than that.  In an anonymous namespace, as cpu_search.h.
#ifndef NF4_CPU_NESTED_H
#define NF4_CPU_NESTED_H

#include "cpu_search.h"

namespace {

#if defined(NF4_VECTORS_AVX512)

// The search among the midpoints of nested codes: a heap (nf4_heap_midpoint) in registers.
struct NestedSearch {
  Tree tree;

  explicit NestedSearch(const float* midpoints) {
    alignas(64) float heap[1 << kNestedBits] = {0};
    for (int node = 1; node < 1 << kNestedBits; node++)
      heap[node] = midpoints[nf4_heap_midpoint(node, kNestedBits)];
    tree = load_tree(heap);
  }

  // Write the ranks of n values.
  NF4_FN void run(const float* x, int n, uint8_t* ranks) const {
    int i = 0;
    // A row's steps wait for each other: four rows at a time take three quarters of the time.
    for (; i + 4 * kRow <= n; i += 4 * kRow) descend<4>(tree, x + i, ranks + i);
    for (; i + kRow <= n; i += kRow) descend<1>(tree, x + i, ranks + i);
    if (i == n) return;
    float row[kRow] = {0};
    uint8_t found[kRow];
    memcpy(row, x + i, (size_t)(n - i) * sizeof *row);
    descend<1>(tree, row, found);
    memcpy(ranks + i, found, (size_t)(n - i));
  }
};

#else

// The search among the midpoints of nested codes, by the leading bits of a value: `start` is the
// number of midpoints below a cell, so that `steps` comparisons remain.
struct NestedSearch {
  // Sign, exponent and the leading bits of the fraction, down to 2^-kOctaves: bitsandbytes' map has
  // at most one midpoint in such a cell.
  static constexpr int kFraction = 6, kOctaves = 20, kShift = 23 - kFraction;
  static constexpr int kSide = kOctaves << kFraction;
  static constexpr int32_t kFirst = (127 - kOctaves) << kFraction;
  float midpoints[kNestedRun + 16];  // past the last one infinity
  uint8_t start[2 * kSide];          // cells of positive values, then of negative ones
  int steps = 0;

  // Return the cell of a value in [-1, 1].
  static NF4_FN int32_t cell(float x) {
    const int32_t above = (int32_t)(nf4_magnitude(x) >> kShift) - kFirst;
    const int32_t place = above < 0 ? 0 : above < kSide ? above : kSide - 1;
    return place + (int32_t)(nf4_bits_of_float(x) >> 31) * kSide;  // no branch on the sign
  }

  explicit NestedSearch(const float* ascending) {
    constexpr int kCount = kNestedRun - 1;
    for (int i = 0; i < kNestedRun + 16; i++)
      midpoints[i] = i < kCount ? ascending[i] : nf4_float_of_bits(kInfinityBits);
    int32_t first[2 * kSide + 1];  // midpoints below each cell, in ascending order of value
    int rank = 0;
    for (int place = 0; place < 2 * kSide; place++) {
      const bool negative = place < kSide;
      const int32_t index = negative ? 2 * kSide - 1 - place : place - kSide;
      while (rank < kCount && position(midpoints[rank]) < place) rank++;
      first[place] = rank;
      start[index] = (uint8_t)rank;
    }
    first[2 * kSide] = kCount;
    for (int place = 0; place < 2 * kSide; place++)
      if (first[place + 1] - first[place] > steps) steps = first[place + 1] - first[place];
  }

  // Write the ranks of n values in [-1, 1].
  NF4_FN void run(const float* x, int n, uint8_t* ranks) const {
    uint32_t cells[kNestedRun];
    uint8_t found[kNestedRun];  // its own array: a store to *ranks might change any table
    for (int i = 0; i < n; i++) cells[i] = (uint32_t)cell(x[i]);
    for (int i = 0; i < n; i++) {
      uint32_t rank = start[cells[i]];
      rank += (uint32_t)(x[i] > midpoints[rank]);
      found[i] = (uint8_t)rank;
    }
    for (int step = 1; step < steps; step++)
      for (int i = 0; i < n; i++) found[i] += x[i] > midpoints[found[i]] ? 1 : 0;
    memcpy(ranks, found, (size_t)n);
  }

 private:
  // Return the place of a value's cell in ascending order.
  static int position(float x) {
    const int32_t at = cell(x);
    return at < kSide ? kSide + at : 2 * kSide - 1 - at;
  }
};

#endif

}  // namespace

#endif
