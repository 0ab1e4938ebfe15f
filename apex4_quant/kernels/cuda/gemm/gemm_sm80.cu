// W4A4 GEMM for sm_80, sm_86 and sm_89: y = dequantize(A) dequantize(W)^T + bias, groups of 128 n input features.
//
// Operands (m_stride = M rounded up to 16; KB = K / 128 blocks; G groups of blocks_per_group blocks):
//   y         [M, N]  bf16 or fp16, row stride ldy
//   a_codes   [KB][m_stride][64 B]   two's-complement nibbles, chunks placed by sm80_activation_byte (index.cuh)
//   a_scale   [G][m_stride]          float32
//   w_packed  [ceil(N/64)][KB][4096 B]   layout sm80 of layouts.py: 8 fragments n8 x k128 of 512 bytes
//   w_scale   [ceil(N/64)][G][64]        float16, in the order the accumulators own columns
//   bias      [N] float32, or null
//   partial   [tiles][splits][TILE_M TILE_N] float32, counter [tiles] zeros: read and written if splits > 1, and the
//             counters are left zero
// With EXPERTS (tile_rows.cuh) weights are [experts, ...] of these, M is tiles_m * TILE_M, and there is no bias.
// Any M, N >= 1. One thread block computes one TILE_M x TILE_N tile over one of `splits` ranges of blocks.
//
// The sum of a group is an integer n, |n| <= 49 g. The first mma of a group takes MAGIC as its C operand, so that the
// result, read as a float, *is* 12582912 + n without a conversion (docs/kernels.md proves it):
//     t   = fma(float(12582912 + n), s_w, -12582912 s_w)     = n s_w, exactly for g = 128
//     acc = fma(t, s_a, acc)
//
// Macros: TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, SHARED_BYTES (of all stages), WIDE_GROUPS (0: groups of
// 128; 1: any multiple), OUT_BF16, EXPERTS (with groups of 128).

#include "gemm/gemm_mma_sync.cuh"

constexpr int FRAGMENTS_M = TILE_M / WARPS_M / 16;  // m16 fragments of a warp
constexpr int FRAGMENTS_N = TILE_N / WARPS_N / 8;   // n8 fragments of a warp
static_assert(TILE_M % (16 * WARPS_M) == 0 && TILE_N % 64 == 0 && TILE_N % (32 * WARPS_N) == 0, "tile of a warp");

constexpr int ROW_BYTES = BLOCK / 2;  // of a_codes
constexpr int MAGIC = 0x4B400000;            // the float 12582912 = 1.5 * 2^23: adding an integer below 2^22 keeps the exponent
constexpr float MAGIC_VALUE = 12582912.0f;

// One stage of the pipeline in shared memory: the images of four contiguous pieces of global memory.
struct Stage {
  uint8 a_codes[TILE_M * ROW_BYTES];
  uint8 w_packed[TILE_N * ROW_BYTES];
  float a_scale[TILE_M];
  __half w_scale[TILE_N];
};
static_assert(sizeof(Stage) % 64 == 0, "stages stay aligned: a_smem_rd is XORed with a chunk's bits");
static_assert(sizeof(Stage) * STAGES == SHARED_BYTES, "what the host asks for (kernels/gemm/configs.py)");
constexpr uint32 STAGE_BYTES = sizeof(Stage);

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const __half* w_scale;
  const float* bias;
  int m, n, k_blocks, blocks_per_group, groups, m_stride, ldy;
};

// Step 1 of a block: the copies into a stage, of codes and of at most one chunk of scales a thread.
struct Loader : CodeLoader<ROW_BYTES, sm80_activation_byte> {
  static constexpr int A_SCALE_CHUNKS = TILE_M / 4, W_SCALE_CHUNKS = TILE_N / 8;
  static_assert(A_SCALE_CHUNKS + W_SCALE_CHUNKS <= THREADS, "one chunk of scales a thread");

  const uint8* scale_gmem_rd;
#if EXPERTS
  const float* a_scale_gmem_rd;
#endif
  int scale_stride;
  uint32 scale_smem_wr;  // relative to the stage
  bool has_scale;
  int blocks_left;  // of the group that scale_gmem_rd points to

