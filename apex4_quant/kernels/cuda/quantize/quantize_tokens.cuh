// The few tokens of a decoding step, quantized by every thread block of the GEMM for itself, into its shared memory: codes and
// scales are those that quantize_rows.cu makes (group size 128), bit for bit.
//
// Eight lanes hold a slice as there. A thread block needs the blocks of inputs that it multiplies: of every `step` blocks, PARTS
// from `first` on, and its `own` count runs through them.
//   codes    sm90_token_byte(m, token, 8 own + chunk)   (index.cuh)
//   scales   float32 [own][TILE_M], of which m are written
// Not for RMSNorm, which needs the squares of whole rows first: there a kernel in front costs less (docs/kernels.md).
//
// Macros: those of quantize_slice.cuh, with APEX4_FORMAT 90. The includer has defined TILE_M and PARTS.
#pragma once

#include "common/ptx.cuh"
#include "quantize/quantize_slice.cuh"

constexpr int QUANTIZING_THREADS = 128 * PARTS, SLICES = QUANTIZING_THREADS / LANES;
constexpr int CHUNKS = BLOCK / 16;
static_assert(32 / LANES == PARTS, "all slices of a warp have work or none: there are shuffles in it");
static_assert(APEX4_INPUT != APEX4_RMS_NORM, "see above");

struct TokenQuantizer {
  Input from;
  int m, k_blocks, first, step;
  float clip_over_7;
  uint8* codes;
  float* scales;

  // Blocks there is room for: whole stages.
  __device__ __forceinline__ int owned() const { return (k_blocks - first + step - 1) / step * PARTS; }

  // By QUANTIZING_THREADS threads, which meet at the named barrier `barrier`; then wgmma may read.
  __device__ __forceinline__ void run(int thread, int barrier) const {
    const int lane = thread & 31, slice = thread / LANES, in_slice = lane & (LANES - 1);
    const int of_token = owned();
#pragma unroll 1
    for (int i = slice; i < m * of_token; i += SLICES) {
      const int token = i / of_token, own = i - token * of_token;
      const int block = first + own / PARTS * step + own % PARTS;
      Lane values;
      values.load(from, token, BLOCK * block + rows_column(lane), block < k_blocks);
      values.load_second(from, token, BLOCK * block + rows_column(lane), block < k_blocks);
      values.finish(from, 1.0f);
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
