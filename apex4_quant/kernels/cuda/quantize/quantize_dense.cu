// Activation quantizer with a dense transform: [x | RMSNorm(x) gain | SiLU(gate) up] -> x_b T_b per block of 128, on the
// tensor cores with float32 sums -> codes and scales, one scale per block (group size 128).
//
// x goes from global memory straight into A fragments: the mma's k is renamed so that a lane needs eight consecutive
// columns at a time, and its n so that a lane ends with 32 consecutive columns of a row (index.cuh, dense_*). The largest
// value of a row is then two shuffles away, and codes are stored in whole 16-byte chunks.
//
// Kernels, by the macro APEX4_FEW_ROWS:
//   0: a CTA keeps the matrix of its block in shared memory and passes over rows_per_cta rows, 32 to a warp, so that a
//      fragment of the matrix read from shared memory serves two products. The next rows of x are loaded while
//      the current ones are quantized; the second operand later, when the accumulators' registers are free for it.
//   1: a CTA has 16 rows; its four warps have a quarter of the columns each and read their quarter of the matrix straight
//      into registers, all of it in flight at once. Also the one kernel for unaligned rows.
//   2: RMS_NORM, the same with four warps more for the sums of squares; up to OWN_RMS_ROWS rows.
//
// Operands (type T: bfloat16 or float16, also of the matrix):
//   codes    uint8 [KB, m_stride, 64 (sm80) | 128 (sm90)], 16-byte aligned; layout: index.cuh
//   scales   float32 [KB, m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. RMS_NORM: the gain, T [k]. PLAIN: not read
//   inverse_rms   RMS_NORM: float32 [m], written by row_rms.cu, or null: a CTA for few rows works out those of its own, of which
//            there may be OWN_RMS_ROWS. Otherwise not read
//   matrix   T [KB or 1][16384] in fragment order (quantize_configs.prepack_matrix), 16-byte aligned
//   m, k, m_stride >= m, ldx, ld_second
//   rows_per_cta   a multiple of 128; FEW_ROWS: 16
//   matrix_stride  2048, or 0 if all blocks share one matrix (16-byte units)
//   matrix_factor  a constant the products are multiplied by; 1 but for a shared matrix of +-1
//   clip_over_7    float32(clip / 7)
//   eps            where inverse_rms is null
//   gain_offset (0 or 1)   RMS_NORM only, see `normalised`
//   aligned  must be 1 unless FEW_ROWS; see quantize_rows.cu
// Grid: (KB, runs of rows), THREADS threads. Rows from m on are not written.
//
// To eight bits (APEX4_FORMAT 8) one scale is for a whole row, of which a CTA has only a block. So there are two launches, by the
// macro APEX4_PASS, and the product is made twice; the scales between them are made by row_scale.cu, with few rows by CODES:
//   MEASURE   scales, here float32 [KB, m_stride], gets the largest magnitude of each row of a block; `codes` is not written
//   CODES     codes as sm90's, in two's complement; scales float32 [m_stride], read
//   block_absmax   what MEASURE has written, for CODES with few rows, which then writes the scales; otherwise null
//
// With the macro APEX4_EXPERTS (and APEX4_FEW_ROWS 1) every expert has its rows, its matrix and its clip: blockIdx.y is an entry of
//   tiles    int32 [gridDim.y][4]   expert, first row, rows (at most 16), 0; expert -1: nothing to do (experts/route.cu)
//   clip_factors   float32 [experts], in the place of clip_over_7, or null
//   matrix   [experts][KB or 1][16384]; experts lie expert_stride apart, 0 if they share one
//
// With the macro APEX4_FEEDBACK, to four bits, errors are made up for by columns that are rounded later (quantize_feedback.cuh):
//   matrix   T [KB][16384 + 7168]: behind the matrix of every block its feedback, in fragment order; none is shared
//   matrix_stride  2944
// If it is 2 there are sixteen levels, and behind the feedback of every block 256 bytes, of which its clip ratio are the first two:
//   matrix   T [KB][16384 + 7168 + 128]
//   matrix_stride  2960
//   clip_over_7, clip_factors   not read
// With many rows G is in shared memory behind the matrix; with few rows every warp reads what goes to its own columns into registers,
// and warps round one after the other, the last columns first.
//
// Macros: those of quantize.cuh, APEX4_FEW_ROWS, APEX4_PASS, APEX4_EXPERTS, APEX4_FEEDBACK.
constexpr int WARPS = 4, THREADS = 32 * (APEX4_FEW_ROWS == 2 ? 8 : WARPS);  // WARPS: of those that multiply
#include "quantize/quantize_dense.cuh"
#if APEX4_FEEDBACK
#include "quantize/quantize_feedback.cuh"
#endif

