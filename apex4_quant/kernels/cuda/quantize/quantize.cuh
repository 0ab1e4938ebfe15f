// What the activation quantizers share: loads, the input stages, the scale, codes and their packing.
//
// Macros: APEX4_BF16 (1: bfloat16, 0: float16), APEX4_INPUT (PLAIN, RMS_NORM, SILU_MUL, ADD_RMS_NORM below), APEX4_FORMAT
// (80, 90, or 8 for s8: the activation format, see index.cuh; of s8 the scale, codes and packing are in quantize_s8.cuh).
#pragma once

#include "common/index.cuh"
#include "quantize/quantize_ptx.cuh"

#define APEX4_PLAIN 0
#define APEX4_RMS_NORM 1
#define APEX4_SILU_MUL 2
#define APEX4_ADD_RMS_NORM 3
#define APEX4_NORMALISES (APEX4_INPUT == APEX4_RMS_NORM || APEX4_INPUT == APEX4_ADD_RMS_NORM)

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float SCALE_FLOOR = 0x1p-100f;
// Adding 1.5 * 2^23 rounds a small number to an integer, ties to even, and leaves it in the low mantissa bits. The 8 on
// top makes codes -7..7 the nibbles 1..15, which add up to words without borrowing from each other.
constexpr float ROUND_BIASED = 12582912.0f + 8.0f;

// ---- loads ------------------------------------------------------------------------------------------------------------
// Eight consecutive elements of a row from `column` on as four pairs; zeros from column k on and where not `active`.
// `aligned` says that the row starts on 16 bytes and that k is a multiple of 8. Not __ldg: under programmatic dependent
// launch the kernel before this one may still be writing x when this one starts.
__device__ __forceinline__ void load_octet(
    unsigned* pairs, const unsigned short* row, int column, int k, bool active, bool aligned) {
  if (aligned) {
    uint4 loaded = make_uint4(0, 0, 0, 0);
    if (active && column < k) loaded = *reinterpret_cast<const uint4*>(row + column);
    pairs[0] = loaded.x, pairs[1] = loaded.y, pairs[2] = loaded.z, pairs[3] = loaded.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int even = column + 2 * i;
    const unsigned low = active && even < k ? row[even] : 0;
    const unsigned high = active && even + 1 < k ? row[even + 1] : 0;
    pairs[i] = high << 16 | low;
  }
}

