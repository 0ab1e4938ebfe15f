// W4A4 GEMM for sm_90a (H100, H200): y = dequantize(A) dequantize(W)^T + bias, groups of 128 n input features.
//
// Hopper has no 4-bit tensor cores, so that codes are widened to 8 bits, exactly: a byte `s0000mmm` is, in e4m3, the
// number (-1)^s m 2^-9, and a product sum of 128 pairs is n 2^-18 with |n| <= 6272 < 2^13. The tensor core keeps 13 bits below the
// leading one and loses nothing (scripts/gpu_check proves it on the GPU).
//
// The weights are the A operand of wgmma, because that one may come from registers: 4-bit codes go from shared memory to
// registers and are widened there by three logic operations per eight codes. Hence the roles are swapped:
//     D [64 outputs, TILE_M tokens] = W [64, 128] x^T [128, TILE_M]
//
// Operands (m_stride = M rounded up to 16; KB = K / 128 blocks; G groups of blocks_per_group blocks):
//   y         [M, N]  bf16 or fp16, row stride ldy
//   a_codes   [KB][m_stride][128 B]      sign and magnitude, chunks placed by sm90_activation_byte (index.cuh): already in
//                                        the order that wgmma's 128-byte swizzle wants, so that a tile is one bulk copy
//   a_scale   [G][m_stride]              float32
//   w_packed  [ceil(N/64)][KB][4096 B]   layout sm90 of layouts.py
//   w_scale   [ceil(N/64)][G][64]        float16
//   bias      [N] float32, or null
//   partial   [ceil(N/64)][ceil(M/TILE_M)][parts][64 TILE_M] float32 and counter [ceil(N/64)][ceil(M/TILE_M)] zeros: read and
//             written if span > 0, and the counters are left zero
//   span      0: thread blocks compute whole tiles. Else the tiles' blocks of 128, in the order of tiles, are cut into spans
//             of this length, one for each thread block, wherever tiles end ("stream-K"); a tile that several thread blocks
//             share has up to parts = ceil(KB / span) + 1 of them, added in their order
// Any M, N >= 1. Groups wider than 128 are dequantized block by block with their group's scales.
//
// Producer threads fill a ring of STAGES blocks with bulk copies; CONSUMERS warpgroups of 64 outputs each multiply.
// While one warpgroup turns its integers into floats, the tensor cores work for the other one.
//
// Macros: TILE_M, CONSUMERS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16.

#include "epilogue.cuh"
#include "index.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

constexpr int BLOCK = 128;  // k of one pipeline stage
constexpr int WARPGROUP = 128;
constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int WEIGHT_TILE_N = 64;  // the layout's tile: what one warpgroup computes
constexpr int WEIGHT_TILE_BYTES = WEIGHT_TILE_N * BLOCK / 2;
constexpr int SUMS = TILE_M / 2;  // accumulators of a lane
#ifdef CHUNK
constexpr int CHUNK_M = CHUNK;
#else
constexpr int CHUNK_M = TILE_M;
#endif
constexpr int CHUNKS = TILE_M / CHUNK_M, CHUNK_SUMS = CHUNK_M / 2;
constexpr float PRODUCT_UNIT = 262144.0f;  // 2^18: one over the product of two e4m3 subnormal steps
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(TILE_M % 8 == 0 && (CHUNKS == 1 || CHUNKS % 2 == 0) && TILE_M <= 256, "chunks take turns in two sets of sums");

