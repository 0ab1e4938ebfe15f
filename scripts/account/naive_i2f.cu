// The control: W4A4 GEMM, groups of 128, dequantized the way public kernels do it. Not used by the library.
//
//   y[m, n] = sum_g s_a[m, g] * s_w[n, g] * float(sum_{k in g} a[m, k] * w[n, k])
//
// Every group has integer accumulators of its own that start at zero; they are converted (I2F), the two scales are
// multiplied (FMUL) and the product is added (FFMA). It is here to be compiled: `scripts/account/issue_slots count`
// counts its main loop
// beside ours and the issue-slot model must give it the published speed (docs/issue_slots.md). Operands, tile, loads and
// pipeline are those of the library's kernel, so that only the dequantization differs. Groups other than 128, bias and
// split K are left out.
//
// Operands: a_codes  uint8 [K/128, m_stride, 64]       activations, rows as sm80_activation_byte has them
//           a_scale  float [K/128, m_stride]           m_stride is a multiple of 16
//           w_packed uint8 [N_padded/64, K/128, 4096]  layout sm80
//           w_scale  half  [N_padded/64, K/128, 64]
//           y        bf16  [m, n], row stride ldy
// Launch: grid (ceil(n/128), ceil(m/128)), block 256, dynamic shared memory STAGES * 17152 bytes.
#include "common/index.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef STAGES
#define STAGES 3
#endif

constexpr int TILE = 128;                     // rows and columns of a thread block
constexpr int FRAGMENTS_M = 4, FRAGMENTS_N = 4;  // of 16 rows and of 8 columns: 64 x 32 per warp, 2 x 4 warps
constexpr int CODES_BYTES = TILE * 64;        // of one operand and k block
constexpr int W_SMEM = CODES_BYTES, A_SCALE_SMEM = 2 * CODES_BYTES, W_SCALE_SMEM = A_SCALE_SMEM + TILE * 4;
constexpr int STAGE_BYTES = W_SCALE_SMEM + TILE * 2;

__device__ __forceinline__ void copy_16_bytes(unsigned smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void load_matrices(unsigned (&a)[4], unsigned smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(smem));
}

__device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(256)
    naive_gemm(__nv_bfloat16* __restrict__ y, const unsigned char* __restrict__ a_codes,
               const float* __restrict__ a_scale, const unsigned char* __restrict__ w_packed,
               const __half* __restrict__ w_scale, int m, int n, int k_blocks, int m_stride, int ldy) {
  extern __shared__ __align__(128) unsigned char smem[];
  const unsigned smem_base = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int warp_m = warp & 1, warp_n = warp >> 1;
  const int m0 = blockIdx.y * TILE, tile0 = blockIdx.x * 2, last_tile = (n + 63) / 64 - 1;

  // One stage: 2 x 512 chunks of codes, 32 chunks of activation scales, 16 of weight scales.
  auto load_stage = [&](int block) {
    const unsigned stage = smem_base + (block % STAGES) * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = thread + 256 * i, row = m0 + chunk / 4;
      const long long a_byte = (static_cast<long long>(block) * m_stride + (row < m_stride ? row : 0)) * 64;
      copy_16_bytes(stage + 16 * chunk, a_codes + a_byte + 16 * (chunk & 3), row < m_stride);
      const int tile = min(tile0 + i, last_tile);
      copy_16_bytes(stage + W_SMEM + 16 * chunk,
                    w_packed + (static_cast<long long>(tile) * k_blocks + block) * 4096 + 16 * thread, true);
    }
    if (thread < 32) {
      const int row = m0 + 4 * thread;
      const long long at = static_cast<long long>(block) * m_stride + (row < m_stride ? row : 0);
      copy_16_bytes(stage + A_SCALE_SMEM + 16 * thread, a_scale + at, row < m_stride);
    } else if (thread < 48) {
      const int tile = min(tile0 + (thread - 32) / 8, last_tile);
      const long long at = (static_cast<long long>(tile) * k_blocks + block) * 64 + 8 * (thread & 7);
      copy_16_bytes(stage + W_SCALE_SMEM + 16 * (thread - 32), w_scale + at, true);
    }
  };

  float total[FRAGMENTS_M][FRAGMENTS_N][4] = {};
#pragma unroll
  for (int block = 0; block < STAGES - 1; ++block) {
    if (block < k_blocks) load_stage(block);
    asm volatile("cp.async.commit_group;");
  }

  // Main loop: one group of 128 a turn.
#pragma unroll 1
  for (int block = 0; block < k_blocks; ++block) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    if (block + STAGES - 1 < k_blocks) load_stage(block + STAGES - 1);
    asm volatile("cp.async.commit_group;");

    const unsigned char* stage = smem + (block % STAGES) * STAGE_BYTES;
    const unsigned stage_address = smem_base + (block % STAGES) * STAGE_BYTES;
    uint4 w[FRAGMENTS_N];
    float2 w_factor[FRAGMENTS_N];
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
      const int fragment = FRAGMENTS_N * warp_n + j;  // of the sixteen of the tile
      w[j] = *reinterpret_cast<const uint4*>(stage + W_SMEM + sm80_weight_byte(fragment, lane));
      const __half* scales = reinterpret_cast<const __half*>(stage + W_SCALE_SMEM) + 64 * (fragment / 8);
      w_factor[j] = __half22float2(*reinterpret_cast<const __half2*>(scales + sm80_scale_position(fragment % 8, lane)));
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i) {
      const int row0 = 64 * warp_m + 16 * i;
      unsigned a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        load_matrices(a[step], stage_address + sm80_activation_byte(row0 + sm80_ldmatrix_row(lane),
                                                                    sm80_ldmatrix_chunk(lane, step)));
      }
      const float* a_factors = reinterpret_cast<const float*>(stage + A_SCALE_SMEM) + row0;
      const float a_factor[2] = {a_factors[accumulator_row(lane, 0)], a_factors[accumulator_row(lane, 1)]};
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; ++j) {
        int sum[4] = {0, 0, 0, 0};
        multiply(sum, a[0], w[j].x, w[j].y);
        multiply(sum, a[1], w[j].z, w[j].w);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float factor = a_factor[c / 2] * (c % 2 ? w_factor[j].y : w_factor[j].x);
          total[i][j][c] += static_cast<float>(sum[c]) * factor;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = m0 + 64 * warp_m + 16 * i + accumulator_row(lane, c / 2);
        const int column = tile0 * 64 + 32 * warp_n + 8 * j + accumulator_column(lane, c % 2);
        if (row < m && column < n) y[static_cast<long long>(row) * ldy + column] = __float2bfloat16(total[i][j][c]);
      }
    }
  }
}
