// W4A4 GEMM for sm_90a (H100, H200) and few tokens, as in decoding. Operands, arithmetic and roles are those of gemm_sm90.cu:
//     D [64 outputs, TILE_M tokens] = W [64, 128] x^T [128, TILE_M], weights widened in registers, codes in e4m3.
//
// What bounds it is other: weights are read once and used for a few tokens, so the time is that of reading them, if enough of
// them are on their way at any time and if no chain of dependent steps is longer. Such a chain is a block of 128 inputs: wait,
// read, widen, four products one after the other, dequantize; some 500 clocks, in which the memory could bring nearly two
// blocks. So a tile of 64 outputs is one thread block's, and its PARTS warpgroups take every PARTS-th block of inputs each. Their
// sums are added in shared memory, in a fixed order. Where that leaves multiprocessors without work, two thread blocks in a
// cluster share a tile, each with every second stage, and the second writes its sums into the first one's shared memory. Sums
// never go through global memory: between thread blocks that cost more than most of these GEMMs take (docs/kernels.md).
//
// Two kernels, by the macro QUANTIZES:
//   0, apex4_gemm: arguments as gemm_sm90.cu has them; `partial`, `counter` and `span` are not used.
//   1, apex4_linear: no codes are given, but x; every thread block quantizes the few tokens for itself (quantize_tokens.cuh) while
//      the copy engine fills the stages with weights, so that a linear is one kernel and the quantizer's time hides.
// Clusters of one or two thread blocks.
//
// Operands of apex4_linear (type T: that of y, and of x):
//   y, w_packed, w_scale, bias, m <= TILE_M, n, k_blocks, ldy, tiles_n    as in gemm_sm90.cu; groups of one block
//   x, second, k, ldx, ld_second, clip_over_7, aligned                         as in quantize_rows.cu
//   dynamic shared memory: struct Shared, and behind it, for each of TokenQuantizer::owned() blocks,
//                            TILE_M scales and m rows of codes, and 128 bytes
//
// Macros: TILE_M, PARTS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16, QUANTIZES; with 1, those of quantize_slice.cuh.

#include "gemm/gemm_sm90.cuh"
#if QUANTIZES
#include "quantize/quantize_tokens.cuh"
#endif

constexpr int COPYING_WARPS = QUANTIZES ? 1 : 3;
constexpr int THREADS = WARPGROUP * PARTS + 32 * COPYING_WARPS;
constexpr int TILES = 1, LANE_SUMS = SUMS, VECTORS = LANE_SUMS / 4;
// Named barriers: of the first warpgroup alone; sums of the others are written; and have been read.
constexpr int FIRST_MEETS = 1, WRITTEN = 2, READ = 3;
[[maybe_unused]] constexpr int QUANTIZED = 4;  // QUANTIZES: all warpgroups
constexpr int PREPARED = 5;                    // all threads: the other barriers

// PARTS consecutive blocks of 128 inputs, one for each warpgroup.
struct Stage {
#if !QUANTIZES
  alignas(1024) uint8 a_codes[PARTS][TILE_M * BLOCK];
  float a_scale[PARTS][TILE_M];
#endif
  alignas(128) uint8 w_packed[PARTS][WEIGHT_TILE_BYTES];
  __half w_scale[PARTS][WEIGHT_TILE_N];
  uint64 full, empty;

  static __device__ __forceinline__ uint32 weight_scales() { return offsetof(Stage, w_scale); }
#if !QUANTIZES
  static __device__ __forceinline__ uint32 token_scales() { return offsetof(Stage, a_scale); }
#endif
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
static_assert(QUANTIZES || STAGE_BYTES % 1024 == 0, "what the swizzle of wgmma needs");
struct Shared {
  Stage stages[STAGES];
  unsigned short y[TILE_M][WEIGHT_TILE_N];
  float4 sums[PARTS - 1][VECTORS][WARPGROUP];  // of this thread block's other warpgroups
  float4 second_sums[VECTORS][WARPGROUP];       // in the first block of a cluster: of the second one
  uint64 sent, taken;                           // second_sums are written: in the first block; are read: in the second