struct Stage {
  alignas(1024) uint8 a_codes[TILE_M * BLOCK];
  uint8 w_packed[CONSUMERS][WEIGHT_TILE_BYTES];
  float a_scale[TILE_M];
  __half w_scale[CONSUMERS][WEIGHT_TILE_N];
  uint64 full, empty;
};
struct Shared {
  Stage stages[STAGES];
  unsigned short y[CONSUMERS][TILE_M][WEIGHT_TILE_N];
  bool last[CONSUMERS];  // of the thread blocks that share a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (gemm_configs.py)");

struct Problem {
  Out* y;
  const uint8* a_codes;
  const float* a_scale;
  const uint8* w_packed;
  const __half* w_scale;
  const float* bias;
  float* partial;
  uint32* counter;
  int m, n, k_blocks, blocks_per_group, groups, m_stride, ldy, span;
  int tiles_m, tiles_n, weight_tiles;
};

// A thread block's work is a sequence of items: a tile, or a range of its blocks.
struct Item {
  Tile tile;
  int first_block, last_block;
  int part, parts;  // which of the tile's ranges
};
struct Schedule {
  int next, end;  // tiles; or blocks of all tiles in a row

  __device__ __forceinline__ explicit Schedule(const Problem& p) {
    const int tiles = p.tiles_m * p.tiles_n;
    next = p.span == 0 ? blockIdx.x : blockIdx.x * p.span;
    end = p.span == 0 ? tiles : min(tiles * p.k_blocks, next + p.span);
  }
  __device__ __forceinline__ bool done() const { return next >= end; }
  __device__ __forceinline__ Item item(const Problem& p) const {
    if (p.span == 0) return {tile_at(next, p.tiles_m, p.tiles_n), 0, p.k_blocks, 0, 1};
    const int index = next / p.k_blocks, start = index * p.k_blocks;
    const int first_owner = start / p.span, last_owner = (start + p.k_blocks - 1) / p.span;
    return {tile_at(index, p.tiles_m, p.tiles_n), next - start, min(p.k_blocks, end - start),
            static_cast<int>(blockIdx.x) - first_owner, last_owner - first_owner + 1};
  }
  __device__ __forceinline__ void advance(const Problem& p) {
    next = p.span == 0 ? next + gridDim.x : min(end, (next / p.k_blocks + 1) * p.k_blocks);
  }
};

// Where the ring of stages stands: the stage's address in shared memory, and the phase parity of its barriers.
struct Ring {
  uint32 stage, parity, begin;
  __device__ __forceinline__ explicit Ring(const Shared& s)
      : stage(ptx::shared_address(s.stages)), parity(0), begin(stage) {}
  __device__ __forceinline__ void next() {
    stage += sizeof(Stage);
    if (stage == begin + STAGES * sizeof(Stage)) stage = begin, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- producer: a warpgroup, of which four threads copy -----------------------------------------------------------------------
//
// Issuing a copy costs its thread about as long as a block costs the tensor cores, so that the copies of a stage are
// issued by one thread each of several warps: of every weight tile (with its scales), of the tokens' codes, and of their scales.

constexpr int PRODUCERS = CONSUMERS + 2;
static_assert(PRODUCERS <= 4, "warps of the producer warpgroup");

struct Producer {
  const int role;
  Ring ring;

  // Announces and starts this thread's copies of block kb.
  __device__ __forceinline__ void copy(const Problem& p, const Item& item, int kb, int group) {
    const uint32 full = ring.stage + offsetof(Stage, full);
    if (role < CONSUMERS) {
      const long long tile = item.tile.n * CONSUMERS + role;
      if (tile >= p.weight_tiles) {
        ptx::barrier_arrive(full);
        return;
      }
      ptx::barrier_expect_bytes(full, WEIGHT_TILE_BYTES + 2 * WEIGHT_TILE_N);
      ptx::bulk_copy(ring.stage + offsetof(Stage, w_packed) + role * WEIGHT_TILE_BYTES,
                     p.w_packed + (tile * p.k_blocks + kb) * WEIGHT_TILE_BYTES, WEIGHT_TILE_BYTES, full);
      ptx::bulk_copy(ring.stage + offsetof(Stage, w_scale) + role * 2 * WEIGHT_TILE_N,
                     p.w_scale + (tile * p.groups + group) * WEIGHT_TILE_N, 2 * WEIGHT_TILE_N, full);
      return;
    }
    const int m0 = item.tile.m * TILE_M, rows = min(TILE_M, p.m_stride - m0);
    if (role == CONSUMERS) {
      ptx::barrier_expect_bytes(full, rows * BLOCK);
      ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes),
                     p.a_codes + (static_cast<long long>(kb) * p.m_stride + m0) * BLOCK, rows * BLOCK, full);
    } else {
      ptx::barrier_expect_bytes(full, rows * 4);
      ptx::bulk_copy(ring.stage + offsetof(Stage, a_scale), p.a_scale + static_cast<long long>(group) * p.m_stride + m0,
                     rows * 4, full);
    }
  }

