// What the quantizers to eight bits share: the scale of a token, its codes and their packing.
//
//   scale = max(absmax / 127, 2^-100) of the whole transformed row, float32; NaN if any of the row is
//   code  = rint(t / scale), int8 in two's complement, -127 .. 127: no clamp, as |t| is at most 127 scales
//
// Where a CTA has only a block of its rows, there are two kernels: one that measures (APEX4_PASS MEASURE), and one that makes codes
// with the scale of the whole row (CODES).
//
// Macros: those of quantize.cuh, with APEX4_FORMAT 8.
#pragma once

#include "quantize/quantize.cuh"

static_assert(APEX4_FORMAT == 8, "the other formats have groups");

#define APEX4_MEASURE 1
#define APEX4_CODES 2

constexpr float CODE_MAX = 127.0f;
// Adding 1.5 * 2^23 rounds a small number to an integer, ties to even, and leaves it in the low bits, in two's complement.
constexpr float ROUND = 12582912.0f;

// The quotient is correctly rounded: of a float32 absmax that is exact, the scale is the reference's bit for bit.
__device__ __forceinline__ float token_scale_of(float absmax) {
  constexpr float RECIPROCAL = 1.0f / CODE_MAX;
  const float near = absmax * RECIPROCAL;
  const float quotient = fmaf(fmaf(-near, CODE_MAX, absmax), RECIPROCAL, near);
  return max_nan(absmax < __uint_as_float(0x7f800000u) ? quotient : near, SCALE_FLOOR);
}

// Codes come as the bits of float(code) + ROUND. Two ways to them, as in the other formats:
//
// Untransformed values: codes are those of a correctly rounded quotient (`ExactQuotient` in quantize.cuh has the reason;
// tests/kernels/quantize/test_quantize_kernels.py goes through the ties of these codes, too).
struct ExactCode {
  float scale, reciprocal;
  __device__ __forceinline__ explicit ExactCode(float scale) : scale(scale), reciprocal(reciprocal_of(scale)) {}
  __device__ __forceinline__ unsigned operator()(float t) const {
    const float q0 = t * reciprocal;
    return __float_as_uint(fmaf(fmaf(-q0, scale, t), reciprocal, q0) + ROUND);
  }
};

// Transformed values y, still without the transform's constant factor: one fused multiply-add.
struct ProductCode {
  float reciprocal;
  __device__ __forceinline__ ProductCode(float scale, float factor) : reciprocal(factor * reciprocal_of(scale)) {}
  __device__ __forceinline__ unsigned operator()(float y) const { return __float_as_uint(fmaf(y, reciprocal, ROUND)); }
};

// Four codes of consecutive k, as their bits above.
__device__ __forceinline__ unsigned pack_codes(unsigned a, unsigned b, unsigned c, unsigned d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The byte of the slab of a block at which chunk `chunk`, sixteen columns, of a row stands.
__device__ __forceinline__ constexpr int chunk_byte(int row, int chunk) { return sm90_activation_byte(row, chunk); }
