// Enough of CUDA to run a kernel on a CPU, one CTA after the other, every thread a fiber of its own. The kernel's source is
// included as it is; only what is PTX is replaced: quantize_ptx.cuh by the second half of this file, ptx.cuh by the file of
// that name beside it. A fiber runs until it meets a barrier of its warp (shuffles, mma) or of its CTA, and a warp runs
// until all of it waits for others, so that warps are as far apart as their barriers allow. Shared memory is static, or,
// where its size is the launch's, an array with addresses of its own; it starts as NaN.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Dim3 { unsigned x = 0, y = 0, z = 0; };
using std::max;
using std::min;

namespace cpu {
constexpr int LANES_OF_WARP = 32;
constexpr size_t STACK = 256 * 1024;
struct Barrier { int arrived = 0, generation = 0; };
struct Copy { void* to; const void* from; unsigned bytes = 16; };  // into shared memory; from null: zeros
struct Fiber {
  ucontext_t context;  // where it starts
  jmp_buf place;       // where it goes on
  bool started;
  Dim3 thread;
  bool done;
  const Barrier* awaited;  // null: it may run
  int awaited_generation;
  std::vector<Copy> open;  // copies that no group has yet
  std::deque<std::vector<Copy>> groups;
};
inline std::vector<Fiber> fibers;
inline std::vector<char> stacks;
inline std::vector<Barrier> warps;
inline Barrier cta, named[16];
struct Phase { Barrier done; int arrivals, missing, bytes; };  // of an mbarrier
inline std::map<uint32_t, Phase> phases;                        // by its address
inline jmp_buf scheduler;
inline int current;
inline uint32_t exchange[64][LANES_OF_WARP][8], results[64][LANES_OF_WARP][4];
inline int any_of_cta, result_of_cta;
inline const char* fault;  // what went wrong first: null if nothing did

inline void fail(const char* what) {
  if (fault == nullptr) fault = what;
}
// Jumps, because swapcontext asks the system for the signal mask each time.
inline __attribute__((noinline)) void yield() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}
inline __attribute__((noinline)) void resume() {
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[current];
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}
// Everyone waits for the last, who first does what all of them wait for.
template <class Last>
void meet(Barrier& barrier, int participants, Last last) {
  if (++barrier.arrived == participants) {
    last();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = fibers[current];
  fiber.awaited = &barrier;
  fiber.awaited_generation = barrier.generation;
  yield();
  fiber.awaited = nullptr;
}
// Counts one that goes on.
inline void pass(Barrier& barrier, int participants) {
  if (++barrier.arrived == participants) barrier.arrived = 0, ++barrier.generation;
}
// Until others have completed the barrier.
inline void wait_for(const Barrier& barrier) {
  Fiber& fiber = fibers[current];
  fiber.awaited = &barrier;
  fiber.awaited_generation = barrier.generation;
  yield();
  fiber.awaited = nullptr;
}
template <class Last>
void meet_warp(Last last) { meet(warps[current / LANES_OF_WARP], LANES_OF_WARP, last); }
inline void meet_warp() { meet_warp([] {}); }
inline uint32_t (&mine())[8] { return exchange[current / LANES_OF_WARP][current % LANES_OF_WARP]; }
inline uint32_t (&of_lane(int lane))[8] { return exchange[current / LANES_OF_WARP][lane]; }
inline uint32_t (&my_result())[4] { return results[current / LANES_OF_WARP][current % LANES_OF_WARP]; }
inline uint32_t (&result_of_lane(int lane))[4] { return results[current / LANES_OF_WARP][lane]; }

// Dynamic shared memory, in a window whose first KiB is the system's and where the static variables come next, as the
// compiler has it: only the alignment it is declared with decides where it starts.
constexpr unsigned WINDOW = 256 * 1024, RESERVED = 1024;
alignas(1024) inline unsigned char window[WINDOW];
inline unsigned dynamic_start, dynamic_bytes;
inline unsigned char* dynamic_shared(unsigned alignment, unsigned static_bytes) {
  dynamic_start = (RESERVED + static_bytes + alignment - 1) / alignment * alignment;
  return window + dynamic_start;
}
inline unsigned char* at_shared(unsigned address, unsigned bytes) {
  static unsigned char nowhere[16];
  if (address % bytes != 0) fail("a shared address is not aligned");
  else if (address < dynamic_start || address + bytes > dynamic_start + dynamic_bytes) fail("a shared address is outside");
  else return window + address;
  return nowhere;
}

// Asynchronous copies. PTX promises only that they have landed after the wait: those of even warps land as late as that
// allows, those of odd warps at once.
inline void land(const Copy& copy) {
  const auto to = reinterpret_cast<uintptr_t>(copy.to), start = reinterpret_cast<uintptr_t>(window);
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.bytes != 0) return fail("a global address is not aligned");
  if (to % copy.bytes != 0) return fail("a shared address is not aligned");
  if (to >= start && to < start + WINDOW &&
      (to < start + dynamic_start || to + copy.bytes > start + dynamic_start + dynamic_bytes))
    return fail("a shared address is outside");
  if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
  else std::memset(copy.to, 0, copy.bytes);
}
inline void copy_later(void* to, const void* from, unsigned bytes = 16) {
  if (current / LANES_OF_WARP % 2 == 1) return land({to, from, bytes});
  fibers[current].open.push_back({to, from, bytes});
}
inline void commit_group() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
inline void wait_for_groups(size_t pending) {
  auto& groups = fibers[current].groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) land(copy);
}
}  // namespace cpu

