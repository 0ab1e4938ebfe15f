// Activation quantizer: [x | RMSNorm(x) gain | SiLU(gate) up | RMSNorm(x + residual) gain] -> [none | Hadamard_128 per block] -> codes and scales.
//
// Eight lanes hold a *slice*, one block of 128 of one row (quantize_slice.cuh). A CTA holds 2^rows_log2 rows times
// blocks_per_cta blocks, numbered rows first, so that a warp's stores are contiguous in the slab of a block. Three forms, by
// the macro APEX4_FORM:
//   NARROW    groups of one block, x or SiLU(gate) up: slices do not know of each other; 256 threads.
//   RESIDENT  RMSNorm, or groups of several blocks: a slice per eight threads, kept in registers while the CTA agrees on
//             one number per row or group through shared memory; up to 1024 threads.
//   LONG      the same for more than 128 blocks: one row a CTA, read again from the caches in every pass.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 64 (sm80) | 128 (sm90)], 16-byte aligned; layout: index.cuh
//   scales   float32 [KB / blocks_per_group, m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. (ADD_)RMS_NORM: the gain, T [k]. PLAIN: not read
//   residual T [m, k], row stride ld_second, and total T [m, k], dense, which gets x + residual: ADD_RMS_NORM only
//   m, k, k_blocks >= ceil(k / 128), blocks_per_group dividing k_blocks (NARROW: 1), m_stride >= m, ldx, ld_second
//   rows_log2, blocks_per_cta: the CTA's tile, blockDim.x = 8 * 2^rows_log2 * blocks_per_cta rounded up to warps (LONG:
//            any number of warps, rows_log2 = 0); blocks_per_cta is a multiple of blocks_per_group, for norms k_blocks
//   clip_over_7   float32(clip / 7)
//   eps, one_over_k = float32(1 / k), gain_offset (0 or 1)   norms only, see `inverse_rms_of` and `normalised`
//   aligned  1: x, second, residual and total (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, slower
// Grid: (ceil(k_blocks / blocks_per_cta), row tiles up to 65535, their excess). Rows from m on are not written.
//
// Macros: those of quantize.cuh; APEX4_FORM; APEX4_HADAMARD (0, 1).
#include "quantize/quantize_slice.cuh"

#define APEX4_NARROW 0
#define APEX4_RESIDENT 1
#define APEX4_LONG 2

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

struct Problem {
  unsigned char* codes;
  float* scales;
  Input input;
  int m, k_blocks, blocks_per_group, m_stride;
  float clip_over_7;
};

// Quantize a lane's columns and store them; the first block of a group stores the group's scale.
__device__ __forceinline__ void store(
    const Problem& p, const float (&y)[COLUMNS], float absmax, int row, int block, int group, bool first_of_group,
    int lane, bool active) {
  unsigned words[2 * OCTET_WORDS];
  const float scale = codes_of(words, y, absmax, p.clip_over_7, lane);
  if (!active) return;
  const unsigned low = octet_byte(row, octet_column(lane, 0));
  unsigned char* const low_wr = p.codes + static_cast<long long>(block) * p.m_stride * ROW_BYTES + low;
#if APEX4_HADAMARD
  unsigned char* const high_wr = low_wr - low + (low ^ ROW_BYTES / 2);  // octet_column(lane, 1) is 64 columns on
#if APEX4_FORMAT == 80
  *reinterpret_cast<unsigned*>(low_wr) = words[0], *reinterpret_cast<unsigned*>(high_wr) = words[1];
#else
  *reinterpret_cast<uint2*>(low_wr) = make_uint2(words[0], words[1]);
  *reinterpret_cast<uint2*>(high_wr) = make_uint2(words[2], words[3]);
#endif
#elif APEX4_FORMAT == 80
  *reinterpret_cast<uint2*>(low_wr) = make_uint2(words[0], words[1]);
#else
  *reinterpret_cast<uint4*>(low_wr) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
  if (first_of_group && (lane & (LANES - 1)) == 0) p.scales[static_cast<long long>(group) * p.m_stride + row] = scale;
}

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second,
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
    const unsigned short* residual, unsigned short* total,
