// GEMM of 4-bit weights and 8-bit activations for sm_90a (H100, H200) and few tokens, as in decoding. Operands, arithmetic and roles
// are those of gemm_sm90_s8.cu; tiles, stages, clusters and what is shared by them are those of gemm_sm90_decode.cu. As nothing is
// done for a group, a warpgroup's integer sums run over all of its blocks.
//
// Arguments as gemm_sm90_s8.cu has them; `partial`, `counter` and `span` are not used. Clusters of one or two thread blocks.
//
// Macros: TILE_M, PARTS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16.

#include "gemm/gemm_sm90_s8.cuh"

#define COMPLEMENTS (TILE_M <= 16)  // signs by products of their own, where registers hold them

constexpr int COPYING_WARPS = 2;
constexpr int THREADS = WARPGROUP * PARTS + 32 * COPYING_WARPS;
constexpr int VECTORS = SUMS / 4;
// Named barriers: of the first warpgroup alone; sums of the others are written; and have been read.
constexpr int FIRST_MEETS = 1, WRITTEN = 2, READ = 3;
constexpr int PREPARED = 4;  // all threads: the other barriers

// PARTS consecutive blocks of 128 inputs, one for each warpgroup.
struct Stage {
  alignas(1024) uint8 a_codes[PARTS][TILE_M * BLOCK];
  uint8 w_packed[PARTS][WEIGHT_TILE_BYTES];
  unsigned short w_ratio[PARTS][WEIGHT_TILE_N];
  uint64 full, empty;
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
static_assert(STAGE_BYTES % 1024 == 0, "what the swizzle of wgmma needs");
struct Shared {
  Stage stages[STAGES];
  unsigned short y[2][CHUNK_M][WEIGHT_TILE_N];
  float a_scale[TILE_M];
  int4 sums[PARTS - 1][VECTORS][WARPGROUP];  // of this thread block's other warpgroups
  int4 second_sums[VECTORS][WARPGROUP];       // in the first block of a cluster: of the second one
  uint64 sent, taken;                           // second_sums are written: in the first block; are read: in the second
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (gemm_configs.py)");

struct Ring {
  uint32 stage, parity, end;
  uint32 descriptor;  // the part of matrix descriptors that says where the stage is
  __device__ __forceinline__ explicit Ring(const Shared& s) : stage(ptx::shared_address(s.stages)), parity(0) {
    asm volatile("" : "+r"(stage));  // kept in a register, rather than worked out again in the main loop
    end = stage + STAGES * STAGE_BYTES;
    descriptor = ptx::descriptor_address(stage);
    asm volatile("" : "+r"(descriptor));
  }
  __device__ __forceinline__ void next() {
    stage += STAGE_BYTES, descriptor += STAGE_BYTES >> 4;
    if (stage == end) stage -= STAGES * STAGE_BYTES, descriptor -= STAGES * STAGE_BYTES >> 4, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- two warps that copy: weights and their ratios; the tokens' codes -----------------------------------------------------

enum Role { WEIGHTS, CODES };

// A thread block computes every `clusters`-th tile; of a tile's stages, those from `rank` on, every `ranks`-th.
struct Share {
  int rank, ranks, cluster, clusters;
  __device__ __forceinline__ Share()
      : rank(ptx::cluster_rank()), ranks(ptx::cluster_size()), cluster(blockIdx.x / ranks), clusters(gridDim.x / ranks) {}
  __device__ __forceinline__ int first_block() const { return rank * PARTS; }
  __device__ __forceinline__ int step() const { return ranks * PARTS; }
};

template <Role role>
struct Producer {
  Ring ring;

  // What a warp copies of one stage, `count` blocks from `block` on.
  __device__ __forceinline__ void copy(const Problem& p, const Tile& tile, int block, int count) {
    [[maybe_unused]] const int m0 = tile.m * TILE_M, rows = min(TILE_M, p.m_stride - m0);
    const uint32 full = ring.stage + offsetof(Stage, full);
    if (role == WEIGHTS) {
      const long long n = tile.n;
      ptx::barrier_expect_bytes(full, count * (WEIGHT_TILE_BYTES + RATIO_BYTES));
      ptx::bulk_copy(ring.stage + offsetof(Stage, w_packed), p.w_packed + (n * p.k_blocks + block) * WEIGHT_TILE_BYTES,
                     count * WEIGHT_TILE_BYTES, full);
      const unsigned short* w_ratio_gmem_rd = p.w_ratio + n * p.groups() * WEIGHT_TILE_N;
      if (p.blocks_per_group == 1) {  // the usual case needs no copy for each
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_ratio), w_ratio_gmem_rd + block * WEIGHT_TILE_N, count * RATIO_BYTES, full);
        return;
      }
      for (int i = 0; i < count; ++i) {
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_ratio) + i * RATIO_BYTES,
                       w_ratio_gmem_rd + (block + i) / p.blocks_per_group * WEIGHT_TILE_N, RATIO_BYTES, full);
      }
    } else {
      ptx::barrier_expect_bytes(full, count * rows * BLOCK);
      const uint8* a_codes_gmem_rd = p.a_codes + (static_cast<long long>(block) * p.m_stride + m0) * BLOCK;
      for (int i = 0; i < count; ++i, a_codes_gmem_rd += static_cast<long long>(p.m_stride) * BLOCK) {
        ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes) + i * TILE_M * BLOCK, a_codes_gmem_rd, rows * BLOCK, full);
      }
    }
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

