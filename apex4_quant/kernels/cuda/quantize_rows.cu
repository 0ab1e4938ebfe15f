// Activation quantizer: [x | RMSNorm(x) gain | SiLU(gate) up] -> [none | Hadamard_128 per block] -> codes and scales.
//
// Eight lanes hold a *slice*, one block of 128 of one row: sixteen consecutive columns a lane, so that four butterfly
// stages are in registers and three are shuffles. A CTA holds 2^rows_log2 rows times blocks_per_cta blocks, numbered rows
// first, so that a warp's stores are contiguous in the slab of a block. Three forms, by the macro APEX4_FORM:
//   NARROW    groups of one block, x or SiLU(gate) up: slices do not know of each other; 256 threads.
//   RESIDENT  RMSNorm, or groups of several blocks: a slice per eight threads, kept in registers while the CTA agrees on
//             one number per row or group through shared memory; up to 1024 threads.
//   LONG      the same for more than 128 blocks: one row a CTA, read again from the caches in every pass.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 64 (sm80) | 128 (sm90)], 16-byte aligned; layout: index.cuh
//   scales   float32 [KB / blocks_per_group, m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. RMS_NORM: the gain, T [k]. PLAIN: not read
//   m, k, k_blocks >= ceil(k / 128), blocks_per_group dividing k_blocks (NARROW: 1), m_stride >= m, ldx, ld_second
//   rows_log2, blocks_per_cta: the CTA's tile, blockDim.x = 8 * 2^rows_log2 * blocks_per_cta rounded up to warps (LONG:
//            any number of warps, rows_log2 = 0); blocks_per_cta is a multiple of blocks_per_group, for RMS_NORM k_blocks
//   clip_over_7   float32(clip / 7)
//   eps, gain_offset (0 or 1)   RMS_NORM only, see `normalised`
//   aligned  1: x and second (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, slower
// Grid: (ceil(k_blocks / blocks_per_cta), row tiles up to 65535, their excess). Rows from m on are not written.
//
// Macros: those of quantize.cuh; APEX4_FORM; APEX4_HADAMARD (0, 1).
#include "quantize.cuh"

#define APEX4_NARROW 0
#define APEX4_RESIDENT 1
#define APEX4_LONG 2

constexpr int LANES = 8;                // of a slice
constexpr int COLUMNS = BLOCK / LANES;  // of a lane
constexpr int WORDS = COLUMNS / 2;
constexpr int MAX_THREADS = APEX4_FORM == APEX4_NARROW ? 256 : APEX4_FORM == APEX4_RESIDENT ? 1024 : 512;
[[maybe_unused]] constexpr int MIN_CTAS = APEX4_FORM == APEX4_NARROW ? 6 : 1;  // per SM: memory's latency is hidden by many small CTAs
#if APEX4_FORM == APEX4_RESIDENT && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
#define APEX4_BOUNDS __maxnreg__(40)  // 1536 threads of an SM, whatever the CTA's size
#else
#define APEX4_BOUNDS __launch_bounds__(MAX_THREADS, MIN_CTAS)
#endif
constexpr int GRID_Y = 65535;
#if APEX4_FORM == APEX4_LONG
constexpr int MAX_LONG_BLOCKS = 1024;
#endif
#if APEX4_HADAMARD
constexpr float TRANSFORM_FACTOR = 0.08838834764831845f;  // 1 / sqrt(128)
#endif

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

#if APEX4_INPUT == APEX4_RMS_NORM
__device__ __forceinline__ float sum_of_squares(const unsigned (&pairs)[WORDS]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    sum = fmaf(low_of(pairs[i]), low_of(pairs[i]), sum);
    sum = fmaf(high_of(pairs[i]), high_of(pairs[i]), sum);
  }
  return sum;
}
#endif

// A lane's columns in float32, times the unscaled Hadamard matrix.
__device__ __forceinline__ void transform(float (&y)[COLUMNS], const unsigned (&pairs)[WORDS], int lane) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) y[2 * i] = low_of(pairs[i]), y[2 * i + 1] = high_of(pairs[i]);
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
  absmax *= TRANSFORM_FACTOR;
#endif
  return max_of_slice(absmax);
}

