// What the sweeps share: 128 columns of one row of a weight in the registers of a warp.
#pragma once

constexpr int WARPS = 16;   // rows of a CTA: neighbours in memory, so that together they read whole sectors
constexpr int COLUMNS = 4;  // of a lane
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float CODE_MAX = 7.0f;

// Half to even, as PyTorch rounds.
__device__ __forceinline__ float code_of(float quotient) { return fminf(fmaxf(rintf(quotient), -CODE_MAX), CODE_MAX); }

// What the codes of a row are worth, where that is no multiple of a scale; and where the next code begins to be nearer.
constexpr int LEVELS = 8;
struct Grid {
  float level[LEVELS], bound[LEVELS - 1];
};
struct Code {
  float number, worth;
};

// Of `levels`, float32 [8, n].
__device__ __forceinline__ Grid grid_of(const float* levels, int n, int row) {
  Grid grid;
#pragma unroll
  for (int i = 0; i < LEVELS; ++i) grid.level[i] = levels[static_cast<long long>(i) * n + row];
#pragma unroll
  for (int i = 0; i + 1 < LEVELS; ++i) grid.bound[i] = (grid.level[i + 1] + grid.level[i]) * 0.5f;
  return grid;
}

// Of two that are as near, and of several that are worth the same, the smaller.
__device__ __forceinline__ Code nearest(const Grid& grid, float value) {
  const float size = fabsf(value);
  float number = 0.0f, worth = grid.level[0];
#pragma unroll
  for (int i = 0; i + 1 < LEVELS; ++i) {
    if (size > grid.bound[i]) number = i + 1.0f, worth = grid.level[i + 1];
  }
  return {value < 0.0f ? -number : number, value < 0.0f ? -worth : worth};
}

// Of `rows`, float32 [128, n].
__device__ __forceinline__ void load_columns(float (&own)[COLUMNS], const float* rows, int n, int row, int lane) {
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) own[c] = rows[static_cast<long long>(COLUMNS * lane + c) * n + row];
}

__device__ __forceinline__ void store_columns(float* rows, const float (&own)[COLUMNS], int n, int row, int lane) {
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) rows[static_cast<long long>(COLUMNS * lane + c) * n + row] = own[c];
}

__device__ __forceinline__ void subtract(float (&own)[COLUMNS], const float4& factors, float amount) {
  own[0] = __fmaf_rn(-factors.x, amount, own[0]);
  own[1] = __fmaf_rn(-factors.y, amount, own[1]);
  own[2] = __fmaf_rn(-factors.z, amount, own[2]);
  own[3] = __fmaf_rn(-factors.w, amount, own[3]);
}
