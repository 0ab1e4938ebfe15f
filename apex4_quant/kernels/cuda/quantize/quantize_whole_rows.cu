// Activation quantizer to eight bits: [x | RMSNorm(x) gain | SiLU(gate) up | RMSNorm(x + residual) gain] -> [none | Hadamard_128
// per block] -> int8 codes and one scale a token, which is known only when all of the row has been transformed. So a CTA has whole
// rows, in registers.
//
// A warp holds eight *slices*, each one block of 128 of one row: four lanes a slice, 32 columns a lane. A CTA holds 2^rows_log2
// rows, its slices numbered rows first. The Hadamard transform is a product of two: over the column's bits 0, 4, 5 and 6 an
// mma.m16n8k16 with a matrix of +-1 in its A operand, which is exact in 16 bits, the eight slices being its n; over bits 1, 2
// and 3 additions in a lane. So there are no shuffles, x goes from memory straight into B fragments, and a lane ends with
// sixteen consecutive columns of two slices: whole chunks of codes. With eight lanes a slice n is four slices by bit 3, and a lane
// ends with sixteen columns of one.
//
// Five forms, by the macro APEX4_FORM:
//   RESIDENT  up to MAX_SLICES slices a CTA, which are kept in registers while the CTA agrees on a number for each row.
//   LONG      any number, and rows that are not aligned: one row a CTA, read again from the caches in every pass.
//   FEW       few rows, on sm_90 and later: one row a CTA, and eight lanes a slice, 16 columns a lane, which are half as many
//             instructions one after the other. A row's number comes from its warps in one step.
//   CLUSTER   few long rows, likewise: FEW, but each row belongs to a cluster, whose CTAs tell each other their numbers.
//   STREAM    many rows: RESIDENT, but a CTA goes on from tile to tile. The next rows are on their way to shared memory meanwhile,
//             where every warp has slots of its own: nobody waits at a barrier for them. Not of a sum.
//
// Operands (type T: bfloat16 or float16; KB = k_blocks; everything in device memory):
//   codes    uint8 [KB, m_stride, 128], two's complement, chunks at sm90_activation_byte (index.cuh); 16-byte aligned
//   scales   float32 [m_stride]
//   x        T [m, k], row stride ldx elements; SILU_MUL: the gate
//   second   SILU_MUL: up, T [m, k], row stride ld_second. (ADD_)RMS_NORM: the gain, T [k]. PLAIN: not read
//   residual T [m, k], row stride ld_second, and total T [m, k], dense, which gets x + residual: ADD_RMS_NORM only
//   m, k, k_blocks >= ceil(k / 128), m_stride >= m, ldx, ld_second
//   rows_log2    0 to 3, LONG, FEW and CLUSTER: 0
//   blocks_per_cta   k_blocks; CLUSTER: at least the CTA's part of them. blockDim.x = LANES * 2^rows_log2 * blocks_per_cta rounded up
//                to warps; LONG: any number of warps up to MAX_THREADS
//   eps, one_over_k = float32(1 / k), gain_offset (0 or 1)   norms only, see `inverse_rms_of` and `normalised`
//   aligned  1: x, second, residual and total (where read) lie on 16 bytes, ldx, ld_second and k are multiples of 8. 0: any, LONG alone
// Grid: (tiles of 2^rows_log2 rows); CLUSTER: times the CTAs of a cluster; STREAM: as many CTAs as run at once, at most, and
// SLOT_BYTES * blockDim.x bytes of dynamic shared memory. Rows from m on are not written.
//
// Macros: those of quantize.cuh with APEX4_FORMAT 8; APEX4_FORM; APEX4_HADAMARD (0, 1). No sum on sm_75: it would spill registers.
#include "quantize/quantize_s8.cuh"

#define APEX4_RESIDENT 1
#define APEX4_LONG 2
#define APEX4_CLUSTER 3
#define APEX4_STREAM 4
#define APEX4_FEW 5
#define APEX4_EIGHT_LANES (APEX4_FORM == APEX4_FEW || APEX4_FORM == APEX4_CLUSTER)

