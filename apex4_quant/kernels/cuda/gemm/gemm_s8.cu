// W4A8 GEMM for every GPU with mma.sync of 8-bit integers: y = (sum_k a[m, k] w8[n, k]) s_a[m] u[n] + bias[n], where w8 are
// the 4-bit weights of all groups folded to int8 of one unit a row (folded_weights.cuh). Nothing is done per group but the
// table that folds, and the sums over all of K are exact.
//
// Operands (m_stride = M rounded up to 16; KB = K / 128 blocks; G groups of blocks_per_group blocks):
//   y         [M, N]  bf16 or fp16, row stride ldy
//   a_codes   [KB][m_stride][128 B]  int8, chunks placed by sm90_activation_byte (index.cuh)
//   a_scale   [m_stride]             float32, of a token
//   w_packed  [ceil(N/64)][KB][4096 B]   layout sm90 of layouts.py
//   w_ratio   [ceil(N/64)][G][64]        int16 in [0, 4608], R, in the order of the layout's scales
//   w_unit    [64 ceil(N/64)]            float32, u
//   bias      [N] float32, or null
//   partial   [tiles][splits][TILE_M TILE_N] int32, counter [tiles] zeros: read and written if splits > 1, and the
//             counters are left zero
// With EXPERTS (tile_rows.cuh) weights are [experts, ...] of these, M is tiles_m * TILE_M, and there is no bias.
// Any M, N >= 1; K <= 131,072, so that the sums fit. One thread block computes one TILE_M x TILE_N tile over one of
// `splits` ranges of blocks.
//
// Weights are the A operand of the mma, because the layout has them as its registers want them, and tokens are B: a warp's
// accumulators are outputs by tokens, and y is turned in shared memory before it is stored.
//
// Macros: TILE_M, TILE_N, WARPS_M, WARPS_N, STAGES, SHARED_BYTES (of all stages), OUT_BF16, EXPERTS.

#include "gemm/folded_weights.cuh"
#include "gemm/gemm_mma_sync.cuh"

constexpr int FRAGMENTS_N = TILE_N / WARPS_N / 16;  // m16 fragments of a warp: of outputs
constexpr int FRAGMENTS_M = TILE_M / WARPS_M / 8;   // n8 fragments of a warp: of tokens
static_assert(TILE_M % (8 * WARPS_M) == 0 && TILE_M % 16 == 0 && TILE_N % 64 == 0, "tile of a warp");
static_assert(TILE_N % (16 * WARPS_N) == 0 && (64 % (16 * FRAGMENTS_N) == 0), "a warp's outputs lie in one tile of weights");

// One stage of the pipeline in shared memory: the images of three contiguous pieces of global memory.
struct Stage {
  uint8 a_codes[TILE_M * BLOCK];
  uint8 w_packed[TILE_N * BLOCK / 2];
  unsigned short w_ratio[TILE_N];
};
static_assert(STAGES > 1, "one stage is read while another lands");
static_assert(sizeof(Stage) % 128 == 0, "stages stay aligned: a_smem_rd is XORed with a chunk's bits");
static_assert(sizeof(Stage) * STAGES == SHARED_BYTES, "what the host asks for (kernels/gemm/s8_configs.py)");
static_assert(s8_output_byte(TILE_N, TILE_M, 0) <= SHARED_BYTES, "y passes through the stages");
constexpr uint32 STAGE_BYTES = sizeof(Stage);

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const unsigned short* w_ratio;
  const float* w_unit;
  const float* bias;
  int m, n, k_blocks, blocks_per_group, groups, m_stride, ldy;
};

// The copies into a stage: codes, and at most one chunk of ratios a thread.
struct Loader : CodeLoader<BLOCK, sm90_activation_byte> {
  static_assert(TILE_N / 8 <= THREADS, "one chunk of ratios a thread");

  const uint8* ratio_gmem_rd;
  bool has_ratio;
  int blocks_left;  // of the group that ratio_gmem_rd points to

