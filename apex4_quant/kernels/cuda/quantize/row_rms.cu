// 1 / sqrt(mean(x^2) + eps) of every row, in float32: what quantize_dense.cu needs beside x where its input is RMSNorm(x).
//
// Operands: inverse_rms float32 [m] (written); x T [m, k], row stride ldx elements; m, k, ldx; eps; aligned as in
// quantize_rows.cu. Grid: (m), 256 threads. Macros: APEX4_BF16, APEX4_FORMAT (not used).
#include "quantize/quantize.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    apex4_row_rms(float* inverse_rms, const unsigned short* x, int m, int k, int ldx, float eps, int aligned) {
  __shared__ float warp_sums[THREADS / 32];
  let_dependents_start();
  wait_for_inputs();
  const int row = blockIdx.x;
  if (row >= m) return;
  float sum = squares_of_warp<THREADS, 2>(x + static_cast<long long>(row) * ldx, k, aligned);
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) sum += warp_sums[i];
  inverse_rms[row] = inverse_rms_of(sum, __frcp_rn(static_cast<float>(k)), eps);
}
