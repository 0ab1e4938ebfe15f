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
//   partial   [ceil(N/64)][ceil(M/TILE_M)][splits][64 TILE_M] float32 and counter [ceil(N/64)][ceil(M/TILE_M)] zeros: read
//             and written if splits > 1, and the counters are left zero
// Any M, N >= 1. Groups wider than 128 are dequantized block by block with their group's scales.
//
// One producer warp fills a ring of STAGES blocks with bulk copies; CONSUMERS warpgroups of 64 outputs each multiply.
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
constexpr int A_BYTES = TILE_M * BLOCK;
constexpr int SUMS = TILE_M / 2;  // accumulators of a lane
constexpr float PRODUCT_UNIT = 262144.0f;  // 2^18: one over the product of two e4m3 subnormal steps
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(TILE_M % 8 == 0 && TILE_M <= 192, "a wgmma's n, and its sums twice in registers");

struct Shared {
  alignas(1024) uint8 a_codes[STAGES][A_BYTES];
  alignas(128) uint8 w_packed[STAGES][CONSUMERS][WEIGHT_TILE_BYTES];
  alignas(128) unsigned short y[CONSUMERS][TILE_M][WEIGHT_TILE_N];
  alignas(16) float a_scale[STAGES][TILE_M];
  alignas(16) __half w_scale[STAGES][CONSUMERS][WEIGHT_TILE_N];
  uint64 full[STAGES], empty[STAGES];
  bool last[CONSUMERS];  // of a tile's splits
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
  int m, n, k_blocks, blocks_per_group, groups, m_stride, ldy, splits;
  int tiles_m, tiles_n, weight_tiles;
};

// A piece of work: one tile, over one range of blocks.
struct Item {
  Tile tile;
  int split, first_block, last_block;
};
__device__ __forceinline__ Item item_at(const Problem& p, int index) {
  const int split = index % p.splits;
  return {tile_at(index / p.splits, p.tiles_m, p.tiles_n), split,
          static_cast<int>(static_cast<long long>(p.k_blocks) * split / p.splits),
          static_cast<int>(static_cast<long long>(p.k_blocks) * (split + 1) / p.splits)};
}

