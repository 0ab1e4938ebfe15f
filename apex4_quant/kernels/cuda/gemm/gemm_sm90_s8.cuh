// What the two 8-bit GEMMs of sm_90a share: the problem, and what finished sums are multiplied by. The includer has defined TILE_M.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"
#include "gemm/constants.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/wgmma.cuh"

constexpr int SUMS = TILE_M / 2;  // accumulators of a lane, of 64 outputs of its warpgroup
static_assert(TILE_M % 8 == 0 && TILE_M <= 256, "the tokens of one wgmma");

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const unsigned short* w_ratio;
  const float* w_unit;
  const float* bias;
  int* partial;
  uint32* counter;
  int m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n;

  __device__ __forceinline__ int weight_tiles() const { return (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N; }
  __device__ __forceinline__ const unsigned short* weight_scales() const { return w_ratio; }
  __device__ __forceinline__ int groups() const { return (k_blocks + blocks_per_group - 1) / blocks_per_group; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a lane multiplies its sums by and adds to them, of outputs r and r + 8.
struct Outputs {
  float unit[2], bias[2];

  __device__ __forceinline__ Outputs(const Problem& p, int tile_n) {
    const int thread = ptx::thread() % WARPGROUP;
    const int row = tile_n * WEIGHT_TILE_N + 16 * (thread / 32) + accumulator_row(thread % 32, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = row + 8 * half < p.n;
      unit[half] = exists ? p.w_unit[row + 8 * half] : 0.0f;
      bias[half] = exists && p.bias != nullptr ? p.bias[row + 8 * half] : 0.0f;
    }
  }
};

#endif