  __device__ __forceinline__ void run(const Problem& p) {
    // Weights do not wait for the kernel that writes the activations.
    if (role >= CONSUMERS) ptx::wait_for_predecessor();
    for (Schedule schedule(p); !schedule.done(); schedule.advance(p)) {
      const Item item = schedule.item(p);
      int group = item.first_block / p.blocks_per_group;
      int left = (group + 1) * p.blocks_per_group - item.first_block;  // blocks of the group
      for (int kb = item.first_block; kb < item.last_block; ++kb) {
        ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
        copy(p, item, kb, group);
        ring.next();
        if (--left == 0) ++group, left = p.blocks_per_group;
      }
    }
  }
};

// ---- consumers: a warpgroup each -------------------------------------------------------------------------------------------

// Eight codes of a word -> four of row r and four of row r + 8, as e4m3. layouts.py, `_sign_magnitude`.
__device__ __forceinline__ void widen(uint32 word, uint32& even, uint32& odd) {
  even = word & 0x87878787u;
  odd = __funnelshift_r(word, word, 4) & 0x87878787u;
}

// The A fragments of one block: 4 k32 steps of 4 registers.
__device__ __forceinline__ void read_weights(uint32 (&a)[16], uint32 w_smem_rd) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 v = ptx::shared_read_128(w_smem_rd + sm90_weight_byte(half, 0, 0));
    widen(v.x, a[8 * half + 0], a[8 * half + 1]);
    widen(v.y, a[8 * half + 2], a[8 * half + 3]);
    widen(v.z, a[8 * half + 4], a[8 * half + 5]);
    widen(v.w, a[8 * half + 6], a[8 * half + 7]);
  }
}

struct Consumer {
  const int group, warp, lane;  // warpgroup, warp of it, lane of that
  Ring ring;                    // of the block whose weights are read next
  uint32 w_lane, w_scale_lane, a_scale_lane;  // what this lane reads, relative to a stage

  __device__ __forceinline__ Consumer(const Shared& s, int thread)
      : group(thread / WARPGROUP), warp(thread / 32 % 4), lane(thread % 32), ring(s) {
    w_lane = offsetof(Stage, w_packed) + group * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    w_scale_lane = offsetof(Stage, w_scale) + 2 * (group * WEIGHT_TILE_N + sm90_scale_position(warp, lane));
    a_scale_lane = offsetof(Stage, a_scale) + 4 * accumulator_column(lane, 0);
    // Kept in registers, rather than worked out again in the main loop.
    asm volatile("" : "+r"(w_lane), "+r"(w_scale_lane), "+r"(a_scale_lane), "+r"(ring.begin));
    ring.stage = ring.begin;
  }

  // The next block's weights, widened.
  __device__ __forceinline__ void prepare(uint32 (&a)[16]) {
    ptx::barrier_wait(ring.stage + offsetof(Stage, full), ring.parity);
    read_weights(a, ring.stage + w_lane);
    ring.next();
  }

