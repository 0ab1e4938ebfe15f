// What the two GEMMs of sm_90a for few tokens share (gemm_sm90_decode.cu says why they are so): the ring of stages, which tiles and
// stages a thread block has, the warps that copy, and how the sums of warpgroups and of a cluster's thread blocks are added. The
// includer has defined
//   Problem      with `weight_scales()`, what stands beside a group's codes
//   Stage        PARTS blocks: a_codes (unless QUANTIZES), w_packed [TILES][PARTS], barriers full and empty; `weight_scales()`: where what
//                stands beside the codes is; `token_scales()`: where the tokens' scales of groups are, or NONE
//   Shared       stages, sums, second_sums, sent, taken; `clear()`, by all threads that do not copy, before any reads it
//   TILES        of weights that a thread block has side by side: a tile of the GEMM has 64 TILES outputs
//   LANE_SUMS    accumulators of a lane; VECTORS, a quarter of them
//   TILE_M, PARTS, STAGES, STAGE_BYTES, THREADS, COPYING_WARPS, QUANTIZES, and the named barriers WRITTEN, READ, PREPARED
//   KEEPS_STAGE  whether the stage's address is kept in a register: see Ring
#pragma once

#include "common/ptx.cuh"
#include "gemm/constants.cuh"
#include "gemm/epilogue.cuh"

struct Ring {
  uint32 stage, parity, end;
  __device__ __forceinline__ explicit Ring(const Shared& s) : stage(ptx::shared_address(s.stages)), parity(0) {
    if (KEEPS_STAGE) asm volatile("" : "+r"(stage));  // rather than worked out again in the main loop
    end = stage + STAGES * STAGE_BYTES;
  }
  __device__ __forceinline__ void next() {
    stage += STAGE_BYTES;
    if (stage == end) stage -= STAGES * STAGE_BYTES, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A thread block computes every `clusters`-th tile; of a tile's stages, those from `rank` on, every `ranks`-th.
struct Share {
  int rank, ranks, cluster, clusters;
  __device__ __forceinline__ Share()
      : rank(ptx::cluster_rank()), ranks(ptx::cluster_size()), cluster(blockIdx.x / ranks), clusters(gridDim.x / ranks) {}
  __device__ __forceinline__ int first_block() const { return rank * PARTS; }
  __device__ __forceinline__ int step() const { return ranks * PARTS; }
};

// ---- warps that copy: weights and their scales; the tokens' codes; the tokens' scales, if groups have their own ----------------

enum Role { WEIGHTS, CODES, SCALES };

template <Role role>
struct Producer {
  Ring ring;

  // What a warp copies of one stage, `count` blocks from `block` on.
  __device__ __forceinline__ void copy(const Problem& p, const Tile& tile, int block, int count) {
    [[maybe_unused]] const int m0 = tile.m * TILE_M, rows = min(TILE_M, p.m_stride - m0);
    const uint32 full = ring.stage + offsetof(Stage, full);
    if (role == WEIGHTS) {
      const int tiles = TILES == 1 ? 1 : min(TILES, p.weight_tiles() - tile.n * TILES);
      ptx::barrier_expect_bytes(full, tiles * count * (WEIGHT_TILE_BYTES + WEIGHT_SCALE_BYTES));
      for (int t = 0; t < tiles; ++t) {
        const long long n = tile.n * TILES + t;
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_packed) + t * PARTS * WEIGHT_TILE_BYTES,
                       p.w_packed + (n * p.k_blocks + block) * WEIGHT_TILE_BYTES, count * WEIGHT_TILE_BYTES, full);
        const auto* w_scale_gmem_rd = p.weight_scales() + n * p.groups() * WEIGHT_TILE_N;
        const uint32 w_scale_smem_wr = ring.stage + Stage::weight_scales() + t * PARTS * WEIGHT_SCALE_BYTES;
        if (p.blocks_per_group == 1) {  // the usual case needs no copy for each
          ptx::bulk_copy(w_scale_smem_wr, w_scale_gmem_rd + block * WEIGHT_TILE_N, count * WEIGHT_SCALE_BYTES, full);
          continue;
        }
        for (int i = 0; i < count; ++i) {
          ptx::bulk_copy(w_scale_smem_wr + i * WEIGHT_SCALE_BYTES,
                         w_scale_gmem_rd + (block + i) / p.blocks_per_group * WEIGHT_TILE_N, WEIGHT_SCALE_BYTES, full);
        }
      }
    }
#if !QUANTIZES
    else if (role == CODES) {
      ptx::barrier_expect_bytes(full, count * rows * BLOCK);
      const uint8* a_codes_gmem_rd = p.a_codes + (static_cast<long long>(block) * p.m_stride + m0) * BLOCK;
      if (rows == TILE_M && p.m_stride == TILE_M) {  // blocks follow each other here and there
        ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes), a_codes_gmem_rd, count * TILE_M * BLOCK, full);
        return;
      }
      for (int i = 0; i < count; ++i, a_codes_gmem_rd += static_cast<long long>(p.m_stride) * BLOCK) {
        ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes) + i * TILE_M * BLOCK, a_codes_gmem_rd, rows * BLOCK, full);
      }
    } else {
      ptx::barrier_expect_bytes(full, count * rows * 4);
      for (int i = 0; i < count; ++i) {
        ptx::bulk_copy(ring.stage + Stage::token_scales() + i * TILE_M * 4,
                       p.a_scale + static_cast<long long>((block + i) / p.blocks_per_group) * p.m_stride + m0, rows * 4, full);
      }
    }
