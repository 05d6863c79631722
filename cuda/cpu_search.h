// From values to ranks and codes and back, a segment at a time: the inner loops of cpu_engine.cpp.
//
// Written twice: in rows of 16 that stay in registers (cpu_vectors_*.h), and as plain loops that
// any C++17 compiler vectorises as it can, which are the reference.  Both evaluate the comparisons
// of nf4_rank.
//
// Everything lies in an anonymous namespace: each instruction set is compiled from its own copy.
#ifndef NF4_CPU_SEARCH_H
#define NF4_CPU_SEARCH_H

#include "cpu_elements.h"

#if defined(NF4_VECTORS_AVX512)
#include "cpu_vectors_avx512.h"
#elif defined(NF4_VECTORS_AVX2)
#include "cpu_vectors_avx2.h"
#elif defined(NF4_VECTORS_NEON)
#include "cpu_vectors_neon.h"
#else
#define NF4_PLAIN_LOOPS
#endif

namespace {

// Return whether one of n elements lies between zero and absmax: the second half of what makes an
// outlier block.
template <int kDtype>
bool between(const typename Element<kDtype>::Raw* src, int n, float absmax) {
  for (int i = 0; i < n; i++) {
    const float x = Element<kDtype>::load(src[i]);
    if (x != 0.0f && x != absmax && x != -absmax) return true;
  }
  return false;
}

// Return the largest of a row's lanes, none of which is negative.
NF4_FN float fold_max(const float* lanes) {
  float largest = 0.0f;
  for (int j = 0; j < kRow; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

// Write the values of n elements; return the magnitude of the largest, as bits.
template <int kDtype>
NF4_FN uint32_t load_block(const typename Element<kDtype>::Raw* src, int n, float* x) {
  uint32_t largest = 0;
  for (int i = 0; i < n; i++) {
    x[i] = Element<kDtype>::load(src[i]);
    const uint32_t magnitude = nf4_magnitude(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// A segment's squared errors and squared values, added up as codec.h defines.
struct Squares {
  float error2, value2;
};

// Write the values of the codes [from, n), two to a byte, by a table of 16.
template <class Raw, bool kLowFirst>
NF4_FN void look_up(const Raw* table, const uint8_t* packed, int from, int n, Raw* out) {
  int i = from;
  for (; i + 2 <= n; i += 2) {
    const int low = packed[i / 2] & 15, high = packed[i / 2] >> 4;
    out[i] = table[kLowFirst ? low : high];
    out[i + 1] = table[kLowFirst ? high : low];
  }
  if (i < n) out[i] = table[kLowFirst ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

// Write the values of a block as they are stored: it has no more than 16.
template <int kDtype>
NF4_FN void decode_table(const float* table, float absmax, typename Element<kDtype>::Raw* values) {
  for (int i = 0; i < 16; i++) values[i] = Element<kDtype>::store(nf4_decode(table[i], absmax));
}

#if !defined(NF4_PLAIN_LOOPS)

// Return the values of a row of elements.
template <int kDtype>
NF4_FN Floats load_row(const typename Element<kDtype>::Raw* x) {
  if constexpr (kDtype == NF4_F32) return load_f32(x);
  if constexpr (kDtype == NF4_F16) return load_f16(x);
  if constexpr (kDtype == NF4_BF16) return load_bf16(x);
}

// Return the magnitude of the largest of n elements, a multiple of 16, as bits.
template <int kDtype>
NF4_FN uint32_t largest_of(const typename Element<kDtype>::Raw* src, int n) {
  if constexpr (kDtype != NF4_F32) {  // their order is that of their bits
    const uint16_t half = (uint16_t)largest_half(src, n);
    return nf4_bits_of_float(Element<kDtype>::load(half));
  }
  Floats largest = magnitude(load_row<kDtype>(src));
  for (int i = kRow; i < n; i += kRow)
    largest = larger(largest, magnitude(load_row<kDtype>(src + i)));
  return largest_bits(largest);
}

// The largest errors so far, lane by lane.
struct Worst {
  Floats lanes = spread(0.0f);
  // Return the largest of all.
  NF4_FN float largest() const {
    float row[kRow];
    store(lanes, row);
    return fold_max(row);
  }
};

// A guess of the rank of a value in [-1, 1]: a parabola for either sign, about as steep as the
// midpoints lie close, in whole numbers.
struct Guess {
  float slope, bend, middle;

  // Return how many comparisons lead from the guess to the rank, at most; 16 if it may be too high.
  // The margin is much more than the roundings of a guess.
  int steps(const float* midpoints) const {
    const float margin = 1e-3f;
    int most = 0;
    for (int rank = 0; rank < 16; rank++) {
      const float low = rank ? midpoints[rank - 1] - margin : -1.0f;
      const float high = rank < 15 ? midpoints[rank] + margin : 1.0f;
      if (of(high) > rank || of(low) < 0) return 16;
      if (rank - of(low) > most) most = rank - of(low);
    }
    return most;
  }

 private:
  int of(float y) const {
    const float whole = (slope - bend * nf4_abs(y)) * y + middle + 0.5f;
    return whole < 0.0f ? -1 : (int)whole;
  }
};
constexpr Guess kGuesses[] = {
    {11.9f, 4.45f, 7.0f},  // NF4: one comparison
    {12.25f, 5.8f, 6.0f},  // FP4: three
    {0.0f, 0.0f, 0.0f},    // any table
};

// A 4-bit table as the search reads it.
struct Search {
  Floats midpoints, values;  // by rank
  Bytes codes;               // by rank
  Floats slope, bend, middle;
  int steps;

  explicit Search(const nf4_codebook& book)
      : midpoints(load_f32(book.midpoints)),
        values(load_f32(book.values)),
        codes(load_bytes(book.codes)),
        steps(16) {
    for (const Guess& guess : kGuesses) {
      const int needed = guess.steps(book.midpoints);
      if (needed >= steps) continue;
      steps = needed;
      slope = spread(guess.slope);
      bend = spread(guess.bend);
      middle = spread(0x1.8p23f + guess.middle);  // floats of this size are whole numbers
    }
  }

  // Return the ranks of scaled values, below bits that are no part of them.  kSteps: 1, or 0 for
  // any; kBounded: all lie in [-1, 1].
  template <int kSteps, bool kBounded>
  NF4_FN Ints ranks(Floats y, Floats size) const {
    const Floats guessed = kBounded ? y : limited(y, 1.0f);
    const Floats rise = fused_less(bend, kBounded ? size : magnitude(guessed), slope);
    Ints rank = bits(fused(rise, guessed, middle));
    for (int i = 0; i < (kSteps ? kSteps : steps); i++)
      rank = count_greater(rank, y, pick(midpoints, rank));
    return rank;
  }

  template <int kDtype, int kSteps, bool kBounded, int kRows>
  NF4_FN Squares encode_rows(const typename Element<kDtype>::Raw* x, float inverse, float scale,
                             uint8_t* packed, Worst& worst) const {
    const Floats factor = spread(inverse);
    Floats error2, value2, largest;
    Ints rank[kRows];
    for (int i = 0; i < kRows; i++) {
      const Floats y = multiply(load_row<kDtype>(x + i * kRow), factor), size = magnitude(y);
      rank[i] = ranks<kSteps, kBounded>(y, size);
      const Floats error = subtract(y, pick(values, rank[i]));
      const Floats errors2 = multiply(error, error), values2 = multiply(y, y);
      error2 = i ? add(error2, errors2) : errors2;
      value2 = i ? add(value2, values2) : values2;
      largest = i ? larger(largest, magnitude(error)) : magnitude(error);
    }
    if constexpr (kRows == kSegment / kRow)
      pack_rows(rank, codes, packed);
    else
      for (int i = 0; i < kRows; i++) pack_row(rank[i], codes, packed + i * (kRow / 2));
    worst.lanes = larger(worst.lanes, multiply(largest, spread(scale)));
    Squares squares;
    fold_two(error2, value2, &squares.error2, &squares.value2);
    return squares;
  }

  template <int kDtype, int kSteps, bool kBounded>
  NF4_FN Squares encode_segment(const typename Element<kDtype>::Raw* x, int n, float inverse,
                                float scale, uint8_t* packed, Worst& worst) const {
    switch (n / kRow) {
      case 1: return encode_rows<kDtype, kSteps, kBounded, 1>(x, inverse, scale, packed, worst);
      case 2: return encode_rows<kDtype, kSteps, kBounded, 2>(x, inverse, scale, packed, worst);
      case 3: return encode_rows<kDtype, kSteps, kBounded, 3>(x, inverse, scale, packed, worst);
      default: return encode_rows<kDtype, kSteps, kBounded, 4>(x, inverse, scale, packed, worst);
    }
  }

  // Write the codes of a segment: x[n] times inverse, n a multiple of 16, as n/2 bytes.  Return its
  // squares; widen `worst` by its errors times scale, which is positive.  kBounded: what is scaled
  // lies in [-1, 1].
  template <int kDtype, bool kBounded>
  NF4_FN Squares encode(const typename Element<kDtype>::Raw* x, int n, float inverse, float scale,
                        uint8_t* packed, Worst& worst) const {
    return steps == 1 ? encode_segment<kDtype, 1, kBounded>(x, n, inverse, scale, packed, worst)
                      : encode_segment<kDtype, 0, kBounded>(x, n, inverse, scale, packed, worst);
  }

  template <bool kPlain, int kSteps>
  NF4_FN float segment_loss(const float* x, const float* w, int n, float inverse) const {
    const Floats factor = spread(inverse);
    Floats sum = spread(0.0f);
    for (int i = 0; i < n; i += kRow) {
      const Floats y = multiply(load_f32(x + i), factor), size = magnitude(y);
      const Floats error = subtract(y, pick(values, ranks<kSteps, false>(y, size)));
      sum = add(sum, multiply(multiply(error, error), kPlain ? size : load_f32(w + i)));
    }
    float folded, same;
    fold_two(sum, sum, &folded, &same);
    return folded;
  }

  // Return the loss of a segment, x[n] times inverse; w: a weight an element, null for the plain
  // one.
  template <bool kPlain>
  NF4_FN float loss(const float* x, const float* w, int n, float inverse) const {
    return steps == 1 ? segment_loss<kPlain, 1>(x, w, n, inverse)
                      : segment_loss<kPlain, 0>(x, w, n, inverse);
  }
};

// Write n values of codes, two to a byte, by a table of 16.
template <bool kLowFirst>
NF4_FN void decode_floats(const float* table, const uint8_t* packed, int n, float* out) {
  const Floats values = load_f32(table);
  int i = 0;
  for (; i + kRow <= n; i += kRow) expand_floats<kLowFirst>(values, packed + i / 2, out + i);
  look_up<float, kLowFirst>(table, packed, i, n, out);
}

// Write the n values of a block.
template <int kDtype>
NF4_FN void decode_block(const float* table, float absmax, const uint8_t* packed, int n,
                         typename Element<kDtype>::Raw* out) {
  const Floats values = multiply(load_f32(table), spread(absmax));
  int i = 0;
  if constexpr (kDtype == NF4_F32) {
    for (; i + kRow <= n; i += kRow) expand_floats<false>(values, packed + i / 2, out + i);
  } else if (is_finite(absmax)) {  // otherwise there may be NaN, which machines round as they like
    const Halves halves = kDtype == NF4_F16 ? round_f16(values) : round_bf16(values);
    for (; i + 2 * kRow <= n; i += 2 * kRow) expand_halves(halves, packed + i / 2, out + i);
  }
  if (i == n) return;
  typename Element<kDtype>::Raw rest[16];
  decode_table<kDtype>(table, absmax, rest);
  look_up<typename Element<kDtype>::Raw, false>(rest, packed, i, n, out);
}

#else

// As above, in plain loops.

template <int kDtype>
NF4_FN uint32_t largest_of(const typename Element<kDtype>::Raw* src, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; i++) {
    const uint32_t magnitude = nf4_magnitude(Element<kDtype>::load(src[i]));
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Write n codes as n/2 bytes, the first of a pair in the high nibble.
NF4_FN void pack(const int32_t* codes, int n, uint8_t* packed) {
  for (int i = 0; i < n / 2; i++) packed[i] = (uint8_t)((codes[2 * i] << 4) | codes[2 * i + 1]);
}

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

  template <int kDtype, bool kBounded>
  NF4_FN Squares encode(const typename Element<kDtype>::Raw* x, int n, float inverse, float scale,
                        uint8_t* packed, Worst& worst) const {
    float y[kSegment];
    int32_t codes[kSegment];
    for (int i = 0; i < n; i++) y[i] = Element<kDtype>::load(x[i]) * inverse;
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

template <bool kLowFirst>
NF4_FN void decode_floats(const float* table, const uint8_t* packed, int n, float* out) {
  look_up<float, kLowFirst>(table, packed, 0, n, out);
}

template <int kDtype>
NF4_FN void decode_block(const float* table, float absmax, const uint8_t* packed, int n,
                         typename Element<kDtype>::Raw* out) {
  typename Element<kDtype>::Raw values[16];
  decode_table<kDtype>(table, absmax, values);
  look_up<typename Element<kDtype>::Raw, false>(values, packed, 0, n, out);
}

#endif

// The error sums of a granule so far, see codec.h, and what counts its outlier blocks.
struct Errors {
  double error2 = 0.0, value2 = 0.0;
  Worst worst;
  int32_t units = 0;  // of the block at hand, see nf4_units
  int32_t outliers = 0;

  // Write the codes of a block: x[n] times inverse, n a multiple of 16, and add up its errors,
  // segment by segment.  scale: positive, what was divided by; unit2: its square in absmax squared;
  // kBounded: no magnitude times inverse is larger than 1.
  template <int kDtype, bool kBounded>
  NF4_FN void encode(const Search& search, const typename Element<kDtype>::Raw* x, int n,
                     float inverse, float scale, float unit2, uint8_t* packed) {
    units = 0;
    for (int i = 0; i < n; i += kSegment) {
      const int count = n - i < kSegment ? n - i : kSegment;
      const Squares squares =
          search.encode<kDtype, kBounded>(x + i, count, inverse, scale, packed + i / 2, worst);
      const double unit = scale;
      error2 += unit * unit * squares.error2;
      value2 += unit * unit * squares.value2;
      units += nf4_units(squares.value2 * unit2);
    }
  }

  // Count the block at hand if it is an outlier block: the n elements x under absmax.
  template <int kDtype>
  NF4_FN void judge(const typename Element<kDtype>::Raw* x, int n, float absmax) {
    if (nf4_outlier(units, n, absmax) && between<kDtype>(x, n, absmax)) outliers++;
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