  // Starts the products of one chunk of tokens with a block's weights.
  __device__ __forceinline__ void multiply(float (&sum)[CHUNK_SUMS], const uint32 (&a)[16], uint32 stage, int chunk) {
    const uint32 tokens = stage + offsetof(Stage, a_codes) + chunk * CHUNK_M * BLOCK;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::Wgmma<CHUNK_M>::e4m3(sum, a + 4 * step, ptx::wgmma_descriptor(tokens + 32 * step), step > 0);
    }
    ptx::wgmma_commit();
  }

  // What takes integers to floats: the scales of rows r and r + 8, and of pairs of tokens.
  __device__ __forceinline__ float2 read_output_scales(uint32 stage) {
    const uint32 pair = ptx::shared_read_32(stage + w_scale_lane);
    const float2 scales = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return make_float2(PRODUCT_UNIT * scales.x, PRODUCT_UNIT * scales.y);
  }
  static constexpr int TOKENS_AT_ONCE = CHUNK_M < 64 ? CHUNK_M : 64;
  __device__ __forceinline__ void read_token_scales(float2 (&tokens)[TOKENS_AT_ONCE / 8], uint32 stage, int first) {
#pragma unroll
    for (int j = 0; j < TOKENS_AT_ONCE / 8; ++j) {
      tokens[j] = ptx::shared_read_float2(stage + a_scale_lane + 4 * (first + 8 * j));
    }
  }
  __device__ __forceinline__ void dequantize(float* acc, float* sum, const float2 (&tokens)[TOKENS_AT_ONCE / 8],
                                             float2 outputs) {
#pragma unroll
    for (int i = 0; i < TOKENS_AT_ONCE / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not before the wait
#pragma unroll
    for (int j = 0; j < TOKENS_AT_ONCE / 8; ++j) {
      acc[4 * j + 0] = __fmaf_rn(sum[4 * j + 0] * outputs.x, tokens[j].x, acc[4 * j + 0]);
      acc[4 * j + 1] = __fmaf_rn(sum[4 * j + 1] * outputs.x, tokens[j].y, acc[4 * j + 1]);
      acc[4 * j + 2] = __fmaf_rn(sum[4 * j + 2] * outputs.y, tokens[j].x, acc[4 * j + 2]);
      acc[4 * j + 3] = __fmaf_rn(sum[4 * j + 3] * outputs.y, tokens[j].y, acc[4 * j + 3]);
    }
  }

  __device__ __forceinline__ void leave(uint32 stage) {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(stage + offsetof(Stage, empty));
  }

#if TILE_M >= 64
  // Large tiles. One block: start its products with `now`, widen the next block's weights into `next` meanwhile, dequantize.
  // The tensor cores work for the other warpgroup then.
  template <bool last>
  __device__ __forceinline__ void block(float (&acc)[SUMS], float (&sum)[2][CHUNK_SUMS], uint32 (&now)[16],
                                        uint32 (&next)[16], uint32& stage) {
    float2 tokens[TOKENS_AT_ONCE / 8];
    const uint32 this_stage = stage;
    if (CHUNKS == 1) {
      multiply(sum[0], now, this_stage, 0);
      const float2 outputs = read_output_scales(this_stage);
      read_token_scales(tokens, this_stage, 0);
      if (!last) {
        stage = ring.stage;
        prepare(next);
      }
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int first = 0; first < TILE_M; first += TOKENS_AT_ONCE) {
        if (first > 0) read_token_scales(tokens, this_stage, first);
        dequantize(acc + first / 2, sum[0] + first / 2, tokens, outputs);
      }
    } else {
      const float2 outputs = read_output_scales(this_stage);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        if (c + 1 < CHUNKS) {
          multiply(sum[(c + 1) % 2], now, this_stage, c + 1);
          if (c == 0 && !last) {
            stage = ring.stage;
            prepare(next);
          }
        } else if (!last) {
          multiply(sum[(c + 1) % 2], next, stage, 0);
        }
        read_token_scales(tokens, this_stage, c * CHUNK_M);
        if (c + 1 == CHUNKS && last) {
          ptx::wgmma_wait<0>();
        } else {
          ptx::wgmma_wait<1>();
        }
        dequantize(acc + c * CHUNK_SUMS, sum[c % 2], tokens, outputs);
      }
    }
    leave(this_stage);
  }

  __device__ __forceinline__ void multiply_item(float (&acc)[SUMS], int blocks) {
    float sum[2][CHUNK_SUMS];
    uint32 a[16], b[16];  // take turns
    uint32 stage = ring.stage;
    prepare(a);
    if (CHUNKS > 1) multiply(sum[0], a, stage, 0);
    // Main loop: one block of 128 input features, one pipeline stage, per call of `block`.
#pragma unroll 1
    for (; blocks > 2; blocks -= 2) {
      block<false>(acc, sum, a, b, stage);
      block<false>(acc, sum, b, a, stage);
    }
    if (blocks == 2) {
      block<false>(acc, sum, a, b, stage);
      block<true>(acc, sum, b, a, stage);
    } else {
      block<true>(acc, sum, a, b, stage);
    }
  }
