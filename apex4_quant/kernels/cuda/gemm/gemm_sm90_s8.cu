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

#include "gemm/gemm_sm90_s8.cuh"
#include "gemm/schedule_sm90.cuh"

constexpr int THREADS = WARPGROUP * (CONSUMERS + 1);
constexpr int WARPGROUP_MEETS = 1;  // named barriers, one for each warpgroup
// Of the 168 a thread that the launch gives, what producers do not need goes to consumers.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS == (CONSUMERS + 1) * 168, "registers of a thread block");
static_assert(CONSUMERS == 2, "warpgroups, by the registers they need");

struct Stage {
  alignas(1024) uint8 a_codes[TILE_M * BLOCK];
  uint8 w_packed[CONSUMERS][WEIGHT_TILE_BYTES];
  unsigned short w_ratio[CONSUMERS][WEIGHT_TILE_N];
  uint64 full, empty;
};
constexpr uint32 STAGE_BYTES = sizeof(Stage);
static_assert(STAGE_BYTES % 1024 == 0, "what the swizzle of wgmma needs");
struct Shared {
  Stage stages[STAGES];
  unsigned short y[CONSUMERS][2][CHUNK_M][WEIGHT_TILE_N];
  float a_scale[CONSUMERS][TILE_M];
  bool last[CONSUMERS];  // of the thread blocks that share a tile
};
static_assert(sizeof(Shared) == SHARED_BYTES, "what the host asks for");

#include "gemm/ring_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ---- producer: a warpgroup, of which three warps copy ------------------------------------------------------------------
//
// Warps: a tile of weights with its ratios each; the tokens' codes.
constexpr int PRODUCERS = CONSUMERS + 1;

// Announces and starts the copies of a warp, by one elected lane: the loop is all lanes', so that its addresses can be in
// uniform registers. They run along, as these warps share their schedulers with warps that multiply.
template <int role>  // warp of the producer warpgroup
struct Producer {
  Ring ring;

  // A tile of weights and its ratios; or, past N, nothing.
  __device__ __forceinline__ void copy_weights(const Problem& p, const Item& item) {
    const long long tile = item.tile.n * CONSUMERS + role;
    const bool exists = tile < p.weight_tiles();
    const uint8* w_packed_gmem_rd = p.w_packed + (tile * p.k_blocks + item.first_block) * WEIGHT_TILE_BYTES;
    const unsigned short* w_ratio_gmem_rd =
        p.w_ratio + (tile * p.groups() + item.first_block / p.blocks_per_group) * WEIGHT_TILE_N;
    int left_of_group = p.blocks_per_group - item.first_block % p.blocks_per_group;
#pragma unroll 1
    for (int left = item.last_block - item.first_block; left > 0; --left) {
      const uint32 full = ring.stage + offsetof(Stage, full);
      ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
      const bool one = ptx::elect_one();
      if (one) ptx::barrier_expect_bytes(full, exists ? WEIGHT_TILE_BYTES + RATIO_BYTES : 0);
      if (one && exists) {
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_packed) + role * WEIGHT_TILE_BYTES, w_packed_gmem_rd, WEIGHT_TILE_BYTES, full);
        ptx::bulk_copy(ring.stage + offsetof(Stage, w_ratio) + role * RATIO_BYTES, w_ratio_gmem_rd, RATIO_BYTES, full);
      }
      w_packed_gmem_rd += WEIGHT_TILE_BYTES;
      if (--left_of_group == 0) w_ratio_gmem_rd += WEIGHT_TILE_N, left_of_group = p.blocks_per_group;
      ring.next();
    }
  }

  __device__ __forceinline__ void copy_tokens(const Problem& p, const Item& item) {
    const int m0 = item.tile.m * TILE_M, rows = min(TILE_M, p.m_stride - m0);
    const uint8* a_codes_gmem_rd = p.a_codes + (static_cast<long long>(item.first_block) * p.m_stride + m0) * BLOCK;
#pragma unroll 1
    for (int left = item.last_block - item.first_block; left > 0; --left) {
      const uint32 full = ring.stage + offsetof(Stage, full);
      ptx::barrier_wait(ring.stage + offsetof(Stage, empty), ring.parity ^ 1);
      const bool one = ptx::elect_one();
      if (one) {
        ptx::barrier_expect_bytes(full, rows * BLOCK);
        ptx::bulk_copy(ring.stage + offsetof(Stage, a_codes), a_codes_gmem_rd, rows * BLOCK, full);
      }
      a_codes_gmem_rd += static_cast<long long>(p.m_stride) * BLOCK;
      ring.next();
    }
  }

  __device__ __forceinline__ void run(const Problem& p) {
    // Weights do not wait for the kernel that writes the activations.
    if (role >= CONSUMERS) ptx::wait_for_predecessor();
    for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
      if (role < CONSUMERS) {
        copy_weights(p, schedule.item(p));
      } else {
        copy_tokens(p, schedule.item(p));
      }
    }
  }
};

// ---- consumers: a warpgroup each -------------------------------------------------------------------------------------------

template <int group>  // which warpgroup
struct Consumer {
  Ring ring;      // at the block that is multiplied or read next
  uint32 w_lane;  // what this lane reads, relative to a stage
  uint32 ratio_lane;

  __device__ __forceinline__ explicit Consumer(const Shared& s) : ring(s) {
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
  // before that; so two fragments are enough, and the warpgroups' products come in turn by themselves.
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
        ptx::Wgmma<TILE_M>::s8(acc, a[step % 2], ptx::wgmma_descriptor(tokens + (32 * step >> 4)), 1);
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

  __device__ __forceinline__ void run(const Problem& p, Shared& s) {
    ptx::wait_for_predecessor();  // whose scales are read
    for (Schedule schedule(p); !schedule.done(p); schedule.advance(p)) {
      int acc[SUMS] = {};
      const Item ahead = schedule.item(p);
      copy_scales(p, s, ahead.tile.m);
      const Outputs outputs(p, ahead.tile.n * CONSUMERS + group);
      multiply_item(acc, ahead.last_block - ahead.first_block);
      asm volatile("" : "+r"(schedule.next));  // the item is worked out again rather than kept through the main loop
      const Item item = schedule.item(p);
      const int tile_n = item.tile.n * CONSUMERS + group;
      if (tile_n * WEIGHT_TILE_N >= p.n) continue;  // past N: nothing was loaded for it
      ptx::cp_async_wait<0>();
      ptx::named_barrier(WARPGROUP_MEETS + group, WARPGROUP);
      if (item.parts > 1 && !add_parts(p, item, tile_n, WARPGROUP_MEETS + group, s.last[group], acc)) continue;
      store(p, item.tile.m, tile_n, WARPGROUP_MEETS + group, s.y[group], s.a_scale[group], outputs, acc);
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
    if (warp_of_block < 4) {
      Consumer<0>(s).run(given, s);
    } else {
      Consumer<1>(s).run(given, s);
    }
  }
#endif
}