constexpr int LANES = APEX4_EIGHT_LANES ? 8 : 4, SLICES = 32 / LANES;  // of a slice; of a warp
constexpr int PARTS = 2, WORDS = BLOCK / LANES / PARTS / 2;            // of what a lane loads; of a part
constexpr int RUNS = 8 / LANES, COLUMNS = 16;                          // of what it ends with: of consecutive columns; of a run
constexpr int MOST_SLICES = 224;                                       // of a row that CTAs keep
[[maybe_unused]] constexpr int MAX_SLICES = APEX4_FORM == APEX4_FEW ? 1024 / LANES : MOST_SLICES;
[[maybe_unused]] constexpr int MAX_THREADS = APEX4_FORM == APEX4_LONG ? 512 : APEX4_EIGHT_LANES ? 1024 : LANES * MAX_SLICES;
#if APEX4_FORM == APEX4_LONG || (APEX4_FORM == APEX4_STREAM && APEX4_INPUT == APEX4_SILU_MUL) || \
    APEX4_INPUT == APEX4_ADD_RMS_NORM || \
    __CUDA_ARCH__ < (APEX4_NORMALISES ? 900 : 800)
#define APEX4_BOUNDS __launch_bounds__(MAX_THREADS)
#else
#define APEX4_BOUNDS __launch_bounds__(1024)  // 64 registers rather than 72: more CTAs of short rows fit a multiprocessor
#endif

#if APEX4_FORM == APEX4_STREAM
// Of a thread, 16 bytes each: the columns of an operand; stages of all operands, and the gain.
constexpr int SLOTS = 4, OPERANDS = APEX4_INPUT == APEX4_SILU_MUL ? 2 : 1, STAGES = 2 / OPERANDS;
[[maybe_unused]] constexpr int SLOT_BYTES = 16 * SLOTS * (STAGES * OPERANDS + (APEX4_INPUT == APEX4_RMS_NORM ? 1 : 0));
#endif

[[maybe_unused]] constexpr unsigned FEW_TILES = 64;

#if APEX4_HADAMARD
constexpr float TRANSFORM_FACTOR = 0.08838834764831845f;  // 1 / sqrt(128)
#endif

struct Source {
  const unsigned short* x;
  const unsigned short* second;
  int k, ldx, ld_second;
  bool gain_offset, aligned;
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
  const unsigned short* residual;  // row stride ld_second
  unsigned short* total;           // row stride k
#endif
};

// The slice of its warp that a lane loads of, and there the first column of a part.
__device__ __forceinline__ int loaded_slice(int lane) { return APEX4_EIGHT_LANES ? few_slice(lane) : whole_slice(lane); }
__device__ __forceinline__ int loaded_column(int lane, int part) {
#if APEX4_EIGHT_LANES
  return APEX4_HADAMARD ? few_column(lane, part) : rows_column(lane) + 8 * part;
#else
  return whole_column(lane, part);
#endif
}

// A lane's columns of a slice: loaded, then finished to what is transformed.
struct Lane {
  unsigned pairs[PARTS][WORDS];
#if APEX4_INPUT != APEX4_PLAIN
  unsigned factors[PARTS][WORDS];  // gain or up
#endif

  __device__ __forceinline__ void load(const Source& from, int row, int column, bool active) {
    load_from(pairs, from.x + static_cast<long long>(row) * from.ldx, from, column, active);
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
    unsigned others[PARTS][WORDS];  // all of them before the first store, which no load behind it may pass
    load_from(others, from.residual + static_cast<long long>(row) * from.ld_second, from, column, active);
    unsigned short* const total = from.total + static_cast<long long>(row) * from.k;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int octet = 0; octet < WORDS / 4; ++octet) {
        add_octet(pairs[part] + 4 * octet, others[part] + 4 * octet);
        store_octet(total, pairs[part] + 4 * octet, column + loaded_column(0, part) + 8 * octet, from.k, active, from.aligned);
      }
#endif
  }

#if APEX4_INPUT == APEX4_ADD_RMS_NORM
  // What this thread has stored.
  __device__ __forceinline__ void load_total(const Source& from, int row, int column, bool active) {
    load_from(pairs, from.total + static_cast<long long>(row) * from.k, from, column, active);
  }
#endif

  __device__ __forceinline__ void load_second(const Source& from, int row, int column, bool active) {
#if APEX4_NORMALISES
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
#if APEX4_NORMALISES
        pairs[part][i] = normalised(pairs[part][i], factors[part][i], inverse_rms, from.gain_offset);
#elif APEX4_INPUT == APEX4_SILU_MUL
        pairs[part][i] = gated(pairs[part][i], factors[part][i]);
#endif
      }
  }