#else
  // Small tiles: two blocks in the tensor cores at a time, `a` and `b`, while the next two are widened into `c` and `d`
  // (as far as there are `blocks`, these two included). Where there is no second block, its products are not read:
  // products that start in one branch only would have to end in it.
  __device__ __forceinline__ void two_blocks(float (&acc)[SUMS], uint32 (&a)[16], uint32 (&b)[16], uint32 (&c)[16],
                                             uint32 (&d)[16], uint32 (&stage)[2], int blocks) {
    float sum[2][CHUNK_SUMS];
    float2 tokens[2][TOKENS_AT_ONCE / 8];
    const uint32 first = stage[0], second = stage[1];
    multiply(sum[0], a, first, 0);
    multiply(sum[1], b, second, 0);
    const float2 outputs[2] = {read_output_scales(first), read_output_scales(second)};
    read_token_scales(tokens[0], first, 0);
    read_token_scales(tokens[1], second, 0);
    stage[0] = ring.stage;
    if (blocks > 2) prepare(c);
    stage[1] = ring.stage;
    if (blocks > 3) prepare(d);
    ptx::wgmma_wait<1>();
    dequantize(acc, sum[0], tokens[0], outputs[0]);
    leave(first);
    ptx::wgmma_wait<0>();
    if (blocks > 1) {
      dequantize(acc, sum[1], tokens[1], outputs[1]);
      leave(second);
    }
  }

  __device__ __forceinline__ void multiply_item(float (&acc)[SUMS], int blocks) {
    uint32 a[16] = {}, b[16] = {}, c[16] = {}, d[16] = {};
    uint32 stage[2];
    stage[0] = ring.stage;
    prepare(a);
    stage[1] = ring.stage;
    if (blocks > 1) prepare(b);
    // Main loop: four blocks of 128 input features per turn.
#pragma unroll 1
    for (; blocks > 0; blocks -= 4) {
      two_blocks(acc, a, b, c, d, stage, blocks);
      if (blocks > 2) two_blocks(acc, c, d, a, b, stage, blocks - 2);
    }
  }
