// Activation quantizer: [x | RMSNorm(x) gain | SiLU(gate) up] -> [none | Hadamard_128 per block] -> codes and scales.
//
// Eight lanes hold a *slice*, one block of 128 of one row (quantize_slice.cuh). A CTA holds 2^rows_log2 rows times
// blocks_per_cta blocks, numbered rows first, so that a warp's stores are contiguous in the slab of a block. Four forms, by
// the macro APEX4_FORM:
//   NARROW    groups of one block, x or SiLU(gate) up: slices do not know of each other; 256 threads.
//   RESIDENT  RMSNorm, or groups of several blocks: a slice per eight threads, kept in registers while the CTA agrees on
//             one number per row or group through shared memory; up to 1024 threads.
//   LONG      the same for more than 128 blocks: one row a CTA, read again from the caches in every pass.
//   STREAM    RMSNorm of many rows, group size 128: as many CTAs as the SMs hold, each with every gridDim.y-th row, one
//             after the other. The next rows are copied to shared memory while one is quantized, so that memory does not
//             wait for the row's sum; the gain stays in registers. Codes and scales are those of RESIDENT.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 64 (sm80) | 128 (sm90)], 16-byte aligned; layout: index.cuh
//   scales   float32 [KB / blocks_per_group, m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. RMS_NORM: the gain, T [k]. PLAIN: not read
//   m, k, k_blocks >= ceil(k / 128), blocks_per_group dividing k_blocks (NARROW: 1), m_stride >= m, ldx, ld_second
//   rows_log2, blocks_per_cta: the CTA's tile, blockDim.x = 8 * 2^rows_log2 * blocks_per_cta rounded up to warps (LONG:
//            any number of warps, rows_log2 = 0); blocks_per_cta is a multiple of blocks_per_group, for RMS_NORM it is
//            k_blocks. STREAM: neither is read, blockDim.x = 8 * k_blocks
//   clip_over_7   float32(clip / 7)
//   eps, one_over_k = float32(1 / k), gain_offset (0 or 1)   RMS_NORM only, see `inverse_rms_of` and `normalised`
//   aligned  1: x and second (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, slower.
//            STREAM: must be 1; k = 128 * k_blocks, k_blocks and m_stride are multiples of 4 and 8, codes less than 2 GiB
// Grid: (ceil(k_blocks / blocks_per_cta), row tiles up to 65535, their excess); STREAM: (1, CTAs), with
// STAGES * STAGE * 16 bytes of dynamic shared memory a warp. Rows from m on are not written.
//
// Macros: those of quantize.cuh; APEX4_FORM; APEX4_HADAMARD (0, 1).
#include "quantize_slice.cuh"

#define APEX4_NARROW 0
#define APEX4_RESIDENT 1
#define APEX4_LONG 2
#define APEX4_STREAM 3

[[maybe_unused]] constexpr int MAX_THREADS = APEX4_FORM == APEX4_NARROW ? 256 : APEX4_FORM == APEX4_LONG ? 512 : 1024;
[[maybe_unused]] constexpr int MIN_CTAS = APEX4_FORM == APEX4_NARROW ? 6 : 1;  // per SM: memory's latency is hidden by many small CTAs
#if (APEX4_FORM == APEX4_RESIDENT || APEX4_FORM == APEX4_STREAM) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204
// 1536 threads of an SM, whatever the CTA's size; 1280 where 40 registers are not enough.
#define APEX4_BOUNDS __maxnreg__(APEX4_FORM == APEX4_STREAM && !APEX4_HADAMARD ? 48 : 40)
#else
#define APEX4_BOUNDS __launch_bounds__(MAX_THREADS, MIN_CTAS)
#endif
[[maybe_unused]] constexpr int GRID_Y = 65535;
#if APEX4_FORM == APEX4_LONG
constexpr int MAX_LONG_BLOCKS = 1024;
#elif APEX4_FORM == APEX4_STREAM
constexpr int STAGES = 2;  // rows on their way
constexpr int STAGE = 68;  // 16-byte units from stage to stage, of a warp's columns as of the sums of squares
constexpr int WARP_COLUMNS = 32 * COLUMNS;
constexpr int QUADS = MAX_THREADS / LANES / (4 * LANES);  // of the sums of squares that a lane adds up
#endif

struct Problem {
  unsigned char* codes;
  float* scales;
  Input input;
  int m, k_blocks, blocks_per_group, m_stride;
  float clip_over_7;
};

// Quantize a lane's columns and store them in their slab, and the group's scale.
__device__ __forceinline__ void store(
    unsigned char* slab, int row, float* scale_wr, bool with_scale, const float (&y)[COLUMNS], float absmax,
    float clip_over_7, int lane) {
  unsigned words[2 * OCTET_WORDS];
  const float scale = codes_of(words, y, absmax, clip_over_7, lane);
  const unsigned low = octet_byte(row, octet_column(lane, 0));
  unsigned char* const low_wr = slab + low;
#if APEX4_HADAMARD
  unsigned char* const high_wr = slab + (low ^ ROW_BYTES / 2);  // octet_column(lane, 1) is 64 columns on
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
  if (with_scale) *scale_wr = scale;
}

