// What the CPU engine's library holds once, whatever the instruction set: which of the compiled
// copies of cpu_engine.cpp this processor can run, and reads of a stored matrix's columns.

#include <unistd.h>

#if defined(NF4_X86_ISAS)
#include <cpuid.h>
#endif

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define NF4_EXPORT extern "C" __attribute__((visibility("default")))

// Read `rows` runs of `width` bytes, which lie `stride` bytes apart in the file from `offset` on,
// into dst, one behind the other.  Return the bytes read, fewer than rows * width only at the end
// of the file, or -errno.  (A loop over five thousand preads costs more in Python than the reads
// themselves.)
NF4_EXPORT int64_t nf4_read_rows(int fd, int64_t offset, int64_t rows, int64_t stride,
                                 int64_t width, uint8_t* dst) {
  int64_t total = 0;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t done = 0; done < width;) {
      const ssize_t count =
          pread(fd, dst + total, (size_t)(width - done), (off_t)(offset + row * stride + done));
      if (count == 0) return total;
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return -errno;
      done += count;
      total += count;
    }
  }
  return total;
}

// Write rows of a matrix, at most a cache line of elements high, as columns of dst, whose rows have
// `rows` elements.  Squares of a line a side are held, so that both are touched by whole lines.
template <typename T>
static void turn(const T* src, int64_t height, int64_t columns, T* dst, int64_t rows) {
  constexpr int64_t side = 64 / sizeof(T);
  T square[side][side];
  for (int64_t left = 0; left < columns; left += side) {
    const int64_t width = columns - left < side ? columns - left : side;
    for (int64_t i = 0; i < height; i++)
      for (int64_t j = 0; j < width; j++) square[j][i] = src[i * columns + left + j];
    for (int64_t j = 0; j < width; j++)
      memcpy(dst + (left + j) * rows, square[j], (size_t)height * sizeof(T));
  }
}

// Read runs as nf4_read_rows does, and write them to dst as the columns of a matrix.
// width: bytes, a multiple of itemsize, which is 1, 2, 4 or 8.
NF4_EXPORT int64_t nf4_read_columns(int fd, int64_t offset, int64_t rows, int64_t stride,
                                    int64_t width, int64_t itemsize, uint8_t* dst) {
  const int64_t columns = width / itemsize, together = 64 / itemsize;
  uint8_t* held = (uint8_t*)malloc((size_t)(together * width));
  if (!held) return -ENOMEM;
  int64_t total = 0;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t height = rows - row < together ? rows - row : together;
    const int64_t count = nf4_read_rows(fd, offset + row * stride, height, stride, width, held);
    if (count < 0) total = count;
    if (count >= 0) total += count;
    if (count < height * width) break;
    uint8_t* at = dst + row * itemsize;
    if (itemsize == 1) turn(held, height, columns, at, rows);
    if (itemsize == 2) turn((uint16_t*)held, height, columns, (uint16_t*)at, rows);
    if (itemsize == 4) turn((uint32_t*)held, height, columns, (uint32_t*)at, rows);
    if (itemsize == 8) turn((uint64_t*)held, height, columns, (uint64_t*)at, rows);
  }
  free(held);
  return total;
}

// Return whether this processor has the level that the -march flag in CMakeLists.txt names.
NF4_EXPORT int nf4_can_run_generic(void) { return 1; }

#if defined(NF4_X86_ISAS)
// By CPUID, not __builtin_cpu_supports: the runtime library that zig links answers no to
// everything. A processor that has these features has all of its level; the system must also save
// the registers.
static bool has_features(unsigned ebx, unsigned registers) {
  // FMA, MOVBE, OSXSAVE, AVX, F16C
  const unsigned needed = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & ebx) != ebx) return false;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & registers) == registers;
}

// BMI1, AVX2, BMI2; the halves of YMM.
NF4_EXPORT int nf4_can_run_avx2(void) { return has_features(1u << 3 | 1u << 5 | 1u << 8, 0x6); }

// Also AVX-512 F, DQ, CD, BW, VL; masks, and the rest of ZMM.
NF4_EXPORT int nf4_can_run_avx512(void) {
  return has_features(
      1u << 3 | 1u << 5 | 1u << 8 | 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31, 0xe6);
}
#endif

#if defined(NF4_ARM_ISAS)
NF4_EXPORT int nf4_can_run_neon(void) { return 1; }  // part of every aarch64
#endif
