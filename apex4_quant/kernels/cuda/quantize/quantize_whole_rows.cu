// Activation quantizer to eight bits: [x | RMSNorm(x) gain | SiLU(gate) up] -> [none | Hadamard_128 per block] -> int8 codes and
// one scale a token, which is known only when all of the row has been transformed. So a CTA has whole rows, in registers.
//
// A warp holds eight *slices*, each one block of 128 of one row: four lanes a slice, 32 columns a lane. A CTA holds 2^rows_log2
// rows, its slices numbered rows first. The Hadamard transform is a product of two: over the column's bits 0, 4, 5 and 6 an
// mma.m16n8k16 with a matrix of +-1 in its A operand, which is exact in 16 bits, the eight slices being its n; over bits 1, 2
// and 3 additions in a lane. So there are no shuffles, x goes from memory straight into B fragments, and a lane ends with
// sixteen consecutive columns of two slices: whole chunks of codes.
//
// Two forms, by the macro APEX4_FORM:
//   RESIDENT  up to MAX_SLICES slices a CTA, which are kept in registers while the CTA agrees on a number for each row.
//   LONG      more: one row a CTA, read again from the caches in every pass.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 128], two's complement, chunks at sm90_activation_byte (index.cuh); 16-byte aligned
//   scales   float32 [m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. RMS_NORM: the gain, T [k]. PLAIN: not read
//   m, k, k_blocks >= ceil(k / 128), m_stride >= m, ldx, ld_second
//   rows_log2    0 to 3. RESIDENT: blockDim.x = 4 * 2^rows_log2 * k_blocks rounded up to warps; LONG: rows_log2 = 0, any
//                number of warps up to MAX_THREADS
//   eps, one_over_k = float32(1 / k), gain_offset (0 or 1)   RMS_NORM only, see `inverse_rms_of` and `normalised`
//   aligned  1: x and second (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, slower
// Grid: (tiles of 2^rows_log2 rows). Rows from m on are not written.
//
// Macros: those of quantize.cuh with APEX4_FORMAT 8; APEX4_FORM; APEX4_HADAMARD (0, 1).
#include "quantize/quantize_s8.cuh"

#define APEX4_RESIDENT 1
#define APEX4_LONG 2

constexpr int LANES = 4, SLICES = 32 / LANES;  // of a slice; of a warp
constexpr int PARTS = 2, COLUMNS = 16;         // of a lane; of a part
constexpr int WORDS = COLUMNS / 2;
constexpr int MAX_THREADS = APEX4_FORM == APEX4_RESIDENT ? 1024 : 512, MAX_SLICES = MAX_THREADS / LANES;

#if APEX4_HADAMARD
constexpr float TRANSFORM_FACTOR = 0.08838834764831845f;  // 1 / sqrt(128)
#endif

struct Source {
  const unsigned short* x;
  const unsigned short* second;
  int k, ldx, ld_second;
  bool gain_offset, aligned;
};

// A lane's columns of a slice: loaded, then finished to what is transformed.
struct Lane {
  unsigned pairs[PARTS][WORDS];
#if APEX4_INPUT != APEX4_PLAIN
  unsigned factors[PARTS][WORDS];  // gain or up
#endif

  __device__ __forceinline__ void load(const Source& from, int row, int column, bool active) {
    load_from(pairs, from.x + static_cast<long long>(row) * from.ldx, from, column, active);
  }

  __device__ __forceinline__ void load_second(const Source& from, int row, int column, bool active) {
#if APEX4_INPUT == APEX4_RMS_NORM
    load_from(factors, from.second, from, column, active);
#elif APEX4_INPUT == APEX4_SILU_MUL
    load_from(factors, from.second + static_cast<long long>(row) * from.ld_second, from, column, active);
#endif
  }

  __device__ __forceinline__ void finish(const Source& from, float inverse_rms) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
#if APEX4_INPUT == APEX4_RMS_NORM
        pairs[part][i] = normalised(pairs[part][i], factors[part][i], inverse_rms, from.gain_offset);
#elif APEX4_INPUT == APEX4_SILU_MUL
        pairs[part][i] = gated(pairs[part][i], factors[part][i]);
#endif
      }
  }

#if APEX4_INPUT == APEX4_RMS_NORM
  __device__ __forceinline__ float squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        sum = fmaf(low_of(pairs[part][i]), low_of(pairs[part][i]), sum);
        sum = fmaf(high_of(pairs[part][i]), high_of(pairs[part][i]), sum);
      }
    return sum;
  }
#endif

 private:
  __device__ __forceinline__ static void load_from(
      unsigned (&to)[PARTS][WORDS], const unsigned short* row, const Source& from, int column, bool active) {
    if (from.aligned) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int octet = 0; octet < 2; ++octet)
          load_octet(to[part] + 4 * octet, row, column + whole_column(0, part) + 8 * octet, from.k, active, true);
      return;
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int octet = 0; octet < 2; ++octet)
        load_octet(to[part] + 4 * octet, row, column + whole_column(0, part) + 8 * octet, from.k, active, false);
  }
};

