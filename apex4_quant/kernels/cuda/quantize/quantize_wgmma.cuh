// The product of 64 rows with a block's matrix as wgmma makes it. For sm_90a.
//
// A wgmma's registers are those of mma.m16n8k16, warp w of a warpgroup having rows 16 w .. 16 w + 15 and d[t] being the tile of
// the columns 8 t .. 8 t + 7; and its sums were bit for bit the same wherever they were compared (README.md, section 9).
#pragma once

#include "quantize/quantize_dense.cuh"

// d = a b (`keep` 0) or d += a b, one step of k16. `b`: the descriptor of its part of the matrix.
__device__ __forceinline__ void multiply_64x128x16(
    float (&d)[TILES][4], const unsigned (&a)[4], unsigned long long b, int keep) {
#if APEX4_BF16
#define APEX4_WGMMA "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"
#else
#define APEX4_WGMMA "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"
#endif
  asm volatile("{\n.reg .pred keep;\n"
               "setp.ne.b32 keep, %69, 0;\n" APEX4_WGMMA " {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
               "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
               "%62, %63"
               "}, {%64, %65, %66, %67}, %68, keep, 1, 1, 0;\n}\n"
               : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
                 "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
                 "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]),
                 "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]),
                 "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]),
                 "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),
                 "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), "+f"(d[12][0]),
                 "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
                 "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]),
                 "+f"(d[15][3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}

// All threads of a warpgroup. `a`: the fragments of the warp's rows; `matrix`: in shared memory, in the order of dense_core_word.
__device__ __forceinline__ void multiply_64x128(float (&d)[TILES][4], const unsigned (&a)[STEPS][4], const unsigned* matrix) {
  // Without swizzle: core matrices of eight columns by 16 bytes along k, 128 bytes each; their strides along k and n.
  constexpr unsigned K_STRIDE = 4 * dense_core_word(0, 0, 1, 0), N_STRIDE = 4 * dense_core_word(0, 1, 0, 0);
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(matrix));
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned long long descriptor;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(descriptor)
        : "r"((address + 4 * dense_core_word(step, 0, 0, 0)) >> 4 | K_STRIDE >> 4 << 16), "r"(N_STRIDE >> 4));
    multiply_64x128x16(d, a[step], descriptor, step > 0);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// What this thread has written to shared memory is there for wgmma, after the next barrier.
__device__ __forceinline__ void write_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
