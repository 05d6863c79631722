// From scaled values to ranks and codes and back, a block at a time: the inner loops of
// cpu_engine.cpp, once with register look-ups (AVX2 and AVX-512, GCC 12 and later) and once as plain
// loops that any C++17 compiler vectorises as it can.  Both evaluate the comparisons of nf4_rank.
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

constexpr int kMaxBlock = 4096;   // the largest blocksize bitsandbytes accepts
constexpr int kRow = 16;          // error sums run over 16 interleaved partial sums, see Sums
constexpr int kSegment = 64;      // elements that are added up by them

// The error sums of one granule (see the C ABI below), and the order they are defined in, which
// is part of the contract between engines.  Within a segment (64 elements, or a block of 32), in
// units of its block's absmax: partial sum j takes the elements j, j+16, j+32, ... in turn, then the
// 16 partial sums are folded in halves (j += j+8, j+4, j+2, j+1).  Segments are added in turn, in
// float64, times the absmax squared.
//
// block: nf4_units of the block at hand; outliers: outlier blocks so far, see codec.h.
struct Sums {
  double error2 = 0.0, value2 = 0.0;
  int32_t block = 0, outliers = 0;

  // scale: what x was divided by.  unit2: its square in units of absmax squared.
  NF4_FN void add(Sums& sums, float scale, float unit2, float error2, float value2) {
    const double unit = scale;
    sums.error2 += unit * unit * error2;
    sums.value2 += unit * unit * value2;
    sums.block += nf4_units(value2 * unit2);
  }
};

// Whether some value lies between zero and absmax, the second half of what makes an outlier block.
inline bool between(const float* x, int n, float absmax) {
  for (int i = 0; i < n; i++)
    if (x[i] != 0.0f && x[i] != absmax && x[i] != -absmax) return true;
  return false;
}

#if NF4_LANES < 16
NF4_FN void pack(const int32_t* codes, int n, uint8_t* packed) {
  for (int i = 0; i < n / 2; i++)
    packed[i] = (uint8_t)((codes[2 * i] << 4) | codes[2 * i + 1]);
}
#endif

NF4_FN float fold_max(const float* lanes) {
  float worst = 0.0f;
  for (int j = 0; j < kRow; j++) worst = lanes[j] > worst ? lanes[j] : worst;
  return worst;
}

#if NF4_LANES > 1

typedef float VF __attribute__((vector_size(4 * NF4_LANES)));
typedef int32_t VI __attribute__((vector_size(4 * NF4_LANES)));
typedef uint32_t VU __attribute__((vector_size(4 * NF4_LANES)));
constexpr int kVectors = kRow / NF4_LANES;

struct Worst {
  VF lanes[kVectors] = {};
  NF4_FN float of(const Worst& worst) {
    float lanes[kRow];
    memcpy(lanes, worst.lanes, sizeof lanes);
    return fold_max(lanes);
  }
};

// A table of 16 in registers; only the low 4 bits of an index count.
template <class V>
struct Table {
  V part[kVectors];
  NF4_FN V low(const Table& t, VI index) { return __builtin_shuffle(t.part[0], index); }
  NF4_FN V high(const Table& t, VI index) {
    return __builtin_shuffle(t.part[kVectors - 1], index);
  }
  NF4_FN V any(const Table& t, VI index) {
    if (kVectors == 1) return low(t, index);
    return (index & 8) != 0 ? high(t, index) : low(t, index);
  }
};

struct Search {
  Table<VF> tree;    // heap order: node 1 is the root, node k has children 2k and 2k+1
  Table<VF> values;  // by rank
  Table<VI> codes;   // by rank

  explicit Search(const nf4_codebook& book) {
    float heap[16] = {0};
    for (int node = 1; node < 16; node++) {
      int depth = 0;
      while ((node >> (depth + 1)) != 0) depth++;
      const int first = node - (1 << depth);
      heap[node] = book.midpoints[((2 * first + 1) << (3 - depth)) - 1];
    }
    int32_t wide[16];
    for (int i = 0; i < 16; i++) wide[i] = book.codes[i];
    memcpy(&tree, heap, 64);
    memcpy(&values, book.values, 64);
    memcpy(&codes, wide, 64);
  }

