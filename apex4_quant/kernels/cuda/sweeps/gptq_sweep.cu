// GPTQ's rounding of 128 columns of a weight, one after the other, with the search for their scale (gptq.py).
//
// By separate operations that is a dozen launches a column. Here a warp has a row of W, and lane l its columns 4 l to
// 4 l + 3. A column goes to all lanes by a shuffle, each rounds it for itself, and takes its error from its own columns.
//
// Operands (in device memory; [128, n] are whole rows of [K, n]: a column of W is a row here):
//   codes    int8 [128, n], written
//   errors   float32 [128, n], written: (w - code scale) / U_ii
//   scales   float32 [n]: written if ratios > 0, else read
//   weights  float32 [128, n], corrected by the columns before these
//   factor   float32 [128, 128], of U what these columns have to do with each other; row stride ld, a multiple of 4;
//            16-byte aligned. What is below the diagonal is read and changes nothing
//   steps    float32 [ratios]: clip ratios / 7. The scale of a row is the one of absmax * steps, rounded to float16,
//            that has the least sum of (code scale - w)^2 / U_ii^2; the first of equals
//   n, ld, ratios; scale_min, scale_max: the least and largest scale
// Grid: (ceil(n / WARPS)), 32 WARPS threads. Macro: APEX4_BF16 = 0, for quantize_ptx.cuh.
#include "sweeps/column_sweep.cuh"
#include "quantize/quantize_ptx.cuh"

__device__ __forceinline__ float searched_scale(
    const float (&w)[COLUMNS], const float* factor, int ld, const float* steps, int ratios, float scale_min,
    float scale_max, int lane) {
  float absmax = 0.0f, cost[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    absmax = fmaxf(absmax, fabsf(w[c]));
    const float diagonal = factor[static_cast<long long>(COLUMNS * lane + c) * (ld + 1)];
    cost[c] = __frcp_rn(diagonal * diagonal);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) absmax = fmaxf(absmax, __shfl_xor_sync(ALL_LANES, absmax, mask));
  float best = 0.0f, least = 0.0f;
  for (int i = 0; i < ratios; ++i) {
    const float scale = low_of(pair_of(fminf(fmaxf(absmax * steps[i], scale_min), scale_max), 0.0f));
    float error = 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const float difference = __fmaf_rn(code_of(__fdiv_rn(w[c], scale)), scale, -w[c]);
      error = __fmaf_rn(difference * difference, cost[c], error);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) error += __shfl_xor_sync(ALL_LANES, error, mask);
    if (i == 0 || error < least) best = scale, least = error;
  }
  return best;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) apex4_gptq_sweep(
    signed char* codes, float* errors, float* scales, const float* weights, const float* factor, const float* steps, int n,
    int ld, int ratios, float scale_min, float scale_max) {
  const int lane = threadIdx.x & 31, row = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= n) return;  // a whole warp
  float w[COLUMNS], code_kept[COLUMNS], error_kept[COLUMNS];
  load_columns(w, weights, n, row, lane);
  float scale;
  if (ratios > 0) {
    scale = searched_scale(w, factor, ld, steps, ratios, scale_min, scale_max, lane);
    if (lane == 0) scales[row] = scale;
  } else {
    scale = scales[row];
  }
  for (int owner = 0; owner < 32; ++owner) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      const int column = COLUMNS * owner + c;
      const float* const factor_row = factor + static_cast<long long>(column) * ld;
      const float4 u = reinterpret_cast<const float4*>(factor_row)[lane];
      const float value = __shfl_sync(ALL_LANES, w[c], owner);
      const float code = code_of(__fdiv_rn(value, scale));
      const float error = __fdiv_rn(__fmaf_rn(-code, scale, value), factor_row[column]);
      subtract(w, u, error);
      if (lane == owner) code_kept[c] = code, error_kept[c] = error;
    }
  }
  store_columns(errors, error_kept, n, row, lane);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
    codes[static_cast<long long>(COLUMNS * lane + c) * n + row] = static_cast<signed char>(code_kept[c]);
}
