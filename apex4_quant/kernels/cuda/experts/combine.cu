// The weighted sum of what a token's experts return: y[t] = sum_j weights[t, j] outputs[t top_k + j], j in order, in float32.
//
// Operands (T: bfloat16, or float16 by the macro OUT_BF16 0):
//   y         T [tokens, n]            outputs   T [tokens * top_k, n], rows of experts that are not here are not read
//   weights   float32 [tokens, top_k]  ids, expert_map   see routing.cuh
// Grid: (tokens, ceil(n / (8 THREADS))). A thread has eight columns. `aligned`: n is a multiple of 8, and y and outputs start on
// 16 bytes.

#include "experts/routing.cuh"
#include "gemm/epilogue.cuh"

constexpr int THREADS = 128;

__device__ __forceinline__ float to_float(unsigned short bits) {
#if OUT_BF16
  return __uint_as_float(static_cast<uint32>(bits) << 16);
#else
  __half2 pair;
  const uint32 both = bits;
  *reinterpret_cast<uint32*>(&pair) = both;
  return __half22float2(pair).x;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    apex4_combine(unsigned short* y, const unsigned short* outputs, const float* weights, const int* ids,
                  const int* expert_map, int top_k, int n, int id_words, int all_experts, int experts, int aligned) {
  const Routing routing = {ids, expert_map, id_words, all_experts, experts};
  const int token = blockIdx.x, column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  ptx::wait_for_predecessor();
  ptx::let_successor_start();
  if (column >= n) return;
  float sum[8] = {};
#pragma unroll 4
  for (int j = 0; j < top_k; ++j) {
    const int choice = token * top_k + j;
    if (routing.expert(choice) < 0) continue;
    const float weight = weights[choice];
    const unsigned short* from = outputs + static_cast<long long>(choice) * n + column;
    if (aligned) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      const uint32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int c = 0; c < 8; ++c)
        sum[c] = __fmaf_rn(weight, to_float(static_cast<unsigned short>(words[c / 2] >> 16 * (c % 2))), sum[c]);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (column + c < n) sum[c] = __fmaf_rn(weight, to_float(from[c]), sum[c]);
    }
  }
  uint32 packed[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) packed[c] = pack_pair(sum[2 * c], sum[2 * c + 1]);
  unsigned short* to = y + static_cast<long long>(token) * n + column;
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  } else {
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (column + c < n) to[c] = static_cast<unsigned short>(packed[c / 2] >> 16 * (c % 2));
  }
}