#define threadIdx (cpu::fibers[cpu::current].thread)
inline Dim3 blockIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }  // NaN: 0
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __int_as_float(int bits) { return __uint_as_float(bits); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selectors >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) { return *from; }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return (*to += value) - value; }
inline int atomicAdd(int* to, int value) { return (*to += value) - value; }
inline unsigned atomicMax(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to = std::max(before, value);
  return before;
}
inline void __syncwarp() { cpu::meet_warp(); }
inline void __syncthreads() { cpu::meet(cpu::cta, blockDim.x, [] {}); }
inline int __syncthreads_or(int predicate) {
  cpu::any_of_cta |= predicate;
  cpu::meet(cpu::cta, blockDim.x, [] {
    cpu::result_of_cta = cpu::any_of_cta;
    cpu::any_of_cta = 0;
  });
  return cpu::result_of_cta;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4, "one register");
  std::memcpy(cpu::mine(), &value, 4);
  cpu::meet_warp();
  std::memcpy(&value, cpu::of_lane((cpu::current % cpu::LANES_OF_WARP) ^ mask), 4);
  cpu::meet_warp();
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4, "one register");
  std::memcpy(cpu::mine(), &value, 4);
  cpu::meet_warp();
  std::memcpy(&value, cpu::of_lane(lane), 4);
  cpu::meet_warp();
  return value;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  cpu::mine()[0] = predicate != 0;
  cpu::meet_warp();
  unsigned votes = 0;
  for (int lane = 0; lane < cpu::LANES_OF_WARP; ++lane) votes |= cpu::of_lane(lane)[0] << lane;
  cpu::meet_warp();
  return votes;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  cpu::mine()[0] = value;
  cpu::meet_warp();
  unsigned most = 0;
  for (int lane = 0; lane < cpu::LANES_OF_WARP; ++lane) most = std::max(most, static_cast<unsigned>(cpu::of_lane(lane)[0]));
  cpu::meet_warp();
  return most;
}

inline int __all_sync(unsigned, int predicate) {
  cpu::mine()[0] = predicate != 0;
  cpu::meet_warp();
  int all = 1;
  for (int lane = 0; lane < cpu::LANES_OF_WARP; ++lane) all &= cpu::of_lane(lane)[0];
  cpu::meet_warp();
  return all;
}

