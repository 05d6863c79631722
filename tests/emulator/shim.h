// The CUDA that gpu_kernels.cu uses, for g++: compile with -ffp-contract=off.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "runtime.h"

#define __device__
#define __host__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __shared__ EMU_SHARED

struct Index {
  unsigned x;
};
#define threadIdx (Index{emu::current->thread})
#define blockIdx (Index{emu::current->block})

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static inline void __syncthreads() { emu::barrier(); }
static inline void __syncwarp() { emu::sync_warp(0xffffffffu); }
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4, "32-bit shuffles");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emu::shuffle_xor(mask, bits, lanes);
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

// One kernel's arguments, in the order of its parameters, from an array of pointers to them.
template <class... Parameters>
static int emu_call(void (*kernel)(Parameters...), unsigned first, unsigned count, unsigned threads,
                    const void* const* arguments) {
  return emu::launch(first, count, threads, [=] {
    int next = 0;
    auto read = [&](auto* value) {
      std::memcpy(value, arguments[next++], sizeof *value);
      return *value;
    };
    std::tuple<std::decay_t<Parameters>...> values;
    std::apply([&](auto&... value) { (read(&value), ...); }, values);
    std::apply(kernel, values);
  });
}