  __device__ __forceinline__ void clear() {}
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (kernels/gemm/configs.py)");

constexpr bool KEEPS_STAGE = false;
#include "gemm/decode_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- warpgroups that multiply ---------------------------------------------------------------------------------------------

// Where the tokens' codes and scales of a warpgroup's next block are.
#if QUANTIZES
struct Tokens {
  uint32 rows, first_codes, first_scales, codes, scales;  // codes: an address as descriptors have it

  __device__ __forceinline__ Tokens(const TokenQuantizer& q, int part) : rows(q.m) {
    first_codes = ptx::descriptor_address(ptx::shared_address(q.codes) + sm90_token_byte(rows, 0, CHUNKS * part));
    first_scales = ptx::shared_address(q.scales) + 4 * (part * TILE_M + accumulator_column(ptx::thread() % 32, 0));
  }
  __device__ __forceinline__ void start_tile() { codes = first_codes, scales = first_scales; }
  __device__ __forceinline__ void next() { codes += PARTS * CHUNKS * rows, scales += PARTS * TILE_M * 4; }
  __device__ __forceinline__ uint32 codes_of(uint32) const { return codes; }
  __device__ __forceinline__ uint32 scales_of(uint32) const { return scales; }
  // Of 32 input features: two chunks.
  __device__ __forceinline__ uint64 descriptor(uint32 codes, int step) const {
    return ptx::wgmma_descriptor_plain(codes + 2 * step * rows, 16 * rows, 128);
  }
};
#else
struct Tokens {
  uint32 codes_at, scales_at;  // in a stage

  __device__ __forceinline__ explicit Tokens(int part)
      : codes_at(offsetof(Stage, a_codes) + part * TILE_M * BLOCK),
        scales_at(offsetof(Stage, a_scale) + 4 * (part * TILE_M + accumulator_column(ptx::thread() % 32, 0))) {}
  __device__ __forceinline__ void start_tile() {}
  __device__ __forceinline__ void next() {}
  __device__ __forceinline__ uint32 codes_of(uint32 stage) const { return ptx::descriptor_address(stage + codes_at); }
  __device__ __forceinline__ uint32 scales_of(uint32 stage) const { return stage + scales_at; }
  __device__ __forceinline__ uint64 descriptor(uint32 codes, int step) const {
    return ptx::wgmma_descriptor(codes + (32 * step >> 4));
  }
};
#endif

struct Consumer {
  const int part;  // which warpgroup: of every stage, it multiplies block `part`
  Ring ring;
  Tokens tokens;
  uint32 w_lane, w_scale_lane;  // what this lane reads, relative to a stage

  __device__ __forceinline__ Consumer(const Shared& s, int part, const Tokens& tokens) : part(part), ring(s), tokens(tokens) {
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    w_lane = offsetof(Stage, w_packed) + part * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    w_scale_lane = offsetof(Stage, w_scale) + 2 * (part * WEIGHT_TILE_N + sm90_scale_position(warp, lane));
  }

  // This warpgroup's block of the stage at `ring`, once that is there, into `acc`. Products of a block that does not `exist`
  // are made of whatever stands there and are not read: products that start in one branch only would have to end in it.
  __device__ __forceinline__ void multiply(float (&acc)[SUMS], bool exists) {
    const uint32 stage = ring.stage, codes = tokens.codes_of(stage), scales_rd = tokens.scales_of(stage);
    uint32 a[16];
    float sum[SUMS];
    ptx::barrier_wait(stage + offsetof(Stage, full), ring.parity);
    const uint4 words[2] = {ptx::shared_read_128(stage + w_lane + sm90_weight_byte(0, 0, 0)),
                            ptx::shared_read_128(stage + w_lane + sm90_weight_byte(1, 0, 0))};
    widen(a, words);
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i]));  // operands are written before the fence
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK / 32; ++step) {
      ptx::Wgmma<TILE_M>::e4m3(sum, a + 4 * step, tokens.descriptor(codes, step), step > 0);
    }
    ptx::wgmma_commit();
    float2 outputs = as_floats(ptx::shared_read_32(stage + w_scale_lane));
    outputs.x *= PRODUCT_UNIT, outputs.y *= PRODUCT_UNIT;
    float2 scales[TILE_M / 8];  // of the tokens
#pragma unroll
    for (int j = 0; j < TILE_M / 8; ++j) scales[j] = ptx::shared_read_float2(scales_rd + 32 * j);
    ring.next();
    tokens.next();
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not before the wait
    if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
    if (!exists) return;