  __device__ __forceinline__ Loader(const Problem& p, int kb, int m0, int n0) {
    const int tid = threadIdx.x, group = kb / p.blocks_per_group, tile = n0 / WEIGHT_TILE_N;
    start_tokens(p, kb, m0);
#if EXPERTS
    a_scale_gmem_rd = p.a_scale + static_cast<long long>(group) * p.m_stride;
#endif
    start_weights(p, kb, tile);
    if (tid < A_SCALE_CHUNKS) {
      has_scale = !EXPERTS && 4 * tid < a_rows;  // those of experts lie apart
      scale_stride = 4 * p.m_stride;
      scale_gmem_rd = reinterpret_cast<const uint8*>(p.a_scale + m0 + 4 * tid);
      scale_smem_wr = offsetof(Stage, a_scale) + 16 * tid;
    } else {
      const int column = 8 * (tid - A_SCALE_CHUNKS), scale_tile = column / WEIGHT_TILE_N;
      has_scale = column < TILE_N && scale_tile < w_tiles;
      scale_stride = WEIGHT_SCALE_BYTES;
      scale_gmem_rd = reinterpret_cast<const uint8*>(p.w_scale + column % WEIGHT_TILE_N) +
                      static_cast<long long>(tile + scale_tile) * p.groups * scale_stride;
      scale_smem_wr = offsetof(Stage, w_scale) + 2 * column;
    }
    scale_gmem_rd += static_cast<long long>(group) * scale_stride;
    blocks_left = (group + 1) * p.blocks_per_group - kb;
  }

  // Starts the copies of the next block.
  __device__ __forceinline__ void load(const Problem& p, const TileRows& rows, uint32 stage_smem_wr) {
    const uint32 chunk_smem_wr = stage_smem_wr + 16 * threadIdx.x;
    const int end = rows_here(p.m, rows);
    load_tokens(rows, end, chunk_smem_wr + offsetof(Stage, a_codes));
#if EXPERTS
    static_assert(TILE_M <= THREADS, "one scale a thread");
    if (const int row = threadIdx.x; row < end)
      ptx::cp_async_4(stage_smem_wr + offsetof(Stage, a_scale) + 4 * row, a_scale_gmem_rd + rows.source(row));
    a_scale_gmem_rd += p.m_stride;
#endif
    load_weights(p, chunk_smem_wr + offsetof(Stage, w_packed));
    if (has_scale) ptx::cp_async_16(stage_smem_wr + scale_smem_wr, scale_gmem_rd);
    advance(p);
#if WIDE_GROUPS
    if (--blocks_left == 0) {
      blocks_left = p.blocks_per_group;
      scale_gmem_rd += scale_stride;
    }
#else
    scale_gmem_rd += scale_stride;
#endif
  }
};

__device__ __forceinline__ void dequantize(float (&acc)[4], const int (&sum)[4], const float (&s_w)[2],
                                           const float (&shift)[2], const float (&s_a)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float t = __fmaf_rn(__int_as_float(sum[2 * half + e]), s_w[e], shift[e]);
      acc[2 * half + e] = __fmaf_rn(t, s_a[half], acc[2 * half + e]);
    }
  }
}

// Two columns' scales of this lane, and what takes the magic number out again.
__device__ __forceinline__ void unpack_scales(uint32 pair, float (&s_w)[2], float (&shift)[2]) {
  const float2 scales = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  s_w[0] = scales.x;
  s_w[1] = scales.y;
  shift[0] = -MAGIC_VALUE * scales.x;
  shift[1] = -MAGIC_VALUE * scales.y;
}

__device__ __forceinline__ void store_tile(const Problem& p, const TileRows& rows,
                                           const float (&acc)[FRAGMENTS_M][FRAGMENTS_N][4], int m0, int n0, int lane) {
  // A quad of lanes holds, of each row, 2 columns of every fragment; they trade so that each lane has the 8 columns of
  // one fragment out of four, and stores 16 bytes.
  const bool vectors = has_vectors(p.y, p.ldy);
  const int q = lane & 3;
#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + 16 * i + accumulator_row(lane, half);
#pragma unroll
      for (int j0 = 0; j0 < FRAGMENTS_N; j0 += 4) {
        uint32 v[4];
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int column = n0 + 8 * (j0 + f) + accumulator_column(lane, e);
            pair[e] = acc[i][j0 + f][2 * half + e];
            if (p.bias != nullptr && column < p.n) pair[e] += p.bias[column];
          }
          v[f] = pack_pair(pair[0], pair[1]);
        }
        // 4 x 4 transpose within the quad: exchange with the neighbour, then with the lane two further.
        uint32 give = q & 1 ? v[0] : v[1];
        uint32 take = __shfl_xor_sync(0xffffffff, give, 1);
        if (q & 1) v[0] = take; else v[1] = take;
        give = q & 1 ? v[2] : v[3];
        take = __shfl_xor_sync(0xffffffff, give, 1);
        if (q & 1) v[2] = take; else v[3] = take;
        give = q & 2 ? v[0] : v[2];
        take = __shfl_xor_sync(0xffffffff, give, 2);
        if (q & 2) v[0] = take; else v[2] = take;
        give = q & 2 ? v[1] : v[3];
        take = __shfl_xor_sync(0xffffffff, give, 2);
        if (q & 2) v[1] = take; else v[3] = take;
        const int column = n0 + 8 * (j0 + q);
        if (row >= rows.end(p.m)) continue;
        Out* y_gmem_wr = p.y + static_cast<long long>(rows.target(row)) * p.ldy + column;
        if (vectors && column + 8 <= p.n) {
          *reinterpret_cast<uint4*>(y_gmem_wr) = make_uint4(v[0], v[1], v[2], v[3]);
        } else {
          store_singly(y_gmem_wr, v, column, p.n);
        }
      }
    }
  }
}

