// See runtime.h.  In TSan builds this file itself is compiled without -fsanitize=thread: switching
// fibers is no synchronisation between CUDA threads, barriers and __syncwarp are.

#include "runtime.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#ifdef EMU_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif
#ifdef EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif

namespace emu {

thread_local const Thread* current = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kWarp = 32;
enum State : uint8_t { kReady, kAtBarrier, kAtWarpOp, kDone };
enum Op : uint8_t { kSyncWarp, kShuffleXor };

// -- switching stacks: swapcontext saves the signal mask with a system call, this does not --

#if defined(__x86_64__)
struct Context {
  void* sp;
};
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  void** sp = reinterpret_cast<void**>(stack + kStack - 64);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  context.sp = sp;
}
void exchange(Context& from, Context& to) { emu_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void exchange(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// -- one block's threads --

struct Fiber {
  Thread place;
  Context context;
  State state;
  Op op;
  uint32_t mask, value;
  int lanes;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* asan = nullptr;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<int> order;  // in which threads take turns
  Context main;
  const std::function<void()>* body = nullptr;
  int count = 0, running = -1, alive = 0, waiting = 0, turn = 0;
  bool failed = false;
  std::string error;
  char barrier_tag = 0, warp_tags[64] = {};  // what TSan hangs an order of events on
  void* main_tsan = nullptr;
  void* main_asan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
};
thread_local std::unique_ptr<Machine> machine;  // kept: sanitizers' fiber contexts are dear to make

void fail(const std::string& message) {
  if (!machine->failed) machine->error = message;
  machine->failed = true;
}

void arrived() {
#ifdef EMU_ASAN
  Machine& m = *machine;
  if (m.running >= 0) {
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(m.fibers[m.running].asan, &stack, &size);
    if (!m.main_stack) m.main_stack = stack, m.main_stack_size = size;
  } else {
    __sanitizer_finish_switch_fiber(m.main_asan, nullptr, nullptr);
  }
#endif
}

// To fiber `to`, or to the launching thread (-1).
void leave_for(int to) {
  Machine& m = *machine;
  const int from = m.running;
  if (from == to) return;
  m.running = to;
  current = to >= 0 ? &m.fibers[to].place : nullptr;
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(from >= 0 ? &m.fibers[from].asan : &m.main_asan,
                                 to >= 0 ? m.fibers[to].stack : m.main_stack,
                                 to >= 0 ? kStack : m.main_stack_size);
#endif
#ifdef EMU_TSAN
  // 1: no happens-before, so that races between CUDA threads stay visible
  __tsan_switch_to_fiber(to >= 0 ? m.fibers[to].tsan : m.main_tsan, 1);
#endif
  exchange(from >= 0 ? m.fibers[from].context : m.main, to >= 0 ? m.fibers[to].context : m.main);
  arrived();
}

int next_ready() {  // round robin from where the last search ended, -1 for none
  Machine& m = *machine;
  for (int k = 0; k < m.count; k++) {
    m.turn = (m.turn + 1) % m.count;
    if (m.fibers[m.order[m.turn]].state == kReady) return m.order[m.turn];
  }
  return -1;
}

void wait_until_ready(int self) {
  // With nobody ready the launching thread finds the deadlock, and never comes back here.
  while (machine->fibers[self].state != kReady) leave_for(next_ready());
}

void entry() {
  arrived();
  for (;;) {
    (*machine->body)();
    machine->fibers[machine->running].state = kDone;
    machine->alive--;
    leave_for(next_ready());
  }
}

uint32_t warp_op(Op op, uint32_t mask, uint32_t value, int lanes) {
  Machine& m = *machine;
  const int self = m.running, first = self / kWarp * kWarp;
  Fiber& fiber = m.fibers[self];
  if (!(mask >> (self - first) & 1))
    fail("a lane calls a warp operation without being in its mask");
#ifdef EMU_TSAN
  if (op == kSyncWarp) __tsan_release(&m.warp_tags[self / kWarp]);
#endif
  fiber.op = op, fiber.mask = mask, fiber.value = value, fiber.lanes = lanes;
  fiber.state = kAtWarpOp;
  const int size = std::min(kWarp, m.count - first);
  bool all = true;
  for (int lane = 0; lane < size; lane++) {
    const Fiber& other = m.fibers[first + lane];
    if (mask >> lane & 1)
      all = all && other.state == kAtWarpOp && other.op == op && other.mask == mask;
  }
  if (all) {
    uint32_t values[kWarp];
    for (int lane = 0; lane < size; lane++) {
      const int source = op == kShuffleXor ? lane ^ m.fibers[first + lane].lanes : lane;
      if (source >= size || !(mask >> source & 1))
        fail("a shuffle reads from a lane that is not there");
      values[lane] = m.fibers[first + std::min(source, size - 1)].value;
    }
    for (int lane = 0; lane < size; lane++)
      if (mask >> lane & 1) {
        m.fibers[first + lane].value = values[lane];
        m.fibers[first + lane].state = kReady;
      }
  }
  wait_until_ready(self);
#ifdef EMU_TSAN
  if (op == kSyncWarp) __tsan_acquire(&m.warp_tags[self / kWarp]);
#endif
  return fiber.value;
}

void start(Fiber& fiber, Thread place) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#ifdef EMU_TSAN
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }
  prepare(fiber.context, fiber.stack, entry);
  fiber.asan = nullptr;
  fiber.state = kReady;
  fiber.place = place;
#ifdef EMU_TSAN  // what was before the launch is before each thread
  __tsan_switch_to_fiber(fiber.tsan, 0);
  __tsan_switch_to_fiber(machine->main_tsan, 0);
#endif
}

