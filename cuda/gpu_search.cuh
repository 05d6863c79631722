// How the GPU kernels find a value's code: a 4-bit table in shared memory, and the search in it.
// How two threads fold the sums of a segment.
#ifndef NF4_GPU_SEARCH_CUH
#define NF4_GPU_SEARCH_CUH

#include "gpu_load.cuh"

namespace nf4 {

// A value and its code, side by side so that one 8-byte load brings both.
struct __align__(8) Entry {
  float value;
  uint32_t code;
};

// The search: a grid of kCells - 1 cells over [-1, 1], and 0 to 2^steps - 1 midpoints in each.
// start[cell] is the number of midpoints below it, so that `steps` comparisons remain (NF4 1, FP4
// 2).  How the cell of a value on an edge rounds is of no account: no midpoint lies near an edge.
// Byte offsets are in units of 8, the size of an Entry and of a Midpoint.
constexpr int kCells = 32;
constexpr float kGrid = 15.25f;  // cells a unit

struct Midpoint {
  float value;  // entries 15 and up: +infinity
  float unused;
};

// A 4-bit table as the search reads it, made by engines/launches.py.  Lanes look up what they like
// without bank conflicts: of each table, all words that one load may ask for lie in different
// banks.
struct Book {
  uint32_t start[kCells];
  Midpoint midpoints[18];
  Entry entries[16];
  float decode[16];
};

// Copy the table to shared memory.
NF4_FN void load_book(Book& shared, const Book* book) {
  static_assert(sizeof(Book) / 4 <= kThreads, "a word a thread");
  const int i = threadIdx.x;
  if (i < (int)(sizeof(Book) / 4))
    reinterpret_cast<uint32_t*>(&shared)[i] = reinterpret_cast<const uint32_t*>(book)[i];
  __syncthreads();
}

// Return the element `offset` bytes into an array.
template <class T>
NF4_FN const T& at_byte(const T* array, uint32_t offset) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(array) + offset);
}

// Return the entry whose value is nearest to a scaled value.  kBounded: it lies in [-1, 1].
template <int kSteps, bool kBounded>
NF4_FN const Entry& search(float scaled, const Book& book) {
  const float guessed = kBounded ? scaled : fminf(fmaxf(scaled, -1.0f), 1.0f);
  // kGrid * (scaled + 1) in quarters, as the last bits of a float near 2^21; a NaN finds some cell.
  const uint32_t quarters = nf4_bits_of_float(__fmaf_rn(guessed, kGrid, 0x1p21f + kGrid));
  const uint32_t cell = quarters & 4 * (kCells - 1);  // in bytes
  uint32_t rank = at_byte(book.start, cell);          // in bytes
  if (kSteps == 2 && scaled > at_byte(book.midpoints + 1, rank).value) rank += 16;
  if (scaled > at_byte(book.midpoints, rank).value) rank += 8;
  return at_byte(book.entries, rank);
}

// Return the sum of a segment's 16 partial sums, or of a block's of 32 in it, folded in halves
// (codec.h): the first of the segment's two threads that of the squared errors, the second that of
// the squared values.
NF4_FN float fold(const float* error2, const float* value2, int half) {
  float lanes[kHalf];
#pragma unroll
  for (int k = 0; k < kHalf; k++) {
    const float mine = half ? value2[k] : error2[k], give = half ? error2[k] : value2[k];
    lanes[k] = mine + __shfl_xor_sync(kAll, give, 1);
  }
#pragma unroll
  for (int step = kHalf / 2; step; step /= 2)
#pragma unroll
    for (int k = 0; k < step; k++) lanes[k] = lanes[k] + lanes[k + step];
  return lanes[0];
}

}  // namespace nf4

#endif
