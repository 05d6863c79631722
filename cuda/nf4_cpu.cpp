// Which of the compiled copies of nf4_host.cpp this processor can run.

extern "C" __attribute__((visibility("default"))) int nf4_can_run_generic(void) { return 1; }

#if defined(NF4_X86_ISAS)
// The levels that the -march flags of CMakeLists.txt name.
extern "C" __attribute__((visibility("default"))) int nf4_can_run_avx2(void) {
  return __builtin_cpu_supports("x86-64-v3") != 0;
}

extern "C" __attribute__((visibility("default"))) int nf4_can_run_avx512(void) {
  return __builtin_cpu_supports("x86-64-v4") != 0;
}
#endif
