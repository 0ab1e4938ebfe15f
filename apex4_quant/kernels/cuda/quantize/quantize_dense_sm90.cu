// Activation quantizer with a dense transform for many rows on Hopper: what quantize_dense.cu does, with wgmma, with copies of x
// under way all the time, and with RMSNorm in the same kernel.
//
// A CTA keeps the matrix of its block in shared memory and passes over rows_per_cta rows; each of its warpgroups multiplies 64 of
// them at a time, 16 to a warp. x goes to shared memory up to STAGES passes ahead. There every lane has slots of its own: what it
// copies it alone reads, as fragments, so that no barrier is needed, and a slot is filled again as soon as it has been read.
// Accumulators and fragments of x are 96 registers: four warpgroups fit a multiprocessor.
//
// RMSNorm needs of every row what only all CTAs of its rows have read. So each CTA has a fourth warpgroup, the *readers*: their
// warps work out 1 / RMS of whole rows, those of a tile in turn with the readers of the other CTAs, and post it on the *board* for
// all. The rows come from L2, where the copies of the other warpgroups bring them, or the other way round: device memory is read
// once. CTAs that share rows should run at the same time (quantize_configs.choose_dense sees to it). Nothing depends on that but
// the time: a warp that has waited long works out for itself what it misses.
//
// Operands: those of quantize_dense.cu, but for
//   board    RMS_NORM, in the place of inverse_rms: 16 bytes of head and 8 of each of m rows, 16-byte aligned. Zeros before the
//            first launch; then for one launch after the other, of any shapes. See `Board`
//   rows_per_cta   a multiple of 128; RMS_NORM: of 64
//   aligned  must be 1
// Grid: (KB, runs of rows), THREADS threads, SHARED_BYTES of dynamic shared memory. Rows from m on are not written.
//
// To eight bits (APEX4_FORMAT 8) it is two launches, as in quantize_dense.cu, and 1 / RMS comes from row_rms.cu: no board, but its
// operands inverse_rms, in that place, and block_absmax, not read. rows_per_cta is a multiple of 128. MEASURE goes through its rows from
// the last one on, and CODES from the first: each begins with the rows that L2 has of the launch before.
//
// Macros: those of quantize.cuh; APEX4_PASS as in quantize_dense.cu.
#include "quantize/quantize_wgmma.cuh"

#define APEX4_BOARD (APEX4_INPUT == APEX4_RMS_NORM && APEX4_FORMAT != 8)

#if APEX4_BOARD
constexpr int READER_WARPS = 4, WARPS = 12, CTAS = 1;  // CTAS: of a multiprocessor
constexpr int OPERANDS = 1, STAGES = 3, GAIN_SLOTS = BLOCK / 8;
constexpr int PARTS = 3, PART_SLOTS = 8 * 32;  // what a reader's warp has on its way: parts of rows, 16 bytes a slot
#else
constexpr int READER_WARPS = 0, WARPS = 8, CTAS = 2;
constexpr int OPERANDS = APEX4_INPUT == APEX4_SILU_MUL ? 2 : 1, STAGES = 2 / OPERANDS;
constexpr int GAIN_SLOTS = APEX4_INPUT == APEX4_RMS_NORM ? BLOCK / 8 : 0;
constexpr int PARTS = 0, PART_SLOTS = 0;
#endif
constexpr int THREADS = 32 * (READER_WARPS + WARPS), MULTIPLIERS = 32 * WARPS;
constexpr int WARP_ROWS = 16, PASS_ROWS = WARP_ROWS * WARPS;
#if APEX4_FORMAT == 8 && APEX4_PASS == APEX4_MEASURE
constexpr bool BACKWARDS = true;
#else
constexpr bool BACKWARDS = false;
#endif
constexpr int STEP_ROWS = BACKWARDS ? -PASS_ROWS : PASS_ROWS;
constexpr int STAGE_SLOTS = 32 * HALVES * PIECES;  // of 16 bytes, of a warp and operand
constexpr int SHARED_BYTES =
    16 * (MATRIX_CHUNKS + GAIN_SLOTS + WARPS * STAGES * OPERANDS * STAGE_SLOTS + READER_WARPS * PARTS * PART_SLOTS);
static_assert(CTAS * (SHARED_BYTES + 1024 + 128) <= 228 * 1024, "with what the system and `begun` take");

