// What the two GEMMs of sm_90a share: the problem, the widening of codes, and what becomes of finished sums. The includer has
// defined TILE_M.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"
#include "gemm/constants.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/wgmma.cuh"

constexpr int SUMS = TILE_M / 2;  // accumulators of a lane
constexpr float PRODUCT_UNIT = 262144.0f;  // 2^18: one over the product of two e4m3 subnormal steps
static_assert(TILE_M % 8 == 0 && TILE_M <= 128, "the tokens of one wgmma, and two sets of its sums in registers");

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const __half* w_scale;
  const float* bias;
  float* partial;
  uint32* counter;
  int m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n;

  __device__ __forceinline__ int weight_tiles() const { return (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N; }
  __device__ __forceinline__ const __half* weight_scales() const { return w_scale; }
  __device__ __forceinline__ int groups() const { return (k_blocks + blocks_per_group - 1) / blocks_per_group; }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Eight codes of a word -> four of row r and four of row r + 8, as e4m3. layouts.py, `_sign_magnitude`.
__device__ __forceinline__ void widen(uint32 word, uint32& even, uint32& odd) {
  even = word & 0x87878787u;
  odd = __funnelshift_r(word, word, 4) & 0x87878787u;
}

// The A fragments of one block, 4 k32 steps of 4 registers, from the two 16-byte words a lane owns.
__device__ __forceinline__ void widen(uint32 (&a)[16], const uint4 (&words)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    widen(words[half].x, a[8 * half + 0], a[8 * half + 1]);
    widen(words[half].y, a[8 * half + 2], a[8 * half + 3]);
    widen(words[half].z, a[8 * half + 4], a[8 * half + 5]);
    widen(words[half].w, a[8 * half + 6], a[8 * half + 7]);
  }
}

// ---- one warpgroup's finished sums: 64 outputs x TILE_M tokens -------------------------------------------------------------

__device__ __forceinline__ float2 as_floats(uint32 pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }

// D is outputs by tokens, y tokens by outputs: stmatrix transposes 8 x 8 blocks into `y_smem`, 128 bytes a token, in 16-byte
// chunks swizzled by token; then every 8 threads store the 128 bytes of one token.
// `tile_m` counts tiles of TILE_M tokens, `tile_n` of 64 outputs; `barrier` is a named one of this warpgroup alone.
__device__ __forceinline__ void store(const Problem& p, int tile_m, int tile_n, int barrier, const void* y, float (&acc)[SUMS]) {
  const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
  const int m0 = tile_m * TILE_M, n0 = tile_n * WEIGHT_TILE_N;
  if (p.bias != nullptr) {
    const int row = n0 + 16 * warp + accumulator_row(lane, 0);
    const float b0 = row < p.n ? p.bias[row] : 0.0f, b1 = row + 8 < p.n ? p.bias[row + 8] : 0.0f;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] += i & 2 ? b1 : b0;
  }
  const uint32 y_smem = ptx::shared_address(y);
  const int token = lane & 7, half = lane >> 3 & 1;  // of the row whose address this lane gives
#pragma unroll
  for (int j = 0; j < TILE_M / 8; ++j) {
    ptx::stmatrix_x2_trans(y_smem + sm90_activation_byte(8 * j + token, 2 * warp + half),
                           pack_pair(acc[4 * j], acc[4 * j + 1]), pack_pair(acc[4 * j + 2], acc[4 * j + 3]));
  }
  ptx::named_barrier(barrier, WARPGROUP);
  const int chunk = thread & 7, column = n0 + 8 * chunk;
  const bool vectors = has_vectors(p.y, p.ldy);
#pragma unroll 4
  for (int row = thread >> 3; row < TILE_M; row += WARPGROUP / 8) {
    if (m0 + row >= p.m) break;
    const uint4 v = ptx::shared_read_128(y_smem + sm90_activation_byte(row, chunk));
    Out* y_gmem_wr = p.y + static_cast<long long>(m0 + row) * p.ldy + column;
    if (vectors && column + 8 <= p.n) {
      *reinterpret_cast<uint4*>(y_gmem_wr) = v;
    } else {
      const uint32 words[4] = {v.x, v.y, v.z, v.w};
      store_singly(y_gmem_wr, words, column, p.n);
    }
  }
  ptx::named_barrier(barrier, WARPGROUP);  // before the next tile writes here
}

#endif