#endif
  }

  __device__ __forceinline__ void run(const Problem& p, const Share& share) {
    // Weights do not wait for the kernel that writes the activations.
    if (role != WEIGHTS) ptx::wait_for_predecessor();
    for (int index = share.cluster; index < p.tiles_m * p.tiles_n; index += share.clusters) {
      const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
#pragma unroll 1
      for (int block = share.first_block(); block < p.k_blocks; block += share.step()) {
        ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
        if (ptx::elect_one()) copy(p, tile, block, min(PARTS, p.k_blocks - block));
        ring.next();
      }
    }
  }
};

// ---- the sums of a tile ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 vector_of(const float (&acc)[LANE_SUMS], int j) {
  return make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
}
__device__ __forceinline__ void add(float (&acc)[LANE_SUMS], int j, float4 v) {
  acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.z, acc[4 * j + 3] += v.w;
}

// Of one warpgroup, for all its tiles.
struct Adder {
  bool met;         // the cluster: its barriers are ready
  uint32 parity;    // of `sent` and `taken`

  __device__ __forceinline__ Adder(const Share& share, int part) : met(share.ranks == 1), parity(0) {
    if (part == 0) ptx::named_barrier_arrive(READ, WARPGROUP * PARTS);
  }

  // By the warpgroups `part` > 0: their sums, to the first one.
  __device__ __forceinline__ void give(Shared& s, int part, int thread, const float (&acc)[LANE_SUMS]) const {
    ptx::named_barrier(READ, WARPGROUP * PARTS);
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) s.sums[part - 1][j][thread] = vector_of(acc, j);
    ptx::named_barrier_arrive(WRITTEN, WARPGROUP * PARTS);
  }

  // By the first warpgroup: adds the others' sums, and those of a cluster's second thread block. False there.
  __device__ __forceinline__ bool take(Shared& s, const Share& share, int thread, float (&acc)[LANE_SUMS]) {
    ptx::named_barrier(WRITTEN, WARPGROUP * PARTS);
#pragma unroll
    for (int other = 0; other < PARTS - 1; ++other) {
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) add(acc, j, s.sums[other][j][thread]);
    }
    ptx::named_barrier_arrive(READ, WARPGROUP * PARTS);
    if (!met) ptx::cluster_wait(), met = true;
    if (share.rank == 1) {
      ptx::barrier_wait_cluster(ptx::shared_address(&s.taken), parity ^ 1);
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        ptx::remote_write_float4(ptx::shared_of_rank(ptx::shared_address(&s.second_sums[j][thread]), 0), vector_of(acc, j));
      }
      ptx::remote_barrier_arrive(ptx::shared_of_rank(ptx::shared_address(&s.sent), 0));
      parity ^= 1;
      return false;
    }
    if (share.ranks == 2) {
      ptx::barrier_wait_cluster(ptx::shared_address(&s.sent), parity);
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) add(acc, j, s.second_sums[j][thread]);
      ptx::remote_barrier_arrive(ptx::shared_of_rank(ptx::shared_address(&s.taken), 1));
      parity ^= 1;
    }
    return true;
  }

  // After the last tile.
  __device__ __forceinline__ void end(int part) const {
    if (part > 0) ptx::named_barrier(READ, WARPGROUP * PARTS);
    if (!met) ptx::cluster_wait();
  }
};

// ---- a kernel's start and end ---------------------------------------------------------------------------------------------

// The warp that copies weights makes the barriers and goes on; the others wait for it.
__device__ __forceinline__ void prepare(Shared& s, int warp) {
  ptx::let_successor_start();  // it waits for the whole of this kernel before it reads or writes anything of it
  if (warp != 4 * PARTS + WEIGHTS) {
    s.clear();
    ptx::named_barrier(PREPARED, THREADS);
    return;
  }
  if (ptx::elect_one()) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].full), COPYING_WARPS);
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].empty), 4 * PARTS);  // a warp each
    }
    ptx::barrier_init(ptx::shared_address(&s.sent), WARPGROUP);
    ptx::barrier_init(ptx::shared_address(&s.taken), WARPGROUP);
    ptx::fence_barrier_init();
  }
  __syncwarp();
  ptx::named_barrier_arrive(PREPARED, THREADS);
}

// What the other block of a cluster may write here, it has written before this returns.
__device__ __forceinline__ void leave(const Share& share) {
  if (share.ranks > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

#endif
