// The few tokens of a decoding step, quantized by every thread block of the GEMM for itself, into its shared memory: codes and
// scales are those that quantize_rows.cu makes (group size 128), bit for bit.
//
// Eight lanes hold a slice as there. A thread block needs the blocks of inputs that it multiplies: of every `step` blocks, PARTS
// from `first` on, and its `own` count runs through them.
//   codes    sm90_token_byte(m, token, 8 own + chunk)   (index.cuh)
//   scales   float32 [own][TILE_M], of which m are written
// RMSNorm needs the squares of whole rows, whatever part of them is multiplied here: rows of at most SLICES blocks.
//
// Macros: those of quantize_slice.cuh, with APEX4_FORMAT 90. The includer has defined TILE_M and PARTS.
#pragma once

#include "ptx.cuh"
#include "quantize_slice.cuh"

constexpr int QUANTIZING_THREADS = 128 * PARTS, SLICES = QUANTIZING_THREADS / LANES;
constexpr int MOST_TOKENS = 3;
constexpr int CHUNKS = BLOCK / 16;
static_assert(32 / LANES == PARTS, "all slices of a warp have work or none: there are shuffles in it, and rows are whole PARTS");

struct TokenQuantizer {
  Input from;
  int m, k_blocks, first, step;
  float one_over_k, eps, clip_over_7;
  uint8* codes;
  float* scales;

  // Blocks there is room for: whole stages.
  __device__ __forceinline__ int owned() const { return (k_blocks - first + step - 1) / step * PARTS; }

  // The gain is no output of the kernel before, and comes from memory: asked for before that one has ended.
  __device__ __forceinline__ void prefetch_gain(int thread) const {
#if APEX4_INPUT == APEX4_RMS_NORM
    const int column = COLUMNS * thread;
    if (column < from.k) prefetch(from.second + column);
#endif
  }

  // By QUANTIZING_THREADS threads, which meet at the named barrier `barrier`; then wgmma may read. `squares`: RMS_NORM only.
  __device__ __forceinline__ void run(int thread, int barrier, float (*squares)[SLICES]) const {
    const int lane = thread & 31, slice = thread / LANES, in_slice = lane & (LANES - 1);
#if APEX4_INPUT == APEX4_RMS_NORM
    const int in_row = (k_blocks + PARTS - 1) / PARTS * PARTS;
#pragma unroll 1
    for (int i = slice; i < m * in_row; i += SLICES) {
      const int token = i / in_row, block = i - token * in_row;
      Lane values;
      values.load(from, token, BLOCK * block + rows_column(lane), block < k_blocks);
      const float of_slice = sum_of_slice(sum_of_squares(values.pairs));
      if (in_slice == 0) squares[token][block] = of_slice;
    }
    ptx::named_barrier(barrier, QUANTIZING_THREADS);
#endif
    const int of_token = owned();
#pragma unroll 1
    for (int i = slice; i < m * of_token; i += SLICES) {
      const int token = i / of_token, own = i - token * of_token;
      const int block = first + own / PARTS * step + own % PARTS;
      Lane values;
      values.load(from, token, BLOCK * block + rows_column(lane), block < k_blocks);
      values.load_second(from, token, BLOCK * block + rows_column(lane), block < k_blocks);
      float inverse_rms = 1.0f;
#if APEX4_INPUT == APEX4_RMS_NORM
      float of_row = 0.0f;
      for (int b = in_slice; b < k_blocks; b += LANES) of_row += squares[token][b];
      inverse_rms = inverse_rms_of(sum_of_slice(of_row), one_over_k, eps);
#endif
      values.finish(from, inverse_rms);
      float y[COLUMNS];
      transform(y, values.pairs, lane);
      unsigned words[2 * OCTET_WORDS];
      const float scale = codes_of(words, y, absmax_of_block(y), clip_over_7, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = octet_column(lane, half);
        uint8* const where = codes + sm90_token_byte(m, token, CHUNKS * own + (column >> 4)) + (column & 15);
        *reinterpret_cast<uint2*>(where) = make_uint2(words[OCTET_WORDS * half], words[OCTET_WORDS * half + 1]);
      }
      if (in_slice == 0) scales[TILE_M * own + token] = scale;
    }
    ptx::fence_proxy_async();
    ptx::named_barrier(barrier, QUANTIZING_THREADS);
  }
};