  // x[n] (n a multiple of 16, up to kSegment) times inverse -> n/2 packed bytes and their error sums;
  // scale: positive, what a unit is; unit2: see Sums; worst: the largest error so far, lane by lane.
  NF4_FN void run(const Search& s, const float* x, int n, float inverse, float scale, float unit2,
                  uint8_t* packed, Sums& sums, Worst& worst) {
    VF error2[kVectors] = {}, value2[kVectors] = {};
    VU largest[kVectors] = {};
#if NF4_LANES < 16
    alignas(64) int32_t codes[kSegment];
#endif
    const VF root = VF{} + s.tree.part[0][1];
    for (int i = 0; i < n; i += kRow) {
      for (int p = 0; p < kVectors; p++) {
        VF y;
        memcpy(&y, x + i + p * NF4_LANES, sizeof y);
        y *= inverse;
        VI node = 2 - (y > root);
        node = node * 2 - (y > Table<VF>::low(s.tree, node));
        node = node * 2 - (y > Table<VF>::low(s.tree, node));
        node = node * 2 - (y > Table<VF>::high(s.tree, node));
        const VI code = Table<VI>::any(s.codes, node);
#if NF4_LANES == 16
        pack_row(code, packed + i / 2);
#else
        memcpy(codes + i + p * NF4_LANES, &code, sizeof code);
#endif
        const VF error = y - Table<VF>::any(s.values, node);
        const VU magnitude = (VU)error & 0x7fffffffu;  // as bits: floats >= 0 order alike
        error2[p] += error * error;
        value2[p] += y * y;
        largest[p] = magnitude > largest[p] ? magnitude : largest[p];
      }
    }
#if NF4_LANES < 16
    pack(codes, n, packed);
#endif
    for (int p = 0; p < kVectors; p++) {
      const VF scaled = (VF)largest[p] * scale;
      worst.lanes[p] = scaled > worst.lanes[p] ? scaled : worst.lanes[p];
    }
    Sums::add(sums, scale, unit2, fold(error2), fold(value2));
  }

  // The loss of x[n] times inverse, see codec.h; w: a weight an element, null for the plain one.
  template <bool kPlain>
  NF4_FN float loss(const Search& s, const float* x, const float* w, int n, float inverse) {
    VF sum[kVectors] = {};
    const VF root = VF{} + s.tree.part[0][1];
    for (int i = 0; i < n; i += kRow)
      for (int p = 0; p < kVectors; p++) {
        VF y, weight;
        memcpy(&y, x + i + p * NF4_LANES, sizeof y);
        y *= inverse;
        VI node = 2 - (y > root);
        node = node * 2 - (y > Table<VF>::low(s.tree, node));
        node = node * 2 - (y > Table<VF>::low(s.tree, node));
        node = node * 2 - (y > Table<VF>::high(s.tree, node));
        const VF error = y - Table<VF>::any(s.values, node);
        if (kPlain)
          weight = (VF)((VU)y & 0x7fffffffu);
        else
          memcpy(&weight, w + i + p * NF4_LANES, sizeof weight);
        sum[p] += error * error * weight;
      }
    return fold(sum);
  }

#if NF4_LANES == 16
  NF4_FN void pack_row(VI code, uint8_t* packed) {
    typedef uint64_t Pairs __attribute__((vector_size(64)));
    typedef uint8_t Bytes __attribute__((vector_size(8)));
    const Pairs pair = (Pairs)code;  // little-endian: the first code is the low half
    const Bytes bytes = __builtin_convertvector(pair << 4 | pair >> 32, Bytes);
    memcpy(packed, &bytes, sizeof bytes);
  }
#endif

  // The 16 partial sums folded in halves, see Sums.
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
};