#if APEX4_FORMAT == 8
#define APEX4_TOKEN_OPERAND const float* block_absmax,
#else
#define APEX4_TOKEN_OPERAND
#endif
#if APEX4_EXPERTS
#define APEX4_EXPERT_POINTERS const int4 *tiles, const float *clip_factors,
#define APEX4_EXPERT_NUMBERS , int expert_stride
#else
#define APEX4_EXPERT_POINTERS
#define APEX4_EXPERT_NUMBERS
#endif

constexpr int WORDS = PIECES * PIECE_WORDS;  // registers of a row

struct Input {
  const unsigned short* x;
  const unsigned short* second;
  const float* inverse_rms;
  int m, k, ldx, ld_second, first_column;
  bool gain_offset, aligned;

  __device__ __forceinline__ void load_row(
      unsigned (&words)[WORDS], const unsigned short* row, bool active, int lane) const {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece)
      load_octet(words + PIECE_WORDS * piece, row, first_column + dense_piece_column(piece, lane), k, active, aligned);
  }

  // ROWS rows of the accumulator pattern from `first` on: row(i) = first + (lane >> 2) + 8 i.
  template <int ROWS>
  __device__ __forceinline__ void load(unsigned (&words)[ROWS][WORDS], int first, int lane) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = first + accumulator_row(lane, i);
      load_row(words[i], x + static_cast<long long>(row) * ldx, row < m, lane);
    }
  }

  // What is left to do on loaded rows before they are multiplied.
  template <int ROWS>
  __device__ __forceinline__ void finish(unsigned (&words)[ROWS][WORDS], int first, int lane) const {
#if APEX4_INPUT == APEX4_RMS_NORM
    unsigned gain[WORDS];
    load_row(gain, second, true, lane);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = first + accumulator_row(lane, i);
      const float inverse = row < m ? inverse_rms[row] : 0.0f;
#pragma unroll
      for (int j = 0; j < WORDS; ++j) words[i][j] = normalised(words[i][j], gain[j], inverse, gain_offset);
    }
#elif APEX4_INPUT == APEX4_SILU_MUL
#pragma unroll
    for (int at = 0; at < ROWS; at += HALVES) {
      // A branch, so that this work is not mixed with the products: there are no registers for both.
      if (first + 8 * at >= m) return;
      unsigned up[HALVES][WORDS];
#pragma unroll
      for (int i = 0; i < HALVES; ++i) {
        const int row = first + accumulator_row(lane, at + i);
        load_row(up[i], second + static_cast<long long>(row) * ld_second, row < m, lane);
      }
#pragma unroll
      for (int i = 0; i < HALVES; ++i)
#pragma unroll
        for (int j = 0; j < WORDS; ++j) words[at + i][j] = gated(words[at + i][j], up[i][j]);
    }
#endif
  }
};

#if APEX4_FEW_ROWS

constexpr int ROWS = 16, WARP_TILES = TILES / WARPS;

#if APEX4_FEEDBACK
constexpr int WARP_STEPS = WARP_TILES / 2;

// The part of G by which errors of all later steps go to the tiles of this warp: in registers, all of it in flight at once.
struct OwnFeedback {
  uint4 chunk[FEEDBACK_STEPS][WARP_STEPS];

