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

  // By all threads; a barrier has to follow. `units`: of an expert.
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
