// The scale of every row from the largest magnitudes of its blocks: between the two launches of quantize_dense.cu to eight bits.
//
// Operands: scales float32 [m] (written), block_absmax float32 [k_blocks, m_stride]; k_blocks, m, m_stride.
// Grid: (ceil(m / 32)), THREADS threads: each warp has every WARPS-th block of 32 rows. Macros: APEX4_BF16, APEX4_FORMAT 8.
#include "quantize/quantize_s8.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS)
    apex4_row_scale(float* scales, const float* block_absmax, int k_blocks, int m, int m_stride) {
  __shared__ float of_warps[WARPS][32];
  let_dependents_start();
  wait_for_inputs();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = 32 * blockIdx.x + lane;
  float absmax = 0.0f;
  if (row < m)
#pragma unroll 4
    for (int block = warp; block < k_blocks; block += WARPS)
      absmax = max_nan(absmax, block_absmax[static_cast<long long>(block) * m_stride + row]);
  of_warps[warp][lane] = absmax;
  __syncthreads();
  if (warp > 0 || row >= m) return;
#pragma unroll
  for (int i = 1; i < WARPS; ++i) absmax = max_nan(absmax, of_warps[i][lane]);
  scales[row] = token_scale_of(absmax);
}