  __device__ __forceinline__ void load(const uint4* feedback, int warp, int lane) {
#pragma unroll
    for (int step = 1; step < FEEDBACK_STEPS; ++step)
#pragma unroll
      for (int i = 0; i < WARP_STEPS; ++i) {
        const int pair = WARP_STEPS * warp + i;
        if (pair < step) chunk[step][i] = feedback[feedback_fragment_byte(step, pair, lane) / 16];
      }
  }
};

// All warps' tiles of values in units of the scale become codes, as `round_step` leaves them. By all threads that multiply.
__device__ __forceinline__ void round_with_feedback(float (&v)[WARP_TILES][4], const OwnFeedback& own, int warp, int lane) {
  __shared__ uint4 errors_of_steps[FEEDBACK_STEPS][32];
#pragma unroll
  for (int turn = WARPS - 1; turn >= 0; --turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = WARP_STEPS - 1; i >= 0; --i) {
        const int step = WARP_STEPS * turn + i;
        const StepErrors errors = round_step(v[2 * i], v[2 * i + 1]);
#pragma unroll
        for (int left = 0; left < i; ++left) errors.correct(v[2 * left], v[2 * left + 1], own.chunk[step][left]);
        if (turn > 0) errors_of_steps[step][lane] = make_uint4(errors.word[0], errors.word[1], errors.word[2], errors.word[3]);
      }
    }
    if (turn == 0) break;
    named_barrier<1, 32 * WARPS>();
    if (warp < turn) {
#pragma unroll
      for (int i = WARP_STEPS - 1; i >= 0; --i) {
        const int step = WARP_STEPS * turn + i;
        const uint4 word = errors_of_steps[step][lane];
        const StepErrors errors{{word.x, word.y, word.z, word.w}};
#pragma unroll
        for (int left = 0; left < WARP_STEPS; ++left)
          errors.correct(v[2 * left], v[2 * left + 1], own.chunk[step][left]);
      }
    }
  }
}
#endif

#if APEX4_FEW_ROWS == 2 || APEX4_FORMAT == 8
#define APEX4_BOUNDS __launch_bounds__(THREADS, 1)
#else
#define APEX4_BOUNDS __launch_bounds__(THREADS)
#endif

#if APEX4_FEW_ROWS == 2
constexpr int RMS_WARPS = THREADS / 32, OWN_RMS_ROWS = 8, LOADS = 8;

// 1 / RMS of all m rows, by all threads: as many warps for each row as there are, and LOADS loads of each at once. Every CTA reads
// the rows whole: less than a kernel in front of this one would cost.
__device__ __forceinline__ const float* own_inverse_rms(
    const unsigned short* x, int m, int k, int ldx, float eps, bool aligned) {
  __shared__ float warp_squares[RMS_WARPS], result[OWN_RMS_ROWS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int rows_log2 = m > 4 ? 3 : m > 2 ? 2 : m - 1, rows = 1 << rows_log2;  // that m rows are rounded up to
  const int row = warp & (rows - 1), part = warp >> rows_log2, step = 8 * 32 * (RMS_WARPS >> rows_log2);
  float sum = 0.0f;
  for (int start = 8 * (32 * part + lane); start < k; start += LOADS * step) {
    unsigned pairs[LOADS][4];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      load_octet(pairs[i], x + static_cast<long long>(row) * ldx, start + i * step, k, row < m, aligned);
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum = fmaf(low_of(pairs[i][j]), low_of(pairs[i][j]), sum);
        sum = fmaf(high_of(pairs[i][j]), high_of(pairs[i][j]), sum);
      }
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
  if (lane == 0) warp_squares[warp] = sum;
  __syncthreads();
  if (threadIdx.x < m) {
    sum = 0.0f;
    for (int i = threadIdx.x; i < RMS_WARPS; i += rows) sum += warp_squares[i];
    result[threadIdx.x] = inverse_rms_of(sum, __frcp_rn(static_cast<float>(k)), eps);
  }
  __syncthreads();
  return result;
}
#elif APEX4_INPUT == APEX4_RMS_NORM
constexpr int OWN_RMS_ROWS = 4;

// 1 / RMS of all m rows, by all threads. Every CTA reads them whole: less than a kernel in front of this one would cost.
__device__ __forceinline__ const float* own_inverse_rms(
    const unsigned short* x, int m, int k, int ldx, float eps, bool aligned) {
  __shared__ float warp_squares[WARPS][OWN_RMS_ROWS], result[OWN_RMS_ROWS];
  for (int row = 0; row < m; ++row) {
    const float sum = squares_of_warp<THREADS, 4>(x + static_cast<long long>(row) * ldx, k, aligned);
    if ((threadIdx.x & 31) == 0) warp_squares[threadIdx.x >> 5][row] = sum;
  }
  __syncthreads();
  if (threadIdx.x < m) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += warp_squares[i][threadIdx.x];
    result[threadIdx.x] = inverse_rms_of(sum, __frcp_rn(static_cast<float>(k)), eps);
  }
  __syncthreads();
  return result;
}
#endif

