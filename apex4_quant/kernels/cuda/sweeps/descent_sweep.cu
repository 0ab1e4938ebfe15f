// One visit of coordinate descent to the codes of 128 columns, one after the other (code_refinement.py). As in
// gptq_sweep.cu, a warp has a row of W, and lane l its columns 4 l to 4 l + 3.
//
// Operands (in device memory; [128, n] are whole rows of [K, n]: a column of W is a row here):
//   codes      float32 [128, n], changed
//   change     float32 [128, n], written: (code after - before) step
//   slope      float32 [128, n], changed: what these columns have of the gradient (w - v) H
//   hessian    float32 [128, 128], of H what these columns have to do with each other; row stride ld, a multiple of 4;
//              16-byte aligned
//   curvature  float32 [128]: H's diagonal with `added`; infinite for a column whose code is to stay
//   step       float32 [n], the scales
//   n, ld; added: to H's diagonal
// Grid: (ceil(n / WARPS)), 32 WARPS threads.
#include "sweeps/column_sweep.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS) apex4_descent_sweep(
    float* codes, float* change, float* slope, const float* hessian, const float* curvature, const float* step, int n,
    int ld, float added) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= n) return;  // a whole warp
  const float scale = step[row];
  float before[COLUMNS], code[COLUMNS], gradient[COLUMNS];
  load_columns(before, codes, n, row, lane);
  load_columns(gradient, slope, n, row, lane);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) code[c] = before[c];
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = COLUMNS * owner + c;
      const float4 h = reinterpret_cast<const float4*>(hessian + static_cast<long long>(column) * ld)[lane];
      const float now = __shfl_sync(ALL_LANES, code[c], owner), down = __shfl_sync(ALL_LANES, gradient[c], owner);
      const float best = code_of(now + __fdiv_rn(down, curvature[column] * scale));
      const float moved = (best - now) * scale;
      subtract(gradient, h, moved);
      if (lane == owner) {
        gradient[c] = __fmaf_rn(-added, moved, gradient[c]);
        code[c] = best;
      }
    }
  }
  store_columns(codes, code, n, row, lane);
  store_columns(slope, gradient, n, row, lane);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) before[c] = (code[c] - before[c]) * scale;
  store_columns(change, before, n, row, lane);
}
