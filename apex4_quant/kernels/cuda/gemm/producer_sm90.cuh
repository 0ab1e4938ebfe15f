// The warps of the many-token GEMMs of sm_90a that copy into the ring of stages. The includer has defined, beside what ring_sm90.cuh and
// schedule_sm90.cuh need: CONSUMERS; in Problem `weight_scales()`, what stands beside a group's codes; and in Stage, where that stands,
// `weight_scales()`, and the tokens' scales of a group, `token_scales()`: NONE if a token has one scale.
#pragma once

#include "gemm/ring_sm90.cuh"
#include "gemm/schedule_sm90.cuh"
#include "gemm/constants.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Warps: a tile of weights with its scales each; the tokens.
constexpr int PRODUCERS = CONSUMERS + 1;

// Announces and starts the copies of a warp, by one elected lane: the loop is all lanes', so that its addresses can be in
// uniform registers. They run along, as these warps share their schedulers with warps that multiply, where every
// instruction is felt.
template <int role>  // warp of the producer warpgroup
struct Producer {
  Ring ring;

  // A tile of weights and its scales; or, past N, nothing.
  __device__ __forceinline__ void copy_weights(const Problem& p, const Item& item) {
    const long long tile = item.tile.n * CONSUMERS + role;
    const bool exists = tile < p.weight_tiles();
    const uint8* w_packed_gmem_rd = p.w_packed + (tile * p.k_blocks + item.first_block) * WEIGHT_TILE_BYTES;
    const auto* w_scale_gmem_rd = p.weight_scales() + (tile * p.groups() + item.first_block / p.blocks_per_group) * WEIGHT_TILE_N;
    int left_of_group = p.blocks_per_group - item.first_block % p.blocks_per_group;
#pragma unroll 1
    for (int left = item.last_block - item.first_block; left > 0; --left) {
      const uint32 full = ring.stage + offsetof(Stage, full);
      ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
      const bool one = ptx::elect_one();
      if (one) ptx::barrier_expect_bytes(full, exists ? WEIGHT_TILE_BYTES + WEIGHT_SCALE_BYTES : 0);
      if (one && exists) {
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_packed) + role * WEIGHT_TILE_BYTES, w_packed_gmem_rd, WEIGHT_TILE_BYTES, full);
        ptx::bulk_copy(ring.stage + Stage::weight_scales() + role * WEIGHT_SCALE_BYTES, w_scale_gmem_rd, WEIGHT_SCALE_BYTES, full);
      }
      w_packed_gmem_rd += WEIGHT_TILE_BYTES;
      if (--left_of_group == 0) w_scale_gmem_rd += WEIGHT_TILE_N, left_of_group = p.blocks_per_group;
      ring.next();
    }
  }

  // The tokens' codes, and scales if groups have their own.
  __device__ __forceinline__ void copy_tokens(const Problem& p, const Item& item) {
    const bool scales = Stage::token_scales() != NONE;  // known to the compiler
    const int m0 = item.tile.m * TILE_M, rows = min(TILE_M, p.m_stride - m0);
    const uint8* a_codes_gmem_rd = p.a_codes + (static_cast<long long>(item.first_block) * p.m_stride + m0) * BLOCK;
    const float* a_scale_gmem_rd =
        p.a_scale + static_cast<long long>(item.first_block / p.blocks_per_group) * p.m_stride + m0;
    int left_of_group = p.blocks_per_group - item.first_block % p.blocks_per_group;
#pragma unroll 1
    for (int left = item.last_block - item.first_block; left > 0; --left) {
      const uint32 full = ring.stage + offsetof(Stage, full);
      ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
      const bool one = ptx::elect_one();
      if (one) {
        ptx::barrier_expect_bytes(full, rows * (BLOCK + (scales ? 4 : 0)));
        ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes), a_codes_gmem_rd, rows * BLOCK, full);
      }
      a_codes_gmem_rd += static_cast<long long>(p.m_stride) * BLOCK;
      if (scales) {
        if (one) ptx::bulk_copy(ring.stage + Stage::token_scales(), a_scale_gmem_rd, rows * 4, full);
        if (--left_of_group == 0) a_scale_gmem_rd += p.m_stride, left_of_group = p.blocks_per_group;
      }
      ring.next();
    }
  }

  __device__ __forceinline__ void run(const Problem& p) {
    // Weights do not wait for the kernel that writes the activations.
    if (role >= CONSUMERS) ptx::wait_for_predecessor();
    for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
      if (role < CONSUMERS) {
        copy_weights(p, schedule.item(p));
      } else {
        copy_tokens(p, schedule.item(p));
      }
    }
  }
};

#endif
