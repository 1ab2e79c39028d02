// Runs CUDA kernels on the CPU, so that their numbers, barriers and bounds can be tested without a GPU.
//
// Blocks run one after another. Inside a block every CUDA thread is a fiber: it runs until it meets a barrier or a
// warp operation, then the next one goes on. What is found:
//   - a missing __syncthreads(): run the threads in another order (KERNELS_CUDA_THREADS=forward|reverse|<seed>)
//   - a barrier that only some threads reach, or that they reach at different lines: reported with both lines
//   - a shuffle from a lane outside its mask, or one that waits for lanes that never come: reported
//   - use of shared memory before it is written: it starts as NaN
//   - writes past the end of a shared array: guard bytes around each array are checked after every block
// Not found: missing memory fences between warps, and anything about speed.
#pragma once
#include <algorithm>
#include <math.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>

#if defined(__x86_64__) && !defined(KERNELS_CUDA_UCONTEXT)
#define KERNELS_CUDA_SWITCH_IN_ASSEMBLY
#else
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

namespace emulation {

#ifdef KERNELS_CUDA_SWITCH_IN_ASSEMBLY
// Saves the registers that a call must preserve, changes stacks, and returns into the other fiber.
extern "C" void kernels_cuda_switch(void** save, void* load);
asm(R"(
.text
.weak kernels_cuda_switch
.hidden kernels_cuda_switch
.type kernels_cuda_switch,@function
kernels_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;

  void start_at(void (*entry)(), char* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry never returns; this keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six saved registers
    stack_pointer = top;
  }
  void leave_for(Context& other) { kernels_cuda_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t state;

  void start_at(void (*entry)(), char* stack, size_t bytes) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void leave_for(Context& other) { swapcontext(&state, &other.state); }
};
#endif

struct Stack {
  static constexpr size_t bytes = 256 * 1024;
  char* memory;
  Stack() : memory(static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (memory == MAP_FAILED) throw std::bad_alloc();
  }
  ~Stack() { munmap(memory, bytes); }
  Stack(const Stack&) = delete;
};

struct Fiber {
  enum State { ready, at_barrier, at_warp, finished };
  State state = ready;
  Context context;
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  dim3 thread;
  unsigned index = 0;
  int line = 0;         // where it waits
  uint64_t value = 0;   // what it brings to a warp operation
  int source = 0;       // the lane it wants to hear from
  uint64_t result = 0;  // what it takes away
};

constexpr unsigned warp_size = 32;

class Block {
 public:
  dim3 index, size, grid;
  Fiber* current = nullptr;

  // Runs `body` once per thread of one block; throws what went wrong.
  template <class Body>
  void run(dim3 grid_size, dim3 block_size, dim3 block_index, size_t shared_bytes, const Body& body) {
    grid = grid_size, size = block_size, index = block_index;
    count = unsigned(size.count());
    while (fibers.size() < count) fibers.emplace_back();
    error.clear();
    arrays.clear();
    for (auto& warp : arrived) warp.clear();
    arrived.resize((count + warp_size - 1) / warp_size);
    if (shared_bytes) allocate(nullptr, shared_bytes);
    argument = &body;
    call = [](const void* what) { (*static_cast<const Body*>(what))(); };
    resting = 0;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = fibers[i];
      fiber.index = i;
      fiber.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
      fiber.state = Fiber::ready;
      fiber.context.start_at(&Block::entry, fiber.stack->memory, Stack::bytes);
    }
    arrange();
    here() = this;
    current = &fibers[order[0]];
    host.leave_for(current->context);
    here() = nullptr;
    if (error.empty()) check_guards();
    if (!error.empty()) {
      throw std::runtime_error("block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
                               "): " + error);
    }
  }

  static Block*& here() {
    static thread_local Block* block = nullptr;
    return block;
  }

  void barrier(int line) {
    current->line = line;
    rest(Fiber::at_barrier);
    if (current->state != Fiber::ready) next();
  }

  // All lanes of `mask` bring a value and the lane they want to hear from; the last one to come settles the results.
  template <class Settle>
  uint64_t exchange(uint32_t mask, uint64_t value, int source, int line, Settle settle) {
    const unsigned first = current->index / warp_size * warp_size;
    const unsigned lane = current->index - first;
    if (count - first < warp_size) mask &= (1u << (count - first)) - 1;
    if (!(mask >> lane & 1)) fail("thread " + std::to_string(current->index) + " is not in its own mask at line " + std::to_string(line));
    current->value = value, current->source = source, current->line = line;
    uint32_t& group = arrived[first / warp_size][mask];
    group |= 1u << lane;
    if (group != mask) {
      current->state = Fiber::at_warp;
      next();
    } else {
      group = 0;
      Fiber* warp = &fibers[first];
      for (unsigned i = 0; i < warp_size; ++i) {
        if (!(mask >> i & 1)) continue;
        if (warp[i].line != line)
          fail("lanes of one warp operation stand at lines " + std::to_string(warp[i].line) + " and " + std::to_string(line));
        if (!(mask >> warp[i].source & 1))
          fail("line " + std::to_string(line) + ": lane " + std::to_string(i) + " reads lane " + std::to_string(warp[i].source) +
               ", which takes no part");
        settle(warp, i, mask);
        warp[i].state = Fiber::ready;
      }
    }
    return current->result;
  }

  // Shared memory of one declaration, the same for all threads, poisoned when the first of them asks.
  void* allocate(const void* site, size_t bytes) {
    auto& array = arrays[site];
    if (array.empty()) {
      array.assign(bytes + 2 * guard, char(0xff));  // 0xff...: NaN in every float type
      std::fill_n(array.begin(), guard, guard_byte);
      std::fill_n(array.end() - guard, guard, guard_byte);
    }
    return array.data() + guard;
  }
  void* dynamic() { return arrays.count(nullptr) ? arrays[nullptr].data() + guard : nullptr; }

 private:
  static constexpr size_t guard = 256;
  static constexpr char guard_byte = 0x5a;

  std::vector<Fiber> fibers;
  std::vector<unsigned> order;
  std::vector<std::map<uint32_t, uint32_t>> arrived;  // per warp: mask -> lanes that have come
  std::map<const void*, std::vector<char>> arrays;
  Context host;
  unsigned count = 0, position = 0;
  unsigned resting = 0;  // threads at the barrier or finished
  std::string error;
  const void* argument = nullptr;
  void (*call)(const void*) = nullptr;

  static void entry() {
    Block& block = *here();
    block.call(block.argument);
    block.rest(Fiber::finished);
    block.next();
  }

  void arrange() {
    order.resize(count);
    for (unsigned i = 0; i < count; ++i) order[i] = i;
    const char* wish = std::getenv("KERNELS_CUDA_THREADS");
    const std::string how = wish ? wish : "forward";
    if (how == "reverse") {
      std::reverse(order.begin(), order.end());
    } else if (how != "forward") {
      std::mt19937 random(unsigned(std::stoul(how)) + index.x);
      std::shuffle(order.begin(), order.end(), random);
    }
    position = 0;
  }

  void fail(const std::string& what) {
    error = what;
    current->context.leave_for(host);
  }

  // The current thread waits at a barrier or has finished. When all do, the barrier opens.
  void rest(Fiber::State state) {
    current->state = state;
    if (++resting < count) return;
    const Fiber* first = nullptr;
    for (unsigned i = 0; i < count && !first; ++i) {
      if (fibers[i].state == Fiber::at_barrier) first = &fibers[i];
    }
    if (!first) return;
    for (unsigned i = 0; i < count; ++i) {
      const Fiber& other = fibers[i];
      if (other.state == Fiber::at_barrier && other.line == first->line) continue;
      fail("thread " + std::to_string(first->index) + " waits at the __syncthreads() of line " + std::to_string(first->line) +
           ", but thread " + std::to_string(i) +
           (other.state == Fiber::finished ? " has left the kernel" : " at that of line " + std::to_string(other.line)));
    }
    for (unsigned i = 0; i < count; ++i) fibers[i].state = Fiber::ready;
    resting = 0;
  }

  // Goes on with the next fiber that can; back to the host when all are finished or none can.
  void next() {
    Fiber* me = current;
    const Fiber* stuck = nullptr;
    for (unsigned i = 0; i < count; ++i) {
      position = position + 1 == count ? 0 : position + 1;
      Fiber& other = fibers[order[position]];
      if (other.state == Fiber::ready) {
        current = &other;
        if (&other != me) me->context.leave_for(other.context);
        return;
      }
      if (other.state == Fiber::at_warp) stuck = &other;
    }
    if (stuck)
      error = "thread " + std::to_string(stuck->index) + " waits for ever at the warp operation of line " + std::to_string(stuck->line) +
              ": other lanes of its mask never come";
    me->context.leave_for(host);
  }

  void check_guards() {
    for (const auto& [site, array] : arrays) {
      for (size_t i = 0; i < guard; ++i) {
        if (array[i] != guard_byte) error = "a write before the start of a shared array";
        if (array[array.size() - 1 - i] != guard_byte) error = "a write past the end of a shared array";
      }
    }
  }
};

template <class Kernel, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel, Arguments... arguments) {
  static thread_local Block running;
  for (uint64_t i = 0; i < grid.count(); ++i) {
    const dim3 index(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (uint64_t(grid.x) * grid.y)));
    running.run(grid, block, index, shared_bytes, [&] { kernel(arguments...); });
  }
}

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, int line) {
  const uint64_t bits = Block::here()->exchange(
      mask, pack(value), source, line, [](Fiber* warp, unsigned lane, uint32_t) { warp[lane].result = warp[warp[lane].source].value; });
  T result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline int lane() { return int(Block::here()->current->index % warp_size); }

inline uint32_t ballot(uint32_t mask, bool vote, int line) {
  return uint32_t(Block::here()->exchange(mask, vote, lane(), line, [](Fiber* warp, unsigned lane, uint32_t members) {
    uint32_t votes = 0;
    for (unsigned i = 0; i < warp_size; ++i) votes |= uint32_t(members >> i & 1 && warp[i].value) << i;
    warp[lane].result = votes;
  }));
}

template <class T>
T add(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

}  // namespace emulation

// The part of CUDA's language that kernels here may use. Shared memory is declared by the macros of cuda_portable.h.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (emulation::Block::here()->current->thread)
#define blockIdx (emulation::Block::here()->index)
#define blockDim (emulation::Block::here()->size)
#define gridDim (emulation::Block::here()->grid)
#define __syncthreads() emulation::Block::here()->barrier(__LINE__)
#define __syncwarp(...) ((void)emulation::ballot(0xffffffffu, true, __LINE__))
#define __shfl_sync(mask, value, source) emulation::shuffle(mask, value, source, __LINE__)
#define __shfl_xor_sync(mask, value, other) emulation::shuffle(mask, value, emulation::lane() ^ (other), __LINE__)
#define __ballot_sync(mask, vote) emulation::ballot(mask, vote, __LINE__)
#define atomicAdd(to, value) emulation::add(to, value)
