// Which tiles, and which of their blocks, a thread block of the many-token GEMMs of sm_90a computes, and how tiles that several
// share are added. The includer has defined Problem, TILE_M, SUMS, WARPGROUP.
#pragma once

#include "common/ptx.cuh"
#include "gemm/epilogue.cuh"

// A thread block's work is a sequence of items: a tile, or a range of its blocks.
struct Item {
  Tile tile;
  int first_block, last_block;
  int part, parts;  // which of the tile's ranges
};
struct Schedule {
  int next;  // tile; or block of all tiles in a row

  __device__ __forceinline__ explicit Schedule(const Problem& p) {
    next = p.span == 0 ? blockIdx.x : blockIdx.x * p.span;
  }
  __device__ __forceinline__ int end(const Problem& p) const {
    const int tiles = p.tiles_m * p.tiles_n;
    return p.span == 0 ? tiles : min(tiles * p.k_blocks, static_cast<int>(blockIdx.x + 1) * p.span);
  }
  __device__ __forceinline__ bool done(const Problem& p) const { return next >= end(p); }
  __device__ __forceinline__ Item item(const Problem& p) const {
    if (p.span == 0) return {tile_at(next, p.tiles_m, p.tiles_n), 0, p.k_blocks, 0, 1};
    const int index = next / p.k_blocks, start = index * p.k_blocks;
    const int first_owner = start / p.span, last_owner = (start + p.k_blocks - 1) / p.span;
    return {tile_at(index, p.tiles_m, p.tiles_n), next - start, min(p.k_blocks, end(p) - start),
            static_cast<int>(blockIdx.x) - first_owner, last_owner - first_owner + 1};
  }
  __device__ __forceinline__ void advance(const Problem& p) {
    next = p.span == 0 ? next + gridDim.x : min(end(p), (next / p.k_blocks + 1) * p.k_blocks);
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename Sum>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float4 type;
};
template <>
struct VectorOf<int> {
  typedef int4 type;
};

// Adds the partial sums of all parts of a tile in their order, in whichever warpgroup comes last. False for the others.
// `tile_n` counts tiles of 64 outputs; `barrier` is a named one of this warpgroup alone, `flag` one of its variables.
template <typename Sum>
__device__ __forceinline__ bool add_parts(const Problem& p, const Item& item, int tile_n, int barrier, bool& flag, Sum (&acc)[SUMS]) {
  typedef typename VectorOf<Sum>::type Vector;
  const int tile = tile_n * p.tiles_m + item.tile.m;
  const int thread = ptx::thread() % WARPGROUP;
  constexpr int VECTORS = SUMS / 4;
  const int most_parts = (p.k_blocks + p.span - 1) / p.span + 1;
  Vector* slice = reinterpret_cast<Vector*>(p.partial) + static_cast<long long>(tile) * most_parts * VECTORS * WARPGROUP + thread;
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    slice[(item.part * VECTORS + j) * WARPGROUP] = Vector{acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
  }
  __threadfence();
  ptx::named_barrier(barrier, WARPGROUP);
  if (thread == 0) {
    const bool last = atomicAdd(&p.counter[tile], 1) == item.parts - 1;
    if (last) p.counter[tile] = 0;  // ready for the next launch
    flag = last;
  }
  ptx::named_barrier(barrier, WARPGROUP);
  if (!flag) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < SUMS; ++i) acc[i] = 0;
#pragma unroll 1
  for (int part = 0; part < item.parts; ++part) {
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const Vector v = __ldcg(&slice[(part * VECTORS + j) * WARPGROUP]);
      acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.z, acc[4 * j + 3] += v.w;
    }
  }
  return true;
}

#endif
