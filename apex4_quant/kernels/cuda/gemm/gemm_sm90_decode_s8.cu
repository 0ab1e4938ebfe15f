// GEMM of 4-bit weights and 8-bit activations for sm_90a (H100, H200) and few tokens, as in decoding. Tiles, stages, clusters and what
// is shared by them are those of gemm_sm90_decode.cu. Weights are not folded: with few tokens there are few sums, and folding every
// code costs more than scaling the sums of every group (docs/format.md, "Eight-bit activations"):
//     y[m, n] = s_a[m] u[n] / 256 sum_g R[n, g] (sum_{k in g} a[m, k] q[n, k]) + bias[n]
//
// A warp multiplies 16 outputs of each of TILES tiles of weights by TILE_M tokens with mma.m16n8k32: its sums of a group start at
// 1.5 * 2^23 as bits, a constant operand, so that they are floats when they are done, off by that number. 16 * 127 * 7 * 128 < 2^22
// keeps them exact. With 32 tokens and more two tiles of weights share what is read of the tokens, from L2 and from shared memory.
// With 64 tokens a warpgroup multiplies 64 outputs of each of TILES tiles with wgmma, which reads the tokens from shared memory once
// for four warps; its sums become floats by I2F.
//
// Two kernels, by the macro QUANTIZES:
//   0, apex4_gemm: arguments as gemm_sm90_s8.cu has them; `partial`, `counter` and `span` are not used.
//   1, apex4_linear: no codes are given, but x; every thread block quantizes the few tokens for itself (quantize_whole_tokens.cuh) while
//      the copy engine fills the stages with weights.
// Clusters of one or two thread blocks.
//
// Operands of apex4_linear (type T: that of y, and of x):
//   y, w_packed, w_ratio, w_unit, bias, m <= TILE_M, n, k_blocks, ldy, tiles_n   as in gemm_sm90_s8.cu; groups of one block
//   x, second, k, ldx, ld_second, aligned                                          as in quantize_rows.cu
//   eps, one_over_k, gain_offset; residual, total                                  likewise, with RMSNorm; of a sum
//   dynamic shared memory: struct Shared, and behind it m rows of codes for each of WholeTokens::owned() blocks
//
// Macros: TILE_M, TILES, PARTS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16, QUANTIZES; with 1, those of
// quantize_slice.cuh, and ROUNDS (quantize_whole_tokens.cuh).

#include "gemm/exact_fragments.cuh"
#include "gemm/gemm_sm90_s8.cuh"

constexpr bool BY_WARPGROUPS = TILE_M == 64;                // wgmma
[[maybe_unused]] constexpr int CODES_ALIGNMENT = BY_WARPGROUPS ? 1024 : 128;  // what its swizzle needs
constexpr int COPYING_WARPS = QUANTIZES ? 1 : 2;
// Registers are handed from one warpgroup to others, so that those that copy are a whole one then.
constexpr int THREADS = WARPGROUP * PARTS + (BY_WARPGROUPS ? WARPGROUP : 32 * COPYING_WARPS);
constexpr int LAUNCH_REGISTERS = PARTS == 2 ? 168 : 96, COPYING_REGISTERS = PARTS == 2 ? 24 : 32, OTHER_REGISTERS = PARTS == 2 ? 240 : 112;
static_assert(COPYING_REGISTERS + PARTS * OTHER_REGISTERS == (PARTS + 1) * LAUNCH_REGISTERS, "registers of a thread block");
constexpr int LANE_SUMS = TILES * SUMS, VECTORS = LANE_SUMS / 4;
static_assert(TILES * WEIGHT_TILE_N <= WARPGROUP, "a thread asks for an output's factors");
static_assert(TILE_M % 8 == 0 && TILE_M <= 64, "tokens of an mma, and registers");
// Named barriers: of the first warpgroup alone; sums of the others are written; and have been read.
constexpr int FIRST_MEETS = 1, WRITTEN = 2, READ = 3;
[[maybe_unused]] constexpr int QUANTIZED = 4;  // QUANTIZES: all warpgroups
constexpr int PREPARED = 5;                    // all threads: the other barriers

#if QUANTIZES
#include "quantize/quantize_whole_tokens.cuh"
#endif

