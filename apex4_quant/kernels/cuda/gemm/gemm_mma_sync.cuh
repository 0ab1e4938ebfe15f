// What the two GEMMs of mma.sync share: the copies of codes into a stage, which blocks a thread block has, and who adds partial sums.
// The includer's macros are TILE_M, TILE_N, WARPS_M, WARPS_N and EXPERTS.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/tile_rows.cuh"
#include "gemm/constants.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;

// The blocks of 128 inputs that split `split` of `splits` has.
struct BlockRange {
  int first, last;
  __device__ __forceinline__ BlockRange(int k_blocks, int split, int splits)
      : first(static_cast<int>(static_cast<long long>(k_blocks) * split / splits)),
        last(static_cast<int>(static_cast<long long>(k_blocks) * (split + 1) / splits)) {}
};

// The copies of both operands' codes into a stage. Each thread keeps running pointers to the pieces it copies: 16-byte chunks tid,
// tid + THREADS, ... Rows past m_stride and weight tiles past N are not copied: what stands in their place reaches only outputs that
// are not stored. A row of a_codes has ROW_BYTES, its chunks where `place` says (index.cuh).
template <int ROW_BYTES, int (*place)(int row, int chunk)>
struct CodeLoader {
  static constexpr int A_COPIES = (TILE_M * ROW_BYTES / 16 + THREADS - 1) / THREADS;
  static constexpr int COPIES_PER_TILE = WEIGHT_TILE_BYTES / 16 / THREADS;
  static_assert(WEIGHT_TILE_BYTES % (16 * THREADS) == 0, "a weight tile is copied in whole rounds of all threads");

  const uint8 *a_gmem_rd, *w_gmem_rd;
  int a_rows, w_tiles;  // of this tile, that exist

  // At block kb of the tile's tokens from m0 on.
  template <typename Problem>
  __device__ __forceinline__ void start_tokens(const Problem& p, int kb, int m0) {
    [[maybe_unused]] const int tid = threadIdx.x;
#if EXPERTS
    a_gmem_rd = p.a_codes + static_cast<long long>(kb) * p.m_stride * ROW_BYTES;
#else
    a_rows = p.m_stride - m0;
    a_gmem_rd = p.a_codes + (static_cast<long long>(kb) * p.m_stride + m0) * ROW_BYTES + 16 * tid;
#endif
  }
  // At block kb of the weights from tile `tile` of w_packed on.
  template <typename Problem>
  __device__ __forceinline__ void start_weights(const Problem& p, int kb, int tile) {
    const int tid = threadIdx.x;
    w_tiles = (p.n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N - tile;
    w_gmem_rd = p.w_packed + (static_cast<long long>(tile) * p.k_blocks + kb) * WEIGHT_TILE_BYTES + 16 * tid;
  }

  // Rows of this tile, that exist.
  __device__ __forceinline__ int rows_here(int m, const TileRows& rows) const {
#if EXPERTS
    return rows.end(m);
#else
    return min(a_rows, TILE_M);
#endif
  }

  // Codes of the next block of `end` tokens, this thread's first chunk to `chunk_smem_wr`.
  __device__ __forceinline__ void load_tokens(const TileRows& rows, int end, uint32 chunk_smem_wr) {
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) {
      constexpr int ROWS = THREADS * 16 / ROW_BYTES;  // of one round
      static_assert(ROWS % 8 == 0, "the swizzle repeats");
      const int row = static_cast<int>(threadIdx.x) * 16 / ROW_BYTES + i * ROWS;
      if (row < end) {
#if EXPERTS
        // A row's chunks are in the order that its place in a_codes says, and here in that of its place in the tile.
        const int chunk_wr = threadIdx.x * 16 % ROW_BYTES / 16, first_row = threadIdx.x * 16 / ROW_BYTES;
        const int chunk = place(first_row, chunk_wr) % ROW_BYTES / 16;
        const uint8* from = a_gmem_rd + place(rows.source(row), chunk);
#else
        const uint8* from = a_gmem_rd + i * 16 * THREADS;
#endif
        ptx::cp_async_16(chunk_smem_wr + i * 16 * THREADS, from);
      }
    }
  }

  // Those of the weights, likewise.
  template <typename Problem>
  __device__ __forceinline__ void load_weights(const Problem& p, uint32 chunk_smem_wr) {
#pragma unroll
    for (int t = 0; t < TILE_N / WEIGHT_TILE_N; ++t) {
      if (t >= w_tiles) break;
#pragma unroll
      for (int i = 0; i < COPIES_PER_TILE; ++i) {
        ptx::cp_async_16(chunk_smem_wr + t * WEIGHT_TILE_BYTES + i * 16 * THREADS,
                         w_gmem_rd + static_cast<long long>(t * p.k_blocks) * WEIGHT_TILE_BYTES + i * 16 * THREADS);
      }
    }
  }

  // To the next block.
  template <typename Problem>
  __device__ __forceinline__ void advance(const Problem& p) {
    a_gmem_rd += p.m_stride * ROW_BYTES;
    w_gmem_rd += WEIGHT_TILE_BYTES;
  }
};

// By all threads when they have written their partial sums of a tile: whether this thread block is the last of `splits`, which adds them.
__device__ __forceinline__ bool comes_last(uint32* counter, int tile, int splits) {
  __threadfence();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(&counter[tile], 1) == splits - 1;
    if (last) counter[tile] = 0;  // ready for the next launch
  }
  if (!__syncthreads_or(last)) return false;
  __threadfence();
  return true;
}