struct Lookup {
  Table<VF> decode;
  explicit Lookup(const nf4_codebook& book) { memcpy(&decode, book.decode, 64); }
  NF4_FN void run(const Lookup& l, const int32_t* codes, int n, float absmax, float* out) {
    for (int i = 0; i < n; i += NF4_LANES) {
      VI code;
      memcpy(&code, codes + i, sizeof code);
      const VF value = Table<VF>::any(l.decode, code) * absmax;
      memcpy(out + i, &value, sizeof value);
    }
  }
};

#else

NF4_FN float fold_sum(float* lanes) {
  for (int half = kRow / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

struct Worst {
  float lanes[kRow] = {0};
  NF4_FN float of(const Worst& worst) { return fold_max(worst.lanes); }
};

struct Search {
  const nf4_codebook& book;
  explicit Search(const nf4_codebook& b) : book(b) {}

  NF4_FN void run(const Search& s, const float* x, int n, float inverse, float scale, float unit2,
                  uint8_t* packed, Sums& sums, Worst& worst) {
    const nf4_codebook& book = s.book;
    float y[kSegment];
    int32_t codes[kSegment];
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
    for (int i = 0; i < n; i++) codes[i] = nf4_rank(y[i], book.midpoints);
    float error2[kRow] = {0}, value2[kRow] = {0};
    for (int i = 0; i < n; i += kRow) {
      for (int j = 0; j < kRow; j++) {
        const float value = y[i + j];
        const float error = value - book.values[codes[i + j]];
        const float scaled = (error < 0.0f ? -error : error) * scale;
        error2[j] += error * error;
        value2[j] += value * value;
        worst.lanes[j] = scaled > worst.lanes[j] ? scaled : worst.lanes[j];
      }
    }
    for (int i = 0; i < n; i++) codes[i] = book.codes[codes[i]];
    pack(codes, n, packed);
    Sums::add(sums, scale, unit2, fold_sum(error2), fold_sum(value2));
  }

  template <bool kPlain>
  NF4_FN float loss(const Search& s, const float* x, const float* w, int n, float inverse) {
    const nf4_codebook& book = s.book;
    float y[kSegment], sum[kRow] = {0};
    int32_t ranks[kSegment];
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
    for (int i = 0; i < n; i++) ranks[i] = nf4_rank(y[i], book.midpoints);
    for (int i = 0; i < n; i += kRow)
      for (int j = 0; j < kRow; j++) {
        const float error = y[i + j] - book.values[ranks[i + j]];
        sum[j] += error * error * (kPlain ? nf4_plain_weight(y[i + j]) : w[i + j]);
      }
    return fold_sum(sum);
  }
};

struct Lookup {
  const nf4_codebook& book;
  explicit Lookup(const nf4_codebook& b) : book(b) {}
  NF4_FN void run(const Lookup& l, const int32_t* codes, int n, float absmax, float* out) {
    for (int i = 0; i < n; i++) out[i] = nf4_decode(l.book.decode[codes[i]], absmax);
  }
};

#endif

// A whole block, n a multiple of 16, segment by segment.
NF4_FN void search_block(const Search& search, const float* x, int n, float inverse, float scale,
                         float unit2, uint8_t* packed, Sums& sums, Worst& worst) {
  sums.block = 0;
  for (int i = 0; i < n; i += kSegment)
    Search::run(search, x + i, n - i < kSegment ? n - i : kSegment, inverse, scale, unit2,
                packed + i / 2, sums, worst);
}

// Its loss, segments added in turn.
template <bool kPlain>
NF4_FN float block_loss(const Search& search, const float* x, const float* w, int n,
                        float inverse) {
  float sum = 0.0f;
  for (int i = 0; i < n; i += kSegment)
    sum += Search::loss<kPlain>(search, x + i, kPlain ? nullptr : w + i,
                                n - i < kSegment ? n - i : kSegment, inverse);
  return sum;
}

}  // namespace

#endif
