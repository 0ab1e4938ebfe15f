// The instructions of the activation quantizers that C++ has no words for. Nothing here knows the algorithms, and nothing
// elsewhere in the quantizers is inline PTX: the tests run the kernels on a CPU with this file replaced by plain C++.
//
// APEX4_BF16 (1: bfloat16, 0: float16) is the type of the halves of a pair, the lower column in the lower half.
#pragma once

#if APEX4_BF16
__device__ __forceinline__ float low_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ unsigned pair_of(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ unsigned pair_product(unsigned a, unsigned b) {
  unsigned product;  // a b + (-0): one rounding; mul.bf16x2 needs sm_90
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}
#else
__device__ __forceinline__ float low_of(unsigned pair) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(pair));
  return value;
}
__device__ __forceinline__ float high_of(unsigned pair) {
  float value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(pair));
  return value;
}
__device__ __forceinline__ unsigned pair_of(float low, float high) {
  unsigned pair;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("{ .reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
      : "=r"(pair)
      : "f"(low), "f"(high));
#endif
  return pair;
}
__device__ __forceinline__ unsigned pair_product(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
#endif

// NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a <= b || b != b ? b : a;
#endif
}

// To one unit in the last place; of numbers beyond 2^126 it is 0.
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// d += a b, m16n8k16, float32 sums.
__device__ __forceinline__ void multiply_16x8x16(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if APEX4_BF16
#define APEX4_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
#define APEX4_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif
#if __CUDA_ARCH__ >= 800
  asm(APEX4_MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // sm_75 has the half of it: k 0 .. 7, then 8 .. 15
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// 16 bytes to shared memory, in the background; on sm_75 at once.
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* from) {
#if __CUDA_ARCH__ < 800
  *shared = *from;
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

#if __CUDA_ARCH__ >= 800
// The same, or zeros where not `there`: `from` is then not read.
__device__ __forceinline__ void copy_async_or_zero(uint4* shared, const void* from, bool there) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// This thread's copies since the last time are a group. Waits for all groups but the last `pending`.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
#else
__device__ __forceinline__ void wait_for_copies() {}
#endif

// Memory that CTAs write while others read it: past L1, and never in parts.
__device__ __forceinline__ unsigned load_relaxed(const unsigned* from) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(unsigned long long* to, unsigned long long value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// The compiler delays loads while it works on those that have come. Not past this, which needs what all of them have loaded.
__device__ __forceinline__ void await_all(unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile(
      "{\n.reg .pred never;\n.reg .b32 all, more, size;\n"
      "mov.u32 size, %%ntid.x;\n"
      "setp.eq.u32 never, size, 0;\n"
      "xor.b32 all, %0, %1;\nxor.b32 more, %2, %3;\nxor.b32 all, all, more;\n"
      "setp.eq.and.u32 never, all, 0, never;\n"
      "@never trap;\n}\n" ::"r"(a),
      "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Asks for the line of `from`, which is read soon.
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L1 [%0];" ::"l"(from)); }

// Some threads of the CTA meet.
template <int id, int threads>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

// Counts this thread, and goes on.
template <int id, int threads>
__device__ __forceinline__ void named_barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// CTAs of a cluster: the number of this one, how many there are, and a write to what is `shared` here in another.
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
__device__ __forceinline__ void write_to_rank(float* shared, int rank, float value) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(here),
               "r"(rank), "f"(value)
               : "memory");
}
// All threads of the cluster meet: a thread says that it has come, and later waits for the others.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

// Programmatic dependent launch; both are without effect in an ordinary launch.
__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
