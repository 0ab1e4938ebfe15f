// Activation quantizer: [x | RMSNorm(x) gain | SiLU(gate) up] -> [none | Hadamard_128 per block] -> codes and scales.
//
// One pass over memory. Eight lanes hold a *slice*, one block of 128 of one row: sixteen consecutive columns a lane, so
// four butterfly stages are in registers and three are shuffles. A CTA holds 2^rows_log2 rows times blocks_per_cta blocks,
// SLICES slices to a thread. Slices are numbered rows first, so that a warp's stores are contiguous in the slab of a block.
// Groups of one block need no synchronisation. Wider groups and RMSNorm exchange one number a slice through shared memory.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 64 (sm80) | 128 (sm90)], 16-byte aligned; layout: index.cuh
//   scales   float32 [KB / blocks_per_group, m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. RMS_NORM: the gain, T [k]. PLAIN: not read
//   m, k, k_blocks >= ceil(k / 128), blocks_per_group dividing k_blocks, m_stride >= m, ldx, ld_second
//   rows_log2, blocks_per_cta: the CTA's tile, 2^rows_log2 * blocks_per_cta <= blockDim.x / 8 * SLICES; a multiple of
//            blocks_per_group, and for RMS_NORM all of k_blocks
//   clip_over_7   float32(clip / 7)
//   eps, gain_offset (0 or 1)   RMS_NORM only, see `normalised`
//   aligned  1: x and second (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, slower
// Grid: (ceil(k_blocks / blocks_per_cta), row tiles, its excess over 65535). Rows from m on are not written.
//
// Macros: those of quantize.cuh; APEX4_HADAMARD (0, 1); APEX4_SLICES (1: CTAs of up to 1024 threads, 4: up to 832).
#include "quantize.cuh"

constexpr int SLICES = APEX4_SLICES;
constexpr int MAX_THREADS = SLICES == 1 ? 1024 : 832;
constexpr int LANES = 8;                   // of a slice
constexpr int COLUMNS = BLOCK / LANES;     // of a lane
constexpr int MAX_SLICES = MAX_THREADS / LANES * SLICES;
constexpr int GRID_Y = 65535;
constexpr float HADAMARD_FACTOR = 0.08838834764831845f;  // 1 / sqrt(128)

__device__ __forceinline__ float sum_of_slice(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value += __shfl_xor_sync(FULL_WARP, value, mask);
  return value;
}

__device__ __forceinline__ float max_of_slice(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value = max_nan(value, __shfl_xor_sync(FULL_WARP, value, mask));
  return value;
}

__device__ __forceinline__ float sum_of_squares(const unsigned (&pairs)[COLUMNS / 2]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) {
    sum = fmaf(low_of(pairs[i]), low_of(pairs[i]), sum);
    sum = fmaf(high_of(pairs[i]), high_of(pairs[i]), sum);
  }
  return sum;
}

// A lane's columns in float32, times the unscaled Hadamard matrix.
__device__ __forceinline__ void transform(float (&y)[COLUMNS], const unsigned (&pairs)[COLUMNS / 2], int lane) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) y[2 * i] = low_of(pairs[i]), y[2 * i + 1] = high_of(pairs[i]);
#if APEX4_HADAMARD
#pragma unroll
  for (int bit = 1; bit < COLUMNS; bit *= 2)
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      if (!(i & bit)) {
        const float a = y[i], b = y[i | bit];
        y[i] = a + b, y[i | bit] = a - b;
      }
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) {
    const float sign = lane & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) y[i] = fmaf(sign, y[i], __shfl_xor_sync(FULL_WARP, y[i], mask));
  }
#endif
}

// The largest |t| of the block: of its transformed values with the constant factor.
__device__ __forceinline__ float absmax_of_block(const float (&y)[COLUMNS]) {
  float absmax = fabsf(y[0]);
#pragma unroll
  for (int i = 1; i < COLUMNS; ++i) absmax = max_nan(absmax, fabsf(y[i]));
#if APEX4_HADAMARD
  absmax *= HADAMARD_FACTOR;
#endif
  return max_of_slice(absmax);
}

