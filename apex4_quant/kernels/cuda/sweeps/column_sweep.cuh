// What gptq_sweep.cu and descent_sweep.cu share: 128 columns of one row of a weight in the registers of a warp.
#pragma once

constexpr int WARPS = 16;   // rows of a CTA: neighbours in memory, so that together they read whole sectors
constexpr int COLUMNS = 4;  // of a lane
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float CODE_MAX = 7.0f;

// Half to even, as PyTorch rounds.
__device__ __forceinline__ float code_of(float quotient) { return fminf(fmaxf(rintf(quotient), -CODE_MAX), CODE_MAX); }

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
