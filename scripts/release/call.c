// Calls a library without Python: where a wheel's platform can be run but has no numpy here.
//   call LIBRARY DIRECTORY
// DIRECTORY has `codebook` (struct nf4_codebook) and `values` (float32). For each instruction set
// that the library holds and this machine runs, it gets `packed-ISA` and `absmax-ISA`, blocks
// of 64.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { kFloat32 = 0, kBlock = 64, kStatsBytes = 1 << 16 };

typedef int64_t Quantize(const void* src, int dtype, int64_t n, int64_t blocksize, const void* book,
                         uint8_t* packed, float* absmax, double* stats);

static void* read_file(const char* directory, const char* name, long* size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  FILE* file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END)) return NULL;
  *size = ftell(file);
  rewind(file);
  void* data = malloc(*size);
  if (data && fread(data, 1, *size, file) != (size_t)*size) return NULL;
  fclose(file);
  return data;
}

static int write_file(const char* directory, const char* name, const char* isa, const void* data,
                      size_t size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s-%s", directory, name, isa);
  FILE* file = fopen(path, "wb");
  return file && fwrite(data, 1, size, file) == size && !fclose(file);
}

int main(int count, char** words) {
  static const char* const isas[] = {"generic", "neon", "avx2", "avx512"};
  if (count != 3) return 2;
  void* library = dlopen(words[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  long book_size = 0, size = 0;
  const void* book = read_file(words[2], "codebook", &book_size);
  const void* values = read_file(words[2], "values", &size);
  if (!book || !values) return fprintf(stderr, "nothing to read in %s\n", words[2]), 1;
  const int64_t n = size / (int64_t)sizeof(float);
  uint8_t* packed = malloc(n / 2);
  float* absmax = malloc(n / kBlock * sizeof(float));
  double* stats = malloc(kStatsBytes);
  for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
    char name[64];
    snprintf(name, sizeof name, "nf4_can_run_%s", isas[i]);
    int (*can_run)(void) = (int (*)(void))dlsym(library, name);
    if (!can_run || !can_run()) continue;
    snprintf(name, sizeof name, "nf4_quantize_%s", isas[i]);
    Quantize* quantize = (Quantize*)dlsym(library, name);
    if (!quantize || quantize(values, kFloat32, n, kBlock, book, packed, absmax, stats) != -1 ||
        !write_file(words[2], "packed", isas[i], packed, n / 2) ||
        !write_file(words[2], "absmax", isas[i], absmax, n / kBlock * sizeof(float)))
      return fprintf(stderr, "%s failed\n", name), 1;
    puts(isas[i]);
  }
  return 0;
}
