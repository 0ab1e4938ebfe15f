// The activation quantizer with error feedback, as distillation/trained_linear.py has it: codes times scales of transformed rows.
// What quantize_dense.cu computes behind its product, in float32 (quantize_feedback.cuh); the way back is round_activation.cu's.
//
// A warp has a block of 16 rows. s = max(absmax * exp(log_clip) / code_max, 2^-100), and with sixteen levels it has the sign that
// makes the value of largest magnitude negative; the units y / s are rounded in steps.
//
// Operands:  out, y Element [rows, k_blocks, 128], aligned to four elements; feedback float16 [k_blocks][7168], G in fragment order
//            (quantize/configs.py, prepack_feedback), aligned to 16 bytes; log_clip float32, one, with sixteen levels [k_blocks]; rows,
//            k_blocks, code_max (what the largest magnitude stands for)
// Grid: (k_blocks, ceil(rows / (16 WARPS))), 32 WARPS threads.
// Macros: APEX4_FLOAT32 (elements.cuh); APEX4_FEEDBACK (quantize_feedback.cuh), 2 for sixteen levels;
// APEX4_BF16 0: errors and G are float16, whatever Element is.
#include "quantize/quantize_feedback.cuh"
#include "training/elements.cuh"

constexpr int WARPS = 4, TILE_ROWS = 16;

// Of a lane's four columns of a step, the first (index.cuh, dense_output).
__device__ __forceinline__ int first_column(int step, int lane) { return dense_output(2 * step, 2 * (lane & 3)); }

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    apex4_round_activation_feedback(Element* out, const Element* y, const uint4* feedback, const float* log_clip, int64 rows,
                                    int k_blocks, float code_max) {
  const int lane = threadIdx.x & 31, block = blockIdx.x;
  const int64 first = (static_cast<int64>(blockIdx.y) * WARPS + (threadIdx.x >> 5)) * TILE_ROWS;
  if (first >= rows) return;  // a whole warp
  feedback += static_cast<int64>(block) * FEEDBACK_CHUNKS;
  float v[TILES][4], scales[HALVES];
  const float clip_over_most = expf(log_clip[APEX4_FEEDBACK == 2 ? block : 0]) / code_max;
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int64 row = first + accumulator_row(lane, half);
    const Element* const from = y + (row * k_blocks + block) * BLOCK;
    Magnitude largest = 0;
#pragma unroll
    for (int step = 0; step < FEEDBACK_STEPS; ++step) {
      float x[WIDTH] = {};
      if (row < rows) load(x, from + first_column(step, lane));
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        v[2 * step + i / 2][2 * half + i % 2] = x[i];
        largest = larger(largest, magnitude_of(x[i]));
      }
    }
    scales[half] = scale_of(max_of_quad(largest), 1.0f, clip_over_most);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) v[tile][2 * half + e] = __fdiv_rn(v[tile][2 * half + e], scales[half]);
  }
#pragma unroll
  for (int step = FEEDBACK_STEPS - 1; step >= 0; --step) {
    const StepErrors errors = round_step(v[2 * step], v[2 * step + 1]);
#pragma unroll
    for (int pair = step - 1; pair >= 0; --pair)
      errors.correct(v[2 * pair], v[2 * pair + 1], feedback[feedback_fragment_byte(step, pair, lane) / 16]);
  }
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int64 row = first + accumulator_row(lane, half);
    if (row >= rows) continue;
    Element* const to = out + (row * k_blocks + block) * BLOCK;
#pragma unroll
    for (int step = 0; step < FEEDBACK_STEPS; ++step) {
      float x[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) x[i] = (v[2 * step + i / 2][2 * half + i % 2] - ROUND_BIASED) * scales[half];
      store(to + first_column(step, lane), x);
    }
  }
}
