// CUDA threads as fibers on the CPU: what the emulated kernels, translated from PTX or compiled
// from the .cu itself, ask of their machine.  One-dimensional grids; shuffles by exclusive or;
// barriers.
#pragma once
#include <cstdint>
#include <functional>

namespace emu {

struct Thread {
  unsigned thread, block, threads, blocks;  // threadIdx.x, blockIdx.x, blockDim.x, gridDim.x
};
extern thread_local const Thread* current;  // of the fiber that runs

void barrier();                                                  // __syncthreads
void sync_warp(uint32_t mask);                                   // __syncwarp
uint32_t shuffle_xor(uint32_t mask, uint32_t value, int lanes);  // __shfl_xor_sync

// Runs blocks [first, first + count) of a grid that ends there; EMU_ORDER says in which order its
// threads take turns: unset in order, "reversed", or a seed.  Returns 0, or 1 with `error()`: a
// deadlock, a shuffle from a lane that is not there, a barrier that some threads have left behind.
int launch(unsigned first, unsigned count, unsigned threads, const std::function<void()>& body);
const char* error();

[[noreturn]] void trap(const char* what, uint64_t address);  // what a GPU would fault on

// Shared memory: a block runs on one host thread.  The sanitizers' builds use one thread only and
// plain statics, around which they put red zones.
#if defined(EMU_ASAN) || defined(EMU_TSAN)
#define EMU_SHARED static
#else
#define EMU_SHARED static thread_local
#endif

}  // namespace emu