// Adds the `splits` partial tiles in their order, whichever block comes last. False for blocks that came earlier.
__device__ __forceinline__ bool reduce_splits(float (&acc)[FRAGMENTS_M][FRAGMENTS_N][4], float* partial, uint32* counter,
                                              int tile, int split, int splits) {
  float4* slice = reinterpret_cast<float4*>(partial) + static_cast<long long>(tile) * splits * (TILE_M * TILE_N / 4);
  constexpr int VECTORS = TILE_M * TILE_N / 4;
#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
      const float(&a)[4] = acc[i][j];
      slice[split * VECTORS + (i * FRAGMENTS_N + j) * THREADS + threadIdx.x] = make_float4(a[0], a[1], a[2], a[3]);
    }
  }
  if (!comes_last(counter, tile, splits)) return false;
#pragma unroll
  for (int i = 0; i < FRAGMENTS_M; ++i) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
      for (int s = 0; s < splits; ++s) {
        const float4 v = __ldcg(&slice[s * VECTORS + (i * FRAGMENTS_N + j) * THREADS + threadIdx.x]);
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][j][c] = sum[c];
    }
  }
  return true;
}

#if EXPERTS
#define BOUNDS __launch_bounds__(THREADS, 1)  // else the compiler wants fewer registers than there are
#else
#define BOUNDS __launch_bounds__(THREADS)
#endif
extern "C" __global__ void BOUNDS
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const __half* w_scale,
               const float* bias, float* partial, uint32* counter, EXPERT_POINTERS int m, int n, int k_blocks,
               int blocks_per_group, int m_stride, int ldy, int splits EXPERT_NUMBERS) {
  extern __shared__ __align__(128) uint8 shared_memory[];  // the swizzle counts from a multiple of 64, banks from 128
  Stage* stages = reinterpret_cast<Stage*>(shared_memory);
  const int groups = (k_blocks + blocks_per_group - 1) / blocks_per_group;
  const int tiles_m = (m + TILE_M - 1) / TILE_M, tiles_n = (n + TILE_N - 1) / TILE_N;
  Tile tile = tile_at(blockIdx.x, tiles_m, tiles_n);
#if EXPERTS
  __shared__ TileRows rows;
  ptx::wait_for_predecessor();
  const int4 own = tiles[tile.m];
  if (own.x < 0) return;
  rows.start(own, w_packed, w_scale, n, k_blocks, groups, source_rows, target_rows, source_divisor, THREADS);
  tile.m = 0;  // rows are counted in the tile
#else
  const TileRows rows = {};
#endif
  const Problem p = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_scale, bias, m, n, k_blocks, blocks_per_group, groups, m_stride, ldy};
  const int split = blockIdx.y;
  const BlockRange blocks(k_blocks, split, splits);
  const int m0 = tile.m * TILE_M, n0 = tile.n * TILE_N;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m0 = warp / WARPS_N * (16 * FRAGMENTS_M), warp_n0 = warp % WARPS_N * (8 * FRAGMENTS_N);

  Loader loader(p, blocks.first, m0, n0);
  const uint32 stages_smem = ptx::shared_address(stages);

  // Of this lane, relative to a stage: everything else in the loop is a constant offset.
  const uint32 a_smem_rd = ptx::shared_address(stages[0].a_codes) +
                           sm80_activation_byte(warp_m0 + sm80_ldmatrix_row(lane), sm80_ldmatrix_chunk(lane, 0));
  const uint32 w_smem_rd = ptx::shared_address(stages[0].w_packed) + sm80_weight_byte(warp_n0 / 8, lane);
  const uint32 a_scale_smem_rd = ptx::shared_address(stages[0].a_scale) + 4 * (warp_m0 + accumulator_row(lane, 0));
  // A warp's fragments lie in one tile of 64 columns, or fill whole ones.
  const uint32 w_scale_smem_rd =
      ptx::shared_address(stages[0].w_scale) +
      2 * (warp_n0 / WEIGHT_TILE_N * WEIGHT_TILE_N + sm80_scale_position(warp_n0 % WEIGHT_TILE_N / 8, lane));

  float acc[FRAGMENTS_M][FRAGMENTS_N][4] = {};