// ---- warpgroups that multiply ---------------------------------------------------------------------------------------------

struct Consumer {
  const int part;  // which warpgroup: of every stage, it multiplies block `part`
  Ring ring;
  uint32 w_lane, ratio_lane, codes;  // what this lane reads, and its warpgroup's tokens, relative to a stage

  __device__ __forceinline__ Consumer(const Shared& s, int part) : part(part), ring(s) {
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    w_lane = offsetof(Stage, w_packed) + part * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    ratio_lane = offsetof(Stage, w_ratio) + 2 * (part * WEIGHT_TILE_N + sm90_scale_position(warp, lane));
    codes = (offsetof(Stage, a_codes) + part * TILE_M * BLOCK) >> 4;
  }

  template <int count>
  static __device__ __forceinline__ void pin(uint32 (&a)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(a[i])::"memory");
  }
  __device__ __forceinline__ void leave(uint32 stage) {
    if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
  }

  // This tile's blocks of this warpgroup. Codes of a block that does not exist are zeros: its products, of whatever stands there,
  // are zeros, too.
  __device__ __forceinline__ void multiply(int (&acc)[SUMS], const Problem& p, const Share& share) {
    uint32 a[4][4] = {}, negative[4][4] = {};
    int complements[SUMS] = {};
    uint32 done = NONE;  // the stage before
    // Main loop: one stage, a block of 128 inputs for each warpgroup, per turn.
#pragma unroll 1
    for (int block = share.first_block(); block < p.k_blocks; block += share.step()) {
      const uint32 stage = ring.stage, tokens = ring.descriptor + codes;
      ptx::barrier_wait(stage + offsetof(Stage, full), ring.parity);
      uint4 words[2] = {ptx::shared_read_128(stage + w_lane + sm90_weight_byte(0, 0, 0)),
                        ptx::shared_read_128(stage + w_lane + sm90_weight_byte(1, 0, 0))};
      uint32 ratios = ptx::shared_read_32(stage + ratio_lane);
      if (block + part >= p.k_blocks) { words[0] = words[1] = make_uint4(0, 0, 0, 0); asm volatile(""); }
#if COMPLEMENTS
      Tables tables;
#else
      SignedTables tables;
#endif
      tables.make(ratios);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int step = 0; step < 4; ++step) pin(a[step]), pin(negative[step]);
      if (done != NONE) leave(done);
      done = stage;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint4& half = words[step / 2];
        const uint32 first = step % 2 ? half.z : half.x, second = step % 2 ? half.w : half.y;
        const uint64 b = ptx::wgmma_descriptor(tokens + (32 * step >> 4));
#if COMPLEMENTS
        fold_complements(a[step], negative[step], first, second, tables);
        pin(a[step]), pin(negative[step]);
        ptx::wgmma_fence();
        ptx::Wgmma<TILE_M>::s8(acc, a[step], b, 1);
        ptx::Wgmma<TILE_M>::s8(complements, negative[step], b, 1);
#else
        fold(a[step], first, second, tables);
        pin(a[step]);
        ptx::wgmma_fence();
        ptx::Wgmma<TILE_M>::s8(acc, a[step], b, 1);
#endif
        ptx::wgmma_commit();
      }
      ring.next();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int step = 0; step < 4; ++step) pin(a[step]), pin(negative[step]);
    if (done != NONE) leave(done);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
      asm volatile("" : "+r"(acc[i]), "+r"(complements[i])::"memory");  // not before the wait
      acc[i] -= complements[i];
    }
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s, const Share& share) {
    const int thread = ptx::thread() % WARPGROUP;
    if (part == 0) ptx::wait_for_predecessor();  // whose scales are read
    bool met = share.ranks == 1;  // the cluster: its barriers are ready
    uint32 parity = 0;            // of `sent` and `taken`
    if (part == 0) ptx::named_barrier_arrive(READ, WARPGROUP * PARTS);
    for (int index = share.cluster; index < p.tiles_m * p.tiles_n; index += share.clusters) {
      int acc[SUMS] = {};
      const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
      if (part == 0 && share.rank == 0) {  // the tokens' scales, on their way while products are made
        const int token = tile.m * TILE_M + thread;
        if (thread < TILE_M && token < p.m) ptx::cp_async_4(ptx::shared_address(&s.a_scale[thread]), p.a_scale + token);
        ptx::cp_async_commit();
      }
      multiply(acc, p, share);
      if (part > 0) {
        ptx::named_barrier(READ, WARPGROUP * PARTS);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) s.sums[part - 1][j][thread] = vector_of(acc, j);
        ptx::named_barrier_arrive(WRITTEN, WARPGROUP * PARTS);
        continue;
      }
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
          ptx::remote_write_int4(ptx::shared_of_rank(ptx::shared_address(&s.second_sums[j][thread]), 0), vector_of(acc, j));
        }
        ptx::remote_barrier_arrive(ptx::shared_of_rank(ptx::shared_address(&s.sent), 0));
        parity ^= 1;
        continue;
      }
      if (share.ranks == 2) {
        ptx::barrier_wait_cluster(ptx::shared_address(&s.sent), parity);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) add(acc, j, s.second_sums[j][thread]);
        ptx::remote_barrier_arrive(ptx::shared_of_rank(ptx::shared_address(&s.taken), 1));
        parity ^= 1;
      }
      const Outputs outputs(p, tile.n);
      ptx::cp_async_wait<0>();
      ptx::named_barrier(FIRST_MEETS, WARPGROUP);
      store(p, tile.m, tile.n, FIRST_MEETS, s.y, s.a_scale, outputs, acc);
    }
    if (part > 0) ptx::named_barrier(READ, WARPGROUP * PARTS);
    if (!met) ptx::cluster_wait();
  }

  static __device__ __forceinline__ int4 vector_of(const int (&acc)[SUMS], int j) {
    return make_int4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
  static __device__ __forceinline__ void add(int (&acc)[SUMS], int j, int4 v) {
    acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.z, acc[4 * j + 3] += v.w;
  }
};

