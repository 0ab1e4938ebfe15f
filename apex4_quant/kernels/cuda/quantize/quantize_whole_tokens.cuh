// The few tokens of a decoding step, quantized to eight bits by every thread block of the GEMM for itself, into its shared memory.
// A token has one scale, so that every thread block transforms all of every token, and keeps it in registers until the absmax is
// known; it makes codes of the blocks of inputs that it multiplies: of every `step` blocks, PARTS from `first` on, and its `own`
// count runs through them.
//
// Eight lanes hold a slice as in quantize_slice.cuh; a token's slices are whole warps', so that a warp has one absmax.
//   codes    uint8 [own][m][128], a block's in the order of exact_token_byte (index.cuh)
//   scales   float32 [m]
//   absmax   bits of float32 [m], zeros before
// With RMSNorm
//   squares  float32 [ROUNDS * warps], in shared memory: of the slices of a warp
//   and a barrier more, since a token's squares are those of its whole row. Of a sum, one thread block stores it (`stores`).
//
// Macros: those of quantize_slice.cuh, with APEX4_FORMAT 8; ROUNDS: passes of all threads, at most. The includer has defined PARTS.
#pragma once

#include "common/ptx.cuh"
#include "quantize/quantize_s8.cuh"
#include "quantize/quantize_slice.cuh"

constexpr int QUANTIZING_THREADS = 128 * PARTS, SLICES = QUANTIZING_THREADS / LANES;
constexpr int SLICES_OF_WARP = 32 / LANES;

struct WholeTokens {
  Input from;
  int m, k_blocks, first, step;
  uint8* codes;
  float* scales;
  uint32* absmax;
#if APEX4_NORMALISES
  float eps, one_over_k;
  float* squares;
#endif
  bool stores = false;

  // By QUANTIZING_THREADS threads, which meet at the named barrier `barrier`.
  __device__ __forceinline__ void run(int thread, int barrier) const {
    const int lane = thread & 31, slice = thread / LANES;
    const int of_token = (k_blocks + SLICES_OF_WARP - 1) / SLICES_OF_WARP * SLICES_OF_WARP;  // slices; some without a block
    int token[ROUNDS], block[ROUNDS];
    Lane values[ROUNDS];
#if APEX4_NORMALISES
    // The gain is no output of the kernel before.
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const int i = slice + round * SLICES, column = BLOCK * (i - i / of_token * of_token) + rows_column(lane);
      values[round].load_second(from, 0, column, i / of_token < m && column < BLOCK * k_blocks);
    }
#endif
    ptx::wait_for_predecessor();
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {  // all loads first
      const int i = slice + round * SLICES;
      token[round] = i / of_token, block[round] = i - token[round] * of_token;
      const bool active = token[round] < m && block[round] < k_blocks;
      const int row = min(token[round], m - 1);
      values[round].load(from, row, BLOCK * block[round] + rows_column(lane), active, stores);
#if !APEX4_NORMALISES
      values[round].load_second(from, row, BLOCK * block[round] + rows_column(lane), active);
#endif
    }
    float inverse_rms[ROUNDS] = {};
#if APEX4_NORMALISES
    // A warp's slices, of all threads' first pass, then of the second, are one token's; a token's warps follow each other.
    constexpr int WARPS = QUANTIZING_THREADS / 32;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      const float sum = sum_of_warp(sum_of_squares(values[round].pairs));
      if (lane == 0) squares[round * WARPS + thread / 32] = sum;
    }
    ptx::named_barrier(barrier, QUANTIZING_THREADS);
    const int warps_of_token = of_token / SLICES_OF_WARP;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      if (token[round] >= m) break;
      static_assert(ROUNDS * WARPS <= 32, "a lane reads what a warp of the token has");
      const float of_warp = lane < warps_of_token ? squares[token[round] * warps_of_token + lane] : 0.0f;
      inverse_rms[round] = inverse_rms_of(sum_of_warp(of_warp), one_over_k, eps);
    }
#endif
    float y[ROUNDS][COLUMNS];
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      if (token[round] >= m) break;  // the same for a warp
      values[round].finish(from, inverse_rms[round]);
      transform(y[round], values[round].pairs, lane);
      float largest = fabsf(y[round][0]);
#pragma unroll
      for (int i = 1; i < COLUMNS; ++i) largest = max_nan(largest, fabsf(y[round][i]));
      // Of numbers that are not negative the bits are in their order, and NaN is above all.
      const uint32 of_warp = __reduce_max_sync(FULL_WARP, __float_as_uint(largest) & 0x7fffffffu);
      if (lane == 0) atomicMax(&absmax[token[round]], of_warp);
    }
    ptx::named_barrier(barrier, QUANTIZING_THREADS);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      if (token[round] >= m) break;
#if APEX4_HADAMARD
      const float scale = token_scale_of(__uint_as_float(absmax[token[round]]) * TRANSFORM_FACTOR);
      // Signs as in codes_of (quantize_slice.cuh).
      ProductCode quantized(scale, TRANSFORM_FACTOR);
      if (lane & 2) quantized.reciprocal *= sign_of(lane, 1);
      if (lane & 4) quantized.reciprocal *= sign_of(lane, 2);
      ProductCode of_differences = quantized;
      of_differences.reciprocal *= sign_of(lane, 4);
#else
      const float scale = token_scale_of(__uint_as_float(absmax[token[round]]));
      const ExactCode quantized(scale), of_differences = quantized;
#endif
      if (block[round] == 0 && (lane & (LANES - 1)) == 0) scales[token[round]] = scale;
      const int behind = block[round] - first, stage = behind / step, in_stage = behind - stage * step;
      if (behind < 0 || in_stage >= PARTS || block[round] >= k_blocks) continue;  // another thread block's, or nobody's
      uint8* const to = codes + BLOCK * ((stage * PARTS + in_stage) * m + token[round]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32 of_octet[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) of_octet[i] = half ? of_differences(y[round][8 + i]) : quantized(y[round][i]);
        const int column = octet_column(lane, half);
#pragma unroll
        for (int quad = 0; quad < 8; quad += 4) {
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {  // codes k and k + 2 are neighbours
            const uint32 pair = __byte_perm(of_octet[quad + odd], of_octet[quad + odd + 2], 0x0040);
            *reinterpret_cast<unsigned short*>(to + exact_token_byte(column + quad + odd)) = static_cast<unsigned short>(pair);
          }
        }
      }
    }
    ptx::named_barrier(barrier, QUANTIZING_THREADS);
  }
};
