// What the quantizers with a dense transform share: the product of 16 rows with a block's matrix on the tensor cores, whose k
// and n are renamed (index.cuh, dense_*), and what becomes of its sums.
//
// k is renamed so that a lane needs eight consecutive columns of a row at a time, a *piece*: x goes from memory straight into A
// fragments. n is renamed so that a lane ends with 32 consecutive columns of a row: the largest value of a row is then two
// shuffles away, and codes are stored in whole 16-byte chunks.
#pragma once

#include "quantize/quantize.cuh"
#if APEX4_FORMAT == 8
#include "quantize/quantize_s8.cuh"
#endif

constexpr int STEPS = BLOCK / 16, PAIRS = STEPS / 2;  // k16 steps of an mma
constexpr int TILES = BLOCK / 8;                      // n8 tiles
constexpr int PIECES = PAIRS, PIECE_WORDS = 4;        // of a row: eight columns a lane each, those of a pair of steps
constexpr int HALVES = 2;                             // rows r and r + 8 of an m16 tile
constexpr int MATRIX_CHUNKS = BLOCK * BLOCK / 8;      // 16 bytes each

// d += a b, sixteen rows and one step: the second of a pair if `odd`. `lower`, `upper`: a piece of the rows r and r + 8 each.
__device__ __forceinline__ void multiply(
    float (&d)[4], const unsigned* lower, const unsigned* upper, int odd, unsigned b0, unsigned b1) {
  const int word0 = dense_piece_word(odd, 0), word1 = dense_piece_word(odd, 1);
  multiply_16x8x16(d, lower[word0], upper[word0], lower[word1], upper[word1], b0, b1);
}

// What a scale is made of: the largest magnitude, or where scales have a sign the value that has it. Its bits, with the sign at the
// bottom, are in the order of magnitudes, and of two magnitudes that are equal the negative value's are larger; NaN's are largest.
#if APEX4_FEEDBACK == 2
typedef unsigned Magnitude;
__device__ __forceinline__ Magnitude magnitude_of(float value) {
  return __funnelshift_l(__float_as_uint(value), __float_as_uint(value), 1);
}
__device__ __forceinline__ Magnitude larger(Magnitude a, Magnitude b) { return max(a, b); }
#else
typedef float Magnitude;
__device__ __forceinline__ Magnitude magnitude_of(float value) { return fabsf(value); }
__device__ __forceinline__ Magnitude larger(Magnitude a, Magnitude b) { return max_nan(a, b); }
#endif

// The larger of the four lanes that share a row.
__device__ __forceinline__ Magnitude max_of_quad(Magnitude value) {
  value = larger(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return larger(value, __shfl_xor_sync(FULL_WARP, value, 2));
}

#if APEX4_FORMAT != 80
// The codes of one row, a byte each, of which this lane has the 32 columns from 32 q.
__device__ __forceinline__ void store_row(unsigned char* slab, const unsigned (&packed)[8], int row, int m, int lane) {
  const int column = dense_output(0, 2 * (lane & 3));
  // A lane's 32 bytes are a sector of memory, but it stores 16 at a time. So two lanes change halves, and store one's sector
  // together, then the other's.
  const bool odd = lane & 1;
  unsigned first[4], second[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned got = __shfl_xor_sync(FULL_WARP, odd ? packed[i] : packed[4 + i], 1);
    first[i] = odd ? got : packed[i], second[i] = odd ? packed[4 + i] : got;
  }
  if (row < m) {
    *reinterpret_cast<uint4*>(slab + octet_byte(row, odd ? column - 16 : column)) =
        make_uint4(first[0], first[1], first[2], first[3]);
    *reinterpret_cast<uint4*>(slab + octet_byte(row, odd ? column + 16 : column + 32)) =
        make_uint4(second[0], second[1], second[2], second[3]);
  }
}
#endif

#if APEX4_FORMAT == 8
// One row, of which this lane has the 32 columns from 32 q. MEASURE: `row_numbers` gets the largest magnitude in this block.
// CODES: they are the scales of whole rows.
__device__ __forceinline__ void quantize_row(
    unsigned char* slab, float* row_numbers, const float (&y)[TILES][4], int half, int row, int m, float matrix_factor, float,
    int lane) {
#if APEX4_PASS == APEX4_MEASURE
  float absmax = 0.0f;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    absmax = max_nan(absmax, max_nan(fabsf(y[t][2 * half]), fabsf(y[t][2 * half + 1])));
  absmax = max_of_quad(absmax);
  if (row < m && (lane & 3) == 0) row_numbers[row] = absmax * matrix_factor;
#else
  const ProductCode code(row < m ? row_numbers[row] : 1.0f, matrix_factor);
  unsigned packed[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    packed[i] = pack_codes(code(y[2 * i][2 * half]), code(y[2 * i][2 * half + 1]), code(y[2 * i + 1][2 * half]),
                           code(y[2 * i + 1][2 * half + 1]));
  store_row(slab, packed, row, m, lane);
#endif
}
#else
// One row, of which this lane has the 32 columns from 32 q: scale, codes, stores.
__device__ __forceinline__ void quantize_row(
    unsigned char* slab, float* block_scales, const float (&y)[TILES][4], int half, int row, int m,
    float matrix_factor, float clip_over_7, int lane) {
  float absmax = 0.0f;
#pragma unroll
  for (int t = 0; t < TILES; ++t)
    absmax = max_nan(absmax, max_nan(fabsf(y[t][2 * half]), fabsf(y[t][2 * half + 1])));
  const float scale = scale_of(max_of_quad(absmax) * matrix_factor, clip_over_7);
  const ShiftedProduct quantized(scale, matrix_factor);
  unsigned packed[4 * OCTET_WORDS];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned octet[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) octet[e] = quantized(y[4 * i + (e >> 1)][2 * half + (e & 1)]);
    pack_octet(packed + OCTET_WORDS * i, octet);
  }
#if APEX4_FORMAT == 80
  const int column = dense_output(0, 2 * (lane & 3));
  if (row < m)
    *reinterpret_cast<uint4*>(slab + octet_byte(row, column)) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
#else
  store_row(slab, packed, row, m, lane);
#endif
  if (row < m && (lane & 3) == 0) block_scales[row] = scale;
}
#endif
