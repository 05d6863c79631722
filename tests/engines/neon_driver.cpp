// Runs the NEON copy of the CPU engine on calls that test_neon.py wrote to standard input, and
// writes what they give to standard output: for each call its outputs, one behind the other.
//
// A call is four int64 (function, dtype, n, blocksize), and arrays: an int64 of bytes, then those.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu_engine.cpp"

typedef std::vector<uint8_t> Bytes8;

// Fill `size` bytes from standard input; return false at its end.
static bool read_all(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

// Return the next array; exit when the input is cut off.
static Bytes8 array() {
  int64_t size;
  if (!read_all(&size, sizeof size)) exit(2);
  Bytes8 bytes((size_t)size);
  if (size && !read_all(bytes.data(), bytes.size())) exit(2);
  return bytes;
}

static void write_all(const Bytes8& bytes) { fwrite(bytes.data(), 1, bytes.size(), stdout); }

// Return the numbers of an array.
template <class T>
static T* as(Bytes8& bytes) {
  return reinterpret_cast<T*>(bytes.data());
}

static size_t parts(int64_t n, int64_t size) { return (size_t)((n + size - 1) / size); }

static void run_quantize(int dtype, int64_t n, int64_t blocksize) {
  Bytes8 book = array(), src = array();
  Bytes8 packed(parts(n, 2)), absmax(4 * parts(n, blocksize));
  Bytes8 stats(8 * kStats * parts(n, kGranule));
  if (nf4_quantize_neon(src.data(), dtype, n, blocksize, as<nf4_codebook>(book), packed.data(),
                        as<float>(absmax), as<double>(stats)) >= 0)
    exit(3);
  for (const Bytes8& out : {packed, absmax, stats}) write_all(out);
}

static void run_dequantize(int dtype, int64_t n, int64_t blocksize) {
  Bytes8 book = array(), packed = array(), absmax = array();
  Bytes8 out((size_t)n * (dtype == NF4_F32 ? 4 : 2));
  nf4_dequantize_neon(packed.data(), n, blocksize, as<nf4_codebook>(book), as<float>(absmax), dtype,
                      out.data());
  write_all(out);
}

static void run_nested(int64_t n) {
  Bytes8 midpoints = array(), offset = array(), absmax = array();
  Bytes8 codes((size_t)n), nested(4 * parts(n, kNestedRun));
  nf4_nested_quantize_neon(as<float>(absmax), n, *as<float>(offset), as<float>(midpoints),
                           codes.data(), as<float>(nested));
  write_all(codes);
  write_all(nested);
}

static void run_codes(int dtype, int64_t n, int64_t columns) {
  Bytes8 table = array(), scale = array(), src = array();
  Bytes8 out((size_t)n * (dtype == NF4_F32 ? 4 : 2));
  if (nf4_decode_codes_neon(src.data(), 4, 0, n, columns, as<float>(table), as<float>(scale),
                            nullptr, 1, 32, dtype, out.data()) >= 0)
    exit(3);
  write_all(out);
}

static void run_search(int dtype, int64_t n, int64_t blocksize) {
  Bytes8 book = array(), ladder = array(), src = array();
  const int64_t run = as<nf4_ladder>(ladder)->run * blocksize;
  Bytes8 packed(parts(n, 2)), index(parts(n, blocksize)), unit(4 * parts(n, run));
  Bytes8 stats(8 * kStats * parts(n, kGranule));
  if (nf4_search_neon(src.data(), dtype, n, blocksize, as<nf4_codebook>(book),
                      as<nf4_ladder>(ladder), nullptr, 0, 0, packed.data(), index.data(),
                      as<float>(unit), as<double>(stats)) >= 0)
    exit(3);
  for (const Bytes8& out : {packed, index, unit, stats}) write_all(out);
}

int main() {
  int64_t call[4];
  while (read_all(call, sizeof call)) {
    const int dtype = (int)call[1];
    switch (call[0]) {
      case 0: run_quantize(dtype, call[2], call[3]); break;
      case 1: run_dequantize(dtype, call[2], call[3]); break;
      case 2: run_nested(call[2]); break;
      case 3: run_codes(dtype, call[2], call[3]); break;
      case 4: run_search(dtype, call[2], call[3]); break;
      default: return 1;
    }
  }
  return 0;
}