// ---- what a lane has after the transform --------------------------------------------------------------------------------
__device__ __forceinline__ int result_slice(int lane, int part) {
#if APEX4_HADAMARD
  return whole_transformed_slice(lane, part);
#else
  return whole_slice(lane);
#endif
}
__device__ __forceinline__ int result_chunk(int lane, int part) {
#if APEX4_HADAMARD
  return whole_transformed_column(lane) / COLUMNS;
#else
  return whole_column(lane, part) / COLUMNS;
#endif
}

#if APEX4_HADAMARD
// The A operand: +-1 by the parity of the bits that an input and an output column have in common.
struct Signs {
  unsigned a[4];
  __device__ __forceinline__ explicit Signs(int lane) {
    constexpr unsigned ONES = APEX4_BF16 ? 0x3f803f80u : 0x3c003c00u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // row g + 8 (i & 1), columns 2 q + 8 (i >> 1) and the next
      const int out = whole_product_output((lane >> 2) + 8 * (i & 1)), k = 2 * (lane & 3) + 8 * (i >> 1);
      a[i] = ONES ^ parity(out & whole_product_input(k)) << 15 ^ parity(out & whole_product_input(k + 1)) << 31;
    }
  }

 private:
  __device__ __forceinline__ static unsigned parity(int bits) { return __popc(bits) & 1; }
};
#endif

// A lane's columns in float32; times the unscaled Hadamard matrix, which moves them.
__device__ __forceinline__ void transform(float (&y)[PARTS][COLUMNS], const unsigned (&pairs)[PARTS][WORDS], int lane) {
#if APEX4_HADAMARD
  const Signs signs(lane);
  float d[WORDS][4];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) d[i][j] = 0.0f;
    multiply_16x8x16(d[i], signs.a[0], signs.a[1], signs.a[2], signs.a[3], pairs[0][i], pairs[1][i]);
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j & 1][2 * i + (j >> 1)] = d[i][j];
#pragma unroll
  for (int bit = 2; bit < COLUMNS; bit *= 2)
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        if (!(i & bit)) {
          const float a = y[part][i], b = y[part][i | bit];
          y[part][i] = a + b, y[part][i | bit] = a - b;
        }
#else
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int i = 0; i < WORDS; ++i) y[part][2 * i] = low_of(pairs[part][i]), y[part][2 * i + 1] = high_of(pairs[part][i]);
#endif
}

// ---- numbers of rows ----------------------------------------------------------------------------------------------------
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {
  __device__ __forceinline__ float operator()(float a, float b) const { return max_nan(a, b); }
};

// Of all lanes that differ from this one in the bits of a mask from FIRST up to but without END.
template <int FIRST, int END, class Combine>
__device__ __forceinline__ float over_lanes(float value, Combine combine) {
#pragma unroll
  for (int mask = FIRST; mask < END; mask *= 2) value = combine(value, __shfl_xor_sync(FULL_WARP, value, mask));
  return value;
}

// `found`: what the slices of the CTA have found, in their order; all have written it. What is found of the row
// `lane` mod 2^rows_log2, always added in the same order.
template <class Combine>
__device__ __forceinline__ float of_rows(const float* found, int rows_log2, int lane, Combine combine) {
  float value = 0.0f;
  for (int i = lane; i < static_cast<int>(blockDim.x) / LANES; i += 32) value = combine(value, found[i]);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2)
    if (mask >> rows_log2) value = combine(value, __shfl_xor_sync(FULL_WARP, value, mask));
  return value;
}

// The largest magnitudes of the lane's parts, to those of its warp's slices.
__device__ __forceinline__ void find_largest(float* found, const float (&largest)[PARTS], int first_slice, int lane) {
#if APEX4_HADAMARD
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const float of_slice = over_lanes<LANES, 32>(largest[part], Maximum());
    if (lane < LANES) found[first_slice + result_slice(lane, part)] = of_slice;
  }
#else
  const float of_slice = over_lanes<1, LANES>(max_nan(largest[0], largest[1]), Maximum());
  if (lane % LANES == 0) found[first_slice + result_slice(lane, 0)] = of_slice;
#endif
}

__device__ __forceinline__ void add_largest(float (&largest)[PARTS], const float (&y)[PARTS][COLUMNS]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) largest[part] = max_nan(largest[part], fabsf(y[part][i]));
}

// ---- stores -------------------------------------------------------------------------------------------------------------
struct Target {
  unsigned char* codes;
  float* scales;
  int m, k_blocks, m_stride;
};

// Part `part` of a lane, of a slice of row `row` and block `block`.
__device__ __forceinline__ void store(
    const Target& to, const float (&y)[COLUMNS], float absmax, int row, int block, int part, int lane) {
#if APEX4_HADAMARD
  const float scale = token_scale_of(absmax * TRANSFORM_FACTOR);
  const ProductCode code(scale, TRANSFORM_FACTOR);
#else
  const float scale = token_scale_of(absmax);
  const ExactCode code(scale);
#endif
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack_codes(code(y[4 * i]), code(y[4 * i + 1]), code(y[4 * i + 2]), code(y[4 * i + 3]));
  if (row >= to.m || block >= to.k_blocks) return;
  const int chunk = result_chunk(lane, part);
  unsigned char* const wr = to.codes + static_cast<long long>(block) * to.m_stride * ROW_BYTES + chunk_byte(row, chunk);
  *reinterpret_cast<uint4*>(wr) = make_uint4(words[0], words[1], words[2], words[3]);
  if (block == 0 && chunk == 0) to.scales[row] = scale;
}