#if APEX4_FORMAT == 8
// Of the CTA's rows: from the largest magnitudes of their blocks to their scales, which the CTAs of the first block also store.
__device__ __forceinline__ void find_scales(
    float (&row_scales)[ROWS], float* scales, const float* block_absmax, int k_blocks, int m_stride, int first, int m, bool stores) {
  constexpr int SHARE = 32 * WARPS / ROWS;  // threads of a row
  const int in_tile = threadIdx.x / SHARE % ROWS, row = first + in_tile;
  float absmax = 0.0f;
  if (row < m)
    for (int block = threadIdx.x % SHARE; block < k_blocks; block += SHARE)
      absmax = max_nan(absmax, block_absmax[static_cast<long long>(block) * m_stride + row]);
#pragma unroll
  for (int mask = 1; mask < SHARE; mask *= 2) absmax = max_nan(absmax, __shfl_xor_sync(FULL_WARP, absmax, mask));
  if (threadIdx.x % SHARE != 0 || threadIdx.x >= SHARE * ROWS) return;
  row_scales[in_tile] = token_scale_of(absmax);
  if (stores && row < m) scales[row] = row_scales[in_tile];
}

// Eight consecutive columns of two rows a lane.
__device__ __forceinline__ void token_codes(
    unsigned char* slab, const float (&y)[WARP_TILES][4], const float (&row_scales)[ROWS], int first, int m, float matrix_factor,
    int lane, int warp) {
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int in_tile = accumulator_row(lane, half), row = first + in_tile;
    if (row >= m) continue;
    const ProductCode code(row_scales[in_tile], matrix_factor);
    unsigned words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[i] = pack_codes(code(y[2 * i][2 * half]), code(y[2 * i][2 * half + 1]), code(y[2 * i + 1][2 * half]),
                            code(y[2 * i + 1][2 * half + 1]));
    const int column = dense_output(WARP_TILES * warp, 2 * (lane & 3));  // the first of this lane's eight
    *reinterpret_cast<uint2*>(slab + octet_byte(row, column)) = make_uint2(words[0], words[1]);
  }
}
#endif

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_dense(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, const float* inverse_rms,
    const uint4* matrix, APEX4_TOKEN_OPERAND APEX4_EXPERT_POINTERS int m, int k, int m_stride, int ldx, int ld_second,
    int rows_per_cta, int matrix_stride, float matrix_factor, float clip_over_7, float eps, int gain_offset,
    int aligned APEX4_EXPERT_NUMBERS) {
  __shared__ Magnitude warp_largest[WARPS][ROWS];
  let_dependents_start();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, block = blockIdx.x;
#if APEX4_EXPERTS
  wait_for_inputs();
  const int4 own = tiles[blockIdx.y];
  if (own.x < 0) return;
  const int first = own.y;
  m = own.y + own.z;
  matrix += static_cast<long long>(own.x) * expert_stride;
#if APEX4_FORMAT != 8 && APEX4_FEEDBACK != 2
  if (clip_factors != nullptr) clip_over_7 = clip_factors[own.x];
#endif
#else
  const int first = blockIdx.y * rows_per_cta;
#endif
  const uint4* const fragments = matrix + static_cast<long long>(block) * matrix_stride;
  uint4 b[PAIRS][WARP_TILES];  // the matrix is no output of the kernel before: no need to wait for that one
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
    for (int t = 0; t < WARP_TILES; ++t)
      if (APEX4_FEW_ROWS == 1 || warp < WARPS)
        b[pair][t] = fragments[dense_fragment_byte(pair, WARP_TILES * warp + t, lane) / 16];
#if APEX4_FEEDBACK
  OwnFeedback feedback;
  if (APEX4_FEW_ROWS == 1 || warp < WARPS) feedback.load(fragments + MATRIX_CHUNKS, warp, lane);
#if APEX4_FEEDBACK == 2
  clip_over_7 = block_clip_over_8(fragments + MATRIX_CHUNKS + FEEDBACK_CHUNKS);
#endif
#endif
#if APEX4_INPUT == APEX4_RMS_NORM
  if (BLOCK * block + 64 * warp < k && warp < 2 && lane == 0) prefetch(second + BLOCK * block + 64 * warp);  // nor is the gain
#endif
  wait_for_inputs();
#if APEX4_INPUT == APEX4_RMS_NORM
  if (inverse_rms == nullptr) inverse_rms = own_inverse_rms(x, m, k, ldx, eps, aligned != 0);
#if APEX4_FEW_ROWS == 2
  if (warp >= WARPS) return;
#endif
#endif
#if APEX4_FORMAT == 8 && APEX4_PASS == APEX4_CODES
  find_scales(warp_largest[0], scales, block_absmax, gridDim.x, m_stride, first, m, block == 0);
  named_barrier<1, 32 * WARPS>();
#endif
  const Input input{x, second, inverse_rms, m, k, ldx, ld_second, BLOCK * block, gain_offset != 0, aligned != 0};
  unsigned words[HALVES][WORDS];
  input.load(words, first, lane);
  input.finish(words, first, lane);
  float y[WARP_TILES][4] = {};
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
    for (int t = 0; t < WARP_TILES; ++t) {
      multiply(y[t], words[0] + PIECE_WORDS * pair, words[1] + PIECE_WORDS * pair, 0, b[pair][t].x, b[pair][t].y);
      multiply(y[t], words[0] + PIECE_WORDS * pair, words[1] + PIECE_WORDS * pair, 1, b[pair][t].z, b[pair][t].w);
    }
#if APEX4_FORMAT == 8 && APEX4_PASS == APEX4_CODES
  token_codes(codes + static_cast<long long>(block) * m_stride * ROW_BYTES, y, warp_largest[0], first, m, matrix_factor, lane, warp);
#else
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    Magnitude largest = 0;
#pragma unroll
    for (int t = 0; t < WARP_TILES; ++t)
      largest = larger(largest, larger(magnitude_of(y[t][2 * half]), magnitude_of(y[t][2 * half + 1])));
    largest = max_of_quad(largest);
    if ((lane & 3) == 0) warp_largest[warp][accumulator_row(lane, half)] = largest;
  }
  named_barrier<1, 32 * WARPS>();