#if APEX4_NORMALISES
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
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int octet = 0; octet < WORDS / 4; ++octet)
        load_octet(to[part] + 4 * octet, row, column + loaded_column(0, part) + 8 * octet, from.k, active, from.aligned);
  }
};

// ---- what a lane has after the transform --------------------------------------------------------------------------------
__device__ __forceinline__ int result_slice(int lane, int run) {
#if APEX4_HADAMARD
  return APEX4_EIGHT_LANES ? few_transformed_slice(lane) : whole_transformed_slice(lane, run);
#else
  return loaded_slice(lane);
#endif
}
__device__ __forceinline__ int result_chunk(int lane, int run) {
#if APEX4_HADAMARD
  return whole_transformed_column(lane) / COLUMNS;
#else
  return loaded_column(lane, run) / COLUMNS;
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
__device__ __forceinline__ void transform(float (&y)[RUNS][COLUMNS], const unsigned (&pairs)[PARTS][WORDS], int lane) {
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
    for (int j = 0; j < 4; ++j) y[j & RUNS - 1][(RUNS == 1 ? 8 * (j & 1) : 0) + 2 * i + (j >> 1)] = d[i][j];
#pragma unroll
  for (int bit = 2; bit < COLUMNS; bit *= 2)
#pragma unroll
    for (int run = 0; run < RUNS; ++run)
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
        if (!(i & bit)) {
          const float a = y[run][i], b = y[run][i | bit];
          y[run][i] = a + b, y[run][i | bit] = a - b;
        }
#else
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int run = part & RUNS - 1, column = 2 * i + (RUNS == 1 ? 8 * part : 0);
      y[run][column] = low_of(pairs[part][i]), y[run][column + 1] = high_of(pairs[part][i]);
    }
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
#pragma unroll 1
  for (int i = lane; i < static_cast<int>(blockDim.x) / LANES; i += 32) value = combine(value, found[i]);
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2)
    if (mask >> rows_log2) value = combine(value, __shfl_xor_sync(FULL_WARP, value, mask));
  return value;
}

#if !APEX4_EIGHT_LANES
// The largest magnitudes of the lane's runs, to those of its warp's slices.
__device__ __forceinline__ void find_largest(float* found, const float (&largest)[RUNS], int first_slice, int lane) {
#if APEX4_HADAMARD
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const float of_slice = over_lanes<LANES, 32>(largest[run], Maximum());
    if (lane < LANES) found[first_slice + result_slice(lane, run)] = of_slice;
  }
#else
  const float of_slice = over_lanes<1, LANES>(max_nan(largest[0], largest[RUNS - 1]), Maximum());
  if (lane % LANES == 0) found[first_slice + result_slice(lane, 0)] = of_slice;
#endif
}
#endif

__device__ __forceinline__ void add_largest(float (&largest)[RUNS], const float (&y)[RUNS][COLUMNS]) {
#pragma unroll
  for (int run = 0; run < RUNS; ++run)
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) largest[run] = max_nan(largest[run], fabsf(y[run][i]));
}

#if APEX4_EIGHT_LANES
// In one instruction: of numbers that are not negative the bits are in their order, and NaN is above all.
__device__ __forceinline__ float largest_of_warp(float value) {
  return __uint_as_float(__reduce_max_sync(FULL_WARP, __float_as_uint(value) & 0x7fffffffu));
}
#endif

// ---- stores -------------------------------------------------------------------------------------------------------------
struct Target {
  unsigned char* codes;
  float* scales;
  int m, k_blocks, m_stride;
};

// Run `run` of a lane, of a slice of row `row` and block `block`.
__device__ __forceinline__ void store(
    const Target& to, const float (&y)[COLUMNS], float absmax, int row, int block, int run, int lane) {
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
  const int chunk = result_chunk(lane, run);
  unsigned char* const wr = to.codes + static_cast<long long>(block) * to.m_stride * ROW_BYTES + chunk_byte(row, chunk);
  *reinterpret_cast<uint4*>(wr) = make_uint4(words[0], words[1], words[2], words[3]);
  if (block == 0 && chunk == 0) to.scales[row] = scale;
}

#if APEX4_FORM != APEX4_LONG
// What all rows of a CTA go through: a thread's place among them.
struct Place {
  int lane, first_slice, rows_log2, first_block, slice, in_rows, block;