#ifdef APEX4_REGS
#define APEX4_BOUNDS __maxnreg__(APEX4_REGS)
#else
#define APEX4_BOUNDS __launch_bounds__(MAX_THREADS)
#endif

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_whole_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, int m, int k, int k_blocks,
    int m_stride, int ldx, int ld_second, int rows_log2, float eps, float one_over_k, int gain_offset, int aligned) {
  __shared__ float slice_absmax[MAX_SLICES];
  let_dependents_start();
  const Source from{x, second, k, ldx, ld_second, gain_offset != 0, aligned != 0};
  const Target to{codes, scales, m, k_blocks, m_stride};
  const int lane = threadIdx.x & 31, first_slice = threadIdx.x / 32 * SLICES;
  Lane values;
  float inverse_rms = 1.0f, y[PARTS][COLUMNS], largest[PARTS] = {};
#if APEX4_INPUT == APEX4_RMS_NORM
  __shared__ float slice_squares[MAX_SLICES];
#endif

#if APEX4_FORM == APEX4_RESIDENT
  const int first_row = blockIdx.x << rows_log2;
  const int slice = first_slice + whole_slice(lane), in_rows = rows_slice_row(slice, rows_log2);
  const int row = first_row + in_rows, block = rows_slice_block(slice, rows_log2);
  const int column = BLOCK * block + whole_column(lane, 0);
  const bool active = row < m && block < k_blocks;
#if APEX4_INPUT == APEX4_RMS_NORM
  // The gain is no output of the kernel before: no need to wait for that one.
#ifndef APEX4_LATE
  values.load_second(from, row, column, active);
#endif
  wait_for_inputs();
  values.load(from, row, column, active);
  const float squares = over_lanes<1, LANES>(values.squares(), Sum());
  if (lane % LANES == 0) slice_squares[slice] = squares;
  __syncthreads();
  const float row_squares = __shfl_sync(FULL_WARP, of_rows(slice_squares, rows_log2, lane, Sum()), in_rows);
  inverse_rms = inverse_rms_of(row_squares, one_over_k, eps);
#ifdef APEX4_LATE
  values.load_second(from, row, column, active);
#endif
#else
  wait_for_inputs();
  values.load(from, row, column, active);
  values.load_second(from, row, column, active);
#endif
  values.finish(from, inverse_rms);
  transform(y, values.pairs, lane);
  add_largest(largest, y);
  find_largest(slice_absmax, largest, first_slice, lane);
  __syncthreads();
  const float row_absmax = of_rows(slice_absmax, rows_log2, lane, Maximum());
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int result = first_slice + result_slice(lane, part), in_result = rows_slice_row(result, rows_log2);
    store(to, y[part], __shfl_sync(FULL_WARP, row_absmax, in_result), first_row + in_result,
          rows_slice_block(result, rows_log2), part, lane);
  }

#else  // APEX4_LONG
  const int row = blockIdx.x, slices = blockDim.x / LANES;
  wait_for_inputs();
  // All warps go the same number of rounds: there are shuffles in them.
#if APEX4_INPUT == APEX4_RMS_NORM
  float squares = 0.0f;
#pragma unroll 1
  for (int round = first_slice; round - first_slice < k_blocks; round += slices) {
    const int block = round + whole_slice(lane);
    values.load(from, row, BLOCK * block + whole_column(lane, 0), block < k_blocks);
    squares += values.squares();
  }
  squares = over_lanes<1, LANES>(squares, Sum());
  if (lane % LANES == 0) slice_squares[first_slice + whole_slice(lane)] = squares;
  __syncthreads();
  inverse_rms = inverse_rms_of(of_rows(slice_squares, 0, lane, Sum()), one_over_k, eps);
#endif
  float row_absmax = 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // 0: the largest magnitude; 1: codes
#pragma unroll 1
    for (int round = first_slice; round - first_slice < k_blocks; round += slices) {
      const int block = round + whole_slice(lane), column = BLOCK * block + whole_column(lane, 0);
      values.load(from, row, column, block < k_blocks);
      values.load_second(from, row, column, block < k_blocks);
      values.finish(from, inverse_rms);
      transform(y, values.pairs, lane);
      if (pass == 0) {
        add_largest(largest, y);
        continue;
      }
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        store(to, y[part], row_absmax, row, round + result_slice(lane, part), part, lane);
    }
    if (pass > 0) break;
    find_largest(slice_absmax, largest, first_slice, lane);
    __syncthreads();
    row_absmax = of_rows(slice_absmax, 0, lane, Maximum());
  }
#endif
}