// A lane's slot of a stage: of a piece of its row half = 0, 1.
__device__ __forceinline__ constexpr int slot(int half, int piece) { return 32 * (PIECES * half + piece); }

// Starts to copy a warp's rows from `first` on, of one operand, to the slots of a stage. Rows from `end` on are zeros.
__device__ __forceinline__ void copy_rows(
    uint4* slots, const unsigned short* x, int ldx, int first, int end, int block, int k, int lane) {
  const int row = first + accumulator_row(lane, 0), start = BLOCK * block + dense_piece_column(0, lane);
  const unsigned short* rd = x + static_cast<long long>(row) * ldx + start;
#pragma unroll
  for (int half = 0; half < HALVES; ++half, rd += 8LL * ldx)
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int column = dense_piece_column(piece, 0);
      copy_async_or_zero(slots + slot(half, piece), rd + column, row + 8 * half < end && start + column < k);
    }
}

// From the order of fragments to that of core matrices; `thread` of MULTIPLIERS.
__device__ __forceinline__ void load_matrix(unsigned* shared, const uint4* from, int thread) {
#pragma unroll
  for (int start = 0; start < MATRIX_CHUNKS; start += MULTIPLIERS) {
    const int at = start + thread, lane = at % 32, tile = at / 32 % TILES, step = at / 32 / TILES * 2;
    if (MATRIX_CHUNKS % MULTIPLIERS != 0 && at >= MATRIX_CHUNKS) break;
    const uint4 b = from[at];
    shared[dense_core_word(step, tile, 0, lane)] = b.x, shared[dense_core_word(step, tile, 1, lane)] = b.y;
    shared[dense_core_word(step + 1, tile, 0, lane)] = b.z, shared[dense_core_word(step + 1, tile, 1, lane)] = b.w;
  }
  write_for_wgmma();
}

#if APEX4_BOARD
constexpr int PATIENCE = 100;              // looks at the board, which take most of a microsecond each, or at `begun`
constexpr int LEAD = 5 * PASS_ROWS;        // rows that readers may be ahead, unless they have waited
constexpr int FIRST_LEAD = 3 * PASS_ROWS;  // the same until the first pass has begun, which waits for them

// What CTAs tell each other. Every launch has its own tag, one more than the launch before: what was posted then is not there
// any more, and nothing has to be cleared. The last CTA to end makes its launch's tag the head's.
struct Board {
  struct Head {
    unsigned tag, ended, unused[2];
  };
  Head* head;
  unsigned long long* posts;  // of rows: the bits of 1 / RMS in the lower half, the tag in the upper
  unsigned tag;

  __device__ __forceinline__ explicit Board(unsigned long long* memory)
      : head(reinterpret_cast<Head*>(memory)), posts(memory + sizeof(Head) / 8), tag(load_relaxed(&head->tag) + 1) {}

  __device__ __forceinline__ void post(int row, float value) const {
    store_relaxed(posts + row, static_cast<unsigned long long>(tag) << 32 | __float_as_uint(value));
  }

  // The readers, when they have nothing more to post; the others, when they have nothing more to look for: these go on.
  __device__ __forceinline__ void leave(bool reader) const {
    if (!reader) return named_barrier_arrive<2, THREADS>();
    named_barrier<2, THREADS>();
    if (threadIdx.x > 0) return;
    __threadfence();
    if (atomicAdd(&head->ended, 1u) + 1 < gridDim.x * gridDim.y) return;
    head->ended = 0;
    head->tag += 1;
  }
};

// 1 / RMS of a lane's rows of a tile, as far as it is known.
struct Statistics {
  unsigned long long posts[HALVES];

  __device__ __forceinline__ void look(const Board& board, int first, int end, int lane) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = first + accumulator_row(lane, half);
      posts[half] = row < end ? load_relaxed(board.posts + row) : static_cast<unsigned long long>(board.tag) << 32;
    }
  }
  __device__ __forceinline__ bool complete(const Board& board) const {
    bool there = true;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) there &= posts[half] >> 32 == board.tag;
    return __all_sync(FULL_WARP, there);
  }
  __device__ __forceinline__ float inverse_rms(int half) const { return __uint_as_float(static_cast<unsigned>(posts[half])); }
};