#endif

  // Adds the partial sums of all parts of a tile in their order, in whichever warpgroup comes last. False for the others.
  __device__ __forceinline__ bool add_parts(const Problem& p, Shared& s, const Item& item, float (&acc)[SUMS]) {
    const int tile = (item.tile.n * CONSUMERS + group) * p.tiles_m + item.tile.m;
    const int thread = 32 * warp + lane;
    constexpr int VECTORS = SUMS / 4;
    const int most_parts = (p.k_blocks + p.span - 1) / p.span + 1;
    float4* slice = reinterpret_cast<float4*>(p.partial) + static_cast<long long>(tile) * most_parts * VECTORS * WARPGROUP + thread;
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      slice[(item.part * VECTORS + j) * WARPGROUP] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    }
    __threadfence();
    ptx::named_barrier(1 + group, WARPGROUP);
    if (thread == 0) {
      const bool last = atomicAdd(&p.counter[tile], 1) == item.parts - 1;
      if (last) p.counter[tile] = 0;  // ready for the next launch
      s.last[group] = last;
    }
    ptx::named_barrier(1 + group, WARPGROUP);
    if (!s.last[group]) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int part = 0; part < item.parts; ++part) {
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        const float4 v = __ldcg(&slice[(part * VECTORS + j) * WARPGROUP]);
        acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.z, acc[4 * j + 3] += v.w;
      }
    }
    return true;
  }

  // D is outputs by tokens, y tokens by outputs: stmatrix transposes 8 x 8 blocks into shared memory, in 16-byte chunks
  // swizzled by token; then every 8 threads store the 128 bytes of one token.
  __device__ __forceinline__ void store(const Problem& p, Shared& s, const Item& item, float (&acc)[SUMS]) {
    const int m0 = item.tile.m * TILE_M, n0 = (item.tile.n * CONSUMERS + group) * WEIGHT_TILE_N;
    if (p.bias != nullptr) {
      const int row = n0 + 16 * warp + accumulator_row(lane, 0);
      const float b0 = row < p.n ? p.bias[row] : 0.0f, b1 = row + 8 < p.n ? p.bias[row + 8] : 0.0f;
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[i] += i & 2 ? b1 : b0;
    }
    const uint32 y_smem = ptx::shared_address(s.y[group]);
    const int token = lane & 7, half = lane >> 3 & 1;  // of the row whose address this lane gives
#pragma unroll
    for (int j = 0; j < TILE_M / 8; ++j) {
      ptx::stmatrix_x2_trans(y_smem + sm90_activation_byte(8 * j + token, 2 * warp + half),
                             pack_pair(acc[4 * j], acc[4 * j + 1]), pack_pair(acc[4 * j + 2], acc[4 * j + 3]));
    }
    ptx::named_barrier(1 + group, WARPGROUP);
    const int thread = 32 * warp + lane, chunk = thread & 7, column = n0 + 8 * chunk;
    const bool vectors = p.ldy % 8 == 0 && (reinterpret_cast<uint64>(p.y) & 15) == 0;
#pragma unroll 4
    for (int row = thread >> 3; row < TILE_M; row += WARPGROUP / 8) {
      if (m0 + row >= p.m) break;
      const uint4 v = ptx::shared_read_128(y_smem + sm90_activation_byte(row, chunk));
      Out* y_gmem_wr = p.y + static_cast<long long>(m0 + row) * p.ldy + column;
      if (vectors && column + 8 <= p.n) {
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
    ptx::named_barrier(1 + group, WARPGROUP);  // before the next tile writes here
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s) {
    for (Schedule schedule(p); !schedule.done(); schedule.advance(p)) {
      float acc[SUMS] = {};
      const Item ahead = schedule.item(p);
      multiply_item(acc, ahead.last_block - ahead.first_block);
      asm volatile("" : "+r"(schedule.next));  // the item is worked out again rather than kept through the main loop
      const Item item = schedule.item(p);
      if (item.tile.n * CONSUMERS + group >= p.weight_tiles) continue;  // past N: nothing was loaded for it
      if (item.parts > 1 && !add_parts(p, s, item, acc)) continue;
      store(p, s, item, acc);
    }
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const __half* w_scale,
               const float* bias, float* partial, uint32* counter, int m, int n, int k_blocks, int blocks_per_group,
               int m_stride, int ldy, int span) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const int groups = (k_blocks + blocks_per_group - 1) / blocks_per_group;
  const int weight_tiles = (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N;
  const Problem p = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_scale, bias, partial, counter, m, n, k_blocks,
                     blocks_per_group, groups, m_stride, ldy, span, (m + TILE_M - 1) / TILE_M,
                     (weight_tiles + CONSUMERS - 1) / CONSUMERS, weight_tiles};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].full), PRODUCERS);
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].empty), 4 * CONSUMERS);  // a warp each
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMERS * WARPGROUP) {
    ptx::fewer_registers<PRODUCER_REGISTERS>();
    const int warp = threadIdx.x / 32 % 4;
    if (threadIdx.x % 32 == 0 && warp < PRODUCERS) Producer{warp, Ring(s)}.run(p);
  } else {
    ptx::more_registers<CONSUMER_REGISTERS>();
    Consumer(s, threadIdx.x).run(p, s);
    ptx::let_successor_start();
  }
#endif
}
