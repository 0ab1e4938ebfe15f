// W4A4 GEMM for sm_90a (H100, H200): y = dequantize(A) dequantize(W)^T + bias, groups of 128 n input features.
//
// Hopper has no 4-bit tensor cores, so that codes are widened to 8 bits, exactly: a byte `s0000mmm` is, in e4m3, the
// number (-1)^s m 2^-9, as is `s0001000` of activations with sixteen levels, m = 8; a product sum of 128 pairs is n 2^-18 with
// |n| <= 128 * 56 = 7168 < 2^13. The tensor core keeps 13 bits
// below the leading one and loses nothing (scripts/gpu_check proves it on the GPU).
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
//   tiles_m, tiles_n  ceil(M / TILE_M), ceil(N / (64 CONSUMERS)): arguments, so that the main loop needs no registers for them
// Any M, N >= 1. Groups wider than 128 are dequantized block by block with their group's scales.
//
// Producer threads fill a ring of STAGES blocks with bulk copies; CONSUMERS warpgroups of 64 outputs each multiply.
//
// Large tiles are bound by what the CUDA cores do beside the tensor cores, so that of the two multiplications by scales
// one is left to the latter: per block, one more wgmma makes the products s_w[n] s_a[m] of all outputs and tokens, a matrix of
// rank one, in float32. Its operands are tf32, 11 bits: s_w has no more, and s_a is cut into three such parts, t1 + t2 + t3 =
// s_a exactly, as three steps of k. What remains is one instruction for each sum: acc = fma(sum, s_w s_a, acc).
//
// Macros: TILE_M, CONSUMERS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16.

#include "gemm/gemm_sm90.cuh"

constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int WARPGROUP_MEETS = 1;  // named barriers, one for each warpgroup
// Of the 168 a thread that the launch gives, what producers do not need goes to consumers.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS == (CONSUMERS + 1) * 168, "registers of a thread block");
static_assert(CONSUMERS == 2, "warpgroups, by the registers they need");

struct Stage {
  alignas(1024) uint8 a_codes[TILE_M * BLOCK];
  uint8 w_packed[CONSUMERS][WEIGHT_TILE_BYTES];
  float4 a_parts[TILE_M];  // tf32 parts of a_scale: (t1, t2, t3, 0)
  float a_scale[TILE_M];
  __half w_scale[CONSUMERS][WEIGHT_TILE_N];
  uint64 full, empty;
  uint64 parted;  // a_parts are written

  static __device__ __forceinline__ uint32 weight_scales() { return offsetof(Stage, w_scale); }
  static __device__ __forceinline__ uint32 token_scales() { return offsetof(Stage, a_scale); }
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
static_assert(STAGE_BYTES % 1024 == 0, "what the swizzle of wgmma needs");
struct Shared {
  Stage stages[STAGES];
  unsigned short y[CONSUMERS][TILE_M][WEIGHT_TILE_N];
  bool last[CONSUMERS];  // of the thread blocks that share a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (kernels/gemm/configs.py)");

#include "gemm/producer_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- the fourth warp of the producer warpgroup, beside three that copy (producer_sm90.cuh) --------------------------------

// The leading 11 bits of a float. NaN and infinity stay what they are, and the parts after them are NaN.
__device__ __forceinline__ float tf32_part(float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); }

// One warp cuts the tokens' scales of each stage into tf32 parts, where wgmma reads them.
__device__ __forceinline__ void part_scales(const Problem& p, Ring ring, int lane) {
  for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
    const Item item = schedule.item(p);
#pragma unroll 1
    for (int left = item.last_block - item.first_block; left > 0; --left) {
      ptx::barrier_wait(ring.stage + offsetof(Stage, full), ring.parity);
#pragma unroll
      for (int token = lane; token < TILE_M; token += 32) {
        const float scale = __uint_as_float(ptx::shared_read_32(ring.stage + offsetof(Stage, a_scale) + 4 * token));
        const float t1 = tf32_part(scale), t2 = tf32_part(scale - t1), t3 = scale - t1 - t2;
        ptx::shared_write_float4(ring.stage + offsetof(Stage, a_parts) + 16 * token, make_float4(t1, t2, t3, 0.0f));
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ring.stage + offsetof(Stage, parted));
      ring.next();
    }
  }
}

// ---- consumers: a warpgroup each -------------------------------------------------------------------------------------------

template <int group>  // which warpgroup
struct Consumer {
  Ring ring;                    // at the block whose weights are read or multiplied
  uint32 w_lane;  // what this lane reads, relative to a stage

  __device__ __forceinline__ explicit Consumer(const Shared& s) : ring(s) {
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    w_lane = offsetof(Stage, w_packed) + group * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    asm volatile("" : "+r"(w_lane));  // as in Ring
  }