// The squares of a row, added by one warp in the order in which the eight warps of row_rms.cu do.
struct SquareSum {
  static constexpr int WARPS_OF_ROW = 8, SPAN = 8 * 32 * WARPS_OF_ROW;
  float sums[WARPS_OF_ROW];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int w = 0; w < WARPS_OF_ROW; ++w) sums[w] = 0.0f;
  }
  // A lane's eight columns from 8 (32 w + lane) on, of a part of SPAN columns.
  __device__ __forceinline__ void add(int w, const unsigned (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[w] = fmaf(low_of(pairs[i]), low_of(pairs[i]), sums[w]);
      sums[w] = fmaf(high_of(pairs[i]), high_of(pairs[i]), sums[w]);
    }
  }
  __device__ __forceinline__ float inverse_rms(int k, float eps, int lane) {
    // A warp's sum is a tree over its lanes, the same whoever adds: lanes that differ in one bit swap halves of their sums.
#pragma unroll
    for (int mask = 1; mask < WARPS_OF_ROW; mask *= 2) {
      const int kept = WARPS_OF_ROW / 2 / mask;
      const bool upper = lane & mask;
#pragma unroll
      for (int w = 0; w < kept; ++w) {
        const float mine = upper ? sums[w + kept] : sums[w], given = upper ? sums[w] : sums[w + kept];
        sums[w] = mine + __shfl_xor_sync(FULL_WARP, given, mask);
      }
    }
#pragma unroll
    for (int mask = WARPS_OF_ROW; mask < 32; mask *= 2) sums[0] += __shfl_xor_sync(FULL_WARP, sums[0], mask);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS_OF_ROW; ++w)  // lane bit 0 has chosen between upper and lower halves, bit 1 between quarters
      total += __shfl_sync(FULL_WARP, sums[0], (w & 1) << 2 | (w & 2) | w >> 2);
    return inverse_rms_of(total, __frcp_rn(static_cast<float>(k)), eps);
  }
};
static_assert(PART_SLOTS == SquareSum::SPAN / 8, "a lane's octets");

// What a warp reads for all: every `step`-th row, one part of SPAN columns after the other.
struct Cursor {
  int row, start;

  __device__ __forceinline__ bool last(int k) const { return start + SquareSum::SPAN >= k; }
  __device__ __forceinline__ void advance(int k, int step) {
    if (last(k)) row += step, start = 0;
    else start += SquareSum::SPAN;
  }
};

// What a reader's warp does. `slots`: a lane's, PARTS times PART_SLOTS; what it copies there it alone reads. `begun`: the rows that
// each of the other warpgroups is at. Readers do not go far ahead, so that what they read is still in L2 when the others copy it.
__device__ __forceinline__ void read_rows(
    const Board& board, uint4* slots, const volatile int* begun, const unsigned short* x, int k, int ldx, int start, int end,
    float eps, int warp, int lane) {
  const int step = READER_WARPS * static_cast<int>(gridDim.x);
  Cursor next{start + READER_WARPS * static_cast<int>(blockIdx.x) + warp, 0}, ahead = next;
  SquareSum sum;
  sum.clear();
  unsigned filled = 0;  // a bit for each part that has been asked for
  int looks = 0;
  for (int part = 0; next.row < end; part = part + 1 < PARTS ? part + 1 : 0) {
    const unsigned bit = 1u << part;
    if (filled & bit) {
      wait_for_copies_but<PARTS - 1>();
#pragma unroll
      for (int w = 0; w < SquareSum::WARPS_OF_ROW; ++w) {
        unsigned pairs[4];
        unpack(pairs, slots[PART_SLOTS * part + 32 * w]);
        sum.add(w, pairs);
      }
    }
    int slowest = begun[0];
#pragma unroll
    for (int group = 1; group < WARPS / 4; ++group) slowest = min(slowest, static_cast<int>(begun[group]));
    // What may not be asked for yet leaves its part empty: those behind it are not to wait.
    const bool may = __all_sync(FULL_WARP, ahead.row < slowest + LEAD) || looks == PATIENCE;
    if (may) {
      const unsigned short* const rd = x + static_cast<long long>(ahead.row) * ldx;
#pragma unroll
      for (int w = 0; w < SquareSum::WARPS_OF_ROW; ++w) {
        const int column = ahead.start + 8 * (32 * w + lane);
        copy_async_or_zero(slots + PART_SLOTS * part + 32 * w, rd + column, ahead.row < end && column < k);
      }
      ahead.advance(k, step);
    }
    commit_copies();
    looks = may ? 0 : looks + 1;
    if (filled & bit) {
      if (next.last(k)) {
        const float inverse_rms = sum.inverse_rms(k, eps, lane);
        if (lane == 0) board.post(next.row, inverse_rms);
        sum.clear();
      }
      next.advance(k, step);
    }
    filled = may ? filled | bit : filled & ~bit;
  }
}
#endif