#if WIDE_GROUPS
  int sum[FRAGMENTS_M][FRAGMENTS_N][4];
  bool group_starts = true;
  int blocks_left = blocks_per_group - blocks.first % blocks_per_group;  // of the group
#else
  const int magic[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
#endif
  // Not needed in the loop, which has no register to spare.
  __shared__ Tile origin;
  if (threadIdx.x == 0) origin = {m0, n0};

  ptx::wait_for_predecessor();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (blocks.first + s < blocks.last) loader.load(p, rows, stages_smem + s * STAGE_BYTES);
    ptx::cp_async_commit();
  }

  // Main loop: one block of 128 input features, one pipeline stage, per turn.
  uint32 at = 0, refill = (STAGES - 1) * STAGE_BYTES;  // the stage that is read, and the one read before it
  for (int kb = blocks.first; kb < blocks.last; ++kb) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // the stage has landed for everyone, and everyone has left the one that is refilled now
    if (kb + STAGES - 1 < blocks.last) loader.load(p, rows, stages_smem + refill);
    ptx::cp_async_commit();

    uint32 a[FRAGMENTS_M][2][4];
    float s_a[FRAGMENTS_M][2];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; ++i) {
      // Sixteen rows further the swizzle repeats; the second k64 step is two chunks further, which is one bit of the address.
      ptx::ldmatrix_x4(a[i][0], a_smem_rd + at + sm80_activation_byte(16 * i, 0));
      ptx::ldmatrix_x4(a[i][1], (a_smem_rd ^ sm80_activation_byte(0, sm80_ldmatrix_chunk(0, 1))) + at + sm80_activation_byte(16 * i, 0));
      s_a[i][0] = __uint_as_float(ptx::shared_read_32(a_scale_smem_rd + at + 4 * (16 * i)));
      s_a[i][1] = __uint_as_float(ptx::shared_read_32(a_scale_smem_rd + at + 4 * (16 * i + 8)));
    }
#if WIDE_GROUPS
#pragma unroll
    for (int j = 0; j < FRAGMENTS_N; ++j) {
      const uint4 b = ptx::shared_read_128(w_smem_rd + at + sm80_weight_byte(j, 0));
#pragma unroll
      for (int i = 0; i < FRAGMENTS_M; ++i) {
        if (group_starts) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[i][j][c] = MAGIC;
        }
        ptx::mma_s4(sum[i][j], a[i][0], b.x, b.y, sum[i][j]);
        ptx::mma_s4(sum[i][j], a[i][1], b.z, b.w, sum[i][j]);
      }
    }
    group_starts = --blocks_left == 0 || kb + 1 == blocks.last;
    if (group_starts) {  // after this block: the sums are whole
      blocks_left = blocks_per_group;
#pragma unroll
      for (int j = 0; j < FRAGMENTS_N; ++j) {
        float s_w[2], shift[2];
        unpack_scales(ptx::shared_read_32(w_scale_smem_rd + at + 2 * (8 * j / WEIGHT_TILE_N * WEIGHT_TILE_N + sm80_scale_position(j % (WEIGHT_TILE_N / 8), 0))), s_w, shift);
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i) dequantize(acc[i][j], sum[i][j], s_w, shift, s_a[i]);
      }
    }
#else
#pragma unroll
    for (int j0 = 0; j0 < FRAGMENTS_N; j0 += 4) {
      // The scales of four fragments are 16 consecutive bytes of a lane.
      const uint4 scales = ptx::shared_read_128(w_scale_smem_rd + at + 2 * (8 * j0 / WEIGHT_TILE_N * WEIGHT_TILE_N + sm80_scale_position(j0 % (WEIGHT_TILE_N / 8), 0)));
      const uint32 pairs[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const uint4 b = ptx::shared_read_128(w_smem_rd + at + sm80_weight_byte(j0 + f, 0));
        float s_w[2], shift[2];
        unpack_scales(pairs[f], s_w, shift);
#pragma unroll
        for (int i = 0; i < FRAGMENTS_M; ++i) {
          int sum[4];
          ptx::mma_s4(sum, a[i][0], b.x, b.y, magic);
          ptx::mma_s4(sum, a[i][1], b.z, b.w, sum);
          dequantize(acc[i][j0 + f], sum, s_w, shift, s_a[i]);
        }
      }
    }
#endif
    refill = at;
    at = at == (STAGES - 1) * STAGE_BYTES ? 0 : at + STAGE_BYTES;
  }
  ptx::let_successor_start();

  if (splits > 1 && !reduce_splits(acc, partial, counter, blockIdx.x, split, splits)) return;
  store_tile(p, rows, acc, origin.m + warp_m0, origin.n + warp_n0, lane);
}
