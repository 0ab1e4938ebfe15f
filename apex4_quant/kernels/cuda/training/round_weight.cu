// Weights out of what is learned of them, and the way back, as distillation/trained_linear.py has it.
//
// A warp has a group of a row: s = exp(log_scale), q = round(v) within +-7, the weight is q s. Or, with 8-bit activations, the
// folded weight times its unit (kernels/folding.py): sign(q) floor((|q| ratio + 128) / 256) unit. Going back both are q s,
// straight through: d/dv = gradient s, d/dlog_scale = the sum over the group of gradient q s.
//
// Operands of the way there:  weight Element [rows, groups_a_row, length], written; v float32 of that shape, log_scale float32
//                             [rows, groups_a_row]; ratio float32 of that shape, unit float32 [rows], or both null;
//                             groups (rows * groups_a_row), groups_a_row, length, code_max
// Operands of the way back:   by_v float32 [rows, groups_a_row, length], by_scale float32 [rows, groups_a_row], written;
//                             v, log_scale as above; gradient Element [rows, groups_a_row, length]; groups, length, code_max
// length is a multiple of 128; everything is aligned to four elements. Grid: (ceil(groups / WARPS)), 32 WARPS threads.
// Macro: APEX4_FLOAT32 (elements.cuh).
#include "training/elements.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    apex4_round_weight(Element* weight, const float* v, const float* log_scale, const float* ratio, const float* unit,
                       int64 groups, int groups_a_row, int length, float code_max) {
  const int64 group = static_cast<int64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (group >= groups) return;  // a whole warp
  const float scale = ratio == nullptr ? expf(log_scale[group]) : unit[group / groups_a_row];
  const float folding = ratio == nullptr ? 0.0f : ratio[group];
  float x[WIDTH];
  for (int at = WIDTH * (threadIdx.x & 31); at < length; at += SPAN) {
    load(x, v + group * length + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float code = code_of(x[i], code_max);
      // Integers below 2^24, and a division by a power of two.
      if (ratio != nullptr) code = copysignf(floorf(fmaf(fabsf(code), folding, 128.0f) / 256.0f), code);
      x[i] = code * scale;
    }
    store(weight + group * length + at, x);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    apex4_round_weight_back(float* by_v, float* by_scale, const float* v, const float* log_scale, const Element* gradient,
                            int64 groups, int length, float code_max) {
  const int64 group = static_cast<int64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (group >= groups) return;  // a whole warp
  const int lane = threadIdx.x & 31;
  const float scale = expf(log_scale[group]);
  float x[WIDTH], g[WIDTH], sum = 0.0f;
  for (int at = WIDTH * lane; at < length; at += SPAN) {
    load(x, v + group * length + at);
    load(g, gradient + group * length + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      g[i] *= scale;
      sum = fmaf(g[i], code_of(x[i], code_max), sum);
    }
    store(by_v + group * length + at, g);
  }
  sum = sum_of_warp(sum);
  if (lane == 0) by_scale[group] = sum;
}
