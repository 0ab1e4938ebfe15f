// Which rows of its operands a tile of a GEMM has: consecutive ones or, with the macro EXPERTS, those that chose one expert.
//
// With EXPERTS one launch multiplies the rows of all experts. Weights are stacked, [experts, ...], and a tile is an entry of
// `tiles`, written by experts/route.cu: the rows of one expert, consecutive where they are sorted by expert. They are read
// from, and written to, where two tables say, so that no one moves codes or outputs into that order or out of it:
//   tiles        int32 [tiles_m][4]   expert, first row, rows (at most TILE_M), 0; expert -1: nothing to do
//   source_rows  int32 [rows] or null: the row itself. Divided by source_divisor: the row of a_codes and a_scale
//   target_rows  int32 [rows] or null: the row itself. The row of y
#pragma once

#include "common/ptx.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/constants.cuh"

#if EXPERTS
#define EXPERT_POINTERS const int4 *tiles, const int *source_rows, const int *target_rows,
#define EXPERT_NUMBERS , int source_divisor

// Of a tile, in shared memory: main loops have no register to spare.
struct TileRows {
  int sources[TILE_M], targets[TILE_M];
  int rows, unit_start;

  __device__ __forceinline__ int source(int row) const { return sources[row]; }
  __device__ __forceinline__ int target(int row) const { return targets[row]; }
  __device__ __forceinline__ int end(int) const { return rows; }
  __device__ __forceinline__ int first_unit() const { return unit_start; }

  // By all threads: the rows of entry `own` of `tiles`, whose expert's weights and scales are w_packed and w_scale from here on.
  template <typename Scale>
  __device__ __forceinline__ void start(const int4& own, const uint8*& w_packed, const Scale*& w_scale, int n, int k_blocks, int groups,
                                        const int* source_rows, const int* target_rows, int divisor, int threads) {
    const int weight_tiles = (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N;
    read(own, source_rows, target_rows, divisor, weight_tiles * WEIGHT_TILE_N, threads);
    __syncthreads();
    const long long expert_tiles = static_cast<long long>(own.x) * weight_tiles;
    w_packed += expert_tiles * k_blocks * WEIGHT_TILE_BYTES;
    w_scale += expert_tiles * groups * WEIGHT_TILE_N;
  }

 private:
  // A barrier has to follow. `units`: of an expert.
  __device__ __forceinline__ void read(const int4& tile, const int* source_rows, const int* target_rows, int divisor, int units,
                                       int threads) {
    if (threadIdx.x == 0) rows = tile.z, unit_start = tile.x * units;
    for (int row = threadIdx.x; row < tile.z; row += threads) {
      const int sorted = tile.y + row;
      sources[row] = (source_rows == nullptr ? sorted : source_rows[sorted]) / divisor;
      targets[row] = target_rows == nullptr ? sorted : target_rows[sorted];
    }
  }
};
#else
#define EXPERT_POINTERS
#define EXPERT_NUMBERS

struct TileRows {
  __device__ __forceinline__ int source(int row) const { return row; }
  __device__ __forceinline__ int target(int row) const { return row; }
  __device__ __forceinline__ int end(int m) const { return m; }
  __device__ __forceinline__ int first_unit() const { return 0; }
};
#endif
