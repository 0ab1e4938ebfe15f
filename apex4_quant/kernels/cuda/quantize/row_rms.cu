// 1 / sqrt(mean(x^2) + eps) of every row, in float32: what quantize_dense.cu needs beside x where its input is RMSNorm(x).
// Where it is RMSNorm(x + residual), also the sum, of which the root is: `total` is then x for quantize_dense.cu.
//
// Operands: inverse_rms float32 [m] (written); x T [m, k], row stride ldx elements; ADD_RMS_NORM: residual T [m, k], row stride
// ld_residual, and total T [m, k], dense (written); m, k, ldx; eps; aligned as in quantize_rows.cu, of total too.
// Grid: (m), 256 threads, ADD_RMS_NORM 512. Macros: APEX4_BF16, APEX4_INPUT (PLAIN or ADD_RMS_NORM), APEX4_FORMAT (not used).
#include "quantize/quantize.cuh"

constexpr int THREADS = APEX4_INPUT == APEX4_ADD_RMS_NORM ? 512 : 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    apex4_row_rms(float* inverse_rms, const unsigned short* x,
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
                  const unsigned short* residual, unsigned short* total, int m, int k, int ldx, int ld_residual,
#else
                  int m, int k, int ldx,
#endif
                  float eps, int aligned) {
  __shared__ float warp_sums[THREADS / 32];
  let_dependents_start();
  wait_for_inputs();
  const int row = blockIdx.x;
  if (row >= m) return;
  const unsigned short* const x_row = x + static_cast<long long>(row) * ldx;
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
  const unsigned short* const residual_row = residual + static_cast<long long>(row) * ld_residual;
  unsigned short* const total_row = total + static_cast<long long>(row) * k;
  float sum = squares_of_warp<THREADS, 2>(k, [=](unsigned* pairs, int column) {
    unsigned others[4];
    load_octet(pairs, x_row, column, k, true, aligned);
    load_octet(others, residual_row, column, k, true, aligned);
    add_octet(pairs, others);
    store_octet(total_row, pairs, column, k, true, aligned);
  });
#else
  float sum = squares_of_warp<THREADS, 2>(x_row, k, aligned);
#endif
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) sum += warp_sums[i];
  inverse_rms[row] = inverse_rms_of(sum, __frcp_rn(static_cast<float>(k)), eps);
}
