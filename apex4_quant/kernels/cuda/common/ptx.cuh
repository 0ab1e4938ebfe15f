// The PTX instructions that C++ has no word for, one inline function each. Nothing here knows of tiles or layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char uint8;
typedef unsigned int uint32;
typedef unsigned long long uint64;
#ifndef offsetof  // NVRTC has no <cstddef>, and before 13.5 no builtin for it
#define offsetof(type, member) static_cast<uint32>(reinterpret_cast<uint64>(&reinterpret_cast<type*>(0)->member))
#endif

namespace ptx {

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// ---- asynchronous copies of 16 bytes (sm_80), on sm_75 ordinary ones ----------------------------------------------------
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__device__ __forceinline__ void cp_async_16(uint32 shared_wr, const void* gmem_rd) {
  const uint4 v = *static_cast<const uint4*>(gmem_rd);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_wr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {}
template <int pending>
__device__ __forceinline__ void cp_async_wait() {}
#else
// Copies 16 bytes past L1.
__device__ __forceinline__ void cp_async_16(uint32 shared_wr, const void* gmem_rd) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_wr), "l"(gmem_rd) : "memory");
}
// Copies 4 bytes, counted with the others of this thread by cp_async_commit.
__device__ __forceinline__ void cp_async_4(uint32 shared_wr, const void* gmem_rd) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_wr), "l"(gmem_rd) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are in flight.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#endif

// ---- shared-memory reads -----------------------------------------------------------------------------------------------
__device__ __forceinline__ void ldmatrix_x4(uint32 (&d)[4], uint32 shared_rd) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_rd)
               : "memory");
}
__device__ __forceinline__ uint4 shared_read_128(uint32 shared_rd) {
  uint4 d;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(shared_rd)
               : "memory");
  return d;
}
__device__ __forceinline__ uint2 shared_read_64(uint32 shared_rd) {
  uint2 d;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(shared_rd) : "memory");
  return d;
}
__device__ __forceinline__ uint32 shared_read_32(uint32 shared_rd) {
  uint32 d;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(shared_rd) : "memory");
  return d;
}

__device__ __forceinline__ float2 shared_read_float2(uint32 shared_rd) {
  float2 d;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(d.x), "=f"(d.y) : "r"(shared_rd) : "memory");
  return d;
}

__device__ __forceinline__ void shared_write_float4(uint32 shared_wr, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared_wr), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ __forceinline__ void shared_write_32(uint32 shared_wr, uint32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_wr), "r"(v) : "memory");
}

// ---- bytes --------------------------------------------------------------------------------------------------------------
// Byte i of the result is the one of {low, high} that nibble i of `selector` names, or eight times its bit 7 where bit 3 of
// the nibble is set. Only the lower half of `selector` counts.
__device__ __forceinline__ uint32 permute_bytes(uint32 low, uint32 high, uint32 selector) {
  uint32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
  return d;
}