#if APEX4_FEEDBACK
  float scales_of_halves[HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    Magnitude largest = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) largest = larger(largest, warp_largest[i][accumulator_row(lane, half)]);
    scales_of_halves[half] = scale_of(largest, matrix_factor, clip_over_7);
    const float in_units = matrix_factor * reciprocal_of(scales_of_halves[half]);
#pragma unroll
    for (int t = 0; t < WARP_TILES; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) y[t][2 * half + e] *= in_units;
  }
  round_with_feedback(y, feedback, warp, lane);
#endif
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int in_tile = accumulator_row(lane, half), row = first + in_tile;
    if (row >= m) continue;
#if APEX4_FEEDBACK
    const float scale = scales_of_halves[half];
    unsigned packed[OCTET_WORDS];
    pack_rounded(packed, y[0], y[1], y[2], y[3], half);
#else
    float absmax = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) absmax = max_nan(absmax, warp_largest[i][in_tile]);
#endif
#if APEX4_FORMAT == 8
    if (warp == 0 && (lane & 3) == 0) scales[static_cast<long long>(block) * m_stride + row] = absmax * matrix_factor;
#else
#if !APEX4_FEEDBACK
    const float scale = scale_of(absmax * matrix_factor, clip_over_7);
    const ShiftedProduct quantized(scale, matrix_factor);
    unsigned octet[8], packed[OCTET_WORDS];