// PARTS consecutive blocks of 128 inputs, one for each warpgroup.
struct Stage {
#if !QUANTIZES
  alignas(CODES_ALIGNMENT) uint8 a_codes[PARTS][TILE_M * BLOCK];
#endif
  alignas(128) uint8 w_packed[TILES][PARTS][WEIGHT_TILE_BYTES];
  unsigned short w_ratio[TILES][PARTS][WEIGHT_TILE_N];
  uint64 full, empty;

  static __device__ __forceinline__ uint32 weight_scales() { return offsetof(Stage, w_ratio); }
  static __device__ __forceinline__ uint32 token_scales() { return NONE; }
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
struct Shared {
  Stage stages[STAGES];
  unsigned short y[TILES][TILE_M][WEIGHT_TILE_N];
  float4 sums[PARTS - 1][VECTORS][WARPGROUP];  // of this thread block's other warpgroups
  float4 second_sums[VECTORS][WARPGROUP];       // in the first block of a cluster: of the second one
  float a_scale[TILE_M], unit[TILES * WEIGHT_TILE_N], bias[TILES * WEIGHT_TILE_N];
  uint32 absmax[TILE_M];                        // QUANTIZES: of whole tokens, as bits
  uint64 sent, taken;                           // second_sums are written: in the first block; are read: in the second

  __device__ __forceinline__ void clear() {
    if (QUANTIZES && threadIdx.x < TILE_M) absmax[threadIdx.x] = 0;
  }
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (kernels/gemm/sm90_s8_configs.py)");

constexpr bool KEEPS_STAGE = true;
#include "gemm/decode_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- warpgroups that multiply ---------------------------------------------------------------------------------------------

// The tokens' codes of a warpgroup's next block, as B fragments.
#if QUANTIZES
struct Tokens {
  uint32 first, step, codes;  // addresses of this lane's 32 bytes, and from one block of this warpgroup to its next

  // Lanes of tokens that do not exist read another one: what they multiply is not stored.
  __device__ __forceinline__ Tokens(const uint8* codes, int m, int part) : step(PARTS * BLOCK * m), codes(0) {
    const int lane = ptx::thread() % 32, token = min(lane >> 2, m - 1);
    first = ptx::shared_address(codes) + BLOCK * (part * m + token) + exact_token_byte(4 * (lane & 3));
  }
  __device__ __forceinline__ void start_tile() { codes = first; }
  __device__ __forceinline__ void next() { codes += step; }
  __device__ __forceinline__ void load(uint32 (&b)[4][2], uint32, int) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = ptx::shared_read_128(codes + exact_token_byte(64 * half));
      b[2 * half][0] = v.x, b[2 * half][1] = v.y, b[2 * half + 1][0] = v.z, b[2 * half + 1][1] = v.w;
    }
  }
};
static_assert(TILE_M == 8 && TILES == 1, "one B fragment has all tokens");
#else
struct Tokens {
  uint32 at[2];  // in a stage: what this lane gives ldmatrix for each half of a block

  __device__ __forceinline__ explicit Tokens(int part) {
    const int lane = ptx::thread() % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      at[half] = offsetof(Stage, a_codes) + part * TILE_M * BLOCK +
                 sm90_activation_byte(s8_ldmatrix_row(lane), s8_ldmatrix_chunk(lane, half));
    }
  }
  __device__ __forceinline__ void start_tile() {}
  __device__ __forceinline__ void next() {}
  // Of tokens 8 j .. 8 j + 7, whose rows repeat the swizzle.
  __device__ __forceinline__ void load(uint32 (&b)[4][2], uint32 stage, int j) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32 v[4];
      ptx::ldmatrix_x4(v, stage + at[half] + sm90_activation_byte(8 * j, 0));
      reorder(v[0], v[1]), reorder(v[2], v[3]);
      b[2 * half][0] = v[0], b[2 * half][1] = v[1], b[2 * half + 1][0] = v[2], b[2 * half + 1][1] = v[3];
    }
  }
};
#endif

struct Consumer {
  const int part;  // which warpgroup: of every stage, it multiplies block `part`
  Ring ring;
  Tokens tokens;
  uint32 w_lane, ratio_lane;  // what this lane reads, relative to a stage

