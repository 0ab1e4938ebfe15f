// Rounding with error feedback, of rows of a block that were multiplied by its matrix and lie in accumulators (docs/format.md, 2).
//
// The block's columns are rounded in eight steps, step 7 first: step j has tiles 2 j and 2 j + 1, four consecutive columns of each
// lane. In units of the scale, v are the values and q the codes of a step; its errors q - v, rounded to T, times G's rows of the step
// are added to the values of all steps that are left. The errors of a step, as accumulators hold them, are an A fragment of
// mma.m16n8k16 as they lie: rows r and r + 8 of tile 2 j are its first two registers, of tile 2 j + 1 the others.
//
// G lies behind the matrix in fragment order (index.cuh, feedback_fragment_byte): 28 chunks of 512 bytes.
//
// Macro APEX4_FEEDBACK: 1: codes are -7 ... 7; 2: -8 ... 7, scales have a sign, and behind G stands the block's clip ratio, a T.
#pragma once

#include "quantize/quantize_dense.cuh"

constexpr int FEEDBACK_STEPS = TILES / 2;
constexpr int FEEDBACK_CHUNKS = FEEDBACK_STEPS * (FEEDBACK_STEPS - 1) / 2 * 32;  // 16 bytes each
constexpr float LOWEST_CODE = APEX4_FEEDBACK == 2 ? -8.0f : -7.0f;

#if APEX4_FEEDBACK == 2
// What the largest magnitude is multiplied by; `chunk`: behind G.
__device__ __forceinline__ float block_clip_over_8(const uint4* chunk) {
  return 0.125f * low_of(*reinterpret_cast<const unsigned*>(chunk));
}

// Of magnitude factor * value, and of the other sign.
__device__ __forceinline__ float scale_of(Magnitude largest, float factor, float clip_over_8) {
  const float magnitude = scale_of(__uint_as_float(largest >> 1) * factor, clip_over_8);
  return __uint_as_float(__float_as_uint(magnitude) | ~largest << 31);
}
#else
__device__ __forceinline__ float scale_of(Magnitude largest, float factor, float clip_over_7) {
  return scale_of(largest * factor, clip_over_7);
}
#endif

// The errors of one step, of sixteen rows.
struct StepErrors {
  unsigned word[4];

  // d += errors * G, two tiles of columns that are left. `g`: b0, b1 of the first tile, b0, b1 of the second.
  __device__ __forceinline__ void correct(float (&first)[4], float (&second)[4], uint4 g) const {
    multiply_16x8x16(first, word[0], word[1], word[2], word[3], g.x, g.y);
    multiply_16x8x16(second, word[0], word[1], word[2], word[3], g.z, g.w);
  }
};

// Rounds two tiles in place: values in units of the scale become the bits of float(code) + ROUND_BIASED.
__device__ __forceinline__ StepErrors round_step(float (&low)[4], float (&high)[4]) {
  StepErrors errors;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    float(&v)[4] = tile ? high : low;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      float error[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = v[2 * half + e];
        const float code = fminf(fmaxf(value, LOWEST_CODE), 7.0f) + ROUND_BIASED;
        error[e] = (code - ROUND_BIASED) - value;
        value = code;
      }
      errors.word[2 * tile + half] = pair_of(error[0], error[1]);
    }
  }
  return errors;
}

// The codes of eight consecutive columns of a row, which four tiles hold after they were rounded.
__device__ __forceinline__ void pack_rounded(
    unsigned* words, const float (&a)[4], const float (&b)[4], const float (&c)[4], const float (&d)[4], int half) {
  unsigned octet[8];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    octet[e] = __float_as_uint(a[2 * half + e]), octet[2 + e] = __float_as_uint(b[2 * half + e]);
    octet[4 + e] = __float_as_uint(c[2 * half + e]), octet[6 + e] = __float_as_uint(d[2 * half + e]);
  }
  pack_octet(words, octet);
}
