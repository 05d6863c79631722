// Add the product of two narrow matrices (a LoRA) to rows of float32 values, and sum the squares of
// rows (for DoRA).  The order of every sum is defined here; nothing is fused.
//
// In an anonymous namespace, as cpu_search.h.
#ifndef NF4_CPU_PRODUCT_H
#define NF4_CPU_PRODUCT_H

#include <cstring>

#include "codec.h"

namespace {

constexpr int kPanel = 16;     // columns that are added together
constexpr int kPanelRows = 4;  // rows that share a load of the right matrix
#if defined(NF4_VECTORS_AVX512)
constexpr int kLane = 16;  // floats in a register
#elif defined(NF4_VECTORS_AVX2)
constexpr int kLane = 8;
#else
constexpr int kLane = 4;
#endif
constexpr int kLanes = kPanel / kLane;
typedef float Lane __attribute__((vector_size(4 * kLane)));

// Add scale * (left . panel) to columns [skip, stop) of kRows rows.  An element's products are
// added from the first rank to the last, each rounded to float32.
//   values  column 0 of the panel in the first row; rows lie `columns` apart
//   left    kRows x rank
//   panel   rank x kPanel
template <int kRows>
NF4_FN void add_panel(float* values, int64_t columns, int skip, int stop, const float* left,
                      int64_t rank, const float* panel, float scale) {
  Lane sums[kRows][kLanes];
  for (int row = 0; row < kRows; row++)
    for (int lane = 0; lane < kLanes; lane++) sums[row][lane] = Lane{};
  for (int64_t k = 0; k < rank; k++, panel += kPanel)
    for (int lane = 0; lane < kLanes; lane++) {
      Lane right;
      memcpy(&right, panel + lane * kLane, sizeof right);
      for (int row = 0; row < kRows; row++)
        sums[row][lane] = sums[row][lane] + right * left[row * rank + k];
    }
  for (int row = 0; row < kRows; row++) {
    float product[kPanel];
    for (int lane = 0; lane < kLanes; lane++) {
      const Lane scaled = sums[row][lane] * scale;
      memcpy(product + lane * kLane, &scaled, sizeof scaled);
    }
    float* out = values + row * columns;
    if (skip == 0 && stop == kPanel)
      for (int j = 0; j < kPanel; j++) out[j] += product[j];
    else
      for (int j = skip; j < stop; j++) out[j] += product[j];
  }
}

// Add to columns [from, to) of kRows rows; values: column 0 of the first row.
template <int kRows>
void add_rows(float* values, int64_t columns, int64_t from, int64_t to, const float* left,
              int64_t rank, const float* panels, float scale) {
  for (int64_t start = from / kPanel * kPanel; start < to; start += kPanel) {
    const int skip = from > start ? (int)(from - start) : 0;
    const int stop = to < start + kPanel ? (int)(to - start) : kPanel;
    add_panel<kRows>(values + start, columns, skip, stop, left, rank, panels + start * rank, scale);
  }
}

// Return the sum of the squares of n values in float64: 16 interleaved sums, halved until one is
// left.
NF4_FN double square_sum(const float* values, int64_t n) {
  double lanes[kRow] = {};
  int64_t i = 0;
  for (; i + kRow <= n; i += kRow)
    for (int j = 0; j < kRow; j++) lanes[j] += (double)values[i + j] * (double)values[i + j];
  for (int j = 0; i + j < n; j++) lanes[j] += (double)values[i + j] * (double)values[i + j];
  for (int half = kRow / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

}  // namespace

#endif