  __device__ __forceinline__ Loader(const Problem& p, int kb, int m0, int n0) {
    const int tid = threadIdx.x, group = kb / p.blocks_per_group, tile = n0 / WEIGHT_TILE_N;
    start_tokens(p, kb, m0);
    start_weights(p, kb, tile);
    const int column = 8 * tid, ratio_tile = column / WEIGHT_TILE_N;
    has_ratio = column < TILE_N && ratio_tile < w_tiles;
    ratio_gmem_rd = reinterpret_cast<const uint8*>(
        p.w_ratio + (static_cast<long long>(tile + ratio_tile) * p.groups + group) * WEIGHT_TILE_N + column % WEIGHT_TILE_N);
    blocks_left = (group + 1) * p.blocks_per_group - kb;
  }

  // Starts the copies of the next block.
  __device__ __forceinline__ void load(const Problem& p, const TileRows& rows, uint32 stage_smem_wr) {
    const uint32 chunk_smem_wr = stage_smem_wr + 16 * threadIdx.x;
    load_tokens(rows, rows_here(p.m, rows), chunk_smem_wr + offsetof(Stage, a_codes));
    load_weights(p, chunk_smem_wr + offsetof(Stage, w_packed));
    if (has_ratio) ptx::cp_async_16(chunk_smem_wr + offsetof(Stage, w_ratio), ratio_gmem_rd);
    advance(p);
    if (--blocks_left == 0) {
      blocks_left = p.blocks_per_group;
      ratio_gmem_rd += WEIGHT_SCALE_BYTES;
    }
  }
};

typedef int Accumulators[FRAGMENTS_N][FRAGMENTS_M][4];

// Adds up the `splits` partial tiles, exactly and so in any order, in whichever block comes last. False for the others.
__device__ __forceinline__ bool reduce_splits(Accumulators& acc, int* partial, uint32* counter, int tile, int split, int splits) {
  constexpr int VECTORS = TILE_M * TILE_N / 4;
  int4* slice = reinterpret_cast<int4*>(partial) + static_cast<long long>(tile) * splits * VECTORS + threadIdx.x;
#pragma unroll
  for (int i = 0; i < FRAGMENTS_N; ++i) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_M; ++j) {
      const int(&a)[4] = acc[i][j];
      slice[split * VECTORS + (i * FRAGMENTS_M + j) * THREADS] = make_int4(a[0], a[1], a[2], a[3]);
    }
  }
  if (!comes_last(counter, tile, splits)) return false;
#pragma unroll 1
  for (int s = 0; s < splits; ++s) {
    if (s == split) continue;
#pragma unroll
    for (int i = 0; i < FRAGMENTS_N; ++i) {
#pragma unroll
      for (int j = 0; j < FRAGMENTS_M; ++j) {
        const int4 v = __ldcg(&slice[s * VECTORS + (i * FRAGMENTS_M + j) * THREADS]);
        acc[i][j][0] += v.x, acc[i][j][1] += v.y, acc[i][j][2] += v.z, acc[i][j][3] += v.w;
      }
    }
  }
  return true;
}

// This warp's accumulators, scaled, into the image of y's tile in shared memory: [TILE_M][TILE_N] and 16 bytes a row.
__device__ __forceinline__ void write_outputs(const Problem& p, const TileRows& rows, const Accumulators& acc, uint32 y_smem,
                                              int m0, int n0, int warp_m0, int warp_n0, int lane) {
  float unit[FRAGMENTS_N][2], bias[FRAGMENTS_N][2];
#pragma unroll
  for (int i = 0; i < FRAGMENTS_N; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = n0 + warp_n0 + 16 * i + accumulator_row(lane, half);
      unit[i][half] = column < p.n ? p.w_unit[rows.first_unit() + column] : 0.0f;
      bias[i][half] = p.bias != nullptr && column < p.n ? p.bias[column] : 0.0f;
    }
  }
  // A lane has one output of two tokens; the lane four further has the next output. They trade, so that each has two
  // outputs of one token.
  const bool odd = lane & 4;
  const uint32 order = odd ? 0x3276 : 0x5410;
  uint32 y_smem_wr = y_smem + s8_output_byte(TILE_N, warp_m0 + accumulator_column(lane, odd), warp_n0 + (accumulator_row(lane, 0) & ~1));
