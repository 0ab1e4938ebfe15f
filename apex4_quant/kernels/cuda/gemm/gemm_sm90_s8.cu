// GEMM of 4-bit weights and 8-bit activations for sm_90a (H100, H200), more than 64 tokens:
//     y[m, n] = (sum_k a[m, k] w8[n, k]) s_a[m] u[n] + bias[n],   w8 = the code q folded to int8 by its group's ratio
//
// Codes are folded in registers beside the products (gemm_sm90_s8.cuh), so that nothing is left to do for a group: int32 sums run
// over all of K, exactly, and scales are multiplied into them once, at a tile's end.
//
// The weights are the A operand of wgmma, because that one may come from registers. Hence the roles are swapped:
//     D [64 outputs, TILE_M tokens] = W [64, 128] a^T [128, TILE_M]
// Folding costs as much for few tokens as for many; so a tile has up to 256 tokens, whose accumulators are half of the registers.
//
// Operands (m_stride = M rounded up to 16; KB = K / 128 blocks; G groups of blocks_per_group blocks):
//   y         [M, N]  bf16 or fp16, row stride ldy
//   a_codes   [KB][m_stride][128 B]      int8, chunks placed by sm90_activation_byte (index.cuh): in the order that wgmma's 128-byte
//                                        swizzle wants, so that a tile is one bulk copy
//   a_scale   [m_stride]                 float32, s_a
//   w_packed  [ceil(N/64)][KB][4096 B]   layout s8 of layouts.py
//   w_ratio   [ceil(N/64)][G][64]        uint16 up to 4608, in the order of the layout's scales
//   w_unit    [64 ceil(N/64)]            float32, u
//   bias      [N] float32, or null
//   partial   [ceil(N/64)][ceil(M/TILE_M)][parts][64 TILE_M] int32 and counter [ceil(N/64)][ceil(M/TILE_M)] zeros: read and written
//             if span > 0, and the counters are left zero
//   span, tiles_m, tiles_n  as in gemm_sm90.cu
// Any M, N >= 1; K up to 131,072, or sums may leave int32.
//
// Producer threads fill a ring of STAGES blocks with bulk copies; CONSUMERS warpgroups of 64 outputs each multiply.
//
// Macros: TILE_M, CONSUMERS, STAGES, SHARED_BYTES (of struct Shared), OUT_BF16.

#include "gemm/fold_fragments.cuh"
#include "gemm/gemm_sm90_s8.cuh"

constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int WARPGROUP_MEETS = 1;  // named barriers, one for each warpgroup
// Of the 168 a thread that the launch gives, what producers do not need goes to consumers.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS == (CONSUMERS + 1) * 168, "registers of a thread block");
static_assert(CONSUMERS == 2, "warpgroups, by the registers they need");
constexpr int AHEAD = 2;  // blocks, the first warpgroup of the second: tiles' ends shall not coincide
static_assert(AHEAD < STAGES, "or it waits for ever");

struct Stage {
  alignas(1024) uint8 a_codes[TILE_M * BLOCK];
  uint8 w_packed[CONSUMERS][WEIGHT_TILE_BYTES];
  unsigned short w_ratio[CONSUMERS][WEIGHT_TILE_N];
  uint64 full, empty;

  static __device__ __forceinline__ uint32 weight_scales() { return offsetof(Stage, w_ratio); }
  static __device__ __forceinline__ uint32 token_scales() { return NONE; }
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
static_assert(STAGE_BYTES % 1024 == 0, "what the swizzle of wgmma needs");
constexpr int Y_BYTES = 2 * WEIGHT_TILE_N;  // of a token
constexpr int CHUNK_M = TILE_M < 32 ? TILE_M : 32;  // tokens that are stored at a time
struct Shared {
  Stage stages[STAGES];
  unsigned short y[CONSUMERS][2][CHUNK_M][WEIGHT_TILE_N];
  float a_scale[CONSUMERS][TILE_M];
  bool last[CONSUMERS];  // of the thread blocks that share a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for (kernels/gemm/sm90_s8_configs.py)");

#include "gemm/producer_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- consumers: a warpgroup each -------------------------------------------------------------------------------------------

// Both warpgroups run the same instructions, whose cache is small beside a tile's end.
struct Consumer {
  int group;  // which warpgroup
  Ring ring;      // at the block that is multiplied or read next
  uint32 w_lane;  // what this lane reads, relative to a stage
  uint32 ratio_lane;

  __device__ __forceinline__ Consumer(const Shared& s, int group) : group(group), ring(s) {
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    w_lane = offsetof(Stage, w_packed) + group * WEIGHT_TILE_BYTES + sm90_weight_byte(0, warp, lane);
    ratio_lane = offsetof(Stage, w_ratio) + 2 * (group * WEIGHT_TILE_N + sm90_scale_position(warp, lane));
    asm volatile("" : "+r"(w_lane), "+r"(ratio_lane));  // as in Ring
  }