#endif
    int m, int k, int k_blocks, int blocks_per_group, int m_stride, int ldx, int ld_second, int rows_log2, int blocks_per_cta, float clip_over_7,
    float eps, float one_over_k, int gain_offset, int aligned) {
  let_dependents_start();
  const Problem p{codes, scales, {x, second, k, ldx, ld_second, gain_offset != 0, aligned != 0
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
                                  , residual, total
#endif
                                 },
                  m, k_blocks, blocks_per_group, m_stride, clip_over_7};
  const int lane = threadIdx.x & 31, slice = threadIdx.x / LANES;
  [[maybe_unused]] const int in_slice = lane & (LANES - 1);

#if APEX4_FORM != APEX4_LONG
  const int row_tile = blockIdx.z * GRID_Y + blockIdx.y, first_block = blockIdx.x * blocks_per_cta;
  const int in_rows = rows_slice_row(slice, rows_log2), in_blocks = rows_slice_block(slice, rows_log2);
  const int row = (row_tile << rows_log2) + in_rows, block = first_block + in_blocks;
  const bool active = row < m && in_blocks < blocks_per_cta && block < k_blocks;
  Lane values;
  float inverse_rms = 1.0f;
#if APEX4_NORMALISES
  // The gain is no output of the kernel before: no need to wait for that one.
  values.load_second(p.input, row, BLOCK * block + rows_column(lane), active);
  wait_for_inputs();
  values.load(p.input, row, BLOCK * block + rows_column(lane), active);
  __shared__ float slice_squares[MAX_THREADS / LANES];
  const float squares = sum_of_slice(sum_of_squares(values.pairs));
  if (in_slice == 0) slice_squares[slice] = squares;
  __syncthreads();
  float row_squares = 0.0f;
  for (int b = in_slice; b < k_blocks; b += LANES) row_squares += slice_squares[(b << rows_log2) + in_rows];
  inverse_rms = inverse_rms_of(sum_of_slice(row_squares), one_over_k, eps);
#else
  wait_for_inputs();
  values.load(p.input, row, BLOCK * block + rows_column(lane), active);
  values.load_second(p.input, row, BLOCK * block + rows_column(lane), active);
#endif
  values.finish(p.input, inverse_rms);

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
  const int row_tile = blockIdx.z * GRID_Y + blockIdx.y, first_block = blockIdx.x * blocks_per_cta;
  wait_for_inputs();
  __shared__ float block_absmax[MAX_LONG_BLOCKS];
  const int row = row_tile, slices = blockDim.x / LANES;
  const int rounds = (blocks_per_cta + slices - 1) / slices;  // the same for all threads: there are shuffles in them
  Lane values;
  float inverse_rms = 1.0f;
#if APEX4_NORMALISES
  __shared__ float slice_squares[MAX_THREADS / LANES];
  float squares = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    const int in_blocks = round * slices + slice, block = first_block + in_blocks;
    values.load(p.input, row, BLOCK * block + rows_column(lane), row < m && in_blocks < blocks_per_cta && block < k_blocks);
    squares += sum_of_squares(values.pairs);
  }
  squares = sum_of_slice(squares);
  if (in_slice == 0) slice_squares[slice] = squares;
  __syncthreads();
  squares = 0.0f;
  for (int i = in_slice; i < slices; i += LANES) squares += slice_squares[i];
  inverse_rms = inverse_rms_of(sum_of_slice(squares), one_over_k, eps);
#endif
#pragma unroll 1
  for (int pass = blocks_per_group > 1 ? 0 : 1; pass < 2; ++pass) {  // 0: absmax of blocks; 1: codes
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const int in_blocks = round * slices + slice, block = first_block + in_blocks;
      const bool active = row < m && in_blocks < blocks_per_cta && block < k_blocks;
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
      values.load_total(p.input, row, BLOCK * block + rows_column(lane), active);
#else
      values.load(p.input, row, BLOCK * block + rows_column(lane), active);
#endif
      values.load_second(p.input, row, BLOCK * block + rows_column(lane), active);
      values.finish(p.input, inverse_rms);
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