// ---- quantize_ptx.cuh -------------------------------------------------------------------------------------------------
#if APEX4_BF16
inline float half_to_float(unsigned bits) { return __uint_as_float(bits << 16); }
inline unsigned float_to_half(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
inline float half_to_float(unsigned bits) {
  const uint16_t narrow = static_cast<uint16_t>(bits);
  _Float16 half;
  std::memcpy(&half, &narrow, 2);
  return static_cast<float>(half);
}
inline unsigned float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#endif
inline float low_of(unsigned pair) { return half_to_float(pair & 0xffff); }
inline float high_of(unsigned pair) { return half_to_float(pair >> 16); }
inline unsigned pair_of(float low, float high) { return float_to_half(high) << 16 | float_to_half(low); }
inline unsigned pair_product(unsigned a, unsigned b) {
  return pair_of(low_of(a) * low_of(b), high_of(a) * high_of(b));  // products of such numbers are exact in float32
}
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline float approximate_reciprocal(float x) { return std::fabs(x) > 0x1p126f ? 0.0f : 1.0f / x; }
inline void prefetch(const void*) {}
inline void await_all(unsigned, unsigned, unsigned, unsigned) {}
inline void copy_async(uint4* shared, const uint4* from) { cpu::copy_later(shared, from); }
inline void copy_async_or_zero(uint4* shared, const void* from, bool there) {
  cpu::copy_later(shared, there ? from : nullptr);
}
inline void wait_for_copies() {
  cpu::commit_group();
  cpu::wait_for_groups(0);
}
inline void commit_copies() { cpu::commit_group(); }
template <int pending>
void wait_for_copies_but() { cpu::wait_for_groups(pending); }
template <int id, int threads>
void named_barrier_arrive() {
  if (++cpu::named[id].arrived == threads) cpu::named[id].arrived = 0, ++cpu::named[id].generation;
}
template <int id, int threads>
void named_barrier() { cpu::meet(cpu::named[id], threads, [] {}); }
template <class T>
T load_relaxed(const T* from) { return *from; }
inline void store_relaxed(unsigned long long* to, unsigned long long value) { *to = value; }
inline void let_dependents_start() {}
inline void wait_for_inputs() {}

// Registers of mma.m16n8k16 (16 bit), PTX ISA: lane l = 4 g + q. A register i holds row g + 8 (i & 1), columns 2 q + 8 (i >> 1)
// and the next; B register i rows 2 q + 8 i and the next, column g; D element i row g + 8 (i >> 1), column 2 q + (i & 1).
inline void multiply_16x8x16(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  uint32_t (&own)[8] = cpu::mine();
  own[0] = a0, own[1] = a1, own[2] = a2, own[3] = a3, own[4] = b0, own[5] = b1;
  cpu::meet_warp();
  const int lane = cpu::current % cpu::LANES_OF_WARP, g = lane / 4, q = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const unsigned a = cpu::of_lane(4 * (row % 8) + k % 8 / 2)[row / 8 + 2 * (k / 8)];
      const unsigned b = cpu::of_lane(4 * column + k % 8 / 2)[4 + k / 8];
      sum += (k % 2 ? high_of(a) : low_of(a)) * (k % 2 ? high_of(b) : low_of(b));
    }
    d[i] = sum;
  }
  cpu::meet_warp();
}

// What code compiled with -fsanitize=alignment calls: on a GPU such an access ends the kernel.
extern "C" inline __attribute__((used, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(void*, void*) {
  cpu::fail("an address is not aligned to its type");
  cpu::fibers[cpu::current].done = true;
  cpu::yield();  // for ever
}

// ---- the launch -------------------------------------------------------------------------------------------------------
namespace cpu {
inline void (*body)(void*);
inline void* body_arguments;
inline void fiber_main() {
  body(body_arguments);
  fibers[current].done = true;
  yield();
}

inline void run_cta(int threads) {
  fibers.assign(threads, {});
  warps.assign((threads + LANES_OF_WARP - 1) / LANES_OF_WARP, {});
  cta = {};
  std::fill(named, named + 16, Barrier{});
  phases.clear();
  any_of_cta = 0;
  std::fill(window, window + WINDOW, 0xff);  // NaN, of every size
  stacks.resize(STACK * threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread.x = t;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + STACK * t;
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (int first = 0; first < threads; first += LANES_OF_WARP)
      for (bool moving = true; moving; running |= moving) {
        moving = false;
        for (current = first; current < std::min(first + LANES_OF_WARP, threads); ++current) {
          const Fiber& fiber = fibers[current];
          if (fiber.done || (fiber.awaited && fiber.awaited->generation == fiber.awaited_generation)) continue;
          resume();
          moving = true;
        }
      }
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) fail("a thread waits for ever");
}

template <class... P, size_t... I>
const char* launch(void (*kernel)(P...), void** arguments, const int* grid, int threads, int shared_bytes,
                   std::index_sequence<I...>) {
  struct Call { void (*kernel)(P...); void** arguments; } call{kernel, arguments};
  body = [](void* opaque) {
    Call& c = *static_cast<Call*>(opaque);
    c.kernel(*static_cast<P*>(c.arguments[I])...);
  };
  body_arguments = &call;
  fault = nullptr;
  dynamic_bytes = shared_bytes;
  blockDim = {unsigned(threads), 1, 1};
  gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        if (fault == nullptr) run_cta(threads);
  return fault;
}

template <class... P>
const char* launch(void (*kernel)(P...), void** arguments, const int* grid, int threads, int shared_bytes) {
  return launch(kernel, arguments, grid, threads, shared_bytes, std::index_sequence_for<P...>{});
}
}  // namespace cpu