#pragma unroll
  for (int j = 0; j < FRAGMENTS_M; ++j) {
    float s_a[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = m0 + warp_m0 + 8 * j + accumulator_column(lane, e);
      s_a[e] = token < rows.end(p.m) ? p.a_scale[rows.source(token)] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < FRAGMENTS_N; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = static_cast<float>(acc[i][j][2 * half + e]);
          y[e] = __fadd_rn(__fmul_rn(__fmul_rn(sum, s_a[e]), unit[i][half]), bias[i][half]);
        }
        const uint32 mine = pack_pair(y[0], y[1]);
        const uint32 theirs = __shfl_xor_sync(0xffffffff, mine, 4);
        ptx::shared_write_32(y_smem_wr + s8_output_byte(TILE_N, 8 * j, 16 * i + 8 * half), ptx::permute_bytes(mine, theirs, order));
      }
    }
  }
}

// The tile from shared memory to y, 16 bytes a thread.
__device__ __forceinline__ void store_tile(const Problem& p, const TileRows& rows, uint32 y_smem, int m0, int n0) {
  const bool vectors = has_vectors(p.y, p.ldy);
  for (int chunk = threadIdx.x; chunk < TILE_M * TILE_N / 8; chunk += THREADS) {
    const int token = chunk / (TILE_N / 8), column = chunk % (TILE_N / 8) * 8;
    if (m0 + token >= rows.end(p.m) || n0 + column >= p.n) continue;
    const uint4 v = ptx::shared_read_128(y_smem + s8_output_byte(TILE_N, token, column));
    Out* y_gmem_wr = p.y + static_cast<long long>(rows.target(m0 + token)) * p.ldy + n0 + column;
    if (vectors && n0 + column + 8 <= p.n) {
      *reinterpret_cast<uint4*>(y_gmem_wr) = v;
    } else {
      const uint32 words[4] = {v.x, v.y, v.z, v.w};
      store_singly(y_gmem_wr, words, n0 + column, p.n);
    }
  }
}