  // The weights and ratios of the block at `ring`, once it is there.
  __device__ __forceinline__ void read_weights(uint4 (&words)[2], uint32& ratios) {
    ptx::barrier_wait(ring.stage + offsetof(Stage, full), ring.parity);
    words[0] = ptx::shared_read_128(ring.stage + w_lane + sm90_weight_byte(0, 0, 0));
    words[1] = ptx::shared_read_128(ring.stage + w_lane + sm90_weight_byte(1, 0, 0));
    ratios = ptx::shared_read_32(ring.stage + ratio_lane);
  }

  // The A fragment of step `step` of four.
  static __device__ __forceinline__ void fold_step(uint32 (&a)[4], const uint4 (&words)[2], int step, const SignedTables& tables) {
    const uint4& half = words[step / 2];
    fold(a, step % 2 ? half.z : half.x, step % 2 ? half.w : half.y, tables);
  }

  template <int count>
  static __device__ __forceinline__ void pin(uint32 (&a)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(a[i])::"memory");
  }

  __device__ __forceinline__ void leave(uint32 stage) {
    if (ptx::elect_one()) ptx::barrier_arrive(stage + offsetof(Stage, empty));
  }

  // The item's blocks. The A fragment of a k32 step is folded while the step before is multiplied, into the registers of the one
  // before that; so two fragments are enough, and the warpgroups' products come in turn by themselves. The first product of an item
  // adds to nothing: `acc` need not be cleared.
  __device__ __forceinline__ void multiply_item(int (&acc)[SUMS], int blocks) {
    uint32 a[2][4];
    uint4 words[2];
    uint32 ratios, done = NONE;  // the stage before
    SignedTables tables;
    read_weights(words, ratios);
    tables.make(ratios);
    fold_step(a[0], words, 0, tables);
    // Main loop: one block of 128 input features, one pipeline stage, per turn.
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      const uint32 tokens = ring.descriptor;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        pin(a[step % 2]);
        ptx::wgmma_fence();
        ptx::Wgmma<TILE_M>::s8(acc, a[step % 2], ptx::wgmma_descriptor(tokens + (32 * step >> 4)), step > 0 || done != NONE);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        pin(a[(step + 1) % 2]);  // not before the wait
        if (step == 0) {
          if (done != NONE) leave(done);
          done = ring.stage;
        }
        if (step < 3) fold_step(a[(step + 1) % 2], words, step + 1, tables);
        if (step == 2) {
          ring.next();
          if (blocks > 1) read_weights(words, ratios);
        }
        if (step == 3 && blocks > 1) {
          tables.make(ratios);
          fold_step(a[0], words, 0, tables);
        }
      }
    }
    ptx::wgmma_wait<0>();
    pin(a[0]), pin(a[1]);
    leave(done);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+r"(acc[i])::"memory");  // not before the wait
  }

  // The tile's tokens' scales, on their way to shared memory while it is multiplied.
  __device__ __forceinline__ void copy_scales(const Problem& p, Shared& s, int tile_m) {
#pragma unroll
    for (int token = ptx::thread() % WARPGROUP; token < TILE_M; token += WARPGROUP) {
      const int row = tile_m * TILE_M + token;
      if (row < p.m) ptx::cp_async_4(ptx::shared_address(&s.a_scale[group][token]), p.a_scale + row);
    }
    ptx::cp_async_commit();
  }

  // Scales a tile's sums and stores them. D is outputs by tokens, y tokens by outputs: stmatrix transposes 8 x 8 blocks into one of
  // two buffers, 128 bytes a token, in 16-byte chunks swizzled by token. Then, VECTORS, every 8 threads store the 128 bytes of one
  // token, while the next tokens' sums are scaled; or threads store outputs one by one, as far as there are any. All of this is run
  // once a tile: what counts is that there are few instructions to fetch.
  template <bool VECTORS>
  __device__ __forceinline__ void store_tile(const Problem& p, const Shared& s, int tile_m, int tile_n, const Outputs& outputs, const int (&acc)[SUMS]) {
    constexpr int CHUNKS = TILE_M / CHUNK_M, BUFFER = CHUNK_M * Y_BYTES;
    static_assert(CHUNKS % 2 == 0, "the next tile starts with the buffer that all have read");
    constexpr int ROWS = WARPGROUP / 8, TURNS = CHUNK_M / ROWS;  // rows that the warpgroup stores at a time
    const int thread = ptx::thread() % WARPGROUP, warp = thread / 32, lane = thread % 32;
    const uint32 scales_rd = ptx::shared_address(s.a_scale[group]) + 4 * accumulator_column(lane, 0);
    const int token = lane & 7, half = lane >> 3 & 1;  // of the row whose address this lane gives
    const uint32 y_smem = ptx::shared_address(s.y[group]);
    const uint32 y_smem_wr = y_smem + sm90_activation_byte(8 * (lane >> 4) + token, 2 * warp + half);
    const uint32 y_smem_rd = y_smem + sm90_activation_byte(thread >> 3, thread & 7);
    const int m0 = tile_m * TILE_M, n0 = tile_n * WEIGHT_TILE_N;
    int left = p.m - m0 - (thread >> 3);  // rows of y from this thread's next one on
    Out* y_gmem_wr = p.y + static_cast<long long>(m0 + (thread >> 3)) * p.ldy + n0 + 8 * (thread & 7);
    uint4 v[TURNS];
#pragma unroll
    for (int chunk = 0; chunk <= CHUNKS; ++chunk) {
      uint32 packed[CHUNK_M / 8][2];
      if (chunk < CHUNKS) {
#pragma unroll
        for (int j = 0; j < CHUNK_M / 8; ++j) {
          const float2 scale = ptx::shared_read_float2(scales_rd + 4 * (chunk * CHUNK_M + 8 * j));
          float r[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float scaled = __fmul_rn(__int2float_rn(acc[chunk * CHUNK_M / 2 + 4 * j + i]), i & 1 ? scale.y : scale.x);
            r[i] = __fadd_rn(__fmul_rn(scaled, outputs.unit[i / 2]), outputs.bias[i / 2]);  // rounded as in format.md
          }
          packed[j][0] = pack_pair(r[0], r[1]), packed[j][1] = pack_pair(r[2], r[3]);
        }
      }
      if (VECTORS && chunk > 0) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          if (left > 0) *reinterpret_cast<uint4*>(y_gmem_wr) = v[turn];
          y_gmem_wr += static_cast<long long>(ROWS) * p.ldy, left -= ROWS;
        }
      }
      if (chunk == CHUNKS) break;
      const uint32 buffer = chunk % 2 * BUFFER;