struct Problem {
  unsigned char* codes;
  float* scales;
  const unsigned short* x;
  const unsigned short* second;
  int m, k, k_blocks, blocks_per_group, m_stride, ldx, ld_second;
  float clip_over_7;
  bool gain_offset, aligned;
};

// Sixteen columns of a lane: loaded, then finished to what is transformed.
struct Lane {
  unsigned pairs[WORDS];
#if APEX4_INPUT != APEX4_PLAIN
  unsigned factors[WORDS];  // gain or up
#endif

  __device__ __forceinline__ void load(const Problem& p, int row, int column, bool active) {
    load_from(pairs, p.x + static_cast<long long>(row) * p.ldx, p, column, active);
  }

  __device__ __forceinline__ void load_second(const Problem& p, int row, int column, bool active) {
#if APEX4_INPUT == APEX4_RMS_NORM
    load_from(factors, p.second, p, column, active);
#elif APEX4_INPUT == APEX4_SILU_MUL
    load_from(factors, p.second + static_cast<long long>(row) * p.ld_second, p, column, active);
#endif
  }

  __device__ __forceinline__ void finish(const Problem& p, float inverse_rms) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
#if APEX4_INPUT == APEX4_RMS_NORM
      pairs[i] = normalised(pairs[i], factors[i], inverse_rms, p.gain_offset);
#elif APEX4_INPUT == APEX4_SILU_MUL
      pairs[i] = gated(pairs[i], factors[i]);
#endif
    }
  }

 private:
  __device__ __forceinline__ static void load_from(
      unsigned (&to)[WORDS], const unsigned short* row, const Problem& p, int column, bool active) {
    load_octet(to, row, column, p.k, active, p.aligned);
    load_octet(to + 4, row, column + 8, p.k, active, p.aligned);
  }
};

// Quantize a lane's columns and store them; the first block of a group stores the group's scale.
__device__ __forceinline__ void store(
    const Problem& p, const float (&y)[COLUMNS], float absmax, int row, int block, int group, bool first_of_group,
    int lane, bool active) {
  const float scale = scale_of(absmax, p.clip_over_7);
#if APEX4_HADAMARD
  const ShiftedProduct quantized(scale, TRANSFORM_FACTOR);
#else
  const ExactQuotient quantized(scale);
#endif
  unsigned codes[COLUMNS], words[2 * OCTET_WORDS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) codes[i] = quantized(y[i]);
  pack_octet(words, codes);
  pack_octet(words + OCTET_WORDS, codes + 8);
  if (!active) return;
  unsigned char* const slab = p.codes + static_cast<long long>(block) * p.m_stride * ROW_BYTES;
  unsigned char* const where = slab + octet_byte(row, rows_column(lane));
#if APEX4_FORMAT == 80
  *reinterpret_cast<uint2*>(where) = make_uint2(words[0], words[1]);
#else
  *reinterpret_cast<uint4*>(where) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
  if (first_of_group && (lane & (LANES - 1)) == 0) p.scales[static_cast<long long>(group) * p.m_stride + row] = scale;
}

