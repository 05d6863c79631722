// Which of the compiled copies of nf4_host.cpp this processor can run.

extern "C" __attribute__((visibility("default"))) int nf4_can_run_generic(void) { return 1; }

#if defined(__x86_64__)
extern "C" __attribute__((visibility("default"))) int nf4_can_run_avx2(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}

extern "C" __attribute__((visibility("default"))) int nf4_can_run_avx512(void) {
  return nf4_can_run_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