  __device__ __forceinline__ Consumer(const Shared& s, int part, const Tokens& tokens) : part(part), ring(s), tokens(tokens) {
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    w_lane = offsetof(Stage, w_packed) + part * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    ratio_lane = offsetof(Stage, w_ratio) + 2 * (part * WEIGHT_TILE_N + sm90_scale_position(warp, lane));
  }

  // Two ratios, integers below 2^23, as floats.
  static __device__ __forceinline__ float2 as_floats(uint32 ratios) {
    constexpr uint32 BITS = 0x4b000000u;  // of 2^23
    return make_float2(__uint_as_float(ptx::permute_bytes(ratios, BITS, 0x7610)) - 8388608.0f,
                       __uint_as_float(ptx::permute_bytes(ratios, BITS, 0x7632)) - 8388608.0f);
  }

  // Of tile t of a stage's weights: this lane's words of a half, and its ratios.
  __device__ __forceinline__ uint4 words_of(uint32 stage, int t, int half) const {
    return ptx::shared_read_128(stage + w_lane + t * PARTS * WEIGHT_TILE_BYTES + sm90_weight_byte(half, 0, 0));
  }
  __device__ __forceinline__ uint32 ratios_of(uint32 stage, int t) const {
    return ptx::shared_read_32(stage + ratio_lane + t * PARTS * WEIGHT_SCALE_BYTES);
  }

  // This tile's blocks of this warpgroup. The ratio of a block that does not exist is zero, and its sums, of whatever stands there, are
  // finite: 16 * 8 * 128 * 128 < 2^22, too.
  __device__ __forceinline__ void multiply_by_warps(float (&acc)[LANE_SUMS], const Problem& p, const Share& share) {
    constexpr int START = 0x4b400000;  // the bits of 1.5 * 2^23
    constexpr float START_VALUE = 12582912.0f;
    const int start[4] = {START, START, START, START};
    tokens.start_tile();
    // Main loop: one stage, a block of 128 inputs for each warpgroup, per turn.
#pragma unroll 1
    for (int block = share.first_block(); block < p.k_blocks; block += share.step()) {
      const uint32 stage = ring.stage;
      ptx::barrier_wait(stage + offsetof(Stage, full), ring.parity);
      uint32 a[TILES][4][4];
      float2 ratio[TILES];
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 words = words_of(stage, t, half);
          widen(a[t][2 * half], words.x, words.y);
          widen(a[t][2 * half + 1], words.z, words.w);
        }
        const uint32 ratios = ratios_of(stage, t);
        ratio[t] = as_floats(block + part < p.k_blocks ? ratios : 0);
      }
#pragma unroll
      for (int j = 0; j < TILE_M / 8; ++j) {
        uint32 b[4][2];
        tokens.load(b, stage, j);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          int sum[4];
          ptx::mma_s8(sum, a[t][0], b[0][0], b[0][1], start);
#pragma unroll
          for (int step = 1; step < 4; ++step) ptx::mma_s8(sum, a[t][step], b[step][0], b[step][1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& to = acc[t * SUMS + 4 * j + i];
            to = __fmaf_rn(__int_as_float(sum[i]) - START_VALUE, i & 2 ? ratio[t].y : ratio[t].x, to);
          }
        }
      }
      __syncwarp();
      if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
      ring.next();
      tokens.next();
    }
  }

#if !QUANTIZES
  // The same with wgmma. While one tile's products are in the tensor cores, the next one's weights are widened, or the sums of the one
  // before are scaled.
  __device__ __forceinline__ void multiply_by_warpgroups(float (&acc)[LANE_SUMS], const Problem& p, const Share& share) {
#pragma unroll 1
    for (int block = share.first_block(); block < p.k_blocks; block += share.step()) {
      const uint32 stage = ring.stage;
      const uint32 codes = ptx::descriptor_address(stage + offsetof(Stage, a_codes) + part * TILE_M * BLOCK);
      int sum[TILES][SUMS];
      uint32 ratios[TILES];
      ptx::barrier_wait(stage + offsetof(Stage, full), ring.parity);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        uint32 a[16];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 words = words_of(stage, t, half);
          widen_in_order(a + 8 * half, words.x, words.y);
          widen_in_order(a + 8 * half + 4, words.z, words.w);
        }
        ratios[t] = ratios_of(stage, t);
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i]));  // operands are written before the fence
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK / 32; ++step) {
          ptx::Wgmma<TILE_M>::s8(sum[t], a + 4 * step, ptx::wgmma_descriptor(codes + (32 * step >> 4)), step > 0);
        }
        ptx::wgmma_commit();
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const float2 ratio = as_floats(block + part < p.k_blocks ? ratios[t] : 0);
        if (t < TILES - 1) {
          ptx::wgmma_wait<1>();
        } else {
          ptx::wgmma_wait<0>();
          if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
        }