void run_block(unsigned block, unsigned threads, unsigned blocks) {
  Machine& m = *machine;
  m.alive = m.count, m.waiting = 0, m.turn = m.count - 1;
  for (int i = 0; i < m.count; i++) start(m.fibers[i], {(unsigned)i, block, threads, blocks});
  leave_for(next_ready());
  if (m.alive && !m.failed) {
    int barriers = 0, warps = 0;
    for (int i = 0; i < m.count; i++) {
      barriers += m.fibers[i].state == kAtBarrier;
      warps += m.fibers[i].state == kAtWarpOp;
    }
    char text[160];
    snprintf(text, sizeof text,
             "deadlock in block %u: %d threads at __syncthreads, %d at a warp "
             "operation, %d have returned",
             block, barriers, warps, m.count - m.alive);
    fail(text);
  }
#ifdef EMU_TSAN
  for (int i = 0; i < m.count; i++) {  // what a thread did is before the end of the launch
    __tsan_switch_to_fiber(m.fibers[i].tsan, 1);
    __tsan_switch_to_fiber(m.main_tsan, 0);
  }
#endif
}

}  // namespace

void barrier() {
  Machine& m = *machine;
  const int self = m.running;
#ifdef EMU_TSAN
  __tsan_release(&m.barrier_tag);
#endif
  m.fibers[self].state = kAtBarrier;
  if (++m.waiting == m.count) {  // all of them: one that has returned is a bug
    m.waiting = 0;
    for (int i = 0; i < m.count; i++) m.fibers[i].state = kReady;
  }
  wait_until_ready(self);
#ifdef EMU_TSAN
  __tsan_acquire(&m.barrier_tag);
#endif
}

void sync_warp(uint32_t mask) { warp_op(kSyncWarp, mask, 0, 0); }

uint32_t shuffle_xor(uint32_t mask, uint32_t value, int lanes) {
  return warp_op(kShuffleXor, mask, value, lanes);
}

void trap(const char* what, uint64_t address) {
  fprintf(stderr, "emulated GPU fault: %s at 0x%llx\n", what, (unsigned long long)address);
  abort();
}

int launch(unsigned first, unsigned count, unsigned threads, const std::function<void()>& body) {
  if (!machine) machine = std::make_unique<Machine>();
  Machine& m = *machine;
  m.body = &body, m.failed = false, m.error.clear(), m.count = (int)threads;
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  m.order.resize(threads);
  for (int i = 0; i < m.count; i++) m.order[i] = i;
  const char* order = getenv("EMU_ORDER");
  const bool reversed = order && !strcmp(order, "reversed");
  if (reversed) std::reverse(m.order.begin(), m.order.end());
  std::mt19937 random(order && !reversed ? (unsigned)atoi(order) : 0);
#ifdef EMU_TSAN
  m.main_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned block = first; block < first + count && !m.failed; block++) {
    if (order && !reversed) std::shuffle(m.order.begin(), m.order.end(), random);
    run_block(block, threads, first + count);
  }
  return m.failed;
}

const char* error() { return machine ? machine->error.c_str() : ""; }

}  // namespace emu