// The same octet to a row of k columns.
__device__ __forceinline__ void store_octet(
    unsigned short* row, const unsigned* pairs, int column, int k, bool active, bool aligned) {
  if (aligned) {
    if (active && column < k) *reinterpret_cast<uint4*>(row + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (active && column + i < k) row[column + i] = static_cast<unsigned short>(pairs[i / 2] >> 16 * (i % 2));
}

// Of two octets the sums, rounded to T as torch's addition does, to the first.
__device__ __forceinline__ void add_octet(unsigned* pairs, const unsigned* others) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = pair_of(low_of(pairs[i]) + low_of(others[i]), high_of(pairs[i]) + high_of(others[i]));
}

__device__ __forceinline__ void unpack(unsigned* pairs, uint4 octet) {
  pairs[0] = octet.x, pairs[1] = octet.y, pairs[2] = octet.z, pairs[3] = octet.w;
}

// Of a row of k columns that `THREADS` threads read: the sum of a warp's, in all its lanes. `UNROLL` loads are on their way.
// `load(pairs, column)`: eight elements, as load_octet.
template <int THREADS, int UNROLL, class Load>
__device__ __forceinline__ float squares_of_warp(int k, Load load) {
  float sum = 0.0f;
#pragma unroll UNROLL
  for (int column = 8 * threadIdx.x; column < k; column += 8 * THREADS) {
    unsigned pairs[4];
    load(pairs, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(low_of(pairs[i]), low_of(pairs[i]), sum);
      sum = fmaf(high_of(pairs[i]), high_of(pairs[i]), sum);
    }
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
  return sum;
}

template <int THREADS, int UNROLL>
__device__ __forceinline__ float squares_of_warp(const unsigned short* row, int k, bool aligned) {
  return squares_of_warp<THREADS, UNROLL>(
      k, [=](unsigned* pairs, int column) { load_octet(pairs, row, column, k, true, aligned); });
}

// Of a row whose squares have this sum; one_over_k: of its columns.
__device__ __forceinline__ float inverse_rms_of(float squares, float one_over_k, float eps) {
  return rsqrtf(fmaf(squares, one_over_k, eps));
}

// ---- input stages, rounded as the unfused PyTorch modules round --------------------------------------------------------
// LlamaRMSNorm: x * inverse_rms is rounded, then the product with the gain is. With gain_offset (GemmaRMSNorm):
// x * inverse_rms * (1 + gain) in float32, rounded once.
__device__ __forceinline__ unsigned normalised(unsigned x, unsigned gain, float inverse_rms, bool gain_offset) {
  const float low = low_of(x) * inverse_rms, high = high_of(x) * inverse_rms;
  if (gain_offset) return pair_of(low * (1.0f + low_of(gain)), high * (1.0f + high_of(gain)));
  return pair_product(pair_of(low, high), gain);
}

// x / (1 + e^-x) to about two units of float32's last place; -0 where e^-x overflows, NaN at minus infinity.
__device__ __forceinline__ float silu(float x) {
  return x * approximate_reciprocal(1.0f + expf(-x));
}

__device__ __forceinline__ unsigned gated(unsigned gate, unsigned up) {
  return pair_product(pair_of(silu(low_of(gate)), silu(high_of(gate))), up);
}

// Correctly rounded, as __frcp_rn is and in the same way; without its slow path for numbers that no scale is.
__device__ __forceinline__ float reciprocal_of(float scale) {
  const float near = approximate_reciprocal(scale);
  return fmaf(fmaf(-near, scale, 1.0f), near, near);
}

#if APEX4_FORMAT != 8
// ---- scale and codes --------------------------------------------------------------------------------------------------
// NaN if absmax is: damage upstream must show.
__device__ __forceinline__ float scale_of(float absmax, float clip_over_7) {
  return max_nan(clip_over_7 * absmax, SCALE_FLOOR);
}

// Codes come as the bits of float(code) + ROUND_BIASED. Two ways to them:
//
// Untransformed values: the quotient t / s is correctly rounded, so that codes equal torch_backend's bit for bit, ties
// included. q0 = t * (1 / s) is off by at most 1.5 units in the last place; one step of q1 = q0 + (t - q0 s) / s repairs
// that: rint(q1) = rint(t / s) for every mantissa of s and every t within three units of a tie, without an exception
// (tests/test_quantize_kernels.py, quotient_codes_differ, which takes a minute for all of them).
struct ExactQuotient {
  float scale, reciprocal;
  __device__ __forceinline__ explicit ExactQuotient(float scale) : scale(scale), reciprocal(reciprocal_of(scale)) {}
  __device__ __forceinline__ unsigned operator()(float t) const {
    const float q0 = t * reciprocal;
    const float q1 = fmaf(fmaf(-q0, scale, t), reciprocal, q0);
    return __float_as_uint(fminf(fmaxf(q1, -7.0f), 7.0f) + ROUND_BIASED);
  }
};

// Transformed values y, still without the transform's constant factor, t = y * factor: their own rounding is larger than
// that of a reciprocal. Shifted to [0, 1], the clamp to +-7 is the saturation of a fused multiply-add and costs nothing.
struct ShiftedProduct {
  float reciprocal;
  __device__ __forceinline__ ShiftedProduct(float scale, float factor) : reciprocal(factor / 14.0f * reciprocal_of(scale)) {}
  __device__ __forceinline__ unsigned operator()(float y) const {
    const float shifted = __saturatef(fmaf(y, reciprocal, 0.5f));  // (t / s + 7) / 14
    return __float_as_uint(fmaf(shifted, 14.0f, ROUND_BIASED - 7.0f));
  }
};

// ---- packing ----------------------------------------------------------------------------------------------------------
// Eight codes, as their bits above, of consecutive k -> one word (sm80) or two (sm90) in the activation format.
#if APEX4_FORMAT == 80
constexpr int OCTET_WORDS = 1;
#else
constexpr int OCTET_WORDS = 2;
#endif

__device__ __forceinline__ constexpr int octet_nibble(int element) {
#if APEX4_FORMAT == 80
  return sm80_octet_nibble(element);
#else
  return sm90_octet_nibble(element);
#endif
}

__device__ __forceinline__ void pack_octet(unsigned* words, const unsigned* codes) {
  // What the exponents of the eight floats add up to; only bits from 22 on.
  constexpr unsigned EXPONENTS = 0x4b400000u * 0x11111111u;
  unsigned nibbles = 0u - EXPONENTS;
#pragma unroll
  for (int i = 0; i < 8; ++i) nibbles += codes[i] << 4 * octet_nibble(i);
#if APEX4_FORMAT == 80
  words[0] = nibbles ^ 0x88888888u;  // from code + 8 to two's complement
#else
  // From code + 8 to sign and magnitude: the low three bits of a negative code are inverted and one is added, which may make 8.
  const unsigned negative = ~nibbles & 0x88888888u, one = negative >> 3;
  const unsigned magnitude = ((nibbles ^ one * 7u) & 0x77777777u) + one;
  words[0] = (magnitude & 0x0f0f0f0fu) | (negative << 4 & 0x80808080u);
  words[1] = (magnitude >> 4 & 0x0f0f0f0fu) | (negative & 0x80808080u);
#endif
}

#endif

// The byte of the slab of a block at which the octet of row `row` and columns k .. k + 7 stands.
__device__ __forceinline__ constexpr int octet_byte(int row, int k) {
#if APEX4_FORMAT == 80
  return sm80_octet_byte(row, k);
#else
  return sm90_octet_byte(row, k);
#endif
}

constexpr int ROW_BYTES = APEX4_FORMAT == 80 ? 64 : 128;