#if APEX4_INPUT == APEX4_RMS_NORM
__device__ __forceinline__ float inverse_rms_of(float squares, int k, float eps) {
  return rsqrtf(__fdiv_rn(squares, static_cast<float>(k)) + eps);
}
#endif

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, int m, int k, int k_blocks,
    int blocks_per_group, int m_stride, int ldx, int ld_second, int rows_log2, int blocks_per_cta, float clip_over_7,
    float eps, int gain_offset, int aligned) {
  let_dependents_start();
  const Problem p{codes, scales, x,         second,      m,           k,       k_blocks, blocks_per_group, m_stride,
                  ldx,   ld_second, clip_over_7, gain_offset != 0, aligned != 0};
  const int lane = threadIdx.x & 31, slice = threadIdx.x / LANES;
  [[maybe_unused]] const int in_slice = lane & (LANES - 1);
  const int row_tile = blockIdx.z * GRID_Y + blockIdx.y, first_block = blockIdx.x * blocks_per_cta;
  wait_for_inputs();

#if APEX4_FORM != APEX4_LONG
  const int in_rows = rows_slice_row(slice, rows_log2), in_blocks = rows_slice_block(slice, rows_log2);
  const int row = (row_tile << rows_log2) + in_rows, block = first_block + in_blocks;
  const bool active = row < m && in_blocks < blocks_per_cta && block < k_blocks;
  Lane values;
  values.load(p, row, BLOCK * block + rows_column(lane), active);
  values.load_second(p, row, BLOCK * block + rows_column(lane), active);

  float inverse_rms = 1.0f;
#if APEX4_INPUT == APEX4_RMS_NORM
  __shared__ float slice_squares[MAX_THREADS / LANES];
  const float squares = sum_of_slice(sum_of_squares(values.pairs));
  if (in_slice == 0) slice_squares[slice] = squares;
  __syncthreads();
  float row_squares = 0.0f;
  for (int b = in_slice; b < k_blocks; b += LANES) row_squares += slice_squares[(b << rows_log2) + in_rows];
  inverse_rms = inverse_rms_of(sum_of_slice(row_squares), k, eps);
#endif
  values.finish(p, inverse_rms);

  float y[COLUMNS];
  transform(y, values.pairs, lane);
  float absmax = absmax_of_block(y);
  int group = block;
  bool first_of_group = true;
#if APEX4_FORM == APEX4_RESIDENT
  if (blocks_per_group > 1) {
    __shared__ float slice_absmax[MAX_THREADS / LANES];
    if (in_slice == 0) slice_absmax[slice] = absmax;
    __syncthreads();
    group = block / blocks_per_group;
    first_of_group = block == group * blocks_per_group;
    const int begin = active ? group * blocks_per_group - first_block : 0;
    absmax = 0.0f;
    for (int b = begin + in_slice; b < begin + blocks_per_group; b += LANES)
      absmax = max_nan(absmax, slice_absmax[(b << rows_log2) + in_rows]);
    absmax = max_of_slice(absmax);
  }
#endif
  store(p, y, absmax, row, block, group, first_of_group, lane, active);

#else  // APEX4_LONG
  __shared__ float block_absmax[MAX_LONG_BLOCKS];
  const int row = row_tile, slices = blockDim.x / LANES;
  const int rounds = (blocks_per_cta + slices - 1) / slices;  // the same for all threads: there are shuffles in them
  Lane values;
  float inverse_rms = 1.0f;
#if APEX4_INPUT == APEX4_RMS_NORM
  __shared__ float slice_squares[MAX_THREADS / LANES];
  float squares = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    const int in_blocks = round * slices + slice, block = first_block + in_blocks;
    values.load(p, row, BLOCK * block + rows_column(lane), row < m && in_blocks < blocks_per_cta && block < k_blocks);
    squares += sum_of_squares(values.pairs);
  }
  squares = sum_of_slice(squares);
  if (in_slice == 0) slice_squares[slice] = squares;
  __syncthreads();
  squares = 0.0f;
  for (int i = in_slice; i < slices; i += LANES) squares += slice_squares[i];
  inverse_rms = inverse_rms_of(sum_of_slice(squares), k, eps);
#endif
#pragma unroll 1
  for (int pass = blocks_per_group > 1 ? 0 : 1; pass < 2; ++pass) {  // 0: absmax of blocks; 1: codes
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int in_blocks = round * slices + slice, block = first_block + in_blocks;
      const bool active = row < m && in_blocks < blocks_per_cta && block < k_blocks;
      values.load(p, row, BLOCK * block + rows_column(lane), active);
      values.load_second(p, row, BLOCK * block + rows_column(lane), active);
      values.finish(p, inverse_rms);
      float y[COLUMNS];
      transform(y, values.pairs, lane);
      if (pass == 0 || blocks_per_group == 1) {
        const float absmax = absmax_of_block(y);
        if (pass == 0) {
          if (in_slice == 0 && active) block_absmax[in_blocks] = absmax;
        } else {
          store(p, y, absmax, row, block, block, true, lane, active);
        }
        continue;
      }
      const int group = block / blocks_per_group, begin = active ? group * blocks_per_group - first_block : 0;
      float absmax = 0.0f;
      for (int b = begin + in_slice; b < begin + blocks_per_group; b += LANES) absmax = max_nan(absmax, block_absmax[b]);
      store(p, y, max_of_slice(absmax), row, block, group, block == group * blocks_per_group, lane, active);
    }
    __syncthreads();
  }
#endif
}