// a b + c as one IMAD, which leaves the pipe of logic and additions alone: the compiler makes a shift of a factor it knows.
__device__ __forceinline__ uint32 multiply_add(uint32 a, uint32 b, uint32 c) {
  uint32 d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// A constant that the compiler does not know.
template <uint32 value>
__device__ __forceinline__ uint32 hidden() {
  uint32 d;
  asm volatile("mov.u32 %0, %1;" : "=r"(d) : "n"(value));
  return d;
}

// ---- D += A B with 8-bit signed integers, one warp, m16 n8 k32; on sm_75 from four products of m8 n8 k16 ------------------
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__device__ __forceinline__ void mma_s8_quarter(int& d0, int& d1, uint32 a, uint32 b) {
  asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(d0), "+r"(d1) : "r"(a), "r"(b));
}
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  mma_s8_quarter(d[0], d[1], a[0], b0);
  mma_s8_quarter(d[2], d[3], a[1], b0);
  mma_s8_quarter(d[0], d[1], a[2], b1);
  mma_s8_quarter(d[2], d[3], a[3], b1);
}
#else
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// D = A B + C.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// ---- D = A B + C with 4-bit signed integers, one warp, m16 n8 k64 ------------------------------------------------------
__device__ __forceinline__ void mma_s4(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// ---- two accumulators in one 64-bit register, the first in its upper half --------------------------------------------------
// Such a register is an even one and the odd one behind it, as are the i-th and the next result of a wgmma for even i. So the
// accumulator of `first` is in the other of the two register banks than its operands, which in one bank would cost a clock.
__device__ __forceinline__ void fma_exchanged(uint64& pair, float a_first, float b_first, float a_second, float b_second) {
  asm volatile(
      "{\n.reg .f32 low, high;\n"
      "mov.b64 {low, high}, %0;\n"
      "fma.rn.f32 high, %1, %2, high;\n"
      "fma.rn.f32 low, %3, %4, low;\n"
      "mov.b64 %0, {low, high};\n}\n"
      : "+l"(pair)
      : "f"(a_first), "f"(b_first), "f"(a_second), "f"(b_second));
}
__device__ __forceinline__ void split_exchanged(uint64 pair, float& first, float& second) {
  asm("mov.b64 {%0, %1}, %2;" : "=f"(second), "=f"(first) : "l"(pair));
}

// threadIdx.x, read again wherever it is asked for rather than kept in a register.
__device__ __forceinline__ int thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- sm_90a: mbarriers, bulk copies, warpgroup matrix products ------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect_bytes(uint32 barrier, int bytes) {  // and arrives
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Copies `bytes` (a multiple of 16, both addresses aligned to 16) and counts them on `barrier`.
__device__ __forceinline__ void bulk_copy(uint32 shared_wr, const void* gmem_rd, int bytes, uint32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_wr),
               "l"(gmem_rd), "r"(bytes), "r"(barrier)
               : "memory");
}
// Thread blocks of a cluster: the number of this one, how many there are, and the address of this block's `shared` in another.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ uint32 shared_of_rank(uint32 shared, int rank) {
  uint32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
}
// All threads of the cluster meet: a thread says that it has come, and later waits for the others.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Into another thread block's shared memory, and an arrival at a barrier there, after what this thread has written.
__device__ __forceinline__ void remote_write_float4(uint32 remote_wr, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote_wr), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void remote_write_int4(uint32 remote_wr, int4 v) {
  asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(remote_wr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void remote_barrier_arrive(uint32 remote_barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}
// For such arrivals.
__device__ __forceinline__ void barrier_wait_cluster(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
  uint32 elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(elected)::"memory");
  return elected != 0;
}
// Orders this thread's ordinary writes of shared memory before what the copy engine and wgmma read.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Some threads of the block meet: `threads` of them, at barrier 1..15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this thread, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32 shared_wr, uint32 a, uint32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_wr), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32 shared_wr, uint32 a, uint32 b, uint32 c, uint32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_wr), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int registers>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// The address field of a matrix descriptor: units of 16 bytes, without the bits that say, in a cluster, whose memory it is.
__device__ __forceinline__ uint32 descriptor_address(uint32 shared_rd) { return (shared_rd & 0x3ffff) >> 4; }
// Of a K-major operand in the 128-byte swizzle: rows of 128 bytes, eight of them every 1024 bytes. Only the low half holds
// the address, so that the high one is a constant.
__device__ __forceinline__ uint64 wgmma_descriptor(uint32 address) {
  constexpr uint32 SWIZZLE_128 = 1u << 30, STRIDE = 1024 >> 4, UNUSED = 1u << 16;
  uint64 descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(address + UNUSED), "n"(SWIZZLE_128 | STRIDE));
  return descriptor;
}
// Of a K-major operand without swizzle: core matrices of 8 rows by 16 bytes, 128 bytes each; strides in bytes.
__device__ __forceinline__ uint64 wgmma_descriptor_plain(uint32 address, uint32 k_stride, uint32 row_stride) {
  uint64 descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(address + (k_stride >> 4 << 16)), "r"(row_stride >> 4));
  return descriptor;
}
#endif
#endif

// ---- programmatic dependent launch (sm_90): no effect elsewhere ---------------------------------------------------------
// Until here the kernel may overlap its predecessor in the stream: nothing the predecessor wrote is read before.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
