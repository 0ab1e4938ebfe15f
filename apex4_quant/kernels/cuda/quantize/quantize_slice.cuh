// A slice, one block of 128 of one row, held by eight lanes, sixteen columns each. Four butterfly stages of the Hadamard
// transform are in a lane's registers. For each of the others two lanes swap halves of what they have, which costs half the
// shuffles of one stage between lanes, and leaves a lane with other columns (`octet_column`).
//
// Macros: those of quantize.cuh; APEX4_HADAMARD (0, 1).
#pragma once

#include "quantize/quantize.cuh"

constexpr int LANES = 8;                // of a slice
constexpr int COLUMNS = BLOCK / LANES;  // of a lane
constexpr int WORDS = COLUMNS / 2;

#if APEX4_HADAMARD
constexpr float TRANSFORM_FACTOR = 0.08838834764831845f;  // 1 / sqrt(128)
#endif

__device__ __forceinline__ float sum_of_slice(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value += __shfl_xor_sync(FULL_WARP, value, mask);
  return value;
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) value += __shfl_xor_sync(FULL_WARP, value, mask);
  return value;
}

__device__ __forceinline__ float max_of_slice(float value) {
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) value = max_nan(value, __shfl_xor_sync(FULL_WARP, value, mask));
  return value;
}

struct Input {
  const unsigned short* x;
  const unsigned short* second;
  int k, ldx, ld_second;
  bool gain_offset, aligned;
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
  const unsigned short* residual;  // row stride ld_second
  unsigned short* total;           // row stride k
#endif
};

// Sixteen columns of a lane: loaded, then finished to what is transformed.
struct Lane {
  unsigned pairs[WORDS];
#if APEX4_INPUT != APEX4_PLAIN
  unsigned factors[WORDS];  // gain or up
#endif

  // `stores`: of several that read a sum, the one that stores it.
  __device__ __forceinline__ void load(const Input& from, int row, int column, bool active, [[maybe_unused]] bool stores = true) {
    load_from(pairs, from.x + static_cast<long long>(row) * from.ldx, from, column, active);
#if APEX4_INPUT == APEX4_ADD_RMS_NORM
    unsigned residual[WORDS];
    load_from(residual, from.residual + static_cast<long long>(row) * from.ld_second, from, column, active);
    add_octet(pairs, residual), add_octet(pairs + 4, residual + 4);
    unsigned short* const total = from.total + static_cast<long long>(row) * from.k;
    store_octet(total, pairs, column, from.k, active && stores, from.aligned);
    store_octet(total, pairs + 4, column + 8, from.k, active && stores, from.aligned);
#endif
  }

#if APEX4_INPUT == APEX4_ADD_RMS_NORM
  // What this thread has stored.
  __device__ __forceinline__ void load_total(const Input& from, int row, int column, bool active) {
    load_from(pairs, from.total + static_cast<long long>(row) * from.k, from, column, active);
  }
#endif

  __device__ __forceinline__ void load_second(const Input& from, int row, int column, bool active) {
#if APEX4_NORMALISES
    load_from(factors, from.second, from, column, active);
#elif APEX4_INPUT == APEX4_SILU_MUL
    load_from(factors, from.second + static_cast<long long>(row) * from.ld_second, from, column, active);
#endif
  }

  __device__ __forceinline__ void finish(const Input& from, float inverse_rms) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
#if APEX4_NORMALISES
      pairs[i] = normalised(pairs[i], factors[i], inverse_rms, from.gain_offset);
#elif APEX4_INPUT == APEX4_SILU_MUL
      pairs[i] = gated(pairs[i], factors[i]);
#endif
    }
  }

 private:
  __device__ __forceinline__ static void load_from(
      unsigned (&to)[WORDS], const unsigned short* row, const Input& from, int column, bool active) {
    load_octet(to, row, column, from.k, active, from.aligned);
    load_octet(to + 4, row, column + 8, from.k, active, from.aligned);
  }
};

#if APEX4_NORMALISES
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

#if APEX4_HADAMARD
__device__ __forceinline__ float sign_of(int lane, int bit) { return lane & bit ? -1.0f : 1.0f; }
#endif

// The first column, in its block, of the octets of codes that a lane ends with. It starts with those of rows_column.
__device__ __forceinline__ int octet_column(int lane, int half) {
#if APEX4_HADAMARD
  return rows_transformed_column(lane, half);
#else
  return rows_column(lane) + 8 * half;
#endif
}

// A lane's columns in float32, times the unscaled Hadamard matrix, which moves them and may change their signs: see codes_of.
__device__ __forceinline__ void transform(float (&y)[COLUMNS], const unsigned (&pairs)[WORDS], int lane) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) y[2 * i] = low_of(pairs[i]), y[2 * i + 1] = high_of(pairs[i]);
#if APEX4_HADAMARD
#pragma unroll
  for (int bit = 1; bit < COLUMNS / 2; bit *= 2)
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i)
      if (!(i & bit)) {
        const float a = y[i], b = y[i | bit];
        y[i] = a + b, y[i | bit] = a - b;
      }
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) {
    const float sign = sign_of(lane, mask);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) {  // the sum stays and the difference goes, or the other way round
      const float a = y[i], b = y[i + COLUMNS / 2];
      y[i] = fmaf(sign, b, a), y[i + COLUMNS / 2] = __shfl_xor_sync(FULL_WARP, fmaf(-sign, b, a), mask);
    }
  }
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) {
    const float a = y[i], b = y[i + COLUMNS / 2];
    y[i] = a + b, y[i + COLUMNS / 2] = a - b;
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

#if APEX4_FORMAT != 8
// A lane's two octets, packed as in the activation format, with the scale of the group's `absmax`. Returns the scale.
__device__ __forceinline__ float codes_of(
    unsigned (&words)[2 * OCTET_WORDS], const float (&y)[COLUMNS], float absmax, float clip_over_7, int lane) {
  const float scale = scale_of(absmax, clip_over_7);
#if APEX4_HADAMARD
  // A lane that has the second of two numbers takes their difference with the wrong sign. So have, after each stage, the
  // differences; and after the next one the lanes that have kept them, in all they have then.
  ShiftedProduct quantized(scale, TRANSFORM_FACTOR);
  if (lane & 2) quantized.reciprocal *= sign_of(lane, 1);
  if (lane & 4) quantized.reciprocal *= sign_of(lane, 2);
  ShiftedProduct of_differences = quantized;
  of_differences.reciprocal *= sign_of(lane, 4);
#else
  const ExactQuotient quantized(scale), of_differences = quantized;
#endif
  unsigned codes[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) codes[i] = i < COLUMNS / 2 ? quantized(y[i]) : of_differences(y[i]);
  pack_octet(words, codes);
  pack_octet(words + OCTET_WORDS, codes + 8);
  return scale;
}
#endif
