// Round the columns of a matrix one after another; those to come make up for the error of each
// (GPTQ), and so may the rows below it in the same column.
//
// In an anonymous namespace, as cpu_search.h.
#ifndef NF4_CPU_FEEDBACK_H
#define NF4_CPU_FEEDBACK_H

#include <cstring>

#include "codec.h"

namespace {

constexpr int kTile = 128;  // most rows that make up for each other's errors

// Return how many midpoints a value is above: the place of the nearest value in the table.
NF4_FN int rank_of(float value, const nf4_codebook& book) {
  int rank = 0;
  for (int i = 0; i < 15; i++) rank += value > book.midpoints[i];
  return rank;
}

// Return what a scale divides by: a block of zeros has a scale of 0.
NF4_FN float divisor(float scale) { return scale == 0.0f ? 1.0f : scale; }

// Round `rows` values of a column, each by itself.  Write the ranks, and what is lost.
NF4_FN void round_alone(const float* values, const float* scale, int rows, const nf4_codebook& book,
                        uint8_t* ranks, float* lost) {
  for (int i = 0; i < rows; i++) {
    const int rank = rank_of(values[i] / divisor(scale[i]), book);
    ranks[i] = (uint8_t)rank;
    lost[i] = values[i] - book.values[rank] * scale[i];
  }
}

// Round `rows` values of a column, at most kTile, from the first to the last.
//   shares  rows x rows: what a row below takes over of a row's error, above the diagonal
NF4_FN void round_together(const float* values, const float* scale, int rows, const float* shares,
                           const nf4_codebook& book, uint8_t* ranks, float* lost) {
  float wanted[kTile];
  memcpy(wanted, values, (size_t)rows * sizeof(float));
  for (int i = 0; i < rows; i++, shares += rows) {
    const int rank = rank_of(wanted[i] / divisor(scale[i]), book);
    const float rounded = book.values[rank] * scale[i], error = wanted[i] - rounded;
    ranks[i] = (uint8_t)rank;
    lost[i] = values[i] - rounded;
    for (int k = i + 1; k < rows; k++) wanted[k] -= error * shares[k];
  }
}

// Round `rows` rows of `width` columns, which lie `stride` elements apart, as do their scales,
// ranks and errors.
//   values  in: the columns; out: what is left of their use
//   factor  width x width, upper triangular
//   shares  null, or as for round_together, for each kTile rows
//   errors  out: what each column lost, over its place on the diagonal of `factor`
inline void round_columns(float* values, const float* scale, int64_t stride, int64_t rows,
                          int64_t width, const float* factor, const float* shares,
                          const nf4_codebook& book, uint8_t* ranks, float* errors) {
  for (int64_t first = 0; first < rows; first += kTile) {
    const int count = (int)(rows - first < kTile ? rows - first : kTile);
    for (int64_t j = 0; j < width; j++) {
      float* lost = errors + j * stride + first;
      const int64_t at = j * stride + first;
      if (shares)
        round_together(values + at, scale + at, count, shares, book, ranks + at, lost);
      else
        round_alone(values + at, scale + at, count, book, ranks + at, lost);
      const float* line = factor + j * width;
      for (int i = 0; i < count; i++) lost[i] /= line[j];
      for (int64_t k = j + 1; k < width; k++) {
        float* later = values + k * stride + first;
        for (int i = 0; i < count; i++) later[i] -= lost[i] * line[k];
      }
    }
    if (shares) shares += (int64_t)count * count;
  }
}

}  // namespace
#endif