#pragma unroll
    for (int i = 0; i < 8; ++i) octet[i] = quantized(y[i >> 1][2 * half + (i & 1)]);
    pack_octet(packed, octet);
#endif
    const int column = dense_output(WARP_TILES * warp, 2 * (lane & 3));  // the first of this lane's eight
    unsigned char* where = codes + static_cast<long long>(block) * m_stride * ROW_BYTES + octet_byte(row, column);
#if APEX4_FORMAT == 80
    *reinterpret_cast<unsigned*>(where) = packed[0];
#else
    *reinterpret_cast<uint2*>(where) = make_uint2(packed[0], packed[1]);
#endif
    if (warp == 0 && (lane & 3) == 0) scales[static_cast<long long>(block) * m_stride + row] = scale;
#endif
  }
#endif
}

#else

constexpr int M_TILES = 2, WARP_ROWS = 16 * M_TILES, CTA_ROWS = WARP_ROWS * WARPS;

#if APEX4_FEEDBACK
constexpr int COPIED_CHUNKS = MATRIX_CHUNKS + FEEDBACK_CHUNKS, COPIED_CLIPS = APEX4_FEEDBACK == 2;

// Sums of M_TILES * 16 rows -> their scales, and the codes of their blocks.
__device__ __forceinline__ void quantize_rows(
    unsigned char* slab, float* block_scales, float (&v)[M_TILES][TILES][4], const uint4* feedback, int first, int m,
    float matrix_factor, float clip_over_7, int lane) {
#pragma unroll
  for (int i = 0; i < M_TILES * HALVES; ++i) {
    float(&tiles)[TILES][4] = v[i / HALVES];
    const int half = i % HALVES, row = first + accumulator_row(lane, i);
    Magnitude largest = 0;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
      largest = larger(largest, larger(magnitude_of(tiles[t][2 * half]), magnitude_of(tiles[t][2 * half + 1])));
    const float scale = scale_of(max_of_quad(largest), matrix_factor, clip_over_7);
    if (row < m && (lane & 3) == 0) block_scales[row] = scale;
    const float in_units = matrix_factor * reciprocal_of(scale);
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) tiles[t][2 * half + e] *= in_units;
  }
  unsigned packed[M_TILES * HALVES][4 * OCTET_WORDS];
#pragma unroll
  for (int step = FEEDBACK_STEPS - 1; step >= 0; --step) {
    StepErrors errors[M_TILES];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) errors[i] = round_step(v[i][2 * step], v[i][2 * step + 1]);
#pragma unroll
    for (int pair = step - 1; pair >= 0; --pair) {  // the next step's tiles first
      const uint4 g = feedback[feedback_fragment_byte(step, pair, lane) / 16];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) errors[i].correct(v[i][2 * pair], v[i][2 * pair + 1], g);
    }
    if (step % 2 == 0)
#pragma unroll
      for (int i = 0; i < M_TILES * HALVES; ++i) {
        const float(&tiles)[TILES][4] = v[i / HALVES];
        pack_rounded(packed[i] + OCTET_WORDS * (step / 2), tiles[2 * step], tiles[2 * step + 1], tiles[2 * step + 2],
                     tiles[2 * step + 3], i % HALVES);
      }
  }
#if APEX4_FORMAT == 80
  asm volatile("" : "+r"(first), "+r"(lane));  // addresses are worked out now: there were no registers to keep them in
