// gptq_sweep.cu where codes are worth the numbers of a grid (folded weights, for 8-bit activations), and scales are final.
//
// Operands (in device memory; [128, n] are whole rows of [K, n]: a column of W is a row here):
//   codes    int8 [128, n], written
//   errors   float32 [128, n], written: (w - worth of the code) / U_ii
//   weights  float32 [128, n], corrected by the columns before these
//   factor   float32 [128, 128], of U what these columns have to do with each other; row stride ld, a multiple of 4;
//            16-byte aligned. What is below the diagonal is read and changes nothing
//   levels   float32 [8, n]: what the codes 0 to 7 of a row are worth, not falling
//   n, ld
// Grid: (ceil(n / WARPS)), 32 WARPS threads.
#include "sweeps/column_sweep.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS) apex4_gptq_grid_sweep(
    signed char* codes, float* errors, const float* weights, const float* factor, const float* levels, int n, int ld) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= n) return;  // a whole warp
  float w[COLUMNS], code_kept[COLUMNS], error_kept[COLUMNS];
  load_columns(w, weights, n, row, lane);
  const Grid grid = grid_of(levels, n, row);
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = COLUMNS * owner + c;
      const float* const factor_row = factor + static_cast<long long>(column) * ld;
      const float4 u = reinterpret_cast<const float4*>(factor_row)[lane];
      const float value = __shfl_sync(ALL_LANES, w[c], owner);
      const Code code = nearest(grid, value);
      const float error = __fdiv_rn(value - code.worth, factor_row[column]);
      subtract(w, u, error);
      if (lane == owner) code_kept[c] = code.number, error_kept[c] = error;
    }
  }
  store_columns(errors, error_kept, n, row, lane);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
    codes[static_cast<long long>(COLUMNS * lane + c) * n + row] = static_cast<signed char>(code_kept[c]);
}