// Where the ring stands: the slot, and the phase parity of its barriers.
struct Ring {
  int slot = 0;
  uint32 parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- producer: one thread ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_weights(const Problem& p, Shared& s, int slot, const Item& item, int kb) {
  const uint32 full = ptx::shared_address(&s.full[slot]);
  const int group = kb / p.blocks_per_group;
  const int first = item.tile.n * CONSUMERS;
  const int tiles = min(CONSUMERS, p.weight_tiles - first);
  const int rows = min(TILE_M, p.m_stride - item.tile.m * TILE_M);
  ptx::barrier_expect_bytes(full, rows * (BLOCK + 4) + tiles * (WEIGHT_TILE_BYTES + 2 * WEIGHT_TILE_N));
  for (int t = 0; t < tiles; ++t) {
    const long long tile = first + t;
    ptx::bulk_copy(ptx::shared_address(s.w_packed[slot][t]), p.w_packed + (tile * p.k_blocks + kb) * WEIGHT_TILE_BYTES,
                   WEIGHT_TILE_BYTES, full);
    ptx::bulk_copy(ptx::shared_address(s.w_scale[slot][t]), p.w_scale + (tile * p.groups + group) * WEIGHT_TILE_N,
                   2 * WEIGHT_TILE_N, full);
  }
}

__device__ __forceinline__ void copy_activations(const Problem& p, Shared& s, int slot, const Item& item, int kb) {
  const uint32 full = ptx::shared_address(&s.full[slot]);
  const int group = kb / p.blocks_per_group;
  const int m0 = item.tile.m * TILE_M;
  const int rows = min(TILE_M, p.m_stride - m0);
  ptx::bulk_copy(ptx::shared_address(s.a_codes[slot]), p.a_codes + (static_cast<long long>(kb) * p.m_stride + m0) * BLOCK,
                 rows * BLOCK, full);
  ptx::bulk_copy(ptx::shared_address(s.a_scale[slot]), p.a_scale + static_cast<long long>(group) * p.m_stride + m0, rows * 4,
                 full);
}

__device__ __forceinline__ void produce(const Problem& p, Shared& s, int items) {
  Ring ring;
  // The weights of the first stages do not wait for the kernel that writes the activations.
  int ahead = 0;
  if (blockIdx.x < items) {
    const Item item = item_at(p, blockIdx.x);
    ahead = min(STAGES, item.last_block - item.first_block);
    for (int i = 0; i < ahead; ++i) copy_weights(p, s, i, item, item.first_block + i);
  }
  ptx::wait_for_predecessor();
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = item_at(p, index);
    for (int kb = item.first_block; kb < item.last_block; ++kb) {
      if (ahead > 0) {
        --ahead;
      } else {
        ptx::barrier_wait(ptx::shared_address(&s.empty[ring.slot]), ring.parity ^ 1);
        copy_weights(p, s, ring.slot, item, kb);
      }
      copy_activations(p, s, ring.slot, item, kb);
      ring.next();
    }
  }
}

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
  Ring ring;

  // One block: multiply with `now`, widen the next block's weights into `next` meanwhile, dequantize.
  __device__ __forceinline__ void block(Shared& s, float (&acc)[SUMS], float (&sum)[SUMS], uint32 (&now)[16],
                                        uint32 (&next)[16], bool has_next) {
    const int slot = ring.slot;
    const uint64 tokens = ptx::wgmma_descriptor(ptx::shared_address(s.a_codes[slot]));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::Wgmma<TILE_M>::e4m3(sum, now + 4 * step, tokens + step * (32 >> 4), step > 0);
    }
    ptx::wgmma_commit();
    const uint32 pair = ptx::shared_read_32(ptx::shared_address(s.w_scale[slot][group]) + 2 * sm90_scale_position(warp, lane));
    const float2 s_w = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    const float s_w0 = PRODUCT_UNIT * s_w.x, s_w1 = PRODUCT_UNIT * s_w.y;
    ring.next();
    if (has_next) {
      ptx::barrier_wait(ptx::shared_address(&s.full[ring.slot]), ring.parity);
      read_weights(next, ptx::shared_address(s.w_packed[ring.slot][group]) + sm90_weight_byte(0, warp, lane));
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not before the wait
    const float2* s_a = reinterpret_cast<const float2*>(s.a_scale[slot]) + accumulator_column(lane, 0) / 2;
#pragma unroll
    for (int j = 0; j < TILE_M / 8; ++j) {
      const float2 pair_a = s_a[4 * j];
      acc[4 * j + 0] = __fmaf_rn(sum[4 * j + 0] * s_w0, pair_a.x, acc[4 * j + 0]);
      acc[4 * j + 1] = __fmaf_rn(sum[4 * j + 1] * s_w0, pair_a.y, acc[4 * j + 1]);
      acc[4 * j + 2] = __fmaf_rn(sum[4 * j + 2] * s_w1, pair_a.x, acc[4 * j + 2]);
      acc[4 * j + 3] = __fmaf_rn(sum[4 * j + 3] * s_w1, pair_a.y, acc[4 * j + 3]);
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&s.empty[slot]));
  }

  // Adds the partial sums of all splits in their order, in whichever warpgroup comes last. False for the others.
  __device__ __forceinline__ bool reduce_splits(const Problem& p, Shared& s, const Item& item, float (&acc)[SUMS]) {
    const int tile = (item.tile.n * CONSUMERS + group) * p.tiles_m + item.tile.m;
    const int thread = 32 * warp + lane;
    float4* slice = reinterpret_cast<float4*>(p.partial) + static_cast<long long>(tile) * p.splits * (WARPGROUP * SUMS / 4);
#pragma unroll
    for (int j = 0; j < SUMS / 4; ++j) {
      slice[(item.split * (SUMS / 4) + j) * WARPGROUP + thread] =
          make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    }
    __threadfence();
    ptx::named_barrier(1 + group, WARPGROUP);
    if (thread == 0) {
      const bool last = atomicAdd(&p.counter[tile], 1) == p.splits - 1;
      if (last) p.counter[tile] = 0;  // ready for the next launch
      s.last[group] = last;
    }
    ptx::named_barrier(1 + group, WARPGROUP);
    if (!s.last[group]) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;
#pragma unroll 1
    for (int split = 0; split < p.splits; ++split) {
#pragma unroll
      for (int j = 0; j < SUMS / 4; ++j) {
        const float4 v = __ldcg(&slice[(split * (SUMS / 4) + j) * WARPGROUP + thread]);
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

  __device__ __forceinline__ void run(const Problem& p, Shared& s, int items) {
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      const Item item = item_at(p, index);
      const int blocks = item.last_block - item.first_block;
      float acc[SUMS], sum[SUMS];
      uint32 a[2][16];
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f, sum[i] = 0.0f;
      ptx::barrier_wait(ptx::shared_address(&s.full[ring.slot]), ring.parity);
      read_weights(a[0], ptx::shared_address(s.w_packed[ring.slot][group]) + sm90_weight_byte(0, warp, lane));
      // Main loop: one block of 128 input features, one pipeline stage, per call of `block`.
#pragma unroll 1
      for (int kb = 0; kb < blocks; kb += 2) {
        block(s, acc, sum, a[0], a[1], kb + 1 < blocks);
        if (kb + 1 < blocks) block(s, acc, sum, a[1], a[0], kb + 2 < blocks);
      }
      if (item.tile.n * CONSUMERS + group >= p.weight_tiles) continue;  // past N: nothing was loaded for it
      if (p.splits > 1 && !reduce_splits(p, s, item, acc)) continue;
      store(p, s, item, acc);
    }
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const __half* w_scale,
               const float* bias, float* partial, uint32* counter, int m, int n, int k_blocks, int blocks_per_group,
               int m_stride, int ldy, int splits) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const int groups = (k_blocks + blocks_per_group - 1) / blocks_per_group;
  const int weight_tiles = (n + WEIGHT_TILE_N - 1) / WEIGHT_TILE_N;
  const Problem p = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_scale, bias, partial, counter, m, n, k_blocks,
                     blocks_per_group, groups, m_stride, ldy, splits, (m + TILE_M - 1) / TILE_M,
                     (weight_tiles + CONSUMERS - 1) / CONSUMERS, weight_tiles};
  const int items = p.tiles_m * p.tiles_n * splits;
  const int group = threadIdx.x / WARPGROUP;

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      ptx::barrier_init(ptx::shared_address(&s.full[slot]), 1);
      ptx::barrier_init(ptx::shared_address(&s.empty[slot]), 4 * CONSUMERS);  // a warp each
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (group == CONSUMERS) {
    ptx::fewer_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS * WARPGROUP) produce(p, s, items);
  } else {
    ptx::more_registers<CONSUMER_REGISTERS>();
    Consumer consumer = {group, static_cast<int>(threadIdx.x) / 32 % 4, static_cast<int>(threadIdx.x) % 32, {}};
    consumer.run(p, s, items);
    ptx::let_successor_start();
  }
#endif
}
