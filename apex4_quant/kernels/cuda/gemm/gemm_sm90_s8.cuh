// What the two 8-bit GEMMs of sm_90a share: the problem, the folding of 4-bit codes to int8, and what becomes of finished sums.
// The includer has defined TILE_M.
//
// A folded weight is sign(q) * ((|q| R + 128) >> 8), R the ratio of its group (kernels/folding.py). Codes have eight magnitudes,
// so that the folded ones of a row and group are a table of eight bytes: two registers, and PRMT looks four up at once.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int WEIGHT_TILE_N = 64;  // the layout's tile: outputs of one wgmma
constexpr int WEIGHT_TILE_BYTES = WEIGHT_TILE_N * BLOCK / 2;
constexpr int RATIO_BYTES = 2 * WEIGHT_TILE_N;  // of a tile and group
constexpr int SUMS = TILE_M / 2;                // accumulators of a lane
static_assert(TILE_M % 8 == 0 && TILE_M <= 256, "the tokens of one wgmma");

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

// ---- folding ------------------------------------------------------------------------------------------------------------

// What the magnitudes 0..7 of a row's codes are folded to, of positive and of negative codes, a byte each.
struct Table {
  uint32 plus[2], minus[2];

  // c R + 128 stays below 2^15, so that two of them fit a register and one multiplication makes both.
  __device__ __forceinline__ void make(uint32 ratio) {
    constexpr uint32 HALVES = 0x00800080u;
    const uint32 m01 = ratio * 0x00010000u + HALVES, m23 = ratio * 0x00030002u + HALVES;
    const uint32 m45 = ratio * 0x00050004u + HALVES, m67 = ratio * 0x00070006u + HALVES;
    plus[0] = __byte_perm(m01, m23, 0x7531);
    plus[1] = __byte_perm(m45, m67, 0x7531);
    // 0x80 - magnitude borrows from no other byte, and the highest bit is then the other one.
    minus[0] = (0x80808080u - plus[0]) ^ 0x80808080u;
    minus[1] = (0x80808080u - plus[1]) ^ 0x80808080u;
  }
  // Four codes: magnitudes in the low 16 bits of `magnitudes`, bytes of ones in `negative` where the sign is set.
  __device__ __forceinline__ uint32 fold(uint32 magnitudes, uint32 negative) const {
    const uint32 p = __byte_perm(plus[0], plus[1], magnitudes), n = __byte_perm(minus[0], minus[1], magnitudes);
    return (p & ~negative) | (n & negative);
  }
};
struct Tables {
  Table low, high;  // of rows r and r + 8

  // `ratios`: those of both rows.
  __device__ __forceinline__ void make(uint32 ratios) { low.make(ratios & 0xffffu), high.make(ratios >> 16); }
};

// The A fragment of one k32 step, from a lane's two words of it. layouts.py, `_sign_magnitude`: of the even codes of a word (row
// r) the magnitudes are the even nibbles and the signs the bytes' highest bits; of the odd ones (row r + 8), after a rotation by
// four. Both words' magnitudes are looked up together, and the bytes are sorted afterwards.
__device__ __forceinline__ void fold(uint32 (&a)[4], uint32 first, uint32 second, const Tables& tables) {
#if S8_ORDER
  {
    const uint32 y = first & 0x77777777u, z = second & 0x77777777u;
    a[0] = tables.low.fold(y, __byte_perm(first, 0, 0xba98));
    a[1] = tables.high.fold(y >> 16, __byte_perm(first << 4, 0, 0xba98));
    a[2] = tables.low.fold(z, __byte_perm(second, 0, 0xba98));
    a[3] = tables.high.fold(z >> 16, __byte_perm(second << 4, 0, 0xba98));
  }
#else
  constexpr uint32 LOW = 0x07070707u, HIGH = 0x70707070u;
  const uint32 odd_first = __funnelshift_r(first, first, 4), odd_second = __funnelshift_r(second, second, 4);
  const uint32 even = (first & LOW) | ((second << 4) & HIGH), odd = (odd_first & LOW) | (second & HIGH);
  const uint32 even01 = tables.low.fold(even, __byte_perm(first, second, 0xd9c8));
  const uint32 even23 = tables.low.fold(even >> 16, __byte_perm(first, second, 0xfbea));
  const uint32 odd01 = tables.high.fold(odd, __byte_perm(odd_first, odd_second, 0xd9c8));
  const uint32 odd23 = tables.high.fold(odd >> 16, __byte_perm(odd_first, odd_second, 0xfbea));
  a[0] = __byte_perm(even01, even23, 0x6420), a[2] = __byte_perm(even01, even23, 0x7531);
  a[1] = __byte_perm(odd01, odd23, 0x6420), a[3] = __byte_perm(odd01, odd23, 0x7531);
#endif
}
// Of step `step` of four, from the two 16-byte words that a lane owns of a block.
__device__ __forceinline__ void fold_step(uint32 (&a)[4], const uint4 (&words)[2], int step, const Tables& tables) {
  const uint4& half = words[step / 2];
  if (step % 2 == 0) {
    fold(a, half.x, half.y, tables);
  } else {
    fold(a, half.z, half.w, tables);
  }
}

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
        v[i] = __int2float_rn(acc[first / 2 + 4 * j + i]) * (i & 1 ? scale.y : scale.x);
        v[i] = __fmaf_rn(v[i], outputs.unit[i / 2], outputs.bias[i / 2]);
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
