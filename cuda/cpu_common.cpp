// What the CPU engine's library holds once, whatever the instruction set: which of the compiled
// copies of cpu_engine.cpp this processor can run, and reads of a stored matrix's columns.

#include <unistd.h>

#include <cerrno>
#include <cstdint>

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

// Return whether this processor has the level that the -march flag in CMakeLists.txt names.
NF4_EXPORT int nf4_can_run_generic(void) { return 1; }

#if defined(NF4_X86_ISAS)
// Not the levels by name, which older Clangs do not know: a processor that has these has all of it.
NF4_EXPORT int nf4_can_run_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

NF4_EXPORT int nf4_can_run_avx512(void) {
  return nf4_can_run_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(NF4_ARM_ISAS)
NF4_EXPORT int nf4_can_run_neon(void) { return 1; }  // part of every aarch64
#endif
