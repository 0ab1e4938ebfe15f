// descent_sweep.cu where codes are worth the numbers of a grid (folded weights, for 8-bit activations).
//
// Operands (in device memory; [128, n] are whole rows of [K, n]: a column of W is a row here):
//   codes      float32 [128, n], written
//   worth      float32 [128, n], of the codes, changed
//   change     float32 [128, n], written: worth after - before
//   slope      float32 [128, n], changed: what these columns have of the gradient (w - v) H
//   hessian    float32 [128, 128], of H what these columns have to do with each other; row stride ld, a multiple of 4;
//              16-byte aligned
//   curvature  float32 [128]: H's diagonal with `added`; infinite for a column whose code is to stay
//   levels     float32 [8, n]: what the codes 0 to 7 of a row are worth, not falling
//   n, ld; added: to H's diagonal
// Grid: (ceil(n / WARPS)), 32 WARPS threads.
#include "sweeps/column_sweep.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS) apex4_descent_grid_sweep(
    float* codes, float* worth, float* change, float* slope, const float* hessian, const float* curvature,
    const float* levels, int n, int ld, float added) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= n) return;  // a whole warp
  float before[COLUMNS], after[COLUMNS], code_kept[COLUMNS], gradient[COLUMNS];
  load_columns(before, worth, n, row, lane);
  load_columns(gradient, slope, n, row, lane);
  const Grid grid = grid_of(levels, n, row);
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = COLUMNS * owner + c;
      const float4 h = reinterpret_cast<const float4*>(hessian + static_cast<long long>(column) * ld)[lane];
      // A column is visited once: until then it is worth what it was before.
      const float now = __shfl_sync(ALL_LANES, before[c], owner), down = __shfl_sync(ALL_LANES, gradient[c], owner);
      const Code code = nearest(grid, now + __fdiv_rn(down, curvature[column]));
      const float moved = code.worth - now;
      subtract(gradient, h, moved);
      if (lane == owner) {
        gradient[c] = __fmaf_rn(-added, moved, gradient[c]);
        code_kept[c] = code.number, after[c] = code.worth;
      }
    }
  }
  store_columns(codes, code_kept, n, row, lane);
  store_columns(worth, after, n, row, lane);
  store_columns(slope, gradient, n, row, lane);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) before[c] = after[c] - before[c];
  store_columns(change, before, n, row, lane);
}