// The same; the first block of a group stores the group's scale.
[[maybe_unused]] __device__ __forceinline__ void store(
    const Problem& p, const float (&y)[COLUMNS], float absmax, int row, int block, int group, bool first_of_group,
    int lane, bool active) {
  if (!active) return;
  unsigned char* const slab = p.codes + static_cast<long long>(block) * p.m_stride * ROW_BYTES;
  store(slab, row, p.scales + static_cast<long long>(group) * p.m_stride + row,
        first_of_group && (lane & (LANES - 1)) == 0, y, absmax, p.clip_over_7, lane);
}

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second, int m, int k, int k_blocks,
    int blocks_per_group, int m_stride, int ldx, int ld_second, int rows_log2, int blocks_per_cta, float clip_over_7,
    float eps, float one_over_k, int gain_offset, int aligned) {
  let_dependents_start();
  const Problem p{codes, scales, {x, second, k, ldx, ld_second, gain_offset != 0, aligned != 0},
                  m, k_blocks, blocks_per_group, m_stride, clip_over_7};
  const int lane = threadIdx.x & 31, slice = threadIdx.x / LANES;
  [[maybe_unused]] const int in_slice = lane & (LANES - 1);

#if APEX4_FORM == APEX4_STREAM
  extern __shared__ uint4 staged[];                // [warps][STAGES][STAGE]
  // Of slices i, i + 8, i + 16 and i + 24 at [i] for i < 8, and so on: [8] is of slices 32, 40, 48 and 56.
  __shared__ float4 slice_squares[STAGES][STAGE];
  // Of a warp's 64 octets a lane copies lane and lane + 32, so that a warp's copies are contiguous, and reads its own two.
  uint4 *octets_wr = staged + STAGES * STAGE * (threadIdx.x >> 5), *octets_rd = octets_wr + staged_octet(2 * lane);
  octets_wr += staged_octet(lane);
  float* squares_wr = &slice_squares[0][slice % LANES + slice / (4 * LANES) * LANES].x + slice / LANES % 4;
  const float4* squares_rd = &slice_squares[0][in_slice];
  int to_other_stage = STAGE;

  Lane values;
  values.load_second(p.input, 0, BLOCK * slice + rows_column(lane), true);  // a weight: no output of the kernel before
  for (int i = threadIdx.x; i < STAGES * STAGE; i += blockDim.x)  // also those of slices that there are not
    slice_squares[0][i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();
  wait_for_inputs();

  const int rows_apart = gridDim.y;
  const unsigned short* from = x + static_cast<long long>(blockIdx.y) * ldx + WARP_COLUMNS * (threadIdx.x >> 5) + 8 * lane;
  const auto copy_row = [&](int row) {
    if (row < m) {
      copy_async(octets_wr, reinterpret_cast<const uint4*>(from));
      copy_async(octets_wr + staged_octet(32), reinterpret_cast<const uint4*>(from + WARP_COLUMNS / 2));
    }
    commit_copies();  // also of no copies: groups are counted
    from += static_cast<long long>(rows_apart) * ldx;
  };
  copy_row(blockIdx.y);
  octets_wr += STAGE;
  copy_row(blockIdx.y + rows_apart);
  octets_wr -= STAGE;

  int in_slabs = slice * m_stride + blockIdx.y;  // the row, all slabs taken for one
  int lane_now = lane;
#pragma unroll 1
  for (int row = blockIdx.y; row < m; row += rows_apart, in_slabs += rows_apart) {
    wait_for_copies<STAGES - 1>();
    __syncwarp();
    values.set(octets_rd[0], octets_rd[staged_octet(1)]);
    __syncwarp();  // other lanes' copies may come to where this lane has read
    copy_row(row + STAGES * rows_apart);
    // To the compiler other numbers: it shall not keep in registers what is made of them, 1 + gain in float32 among it.
#pragma unroll
    for (int i = 0; i < WORDS; ++i) asm volatile("" : "+r"(values.factors[i]));
    asm volatile("" : "+r"(lane_now));

    const float squares = sum_of_slice(sum_of_squares(values.pairs));
    if (in_slice == 0) *squares_wr = squares;
    __syncthreads();  // one a row: the next one's sums go elsewhere
    float row_squares = 0.0f;  // in the order in which RESIDENT adds
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      if (i > 0 && 4 * LANES * i >= k_blocks) break;
      const float4 four = squares_rd[LANES * i];
      row_squares = row_squares + four.x + four.y + four.z + four.w;
    }
    values.finish(p.input, inverse_rms_of(sum_of_slice(row_squares), one_over_k, eps));

    float y[COLUMNS];
    transform(y, values.pairs, lane_now);
    const float absmax = absmax_of_block(y);
    store(codes, in_slabs, scales + static_cast<unsigned>(in_slabs), (lane_now & (LANES - 1)) == 0, y, absmax, clip_over_7,
          lane_now);
    octets_wr += to_other_stage, octets_rd += to_other_stage, squares_rd += to_other_stage;
    squares_wr += 4 * to_other_stage;
    to_other_stage = -to_other_stage;
  }

#elif APEX4_FORM != APEX4_LONG
  const int row_tile = blockIdx.z * GRID_Y + blockIdx.y, first_block = blockIdx.x * blocks_per_cta;
  const int in_rows = rows_slice_row(slice, rows_log2), in_blocks = rows_slice_block(slice, rows_log2);
  const int row = (row_tile << rows_log2) + in_rows, block = first_block + in_blocks;
  const bool active = row < m && in_blocks < blocks_per_cta && block < k_blocks;
  Lane values;
  float inverse_rms = 1.0f;
#if APEX4_INPUT == APEX4_RMS_NORM
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
#if APEX4_INPUT == APEX4_RMS_NORM
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
      values.load(p.input, row, BLOCK * block + rows_column(lane), active);
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