  // The weights of the block at `ring`, once it is there.
  __device__ __forceinline__ void read_weights(uint4 (&words)[2]) {
    ptx::barrier_wait(ring.stage + offsetof(Stage, full), ring.parity);
    read_words(words, ring.stage);
  }
  __device__ __forceinline__ void read_words(uint4 (&words)[2], uint32 stage) {
    words[0] = ptx::shared_read_128(stage + w_lane + sm90_weight_byte(0, 0, 0));
    words[1] = ptx::shared_read_128(stage + w_lane + sm90_weight_byte(1, 0, 0));
  }

  // Starts the products of a block, k32 steps `first` to `end`, whose tokens stand where the descriptor says.
  template <int first = 0, int end = BLOCK / 32>
  __device__ __forceinline__ void multiply(float (&sum)[SUMS], const uint32 (&a)[16], uint32 tokens) {
#pragma unroll
    for (int step = first; step < end; ++step) {
      ptx::Wgmma<TILE_M>::e4m3(sum, a + 4 * step, ptx::wgmma_descriptor(tokens + (32 * step >> 4)), step > 0);
    }
    ptx::wgmma_commit();
  }

  // From `w_lane`, which is 16 bytes a thread: no register is left for it.
  __device__ __forceinline__ uint32 w_scale_lane() const {
    static_assert(sm90_weight_byte(0, 1, 1) - sm90_weight_byte(0, 0, 0) == 16 * (32 + 1), "16 bytes a thread");
    const int thread = (w_lane - offsetof(Stage, w_packed) - group * WEIGHT_TILE_BYTES) / 16;
    return offsetof(Stage, w_scale) + 2 * (group * WEIGHT_TILE_N + sm90_scale_position(thread / 32, thread % 32));
  }
  // The scales of outputs r and r + 8.
  __device__ __forceinline__ float2 read_output_scales(uint32 stage) { return as_floats(ptx::shared_read_32(stage + w_scale_lane())); }

  __device__ __forceinline__ void leave(uint32 stage) {
    if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
  }

  // The warpgroups take turns in the tensor cores. A warp cannot issue anything while it waits to issue a
  // wgmma, so that without an order all would wait, then all dequantize, and the tensor cores with them. A turn is
  // handed on as soon as its products are issued; the next warpgroup's wait behind them.
  static constexpr int TURN = WARPGROUP_MEETS + CONSUMERS;
  __device__ __forceinline__ void await_turn() { ptx::named_barrier(TURN + group, 2 * WARPGROUP); }
  __device__ __forceinline__ void pass_turn() { ptx::named_barrier_arrive(TURN + (group + 1) % CONSUMERS, 2 * WARPGROUP); }

  // Starts the rank-one product of scales: tf32, k of 8. Steps 0..2 hold the parts of s_a and step 3 a zero, against s_w in
  // all four; steps 4..7 are the first four again, against zeros. The tokens' operand is not swizzled: core matrices of 8
  // tokens by 16 bytes.
  __device__ __forceinline__ void multiply_scales(float (&scale)[SUMS], const uint32 (&a)[4]) {
    ptx::Wgmma<TILE_M>::tf32(scale, a, ptx::wgmma_descriptor_plain(ring.descriptor + (offsetof(Stage, a_parts) >> 4), 0, 128), 0);
  }

