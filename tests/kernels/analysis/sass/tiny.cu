// Source of the *.sass beside it: nvcc -std=c++17 -arch=ARCH -cubin -D..., then nvdisasm -c. Two loops with mma, one in the
// other, and a loop without; the inner one is the main loop. WGMMA: the same on a warpgroup.
extern "C" __global__ void __launch_bounds__(128) tiny(float* y, const uint4* x, int outer, int inner) {
  __shared__ uint4 smem[256];
  const float* table = reinterpret_cast<const float*>(smem);
  unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  float total[4] = {};
#pragma unroll 1
  for (int i = 0; i < inner; ++i) smem[(threadIdx.x + i) & 255] = x[128 * i + threadIdx.x];
  __syncthreads();
#pragma unroll 1
  for (int o = 0; o < outer; ++o) {
#ifdef WGMMA
    float d[4] = {};
    unsigned long long descriptor = base >> 4;
#pragma unroll 1
    for (int i = 0; i < inner; ++i) {
      asm volatile("wgmma.fence.sync.aligned;");
      asm volatile(
          "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 0, 1, 1;\n"
          "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "l"(descriptor + i), "l"(descriptor));
      for (int c = 0; c < 4; ++c) total[c] = fmaf(d[c], table[i], total[c]);
    }
#else
    asm volatile("" ::: "memory");
#pragma unroll 1
    for (int i = 0; i < inner; ++i) {
      unsigned a[4];
      int d[4] = {};
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(base + 16 * (threadIdx.x & 31)));
      uint4 b = smem[(threadIdx.x + i) & 255];
      asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
      asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.z), "r"(b.w));
      for (int c = 0; c < 4; ++c) total[c] = fmaf(static_cast<float>(d[c]), table[i], total[c]);
    }
#endif
    asm volatile("" ::: "memory");
    y[o] = total[0];
  }
#ifdef LOCAL
  volatile float many[16];
  many[inner & 15] = total[0];
  total[1] += many[outer & 15];
#endif
  for (int c = 0; c < 4; ++c) y[4 * threadIdx.x + c] = total[c];
}
