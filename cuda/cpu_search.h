// From values to ranks and codes and back, a block at a time: the inner loops of cpu_engine.cpp.
//
// Written twice: with register look-ups (AVX2 and AVX-512, GCC 12 and later), and as plain loops
// that any C++17 compiler vectorises as it can.  Both evaluate the comparisons of nf4_rank.
//
// Everything lies in an anonymous namespace: each instruction set is compiled from its own copy.
#ifndef NF4_CPU_SEARCH_H
#define NF4_CPU_SEARCH_H

#include "codec.h"

#if defined(NF4_X86_ISAS) && defined(__AVX512F__)
#define NF4_LANES 16
#elif defined(NF4_X86_ISAS) && defined(__AVX2__)
#define NF4_LANES 8
#else
#define NF4_LANES 1
#endif

namespace {

// Return whether one of n values lies between zero and absmax: the second half of what makes an
// outlier block.
inline bool between(const float* x, int n, float absmax) {
  for (int i = 0; i < n; i++)
    if (x[i] != 0.0f && x[i] != absmax && x[i] != -absmax) return true;
  return false;
}

#if NF4_LANES < 16
// Write n codes as n/2 bytes, the first of a pair in the high nibble.
NF4_FN void pack(const int32_t* codes, int n, uint8_t* packed) {
  for (int i = 0; i < n / 2; i++) packed[i] = (uint8_t)((codes[2 * i] << 4) | codes[2 * i + 1]);
}
#endif

// Return the largest of a row's lanes, none of which is negative.
NF4_FN float fold_max(const float* lanes) {
  float largest = 0.0f;
  for (int j = 0; j < kRow; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

// A segment's squared errors and squared values, added up as codec.h defines.
struct Squares {
  float error2, value2;
};

#if NF4_LANES > 1

typedef float VF __attribute__((vector_size(4 * NF4_LANES)));
typedef int32_t VI __attribute__((vector_size(4 * NF4_LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * NF4_LANES)));
constexpr int kVectors = kRow / NF4_LANES;  // of a row

// The largest errors so far, lane by lane.
struct Worst {
  VF lanes[kVectors] = {};
  // Return the largest of all.
  NF4_FN float largest() const {
    float row[kRow];
    memcpy(row, lanes, sizeof row);
    return fold_max(row);
  }
};

// A table of 16 in registers; only the low 4 bits of an index count.
template <class V>
struct Table {
  V part[kVectors];
  // Return the entries of indices that are known to lie in the first vector, in the last, in any.
  NF4_FN V low(VI index) const { return __builtin_shuffle(part[0], index); }
  NF4_FN V high(VI index) const { return __builtin_shuffle(part[kVectors - 1], index); }
  NF4_FN V any(VI index) const {
    if (kVectors == 1) return low(index);
    return (index & 8) != 0 ? high(index) : low(index);
  }
};

#if NF4_LANES == 16
// Write a row's codes as 8 bytes.
NF4_FN void pack_row(VI code, uint8_t* packed) {
  typedef uint64_t Pairs __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  const Pairs pair = (Pairs)code;  // little-endian: the first code is the low half
  const Bytes bytes = __builtin_convertvector(pair << 4 | pair >> 32, Bytes);
  memcpy(packed, &bytes, sizeof bytes);
}
#endif

// Return the sum of a row's lanes, folded in halves.
NF4_FN float fold(const VF* lanes) {
#if NF4_LANES == 16
  typedef float V8 __attribute__((vector_size(32)));
  const V8 eight = __builtin_shufflevector(lanes[0], lanes[0], 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(lanes[0], lanes[0], 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const VF eight = lanes[0] + lanes[1];
#endif
  typedef float V4 __attribute__((vector_size(16)));
  V4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
            __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  four += __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return four[0] + four[1];
}

// A 4-bit table as the search reads it.
struct Search {
  Table<VF> tree;    // the midpoints as a heap, see nf4_heap_midpoint
  Table<VF> values;  // by rank
  Table<VI> codes;   // by rank

  explicit Search(const nf4_codebook& book) {
    float heap[16] = {0};
    for (int node = 1; node < 16; node++) heap[node] = book.midpoints[nf4_heap_midpoint(node, 4)];
    int32_t wide[16];
    for (int i = 0; i < 16; i++) wide[i] = book.codes[i];
    memcpy(&tree, heap, 64);
    memcpy(&values, book.values, 64);
    memcpy(&codes, wide, 64);
  }

  // Return 16 + rank of each scaled value: four steps down the tree.
  NF4_FN VI descend(VF y) const {
    VI node = 2 - (y > tree.part[0][1]);
    node = node * 2 - (y > tree.low(node));
    node = node * 2 - (y > tree.low(node));
    return node * 2 - (y > tree.high(node));
  }

  // Write the codes of a segment: x[n] times inverse, n a multiple of 16, as n/2 bytes.  Return its
  // squares; widen `worst` by its errors times scale, which is positive.
  NF4_FN Squares encode(const float* x, int n, float inverse, float scale, uint8_t* packed,
                        Worst& worst) const {
    VF error2[kVectors] = {}, value2[kVectors] = {};
    VU largest[kVectors] = {};
#if NF4_LANES < 16
    alignas(64) int32_t written[kSegment];
#endif
    for (int i = 0; i < n; i += kRow) {
      for (int p = 0; p < kVectors; p++) {
        VF y;
        memcpy(&y, x + i + p * NF4_LANES, sizeof y);
        y *= inverse;
        const VI node = descend(y);
        const VI code = codes.any(node);
#if NF4_LANES == 16
        pack_row(code, packed + i / 2);
#else
        memcpy(written + i + p * NF4_LANES, &code, sizeof code);
#endif
        const VF error = y - values.any(node);
        const VU magnitude = (VU)error & 0x7fffffffu;  // as bits: floats >= 0 order alike
        error2[p] += error * error;
        value2[p] += y * y;
        largest[p] = magnitude > largest[p] ? magnitude : largest[p];
      }
    }
#if NF4_LANES < 16
    pack(written, n, packed);
#endif
    for (int p = 0; p < kVectors; p++) {
      const VF scaled = (VF)largest[p] * scale;
      worst.lanes[p] = scaled > worst.lanes[p] ? scaled : worst.lanes[p];
    }
    return {fold(error2), fold(value2)};
  }

  // Return the loss of a segment, x[n] times inverse; w: a weight an element, null for the plain
  // one.
  template <bool kPlain>
  NF4_FN float loss(const float* x, const float* w, int n, float inverse) const {
    VF sum[kVectors] = {};
    for (int i = 0; i < n; i += kRow)
      for (int p = 0; p < kVectors; p++) {
        VF y, weight;
        memcpy(&y, x + i + p * NF4_LANES, sizeof y);
        y *= inverse;
        const VF error = y - values.any(descend(y));
        if (kPlain)
          weight = (VF)((VU)y & 0x7fffffffu);
        else
          memcpy(&weight, w + i + p * NF4_LANES, sizeof weight);
        sum[p] += error * error * weight;
      }
    return fold(sum);
  }
};

// A 4-bit table as decoding reads it.
struct Lookup {
  Table<VF> decode;
  explicit Lookup(const nf4_codebook& book) { memcpy(&decode, book.decode, 64); }
  // Write the values of n codes, n a multiple of 16.
  NF4_FN void run(const int32_t* codes, int n, float absmax, float* out) const {
    for (int i = 0; i < n; i += NF4_LANES) {
      VI code;
      memcpy(&code, codes + i, sizeof code);
      const VF value = decode.any(code) * absmax;
      memcpy(out + i, &value, sizeof value);
    }
  }
};

#else

// As above, in plain loops.

NF4_FN float fold(float* lanes) {
  for (int half = kRow / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

struct Worst {
  float lanes[kRow] = {0};
  NF4_FN float largest() const { return fold_max(lanes); }
};

struct Search {
  const nf4_codebook& book;
  explicit Search(const nf4_codebook& b) : book(b) {}

  NF4_FN Squares encode(const float* x, int n, float inverse, float scale, uint8_t* packed,
                        Worst& worst) const {
    float y[kSegment];
    int32_t codes[kSegment];
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
    for (int i = 0; i < n; i++) codes[i] = nf4_rank(y[i], book.midpoints);
    float error2[kRow] = {0}, value2[kRow] = {0};
    for (int i = 0; i < n; i += kRow) {
      for (int j = 0; j < kRow; j++) {
        const float value = y[i + j];
        const float error = value - book.values[codes[i + j]];
        const float scaled = nf4_abs(error) * scale;
        error2[j] += error * error;
        value2[j] += value * value;
        worst.lanes[j] = scaled > worst.lanes[j] ? scaled : worst.lanes[j];
      }
    }
    for (int i = 0; i < n; i++) codes[i] = book.codes[codes[i]];
    pack(codes, n, packed);
    return {fold(error2), fold(value2)};
  }

  template <bool kPlain>
  NF4_FN float loss(const float* x, const float* w, int n, float inverse) const {
    float y[kSegment], sum[kRow] = {0};
    int32_t ranks[kSegment];
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
    for (int i = 0; i < n; i++) ranks[i] = nf4_rank(y[i], book.midpoints);
    for (int i = 0; i < n; i += kRow)
      for (int j = 0; j < kRow; j++) {
        const float error = y[i + j] - book.values[ranks[i + j]];
        sum[j] += error * error * (kPlain ? nf4_plain_weight(y[i + j]) : w[i + j]);
      }
    return fold(sum);
  }
};

struct Lookup {
  const nf4_codebook& book;
  explicit Lookup(const nf4_codebook& b) : book(b) {}
  NF4_FN void run(const int32_t* codes, int n, float absmax, float* out) const {
    for (int i = 0; i < n; i++) out[i] = nf4_decode(book.decode[codes[i]], absmax);
  }
};

#endif

// The error sums of a granule so far, see codec.h, and what counts its outlier blocks.
struct Errors {
  double error2 = 0.0, value2 = 0.0;
  Worst worst;
  int32_t units = 0;  // of the block at hand, see nf4_units
  int32_t outliers = 0;

  // Write the codes of a block: x[n] times inverse, n a multiple of 16, and add up its errors,
  // segment by segment.  scale: positive, what was divided by; unit2: its square in absmax squared.
  NF4_FN void encode(const Search& search, const float* x, int n, float inverse, float scale,
                     float unit2, uint8_t* packed) {
    units = 0;
    for (int i = 0; i < n; i += kSegment) {
      const int count = n - i < kSegment ? n - i : kSegment;
      const Squares squares = search.encode(x + i, count, inverse, scale, packed + i / 2, worst);
      const double unit = scale;
      error2 += unit * unit * squares.error2;
      value2 += unit * unit * squares.value2;
      units += nf4_units(squares.value2 * unit2);
    }
  }

  // Count the block at hand if it is an outlier block: the n values x under absmax.
  NF4_FN void judge(const float* x, int n, float absmax) {
    if (nf4_outlier(units, n, absmax) && between(x, n, absmax)) outliers++;
  }

  // Write a row of kStats.
  NF4_FN void store(double* stats) const {
    stats[kErrorSquares] = error2;
    stats[kValueSquares] = value2;
    stats[kLargestError] = worst.largest();
    stats[kOutliers] = outliers;
  }
};

// Return the loss of a block, x[n] times inverse, segments added in turn; w as for Search::loss.
template <bool kPlain>
NF4_FN float block_loss(const Search& search, const float* x, const float* w, int n,
                        float inverse) {
  float sum = 0.0f;
  for (int i = 0; i < n; i += kSegment)
    sum += search.loss<kPlain>(x + i, kPlain ? nullptr : w + i, n - i < kSegment ? n - i : kSegment,
                               inverse);
  return sum;
}

}  // namespace

#endif