  // The block at `ring`, whose weights are in `a` and whose outputs' scales are in `outputs`; those of the next one follow,
  // unless this is the last. A warp issues nothing between the first of its products and the start of the last one, and
  // little while the tensor cores work (docs/kernels.md), so that as little as possible stands between the end of its
  // products and the start of the next ones: the next weights are widened, into the registers of k32 steps that are done,
  // while the last step is still being computed. Accumulators are pairs with their halves exchanged, because of the register
  // banks (ptx::fma_exchanged).
  __device__ __forceinline__ void block(bool last, uint64 (&acc)[SUMS / 2], uint32 (&a)[16], float2& outputs) {
    float sum[SUMS], scale[SUMS];
    uint32 outputs_a[4] = {__float_as_uint(outputs.x), __float_as_uint(outputs.y), 0, 0};
    uint4 words[2];
    const uint32 done = ring.stage;
    // Registers of operands are written before the fence.
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i]));
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(outputs_a[i]));
    await_turn();
    ptx::wgmma_fence();
    multiply_scales(scale, outputs_a);
    multiply<0, 3>(sum, a, ring.descriptor);
    multiply<3, 4>(sum, a, ring.descriptor);
    pass_turn();
    ring.next();
    if (!last) {
      read_weights(words);
      const uint32 pair = ptx::shared_read_32(ring.stage + w_scale_lane());
      ptx::wgmma_wait<1>();
#pragma unroll
      for (int i = 0; i < 12; ++i) asm volatile("" : "+r"(a[i])::"memory");  // not before the wait
      widen(words[0].x, a[0], a[1]), widen(words[0].y, a[2], a[3]), widen(words[0].z, a[4], a[5]), widen(words[0].w, a[6], a[7]);
      widen(words[1].x, a[8], a[9]), widen(words[1].y, a[10], a[11]);
#pragma unroll
      for (int i = 0; i < 12; ++i) asm volatile("" : "+r"(a[i])::"memory");
      outputs = as_floats(pair);
      asm volatile("" : "+f"(outputs.x), "+f"(outputs.y)::"memory");
      ptx::barrier_wait(ring.stage + offsetof(Stage, parted), ring.parity);  // here: ptxas moves no widening past a loop
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sum[i]), "+f"(scale[i])::"memory");  // not before the wait
#pragma unroll
    for (int i = 0; i < SUMS; i += 2) {
      ptx::fma_exchanged(acc[i / 2], sum[i], scale[i], sum[i + 1], scale[i + 1]);
    }
    leave(done);
    if (!last) widen(words[1].z, a[12], a[13]), widen(words[1].w, a[14], a[15]);
  }

  __device__ __forceinline__ void multiply_item(float (&acc)[SUMS], int blocks) {
    uint64 pairs[SUMS / 2] = {};
    uint32 a[16];
    uint4 words[2];
    read_weights(words);
    widen(a, words);
    float2 outputs = read_output_scales(ring.stage);
    ptx::barrier_wait(ring.stage + offsetof(Stage, parted), ring.parity);
    // Main loop: one block of 128 input features, one pipeline stage, per turn.
#pragma unroll 1
    for (; blocks > 0; --blocks) block(blocks == 1, pairs, a, outputs);
#pragma unroll
    for (int i = 0; i < SUMS; i += 2) {
      ptx::split_exchanged(pairs[i / 2], acc[i], acc[i + 1]);
      acc[i] *= PRODUCT_UNIT, acc[i + 1] *= PRODUCT_UNIT;
    }
  }
  __device__ __forceinline__ void begin() {
    if (group == CONSUMERS - 1) pass_turn();
  }
  __device__ __forceinline__ void end() {
    if (group == 0) await_turn();  // what the last one has passed on
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s) {
    begin();
    for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
      float acc[SUMS] = {};
      const Item ahead = schedule.item(p);
      multiply_item(acc, ahead.last_block - ahead.first_block);
      asm volatile("" : "+r"(schedule.next));  // the item is worked out again rather than kept through the main loop
      const Item item = schedule.item(p);
      const int tile_n = item.tile.n * CONSUMERS + group;
      if (tile_n * WEIGHT_TILE_N >= p.n) continue;  // past N: nothing was loaded for it
      if (item.parts > 1 && !add_parts(p, item, tile_n, WARPGROUP_MEETS + group, s.last[group], acc)) continue;
      store(p, item.tile.m, tile_n, WARPGROUP_MEETS + group, s.y[group], acc);
    }
    end();
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    apex4_gemm(void* y, const uint8* a_codes, const float* a_scale, const uint8* w_packed, const __half* w_scale,
               const float* bias, float* partial, uint32* counter, int m, int n, int k_blocks, int blocks_per_group,
               int m_stride, int ldy, int span, int tiles_m, int tiles_n) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8 shared_memory[];
  Shared& s = *reinterpret_cast<Shared*>(shared_memory);
  const Problem given = {static_cast<Out*>(y), a_codes, a_scale, w_packed, w_scale, bias, partial, counter,
                         m, n, k_blocks, blocks_per_group, m_stride, ldy, span, tiles_m, tiles_n};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].full), PRODUCERS);
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].empty), 4 * CONSUMERS);  // a warp each
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].parted), 1);
    }
    ptx::fence_barrier_init();
  }
  ptx::let_successor_start();  // it waits for the whole of this kernel before it reads or writes anything of it
  __syncthreads();

  // The same in all lanes, also for the compiler, which then addresses with uniform registers.
  const int warp_of_block = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), warp = warp_of_block % 4;
  if (warp_of_block >= CONSUMERS * 4) {
    ptx::fewer_registers<PRODUCER_REGISTERS>();
    if (warp == 0) Producer<0>{Ring(s)}.run(given);
    if (warp == 1) Producer<1>{Ring(s)}.run(given);
    if (warp == 2) Producer<2>{Ring(s)}.run(given);
    if (warp == 3) part_scales(given, Ring(s), threadIdx.x % 32);
  } else {
    ptx::more_registers<CONSUMER_REGISTERS>();
    if (warp_of_block < 4) {
      Consumer<0>(s).run(given, s);
    } else {
      Consumer<1>(s).run(given, s);
    }
  }
#endif
}