  __device__ __forceinline__ Place(int rows_log2, int first_block)
      : lane(threadIdx.x & 31), first_slice(threadIdx.x / 32 * SLICES), rows_log2(rows_log2), first_block(first_block),
        slice(first_slice + loaded_slice(lane)), in_rows(rows_slice_row(slice, rows_log2)),
        block(first_block + rows_slice_block(slice, rows_log2)) {}
  __device__ __forceinline__ int column() const { return BLOCK * block + loaded_column(lane, 0); }
};

// Codes of a tile, whose first row is `first_row`, from what is known of its rows: in each lane of the row `lane` mod 2^rows_log2.
__device__ __forceinline__ void store_tile(
    const Target& to, const Place& at, const float (&y)[RUNS][COLUMNS], float row_absmax, int first_row) {
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int slice = at.first_slice + result_slice(at.lane, run), in_rows = rows_slice_row(slice, at.rows_log2);
    const float absmax = APEX4_EIGHT_LANES ? row_absmax : __shfl_sync(FULL_WARP, row_absmax, in_rows);  // all lanes have it
    store(to, y[run], absmax, first_row + in_rows, at.first_block + rows_slice_block(slice, at.rows_log2), run, at.lane);
  }
}
#endif

#if APEX4_FORM == APEX4_FEW
// A number of the CTA's row from those of its warps. `of_warps`: room for one of each.
__device__ __forceinline__ float sum_of_row(float* of_warps, float value, int lane) {
  value = over_lanes<1, 32>(value, Sum());
  if (lane == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  value = lane < warps ? of_warps[lane] : 0.0f;
  return over_lanes<1, 32>(value, Sum());
}
__device__ __forceinline__ float largest_of_row(float* of_warps, float value, int lane) {
  value = largest_of_warp(value);
  if (lane == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  return largest_of_warp(lane < warps ? of_warps[lane] : 0.0f);
}
#endif

#if APEX4_FORM == APEX4_CLUSTER
// A number of a row from those of the lanes of all its CTAs: every warp writes its own to all CTAs. `of_warps`: of the cluster's.
template <class Combine>
__device__ __forceinline__ float of_cluster(float* of_warps, float value, int lane, Combine combine) {
  value = over_lanes<1, 32>(value, combine);
  const int ctas = cluster_size(), warps = blockDim.x / 32;
  if (lane < ctas) write_to_rank(of_warps + cluster_rank() * warps + threadIdx.x / 32, lane, value);
  cluster_arrive();
  cluster_wait();
  value = 0.0f;
#pragma unroll 1
  for (int i = lane; i < ctas * warps; i += 32) value = combine(value, of_warps[i]);
  return over_lanes<1, 32>(value, combine);
}
#endif

extern "C" __global__ void APEX4_BOUNDS apex4_quantize_whole_rows(
    unsigned char* codes, float* scales, const unsigned short* x, const unsigned short* second,
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
    const unsigned short* residual, unsigned short* total,
#endif
    int m, int k, int k_blocks, int m_stride, int ldx, int ld_second, int rows_log2, int blocks_per_cta, float eps,
    float one_over_k, int gain_offset, int aligned) {
  let_dependents_start();
  const Source from{x, second, k, ldx, ld_second, gain_offset != 0, APEX4_FORM != APEX4_LONG || aligned != 0
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
                    , residual, total
#endif
  };
  [[maybe_unused]] const Target to{codes, scales, m, k_blocks, m_stride};
  Lane values;
  [[maybe_unused]] float inverse_rms = 1.0f;

#if APEX4_FORM == APEX4_FEW
  constexpr int MAX_WARPS = MAX_THREADS / 32;
  __shared__ float warp_absmax[MAX_WARPS];
  const Place at(0, 0);
  const int row = blockIdx.x;
  const bool active = at.block < k_blocks;
#if APEX4_NORMALISES
  __shared__ float warp_squares[MAX_WARPS];
  values.load_second(from, row, at.column(), active);  // no output of the kernel before: no need to wait for that one
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  inverse_rms = inverse_rms_of(sum_of_row(warp_squares, values.squares(), at.lane), one_over_k, eps);
#else
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  values.load_second(from, row, at.column(), active);
#if APEX4_INPUT == APEX4_SILU_MUL
  await_all(values.pairs[0][0], values.pairs[1][0], values.factors[0][0], values.factors[1][0]);
#endif
#endif
  values.finish(from, inverse_rms);
  float y[RUNS][COLUMNS], largest[RUNS] = {};
  transform(y, values.pairs, at.lane);
  add_largest(largest, y);
  store_tile(to, at, y, largest_of_row(warp_absmax, largest[0], at.lane), row);

#elif APEX4_FORM == APEX4_RESIDENT
  __shared__ float slice_absmax[MAX_SLICES];
  const Place at(rows_log2, 0);
  const int first_row = blockIdx.x << rows_log2, row = first_row + at.in_rows;
  const bool active = row < m && at.block < k_blocks;
#if APEX4_NORMALISES
  __shared__ float slice_squares[MAX_SLICES];
#if __CUDA_ARCH__ >= 900
  values.load_second(from, row, at.column(), active);  // no output of the kernel before: no need to wait for that one
#endif
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  const float squares = over_lanes<1, LANES>(values.squares(), Sum());
  if (at.lane % LANES == 0) slice_squares[at.slice] = squares;
  __syncthreads();
  const float row_squares = __shfl_sync(FULL_WARP, of_rows(slice_squares, rows_log2, at.lane, Sum()), at.in_rows);
  inverse_rms = inverse_rms_of(row_squares, one_over_k, eps);
#if __CUDA_ARCH__ < 900
  values.load_second(from, row, at.column(), active);
#endif
#else
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  values.load_second(from, row, at.column(), active);
#if APEX4_INPUT == APEX4_SILU_MUL
  if (gridDim.x > FEW_TILES)
    await_all(values.factors[0][0], values.factors[0][4], values.factors[1][0], values.factors[1][4]);
#endif
#endif
  values.finish(from, inverse_rms);
  float y[RUNS][COLUMNS], largest[RUNS] = {};
  transform(y, values.pairs, at.lane);
  add_largest(largest, y);
  find_largest(slice_absmax, largest, at.first_slice, at.lane);
  __syncthreads();
  store_tile(to, at, y, of_rows(slice_absmax, rows_log2, at.lane, Maximum()), first_row);

#elif APEX4_FORM == APEX4_CLUSTER
  constexpr int MAX_WARPS = LANES * MOST_SLICES / 32 + 8;  // of a cluster: its CTAs, eight at most, may have part of a warp more each
  __shared__ float warp_absmax[MAX_WARPS];
  cluster_arrive();  // that it runs
  const int ctas = cluster_size(), row = blockIdx.x / ctas;
  const Place at(0, cluster_rank() * blocks_per_cta);
  const bool active = at.block < k_blocks && rows_slice_block(at.slice, 0) < blocks_per_cta;
#if APEX4_NORMALISES
  __shared__ float warp_squares[MAX_WARPS];
  values.load_second(from, row, at.column(), active);
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  const float squares = values.squares();
  cluster_wait();
  inverse_rms = inverse_rms_of(of_cluster(warp_squares, squares, at.lane, Sum()), one_over_k, eps);
#else
  wait_for_inputs();
  values.load(from, row, at.column(), active);
  values.load_second(from, row, at.column(), active);
#if APEX4_INPUT == APEX4_SILU_MUL
  await_all(values.pairs[0][0], values.pairs[1][0], values.factors[0][0], values.factors[1][0]);
#endif
#endif
  values.finish(from, inverse_rms);
  float y[RUNS][COLUMNS], largest[RUNS] = {};
  transform(y, values.pairs, at.lane);
  add_largest(largest, y);
#if !APEX4_NORMALISES
  cluster_wait();
#endif
  // Of the slices that are another CTA's the last warp has zeros, and stores none of them.
  const Target own{codes, scales, m, min(k_blocks, at.first_block + blocks_per_cta), m_stride};
  store_tile(own, at, y, of_cluster(warp_absmax, largest[0], at.lane, Maximum()), row);

#elif APEX4_FORM == APEX4_STREAM
  extern __shared__ __align__(16) uint4 memory[];
  __shared__ float slice_absmax[2][MAX_SLICES];
  Place at(rows_log2, 0);
  const int threads = blockDim.x, tiles = (m + (1 << rows_log2) - 1) >> rows_log2, step = gridDim.x;
  uint4* const slots = memory + threadIdx.x / 32 * 32;
  // Of one operand's row: `slot` counts those of all.
  const auto copy_row = [&](int slot, const unsigned short* row, bool there) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const int column = BLOCK * at.block + whole_copy_column(at.lane, i);
      copy_async_or_zero(slots + (slot + i) * threads + whole_copy_slot(at.lane, i), row + column, there && column < k);
    }
  };
  const auto copy_tile = [&](int stage, int tile) {
    const int row = (tile << rows_log2) + at.in_rows;
    const bool there = row < m && at.block < k_blocks;
    copy_row(stage * OPERANDS * SLOTS, x + static_cast<long long>(row) * ldx, there);
#if APEX4_INPUT == APEX4_SILU_MUL
    copy_row((stage * OPERANDS + 1) * SLOTS, second + static_cast<long long>(row) * ld_second, there);
#endif
  };
  const auto read_row = [&](unsigned (&pairs)[PARTS][WORDS], int slot) {
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
      unpack(pairs[i / 2] + 4 * (i % 2),
             slots[(slot + whole_read_copy(at.lane, i / 2)) * threads + whole_read_slot(at.lane, i % 2)]);
  };
#if APEX4_NORMALISES
  __shared__ float slice_squares[MAX_SLICES];
  constexpr int GAIN = STAGES * OPERANDS * SLOTS;
  copy_row(GAIN, second, at.block < k_blocks);
#endif
  wait_for_inputs();
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) {
    copy_tile(stage, blockIdx.x + stage * step);
    commit_copies();
  }
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += step) {
    asm volatile("" : "+r"(at.lane));  // to the compiler another number: it shall keep nothing made of it from tile to tile
    wait_for_copies_but<STAGES - 1>();
    __syncwarp();  // the other lanes' copies, too
    read_row(values.pairs, stage * OPERANDS * SLOTS);
#if APEX4_INPUT == APEX4_SILU_MUL
    read_row(values.factors, (stage * OPERANDS + 1) * SLOTS);
#endif
    __syncwarp();
    copy_tile(stage, tile + STAGES * step);
    commit_copies();
#if APEX4_NORMALISES
    const float squares = over_lanes<1, LANES>(values.squares(), Sum());
    if (at.lane % LANES == 0) slice_squares[at.slice] = squares;
    __syncthreads();
    const float row_squares = __shfl_sync(FULL_WARP, of_rows(slice_squares, rows_log2, at.lane, Sum()), at.in_rows);
    inverse_rms = inverse_rms_of(row_squares, one_over_k, eps);
    read_row(values.factors, GAIN);
#endif
    values.finish(from, inverse_rms);
    float y[RUNS][COLUMNS], largest[RUNS] = {};
    transform(y, values.pairs, at.lane);
    add_largest(largest, y);
    // In turn, as a warp may be a tile ahead of others that still read.
    find_largest(slice_absmax[parity], largest, at.first_slice, at.lane);
    __syncthreads();
    store_tile(to, at, y, of_rows(slice_absmax[parity], rows_log2, at.lane, Maximum()), tile << rows_log2);
    stage = stage + 1 < STAGES ? stage + 1 : 0, parity ^= 1;
  }