#pragma unroll
    for (int j = 0; j < TILE_M / 8; ++j) {
      acc[4 * j + 0] = __fmaf_rn(sum[4 * j + 0] * outputs.x, scales[j].x, acc[4 * j + 0]);
      acc[4 * j + 1] = __fmaf_rn(sum[4 * j + 1] * outputs.x, scales[j].y, acc[4 * j + 1]);
      acc[4 * j + 2] = __fmaf_rn(sum[4 * j + 2] * outputs.y, scales[j].x, acc[4 * j + 2]);
      acc[4 * j + 3] = __fmaf_rn(sum[4 * j + 3] * outputs.y, scales[j].y, acc[4 * j + 3]);
    }
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s, const Share& share) {
    const int thread = ptx::thread() % WARPGROUP;
    Adder adder(share, part);
    for (int index = share.cluster; index < p.tiles_m * p.tiles_n; index += share.clusters) {
      float acc[SUMS] = {};
      tokens.start_tile();
      // Main loop: one stage, a block of 128 inputs for each warpgroup, per turn.
#pragma unroll 1
      for (int block = share.first_block(); block < p.k_blocks; block += share.step()) multiply(acc, block + part < p.k_blocks);
      if (part > 0) {
        adder.give(s, part, thread, acc);
        continue;
      }
      if (!adder.take(s, share, thread, acc)) continue;
      const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
      store(p, tile.m, tile.n, FIRST_MEETS, s.y, acc);
    }
    adder.end(part);
  }
};

#endif

// ---- the kernels ----------------------------------------------------------------------------------------------------------

#if QUANTIZES

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_linear(void* y, const unsigned short* x, const unsigned short* second, const uint8* w_packed, const __half* w_scale,
                 const float* bias, int m, int n, int k, int k_blocks, int ldx, int ld_second, int ldy, int tiles_n,
                 float clip_over_7, int aligned) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const Problem given = {static_cast<Out*>(y), nullptr, nullptr, w_packed, w_scale, bias, nullptr, nullptr,
                         m, n, k_blocks, 1, m, ldy, 0, 1, tiles_n};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  prepare(s, warp);
  const Share share;
  if (share.ranks > 1) ptx::cluster_arrive();
  if (warp < 4 * PARTS) {
    TokenQuantizer quantizer = {{x, second, k, ldx, ld_second, false, aligned != 0},
                                m, k_blocks, share.first_block(), share.step(), clip_over_7, nullptr, nullptr};
    // Behind the scales come the codes: the last core matrix reaches past them.
    quantizer.scales = reinterpret_cast<float*>(shared_memory + sizeof(Shared));
    quantizer.codes = shared_memory + sizeof(Shared) + 4 * TILE_M * quantizer.owned();
    ptx::wait_for_predecessor();
    quantizer.run(ptx::thread(), QUANTIZED);
    Consumer(s, warp / 4, Tokens(quantizer, warp / 4)).run(given, s, share);
  } else {
    Producer<WEIGHTS>{Ring(s)}.run(given, share);
    if (share.ranks > 1) ptx::cluster_wait();
  }
  leave(share);
#endif
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const __half* w_scale,
               const float* bias, float* partial, uint32* counter, int m, int n, int k_blocks, int blocks_per_group,
               int m_stride, int ldy, int span, int tiles_m, int tiles_n) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const Problem given = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_scale, bias, partial, counter,
                         m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n};
  // The same in all lanes, also for the compiler, which then addresses with uniform registers.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  prepare(s, warp);
  const Share share;
  if (share.ranks > 1) ptx::cluster_arrive();
  if (warp < 4 * PARTS) {
    Consumer(s, warp / 4, Tokens(warp / 4)).run(given, s, share);
  } else {
    if (warp == 4 * PARTS + WEIGHTS) Producer<WEIGHTS>{Ring(s)}.run(given, share);
    if (warp == 4 * PARTS + CODES) Producer<CODES>{Ring(s)}.run(given, share);
    if (warp == 4 * PARTS + SCALES) Producer<SCALES>{Ring(s)}.run(given, share);
    if (share.ranks > 1) ptx::cluster_wait();
  }
  leave(share);
#endif
}

#endif