#pragma unroll
      for (int j = 0; j < CHUNK_M / 8; j += 2) {
        ptx::stmatrix_x4_trans(y_smem_wr + buffer + 8 * Y_BYTES * j, packed[j][0], packed[j][1], packed[j + 1][0], packed[j + 1][1]);
      }
      ptx::named_barrier(WARPGROUP_MEETS + group, WARPGROUP);  // and everyone has read the other buffer
      if (VECTORS) {
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) v[turn] = ptx::shared_read_128(y_smem_rd + buffer + turn * ROWS * Y_BYTES);
      } else {
#pragma unroll 1
        for (int at = thread; at < CHUNK_M * WEIGHT_TILE_N; at += WARPGROUP) {
          const int row = at / WEIGHT_TILE_N, column = at % WEIGHT_TILE_N, m = m0 + chunk * CHUNK_M + row;
          const uint32 pair = ptx::shared_read_32(y_smem + buffer + sm90_activation_byte(row, column / 8) + 4 * (column % 8 / 2));
          const unsigned short word = static_cast<unsigned short>(column % 2 ? pair >> 16 : pair);
          if (m < p.m && n0 + column < p.n) p.y[static_cast<long long>(m) * p.ldy + n0 + column] = *reinterpret_cast<const Out*>(&word);
        }
      }
    }
  }

  __device__ __forceinline__ void run(const Problem& p, Shared& s) {
    ptx::wait_for_predecessor();  // whose scales are read
    Schedule schedule(p);
    if (group > 0 && !schedule.done(p)) {
      // Starts when the other warpgroup's block AHEAD is there, and stays behind it: while one is at a tile's end, the other one has
      // the tensor cores for itself, and catches up.
      const Item item = schedule.item(p);
      const int ahead = min(AHEAD, item.last_block - item.first_block - 1);
      ptx::barrier_wait(ring.stage + ahead * STAGE_BYTES + offsetof(Stage, full), 0);
    }
    const bool aligned = has_vectors(p.y, p.ldy);
    for (; !schedule.done(p); schedule.advance(p)) {
      const Item item = schedule.item(p);
      const int tile_n = item.tile.n * CONSUMERS + group;
      copy_scales(p, s, item.tile.m);
      const Outputs outputs(p, tile_n);
      int acc[SUMS];
      multiply_item(acc, item.last_block - item.first_block);
      if (tile_n * WEIGHT_TILE_N >= p.n) continue;  // past N: nothing was loaded for it
      ptx::cp_async_wait<0>();
      ptx::named_barrier(WARPGROUP_MEETS + group, WARPGROUP);
      if (item.parts > 1 && !add_parts(p, item, tile_n, WARPGROUP_MEETS + group, s.last[group], acc)) continue;
      if (aligned && (tile_n + 1) * WEIGHT_TILE_N <= p.n) {
        store_tile<true>(p, s, item.tile.m, tile_n, outputs, acc);
      } else {
        store_tile<false>(p, s, item.tile.m, tile_n, outputs, acc);
      }
    }
  }
};

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
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].full), PRODUCERS);
      ptx::barrier_init(ptx::shared_address(&s.stages[stage].empty), 4 * CONSUMERS);  // a warp each
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
  } else {
    ptx::more_registers<CONSUMER_REGISTERS>();
    Consumer(s, warp_of_block / 4).run(given, s);
  }
#endif
}
