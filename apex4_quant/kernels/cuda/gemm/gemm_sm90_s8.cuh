// What the two 8-bit GEMMs of sm_90a share: the problem, the folding of 4-bit codes to int8, and what becomes of finished sums.
// The includer has defined TILE_M.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/fold_fragments.cuh"
#include "gemm/wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int WEIGHT_TILE_N = 64;  // the layout's tile: outputs of one wgmma
constexpr int WEIGHT_TILE_BYTES = WEIGHT_TILE_N * BLOCK / 2;
constexpr int RATIO_BYTES = 2 * WEIGHT_TILE_N;  // of a tile and group
constexpr int SUMS = TILE_M / 2;                // accumulators of a lane
static_assert(TILE_M % 8 == 0 && TILE_M <= 256, "the tokens of one wgmma");
constexpr uint32 NONE = 0xffffffffu;  // no address in shared memory

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const unsigned short* w_ratio;
  const float* w_unit;
  const float* bias;
  int* partial;
  uint32* counter;
  int m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n;

  __device__ __forceinline__ int weight_tiles() const { return (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N; }
  __device__ __forceinline__ int groups() const { return (k_blocks + blocks_per_group - 1) / blocks_per_group; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- one warpgroup's finished sums: 64 outputs x TILE_M tokens -------------------------------------------------------------

constexpr int CHUNK_M = TILE_M < 32 ? TILE_M : 32;  // tokens that are stored at a time

// What a lane multiplies its sums by and adds to them, of outputs r and r + 8.
struct Outputs {
  float unit[2], bias[2];

  __device__ __forceinline__ Outputs(const Problem& p, int tile_n) {
    const int thread = ptx::thread() % WARPGROUP;
    const int row = tile_n * WEIGHT_TILE_N + 16 * (thread / 32) + accumulator_row(thread % 32, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = row + 8 * half < p.n;
      unit[half] = exists ? p.w_unit[row + 8 * half] : 0.0f;
      bias[half] = exists && p.bias != nullptr ? p.bias[row + 8 * half] : 0.0f;
    }
  }
};

// D is outputs by tokens, y tokens by outputs: stmatrix transposes 8 x 8 blocks into one of two buffers, 128 bytes a token, in
// 16-byte chunks swizzled by token; then every 8 threads store the 128 bytes of one token.
// `tile_m` counts tiles of TILE_M tokens, `tile_n` of 64 outputs; `barrier` is a named one of this warpgroup alone; `scales` are the
// tile's tokens' in shared memory.
__device__ __forceinline__ void store(const Problem& p, int tile_m, int tile_n, int barrier, unsigned short (&y)[2][CHUNK_M][WEIGHT_TILE_N],
                                      const float* scales, const Outputs& outputs, const int (&acc)[SUMS]) {
  const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
  const uint32 scales_rd = ptx::shared_address(scales) + 4 * accumulator_column(lane, 0);
  const int token = lane & 7, half = lane >> 3 & 1;  // of the row whose address this lane gives
  const int chunk = thread & 7, column = tile_n * WEIGHT_TILE_N + 8 * chunk;
  const bool vectors = p.ldy % 8 == 0 && (reinterpret_cast<uint64>(p.y) & 15) == 0 && column + 8 <= p.n;
#pragma unroll
  for (int first = 0; first < TILE_M; first += CHUNK_M) {
    const int m0 = tile_m * TILE_M + first;
    if (m0 >= p.m) break;
    const uint32 y_smem = ptx::shared_address(y[first / CHUNK_M % 2]);
#pragma unroll
    for (int j = 0; j < CHUNK_M / 8; ++j) {
      const float2 scale = ptx::shared_read_float2(scales_rd + 4 * (first + 8 * j));
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scaled = __fmul_rn(__int2float_rn(acc[first / 2 + 4 * j + i]), i & 1 ? scale.y : scale.x);
        v[i] = __fadd_rn(__fmul_rn(scaled, outputs.unit[i / 2]), outputs.bias[i / 2]);  // rounded as in format.md
      }
      ptx::stmatrix_x2_trans(y_smem + sm90_activation_byte(8 * j + token, 2 * warp + half), pack_pair(v[0], v[1]), pack_pair(v[2], v[3]));
    }
    ptx::named_barrier(barrier, WARPGROUP);  // and everyone has read the other buffer
#pragma unroll
    for (int row = thread >> 3; row < CHUNK_M; row += WARPGROUP / 8) {
      if (m0 + row >= p.m) break;
      const uint4 v = ptx::shared_read_128(y_smem + sm90_activation_byte(row, chunk));
      Out* y_gmem_wr = p.y + static_cast<long long>(m0 + row) * p.ldy + column;
      if (vectors) {
        *reinterpret_cast<uint4*>(y_gmem_wr) = v;
      } else {
        const uint32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const unsigned short word = static_cast<unsigned short>(words[c / 2] >> (16 * (c % 2)));
          if (column + c < p.n) y_gmem_wr[c] = *reinterpret_cast<const Out*>(&word);
        }
      }
    }
  }
  ptx::named_barrier(barrier, WARPGROUP);  // before the next tile writes here
}

#endif