// Quantize a lane's columns and store them; `slab` is that of the block.
__device__ __forceinline__ void store_codes(
    unsigned char* slab, int row, const float (&y)[COLUMNS], float scale, int lane, bool active) {
#if APEX4_HADAMARD
  const ShiftedProduct quantized(scale, HADAMARD_FACTOR);
#else
  const ExactQuotient quantized(scale);
#endif
  unsigned codes[COLUMNS], words[2 * OCTET_WORDS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) codes[i] = quantized(y[i]);
  pack_octet(words, codes);
  pack_octet(words + OCTET_WORDS, codes + 8);
  if (!active) return;
  unsigned char* where = slab + octet_byte(row, rows_column(lane));
#if APEX4_FORMAT == 80
  *reinterpret_cast<uint2*>(where) = make_uint2(words[0], words[1]);
#else
  *reinterpret_cast<uint4*>(where) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) apex4_quantize_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, int m, int k, int k_blocks,
    int blocks_per_group, int m_stride, int ldx, int ld_second, int rows_log2, int blocks_per_cta, float clip_over_7,
    float eps, int gain_offset, int aligned) {
  __shared__ float slice_absmax[MAX_SLICES];
#if APEX4_INPUT == APEX4_RMS_NORM
  __shared__ float slice_squares[MAX_SLICES];
#endif
  let_dependents_start();
  const int lane = threadIdx.x & 31, column = rows_column(lane);
  const int first_row = (blockIdx.z * GRID_Y + blockIdx.y) << rows_log2, first_block = blockIdx.x * blocks_per_cta;
  wait_for_inputs();

  // Where this thread's slices are.
  int slice[SLICES], row[SLICES], cta_block[SLICES];
  bool active[SLICES];
  unsigned pairs[SLICES][COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    slice[i] = threadIdx.x / LANES + i * (blockDim.x / LANES);
    row[i] = first_row + rows_slice_row(slice[i], rows_log2);
    cta_block[i] = rows_slice_block(slice[i], rows_log2);
    active[i] = row[i] < m && cta_block[i] < blocks_per_cta && first_block + cta_block[i] < k_blocks;
  }

  // Input: all loads before the first use.
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    const unsigned short* from = x + static_cast<long long>(row[i]) * ldx;
    const int at = BLOCK * (first_block + cta_block[i]) + column;
    load_octet(pairs[i], from, at, k, active[i], aligned);
    load_octet(pairs[i] + 4, from, at + 8, k, active[i], aligned);
  }
#if APEX4_INPUT != APEX4_PLAIN
  unsigned factors[SLICES][COLUMNS / 2];  // gain or up
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    const long long offset = APEX4_INPUT == APEX4_RMS_NORM ? 0 : static_cast<long long>(row[i]) * ld_second;
    const int at = BLOCK * (first_block + cta_block[i]) + column;
    load_octet(factors[i], second + offset, at, k, active[i], aligned);
    load_octet(factors[i] + 4, second + offset, at + 8, k, active[i], aligned);
  }
#endif
#if APEX4_INPUT == APEX4_RMS_NORM
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    const float squares = sum_of_slice(sum_of_squares(pairs[i]));
    if ((lane & (LANES - 1)) == 0) slice_squares[slice[i]] = squares;
  }
  __syncthreads();
  // A thread's slices may belong to different rows.
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    float squares = 0.0f;
    for (int b = lane & (LANES - 1); b < k_blocks; b += LANES)
      squares += slice_squares[(b << rows_log2) + rows_slice_row(slice[i], rows_log2)];
    const float inverse_rms = rsqrtf(__fdiv_rn(sum_of_slice(squares), static_cast<float>(k)) + eps);
#pragma unroll
    for (int j = 0; j < COLUMNS / 2; ++j)
      pairs[i][j] = normalised(pairs[i][j], factors[i][j], inverse_rms, gain_offset);
  }
#elif APEX4_INPUT == APEX4_SILU_MUL
#pragma unroll
  for (int i = 0; i < SLICES; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS / 2; ++j) pairs[i][j] = gated(pairs[i][j], factors[i][j]);
#endif

  const bool wide = blocks_per_group > 1;
  if (SLICES > 1 && wide) {
#pragma unroll
    for (int i = 0; i < SLICES; ++i) {
      float y[COLUMNS];
      transform(y, pairs[i], lane);
      const float absmax = absmax_of_block(y);
      if ((lane & (LANES - 1)) == 0) slice_absmax[slice[i]] = absmax;
    }
    __syncthreads();
  }
  // With several slices a wide group is transformed twice: float32 values of all of them would not fit the registers.
#pragma unroll
  for (int i = 0; i < SLICES; ++i) {
    float y[COLUMNS];
    transform(y, pairs[i], lane);
    const int block = first_block + cta_block[i];
    int group = block;
    bool first_of_group = true;
    float absmax;
    if (SLICES == 1 || !wide) absmax = absmax_of_block(y);
    if (wide) {
      if (SLICES == 1) {
        if ((lane & (LANES - 1)) == 0) slice_absmax[slice[i]] = absmax;
        __syncthreads();
      }
      group = block / blocks_per_group;
      first_of_group = block == group * blocks_per_group;
      const int begin = active[i] ? group * blocks_per_group - first_block : 0;
      absmax = 0.0f;
      for (int b = lane & (LANES - 1); b < blocks_per_group; b += LANES)
        absmax = max_nan(absmax, slice_absmax[(begin + b << rows_log2) + rows_slice_row(slice[i], rows_log2)]);
      absmax = max_of_slice(absmax);
    }
    const float scale = scale_of(absmax, clip_over_7);
    store_codes(codes + static_cast<long long>(block) * m_stride * ROW_BYTES, row[i], y, scale, lane, active[i]);
    if (active[i] && first_of_group && (lane & (LANES - 1)) == 0)
      scales[static_cast<long long>(group) * m_stride + row[i]] = scale;
  }
}