// ---- the kernels ----------------------------------------------------------------------------------------------------------

// The warp that copies weights makes the barriers and goes on; the others wait for it.
__device__ __forceinline__ void prepare(Shared& s, int warp) {
  ptx::let_successor_start();  // it waits for the whole of this kernel before it reads or writes anything of it
  if (warp != 4 * PARTS + WEIGHTS) {
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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const unsigned short* w_ratio,
               const float* w_unit, const float* bias, int* partial, uint32* counter, int m, int n, int k_blocks,
               int blocks_per_group, int m_stride, int ldy, int span, int tiles_m, int tiles_n) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const Problem given = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_ratio, w_unit, bias, partial, counter,
                         m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n};
  // The same in all lanes, also for the compiler, which then addresses with uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  prepare(s, warp);
  const Share share;
  if (share.ranks > 1) ptx::cluster_arrive();
  if (warp < 4 * PARTS) {
    Consumer(s, warp / 4).run(given, s, share);
  } else {
    if (warp == 4 * PARTS + WEIGHTS) Producer<WEIGHTS>{Ring(s)}.run(given, share);
    if (warp == 4 * PARTS + CODES) Producer<CODES>{Ring(s)}.run(given, share);
    if (share.ranks > 1) ptx::cluster_wait();
  }
  leave(share);
#endif
}