// With few tokens one thread block a multiprocessor is enough: more registers, where ptxas would spill.
#if TILE_M <= 16
#define AT_ONCE , 1
#else
#define AT_ONCE
#endif
extern "C" __global__ void __launch_bounds__(THREADS AT_ONCE)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const unsigned short* w_ratio,
               const float* w_unit, const float* bias, int* partial, uint32* counter, EXPERT_POINTERS int m, int n,
               int k_blocks, int blocks_per_group, int m_stride, int ldy, int splits EXPERT_NUMBERS) {
  extern __shared__ __align__(128) uint8 shared_memory[];  // the swizzle counts from a multiple of 128
  Stage* stages = reinterpret_cast<Stage*>(shared_memory);
  const int groups = (k_blocks + blocks_per_group - 1) / blocks_per_group;
  const int tiles_m = (m + TILE_M - 1) / TILE_M, tiles_n = (n + TILE_N - 1) / TILE_N;
  Tile tile = tile_at(blockIdx.x, tiles_m, tiles_n);
#if EXPERTS
  __shared__ TileRows rows;
  ptx::wait_for_predecessor();
  const int4 own = tiles[tile.m];
  if (own.x < 0) return;
  rows.start(own, w_packed, w_ratio, n, k_blocks, groups, source_rows, target_rows, source_divisor, THREADS);
  tile.m = 0;  // rows are counted in the tile
#else
  const TileRows rows = {};
#endif
  const Problem p = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_ratio, w_unit, bias, m, n, k_blocks, blocks_per_group, groups, m_stride, ldy};
  const int split = blockIdx.y;
  const BlockRange blocks(k_blocks, split, splits);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m0 = warp / WARPS_N * (8 * FRAGMENTS_M), warp_n0 = warp % WARPS_N * (16 * FRAGMENTS_N);

  Loader loader(p, blocks.first, tile.m * TILE_M, tile.n * TILE_N);
  const uint32 stages_smem = ptx::shared_address(stages);

  // Of this lane, relative to a stage: everything else in the loop is a constant offset.
  const uint32 a_smem_rd = ptx::shared_address(stages[0].a_codes) +
                           sm90_activation_byte(warp_m0 + s8_ldmatrix_row(lane), s8_ldmatrix_chunk(lane, 0));
  const int weight_tile = warp_n0 / WEIGHT_TILE_N, weight_warp = warp_n0 % WEIGHT_TILE_N / 16;
  const uint32 w_smem_rd =
      ptx::shared_address(stages[0].w_packed) + weight_tile * WEIGHT_TILE_BYTES + sm90_weight_byte(0, weight_warp, lane);
  const uint32 ratio_smem_rd = ptx::shared_address(stages[0].w_ratio) +
                               2 * (weight_tile * WEIGHT_TILE_N + sm90_scale_position(weight_warp, lane));

  Accumulators acc = {};
  // Not needed in the loop, which has no register to spare.
  __shared__ Tile origin;
  if (threadIdx.x == 0) origin = {tile.m * TILE_M, tile.n * TILE_N};

  // Of this warp's outputs: the tables of a block's group, and the int8 of two k32 steps, as the mma wants them.
  FoldTable tables[FRAGMENTS_N][2];
  uint32 w[2][FRAGMENTS_N][2][4];
  const auto make_tables = [&](uint32 at) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_N; ++i) {
      const uint32 ratios = ptx::shared_read_32(ratio_smem_rd + at + 2 * sm90_scale_position(i, 0));  // of rows r and r + 8
      tables[i][0] = FoldTable(ratios & 0xffff);
      tables[i][1] = FoldTable(ratios >> 16);
    }
  };
  const auto widen_half = [&](uint32 at, int half) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS_N; ++i) {
      const uint4 words = ptx::shared_read_128(w_smem_rd + at + sm90_weight_byte(half, i, 0));
      widen(words.x, tables[i][0], w[half][i][0][0], w[half][i][0][2]);
      widen(words.y, tables[i][1], w[half][i][0][1], w[half][i][0][3]);
      widen(words.z, tables[i][0], w[half][i][1][0], w[half][i][1][2]);
      widen(words.w, tables[i][1], w[half][i][1][1], w[half][i][1][3]);
    }
  };
  const auto multiply_half = [&](uint32 at, int half) {
#pragma unroll
    for (int j = 0; j < FRAGMENTS_M; ++j) {
      // Eight rows further the swizzle repeats; the second half is four chunks further, which is one bit of the address.
      uint32 a[4];
      ptx::ldmatrix_x4(a, (a_smem_rd ^ sm90_activation_byte(0, s8_ldmatrix_chunk(0, half))) + at + sm90_activation_byte(8 * j, 0));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int i = 0; i < FRAGMENTS_N; ++i) ptx::mma_s8(acc[i][j], w[half][i][step], a[2 * step], a[2 * step + 1]);
      }
    }
  };

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
    make_tables(at);
    widen_half(at, 0);
    multiply_half(at, 0);
    widen_half(at, 1);
    multiply_half(at, 1);
    refill = at;
    at = at == (STAGES - 1) * STAGE_BYTES ? 0 : at + STAGE_BYTES;
  }
  ptx::let_successor_start();

  if (splits > 1 && !reduce_splits(acc, partial, counter, blockIdx.x, split, splits)) return;
  ptx::cp_async_wait<0>();
  __syncthreads();  // everyone has left the stages
  write_outputs(p, rows, acc, stages_smem, origin.m, origin.n, warp_m0, warp_n0, lane);
  __syncthreads();
  store_tile(p, rows, stages_smem, origin.m, origin.n);
}