#if APEX4_FORMAT == 8
#define APEX4_ROW_OPERAND const float* inverse_rms
#define APEX4_TOKEN_OPERAND const float*,
#else
#define APEX4_ROW_OPERAND [[maybe_unused]] unsigned long long* board_memory
#define APEX4_TOKEN_OPERAND
#endif

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) apex4_quantize_dense(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, APEX4_ROW_OPERAND,
    const uint4* matrix, APEX4_TOKEN_OPERAND int m, int k, int m_stride, int ldx, int ld_second,
    int rows_per_cta, int matrix_stride, float matrix_factor, float clip_over_7, float eps, int gain_offset, int) {
  extern __shared__ __align__(128) uint4 memory[];
  let_dependents_start();
  int lane = threadIdx.x & 31;
  const int block = blockIdx.x, start = blockIdx.y * rows_per_cta, end = min(m, start + rows_per_cta);
  // From a shuffle, so that the compiler knows it to be the same in all lanes. Readers' are negative.
  const int warp = __shfl_sync(FULL_WARP, static_cast<int>(threadIdx.x >> 5), 0) - READER_WARPS;
#if APEX4_BOARD
  __shared__ volatile int begun[WARPS / 4];
  if (threadIdx.x < WARPS / 4) begun[threadIdx.x] = start + FIRST_LEAD - LEAD;
  __syncthreads();
  if (warp < 0) {
    wait_for_inputs();
    const Board board(board_memory);
    uint4* const slots = memory + MATRIX_CHUNKS + GAIN_SLOTS + WARPS * STAGES * STAGE_SLOTS;
    const int reader = warp + READER_WARPS;
    read_rows(board, slots + reader * (PARTS * PART_SLOTS) + lane, begun, x, k, ldx, start, end, eps, reader, lane);
    return board.leave(true);
  }
#endif
  const int thread = 32 * warp + lane;
  unsigned* const core_matrices = reinterpret_cast<unsigned*>(memory);
  uint4* const stages = memory + MATRIX_CHUNKS + GAIN_SLOTS + warp * (STAGES * OPERANDS * STAGE_SLOTS) + lane;
  // Neither the matrix nor the gain is an output of the kernel before: no need to wait for that one.
#if APEX4_INPUT == APEX4_RMS_NORM
  uint4* const gains = memory + MATRIX_CHUNKS;
  if (thread < GAIN_SLOTS)
    copy_async_or_zero(gains + thread, second + BLOCK * block + 8 * thread, BLOCK * block + 8 * thread < k);
#endif
  wait_for_inputs();

  int first = start + warp * WARP_ROWS + (BACKWARDS ? (end - start - 1) / PASS_ROWS * PASS_ROWS : 0);
  // Whether the pass of these rows exists: a warpgroup goes on together, as long as there are any of its 64 rows.
  const auto exists = [&](int from) { return BACKWARDS ? from >= start : from - warp % 4 * WARP_ROWS < end; };
  const auto copy = [&](int stage, int from) {
    uint4* const slots = stages + stage * OPERANDS * STAGE_SLOTS;
    copy_rows(slots, x, ldx, from, end, block, k, lane);
#if APEX4_INPUT == APEX4_SILU_MUL
    copy_rows(slots + STAGE_SLOTS, second, ld_second, from, end, block, k, lane);
#endif
  };
  copy(0, first);
  commit_copies();  // the first group also has the gain
  load_matrix(core_matrices, matrix + static_cast<long long>(block) * matrix_stride, thread);
  const auto copy_others = [&] {
#pragma unroll
    for (int stage = 1; stage < STAGES; ++stage) {
      if (!BACKWARDS || exists(first + stage * STEP_ROWS)) copy(stage, first + stage * STEP_ROWS);
      commit_copies();
    }
  };
#if APEX4_BOARD
  // Memory answers in no order, and late if much is asked of it: the first pass would wait for what the second needs.
  const Board board(board_memory);
  Statistics statistics;
  statistics.look(board, first, end, lane);
  if (first - warp % 4 * WARP_ROWS >= end) board.leave(false);
  wait_for_copies_but<0>();
  copy_others();
#else
  copy_others();
  wait_for_copies_but<STAGES - 1>();
#endif
  named_barrier<1, MULTIPLIERS>();
  unsigned char* const slab = codes + static_cast<long long>(block) * m_stride * ROW_BYTES;
#if APEX4_FORMAT == 8 && APEX4_PASS == APEX4_CODES
  float* const block_scales = scales;
#else
  float* const block_scales = scales + static_cast<long long>(block) * m_stride;
#endif

  for (int stage = 0; exists(first); first += STEP_ROWS, stage = stage + 1 < STAGES ? stage + 1 : 0) {
    asm volatile("" : "+r"(first), "+r"(lane));  // to the compiler other numbers: it shall keep no addresses from pass to pass
    wait_for_copies_but<STAGES - 1>();
#if APEX4_INPUT == APEX4_RMS_NORM && !APEX4_BOARD
    float inverse[HALVES];
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const int row = first + accumulator_row(lane, half);
      inverse[half] = row < end ? inverse_rms[row] : 0.0f;
    }
#elif APEX4_BOARD
    for (int looks = 0; !statistics.complete(board); ++looks) {
      if (looks == PATIENCE) {
#pragma unroll 1
        for (int row = 0; row < min(WARP_ROWS, end - first); ++row) {
          const unsigned short* const rd = x + static_cast<long long>(first + row) * ldx;
          SquareSum sum;
          sum.clear();
#pragma unroll 1
          for (int column = 0; column < k; column += SquareSum::SPAN) {
#pragma unroll
            for (int w = 0; w < SquareSum::WARPS_OF_ROW; ++w) {
              unsigned pairs[4];
              load_octet(pairs, rd, column + 8 * (32 * w + lane), k, true, true);
              sum.add(w, pairs);
            }
          }
          const float inverse_rms = sum.inverse_rms(k, eps, lane);
#pragma unroll
          for (int half = 0; half < HALVES; ++half)
            if (accumulator_row(lane, half) == row) statistics.posts[half] = __float_as_uint(inverse_rms);
        }
        break;
      }
      statistics.look(board, first, end, lane);
    }
    if (thread % 128 == 0) begun[warp / 4] = first;
    if (first - warp % 4 * WARP_ROWS + PASS_ROWS >= end) board.leave(false);
#endif
    const uint4* const slots = stages + stage * OPERANDS * STAGE_SLOTS;
    unsigned a[STEPS][4];
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      unsigned words[HALVES][PIECE_WORDS];
      [[maybe_unused]] unsigned factors[PIECE_WORDS];
#if APEX4_INPUT == APEX4_RMS_NORM
      unpack(factors, gains[dense_piece_column(piece, lane) / 8]);
#endif
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        unpack(words[half], slots[slot(half, piece)]);
#if APEX4_INPUT == APEX4_SILU_MUL
        unpack(factors, slots[STAGE_SLOTS + slot(half, piece)]);
#endif
#if APEX4_INPUT != APEX4_PLAIN
#pragma unroll
        for (int i = 0; i < PIECE_WORDS; ++i)
#if APEX4_INPUT == APEX4_RMS_NORM
#if APEX4_BOARD
          words[half][i] = normalised(words[half][i], factors[i], statistics.inverse_rms(half), gain_offset != 0);
#else
          words[half][i] = normalised(words[half][i], factors[i], inverse[half], gain_offset != 0);
#endif
#else
          words[half][i] = gated(words[half][i], factors[i]);
#endif
#endif
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 * piece + odd][i] = words[i & 1][dense_piece_word(odd, i >> 1)];
    }
    if (exists(first + STAGES * STEP_ROWS)) copy(stage, first + STAGES * STEP_ROWS);
    commit_copies();
    float y[TILES][4];
    multiply_64x128(y, a, core_matrices);
#if APEX4_BOARD
    statistics.look(board, first + PASS_ROWS, end, lane);
#endif
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      quantize_row(slab, block_scales, y, half, first + accumulator_row(lane, half), m, matrix_factor, clip_over_7, lane);
  }
}