#else  // APEX4_LONG
  __shared__ float slice_absmax[MAX_SLICES];
#if APEX4_NORMALISES
  __shared__ float slice_squares[MAX_SLICES];
#endif
  const int lane = threadIdx.x & 31, first_slice = threadIdx.x / 32 * SLICES;
  const int row = blockIdx.x, slices = blockDim.x / LANES;
  float y[RUNS][COLUMNS], largest[RUNS] = {};
  wait_for_inputs();
  // All warps go the same number of rounds: there are shuffles in them.
#if APEX4_NORMALISES
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
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
      values.load_total(from, row, column, block < k_blocks);
#else
      values.load(from, row, column, block < k_blocks);
#endif
      values.load_second(from, row, column, block < k_blocks);
      values.finish(from, inverse_rms);
      transform(y, values.pairs, lane);
      if (pass == 0) {
        add_largest(largest, y);
        continue;
      }
#pragma unroll
      for (int run = 0; run < RUNS; ++run)
        store(to, y[run], row_absmax, row, round + result_slice(lane, run), run, lane);
    }
    if (pass > 0) break;
    find_largest(slice_absmax, largest, first_slice, lane);
    __syncthreads();
    row_absmax = of_rows(slice_absmax, 0, lane, Maximum());
  }
#endif
}