#endif
#pragma unroll
  for (int i = 0; i < M_TILES * HALVES; ++i) {
    const int row = first + accumulator_row(lane, i);
#if APEX4_FORMAT == 80
    if (row < m)
      *reinterpret_cast<uint4*>(slab + octet_byte(row, dense_output(0, 2 * (lane & 3)))) =
          make_uint4(packed[i][0], packed[i][1], packed[i][2], packed[i][3]);
#else
    store_row(slab, packed[i], row, m, lane);
#endif
  }
}
#else
constexpr int COPIED_CHUNKS = MATRIX_CHUNKS, COPIED_CLIPS = 0;
#endif

__device__ __forceinline__ void copy_matrix(uint4* shared, const uint4* from) {
#pragma unroll
  for (int i = 0; i < COPIED_CHUNKS / THREADS; ++i) {
    const int at = threadIdx.x + i * THREADS;
    copy_async(shared + at, from + at);
  }
  if (COPIED_CLIPS && threadIdx.x == 0) copy_async(shared + COPIED_CHUNKS, from + COPIED_CHUNKS);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) apex4_quantize_dense(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, const float* inverse_rms,
    const uint4* matrix, APEX4_TOKEN_OPERAND int m, int k, int m_stride, int ldx, int ld_second, int rows_per_cta, int matrix_stride,
    float matrix_factor, float clip_over_7, float, int gain_offset, int) {
  __shared__ uint4 fragments[COPIED_CHUNKS + COPIED_CLIPS];
  let_dependents_start();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, block = blockIdx.x;
  // The matrix is no output of the kernel before: no need to wait for that one.
  copy_matrix(fragments, matrix + static_cast<long long>(block) * matrix_stride);
  wait_for_inputs();
  const Input input{x, second, inverse_rms, m, k, ldx, ld_second, BLOCK * block, gain_offset != 0, true};
  unsigned words[M_TILES * HALVES][WORDS];
  int first = blockIdx.y * rows_per_cta + warp * WARP_ROWS;
  const int end = min(m, (static_cast<int>(blockIdx.y) + 1) * rows_per_cta);
  input.load(words, first, lane);
  wait_for_copies();
  __syncthreads();
  unsigned char* const slab = codes + static_cast<long long>(block) * m_stride * ROW_BYTES;
#if APEX4_FORMAT == 8 && APEX4_PASS == APEX4_CODES
  float* const block_scales = scales;
#else
  float* const block_scales = scales + static_cast<long long>(block) * m_stride;
#endif

  for (; first < end; first += CTA_ROWS) {
    asm volatile("" : "+r"(first));  // to the compiler another number: it shall keep no pointers from pass to pass
    input.finish(words, first, lane);
    float y[M_TILES][TILES][4] = {};
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const uint4 b = fragments[dense_fragment_byte(pair, t, lane) / 16];
        const int at = PIECE_WORDS * pair;
        multiply(y[0][t], words[0] + at, words[1] + at, 0, b.x, b.y);
        multiply(y[1][t], words[2] + at, words[3] + at, 0, b.x, b.y);
        multiply(y[0][t], words[0] + at, words[1] + at, 1, b.z, b.w);
        multiply(y[1][t], words[2] + at, words[3] + at, 1, b.z, b.w);
      }
    const int next = first + CTA_ROWS;
    if (next < end) input.load(words, next, lane);
#if APEX4_FEEDBACK == 2
    clip_over_7 = block_clip_over_8(fragments + COPIED_CHUNKS);  // read anew: there is no register to keep it in
#endif
#if APEX4_FEEDBACK
    quantize_rows(slab, block_scales, y, fragments + MATRIX_CHUNKS, first, m, matrix_factor, clip_over_7, lane);
#else
#pragma unroll
    for (int i = 0; i < M_TILES * HALVES; ++i)
      quantize_row(slab, block_scales, y[i / HALVES], i % HALVES, first + accumulator_row(lane, i), m, matrix_factor,
                   clip_over_7, lane);
#endif
  }
}

#endif