#pragma unroll
        for (int i = 0; i < SUMS; ++i) asm volatile("" : "+r"(sum[t][i])::"memory");  // not before the wait
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
          float& to = acc[t * SUMS + i];
          to = __fmaf_rn(__int2float_rn(sum[t][i]), i & 2 ? ratio.y : ratio.x, to);
        }
      }
      ring.next();
    }
  }
  static_assert(!BY_WARPGROUPS || TILES <= 2, "products that are waited for");
#endif

  __device__ __forceinline__ void multiply(float (&acc)[LANE_SUMS], const Problem& p, const Share& share) {
#if !QUANTIZES
    if (BY_WARPGROUPS) return multiply_by_warpgroups(acc, p, share);
#endif
    multiply_by_warps(acc, p, share);
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s, const Share& share) {
    const int thread = ptx::thread() % WARPGROUP;
#if !QUANTIZES
    if (part == 0) ptx::wait_for_predecessor();  // whose scales are read
#endif
    Adder adder(share, part);
    for (int index = share.cluster; index < p.tiles_m * p.tiles_n; index += share.clusters) {
      float acc[LANE_SUMS] = {};
      const Tile tile = tile_at(index, p.tiles_m, p.tiles_n);
      if (part == 0 && share.rank == 0) ask_for_factors(p, tile, s, thread);
      multiply(acc, p, share);
      if (part > 0) {
        adder.give(s, part, thread, acc);
        continue;
      }
      if (!adder.take(s, share, thread, acc)) continue;
      ptx::cp_async_wait<0>();
      ptx::named_barrier(FIRST_MEETS, WARPGROUP);
      store(p, tile, s, acc);
    }
    adder.end(part);
  }

  // What the sums of a tile are multiplied by, and the bias: on their way to shared memory while products are made.
  static __device__ __forceinline__ void ask_for_factors(const Problem& p, const Tile& tile, Shared& s, int thread) {
#if !QUANTIZES
    const int token = tile.m * TILE_M + thread;
    if (thread < TILE_M && token < p.m) ptx::cp_async_4(ptx::shared_address(&s.a_scale[thread]), p.a_scale + token);
#endif
    const int output = tile.n * TILES * WEIGHT_TILE_N + thread;
    if (thread < TILES * WEIGHT_TILE_N && output < p.n) {
      ptx::cp_async_4(ptx::shared_address(&s.unit[thread]), p.w_unit + output);
      if (p.bias != nullptr) {
        ptx::cp_async_4(ptx::shared_address(&s.bias[thread]), p.bias + output);
      } else {
        s.bias[thread] = 0.0f;
      }
    }
    ptx::cp_async_commit();
  }

  // D is outputs by tokens, y tokens by outputs: stmatrix transposes 8 x 8 blocks into s.y, 128 bytes a token, in 16-byte chunks
  // swizzled by token; then every 8 threads store the 128 bytes of one token.
  static __device__ __forceinline__ void store(
      const Problem& p, const Tile& tile, Shared& s, const float (&acc)[LANE_SUMS]) {
    constexpr float OF_SUMS = 1.0f / (256 * WEIGHT_FACTOR);
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    const int m0 = tile.m * TILE_M;
    const uint32 scales_rd = ptx::shared_address(s.a_scale) + 4 * accumulator_column(lane, 0), y_smem = ptx::shared_address(s.y);
    const int token = lane & 7, half = lane >> 3 & 1;  // of the row whose address this lane gives
    float unit[TILES][2], bias[TILES][2];  // of outputs r and r + 8
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int output = t * WEIGHT_TILE_N + 16 * warp + accumulator_row(lane, i);
        unit[t][i] = s.unit[output] * OF_SUMS, bias[t][i] = s.bias[output];
      }
    }
