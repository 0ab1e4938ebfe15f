// Sorts choices of experts by expert, and cuts each expert's into tiles of a GEMM: nothing that the host has to know.
//
// A choice is one of the top_k of one token, token * top_k + place. Operands:
//   rows          int32 [choices]   written: the choices, those of expert 0 first, each expert's in their order. Choices of
//                 experts that are not here are in none; that many entries at the end are not written
//   tiles         int32 [most_tiles][4]   written: expert, first entry of rows, entries (at most tile_rows), 0; then -1, 0, 0, 0
//   small_tiles   int32 [most_small_tiles][4], or null   the same with small_tile_rows
//   ids, expert_map   see routing.cuh
// Grid: a thread block of THREADS for each expert. Each counts all choices, so that none waits for another: it knows where
// its own begin, and puts them there. Dynamic shared memory: an int an expert. No atomic addition decides an order.

#include "experts/routing.cuh"
#include "common/ptx.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LOADS = 8;  // of a thread, on their way at once
constexpr int SUMS = 5;

struct Sums {
  int of_warp[WARPS][SUMS];
};
struct Found {
  int of_warp[WARPS];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_route(int* rows, int4* tiles, int4* small_tiles, const int* ids, const int* expert_map, int choices, int id_words,
                int all_experts, int experts, int tile_rows, int most_tiles, int small_tile_rows, int most_small_tiles) {
  extern __shared__ int counts[];
  __shared__ Sums sums;
  __shared__ Found found;
  const Routing routing = {ids, expert_map, id_words, all_experts, experts};
  const int own = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  for (int expert = threadIdx.x; expert < experts; expert += THREADS) counts[expert] = 0;
  __syncthreads();
  ptx::wait_for_predecessor();
  ptx::let_successor_start();
  for (int start = 0; start < choices; start += THREADS * LOADS) {
    int chosen[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = start + i * THREADS + threadIdx.x;
      chosen[i] = at < choices ? routing.expert(at) : -1;
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (chosen[i] >= 0) atomicAdd(&counts[chosen[i]], 1);
  }
  __syncthreads();

  // Of the experts before this one: choices, tiles, small tiles. Of all: tiles, small tiles.
  int sum[SUMS] = {};
  for (int expert = threadIdx.x; expert < experts; expert += THREADS) {
    const int count = counts[expert];
    const int large = (count + tile_rows - 1) / tile_rows, small = (count + small_tile_rows - 1) / small_tile_rows;
    if (expert < own) sum[0] += count, sum[1] += large, sum[2] += small;
    sum[3] += large, sum[4] += small;
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], mask);
    if (lane == 0) sums.of_warp[warp][i] = sum[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    sum[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum[i] += sums.of_warp[w][i];
  }

  const int count = counts[own], first = sum[0];
  const auto cut = [&](int4* table, int before, int total, int size, int most) {
    for (int tile = threadIdx.x; tile * size < count; tile += THREADS)
      table[before + tile] = make_int4(own, first + tile * size, min(size, count - tile * size), 0);
    if (own == 0)
      for (int tile = total + threadIdx.x; tile < most; tile += THREADS) table[tile] = make_int4(-1, 0, 0, 0);
  };
  cut(tiles, sum[1], sum[3], tile_rows, most_tiles);
  if (small_tiles != nullptr) cut(small_tiles, sum[2], sum[4], small_tile_rows, most_small_tiles);

  // In the order of the choices: those of a warp are consecutive, 32 a load.
  int next = first;
  for (int start = 0; start < choices && next < first + count; start += THREADS * LOADS) {
    unsigned matches[LOADS];
    int of_warp = 0;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = start + (warp * LOADS + i) * 32 + lane;
      matches[i] = __ballot_sync(0xffffffff, at < choices && routing.expert(at) == own);
      of_warp += __popc(matches[i]);
    }
    if (lane == 0) found.of_warp[warp] = of_warp;
    __syncthreads();
    int place = next;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) place += found.of_warp[w];
      next += found.of_warp[w];
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = start + (warp * LOADS + i) * 32 + lane;
      if (matches[i] >> lane & 1) rows[place + __popc(matches[i] & ((1u << lane) - 1))] = at;
      place += __popc(matches[i]);
    }
    __syncthreads();  // found is written again
  }
}