#pragma unroll
    for (int j = 0; j < TILE_M / 8; ++j) {
      const float2 scale = ptx::shared_read_float2(scales_rd + 32 * j);
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = __fmaf_rn(acc[t * SUMS + 4 * j + i] * unit[t][i / 2], i & 1 ? scale.y : scale.x, bias[t][i / 2]);
        }
        ptx::stmatrix_x2_trans(y_smem + sm90_activation_byte(t * TILE_M + 8 * j + token, 2 * warp + half), pack_pair(v[0], v[1]),
                               pack_pair(v[2], v[3]));
      }
    }
    ptx::named_barrier(FIRST_MEETS, WARPGROUP);
    const int chunk = thread & 7;
    const bool vectors = has_vectors(p.y, p.ldy);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const int column = (tile.n * TILES + t) * WEIGHT_TILE_N + 8 * chunk;
#pragma unroll
      for (int row = thread >> 3; row < TILE_M; row += WARPGROUP / 8) {
        if (m0 + row >= p.m) break;
        const uint4 v = ptx::shared_read_128(y_smem + sm90_activation_byte(t * TILE_M + row, chunk));
        Out* y_gmem_wr = p.y + static_cast<long long>(m0 + row) * p.ldy + column;
        if (vectors && column + 8 <= p.n) {
          *reinterpret_cast<uint4*>(y_gmem_wr) = v;
        } else {
          const uint32 words[4] = {v.x, v.y, v.z, v.w};
          store_singly(y_gmem_wr, words, column, p.n);
        }
      }
    }
    ptx::named_barrier(FIRST_MEETS, WARPGROUP);  // before the next tile writes here
  }
};

#endif

// ---- the kernels ----------------------------------------------------------------------------------------------------------

#if QUANTIZES

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_linear(void* y, const unsigned short* x, const unsigned short* second, const uint8* w_packed, const unsigned short* w_ratio,
                 const float* w_unit, const float* bias,
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
                 const unsigned short* residual, unsigned short* total,
#endif
                 int m, int n, int k, int k_blocks, int ldx, int ld_second, int ldy, int tiles_n, int aligned
#if APEX4_NORMALISES
                 , float eps, float one_over_k, int gain_offset
#endif
    ) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const Problem given = {static_cast<Out*>(y), nullptr, nullptr, w_packed, w_ratio, w_unit, bias, nullptr, nullptr,
                         m, n, k_blocks, 1, m, ldy, 0, 1, tiles_n};
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  prepare(s, warp);
  const Share share;
  if (share.ranks > 1) ptx::cluster_arrive();
  if (warp < 4 * PARTS) {
    uint8* const codes = shared_memory + sizeof(Shared);
#if APEX4_NORMALISES
    float* const squares = reinterpret_cast<float*>(s.sums);  // of no tile yet
    const WholeTokens quantizer = {{x, second, k, ldx, ld_second, gain_offset != 0, aligned != 0
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
                                    , residual, total
#endif
                                   }, m, k_blocks, share.first_block(), share.step(), codes, s.a_scale, s.absmax,
                                   eps, one_over_k, squares, blockIdx.x == 0};
#else
    const WholeTokens quantizer = {{x, second, k, ldx, ld_second, false, aligned != 0}, m, k_blocks, share.first_block(), share.step(),
                                   codes, s.a_scale, s.absmax};
#endif
    quantizer.run(ptx::thread(), QUANTIZED);
    Consumer(s, warp / 4, Tokens(codes, m, warp / 4)).run(given, s, share);
  } else {
    Producer<WEIGHTS>{Ring(s)}.run(given, share);
    if (share.ranks > 1) ptx::cluster_wait();
  }
  leave(share);
#endif
}

#else

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
    if (BY_WARPGROUPS) ptx::more_registers<OTHER_REGISTERS>();
    Consumer(s, warp / 4, Tokens(warp / 4)).run(given, s, share);
  } else {
    if (BY_WARPGROUPS) ptx::fewer_registers<COPYING_REGISTERS>();
    if (warp == 4 * PARTS + WEIGHTS) Producer<WEIGHTS>{Ring(s)}.run(given, share);
    if (warp == 4 * PARTS + CODES) Producer<CODES>{Ring(s)}.run(given, share);
    if (share.ranks > 1) ptx::cluster_wait();
  }
  leave(share);
#endif
}

#endif
