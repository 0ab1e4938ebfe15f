// The activation quantizer with its gradient, as distillation/trained_linear.py has it: codes times scales, straight through.
//
// A warp has a group. s = max(absmax * exp(log_clip) / code_max, scale_min), r = y / s, q = round(r) within +-code_max.
// Going back: inside where |r| <= code_max + 1/2;  d/dy = gradient there, else 0;  the sum over the group of
// gradient * (inside ? q - r : q) goes to s, and from s to the first largest value of the group and to log_clip.
//
// Operands of the way there:   out, y Element [groups, length]; log_clip float32, one; groups, length, code_max, scale_min
// Operands of the way back:    by_y Element [groups, length], by_clip float32 [groups] (to be summed), both written;
//                              y, log_clip as above; gradient Element [groups, length]; rounded Element [groups, length], what
//                              round_feedback.cu made of y, whose codes are not round(r), or null; the numbers as above
// length is a multiple of 128; everything is aligned to four elements. Grid: (ceil(groups / WARPS)), 32 WARPS threads.
// Macro: APEX4_FLOAT32 (elements.cuh).
#include "training/elements.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    apex4_round_activation(Element* out, const Element* y, const float* log_clip, int64 groups, int length, float code_max,
                           float scale_min) {
  const int64 group = static_cast<int64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (group >= groups) return;  // a whole warp
  const int first = WIDTH * (threadIdx.x & 31);
  y += group * length, out += group * length;
  float x[WIDTH], absmax = 0.0f;
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) absmax = fmaxf(absmax, fabsf(x[i]));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) absmax = fmaxf(absmax, __shfl_xor_sync(ALL_LANES, absmax, mask));
  const float scale = fmaxf(absmax * (expf(*log_clip) / code_max), scale_min);
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] = code_of(__fdiv_rn(x[i], scale), code_max) * scale;
    store(out + at, x);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    apex4_round_activation_back(Element* by_y, float* by_clip, const Element* y, const float* log_clip,
                                const Element* gradient, const Element* rounded, int64 groups, int length, float code_max,
                                float scale_min) {
  const int64 group = static_cast<int64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);
  if (group >= groups) return;  // a whole warp
  const int lane = threadIdx.x & 31, first = WIDTH * lane;
  y += group * length, by_y += group * length, gradient += group * length;
  if (rounded != nullptr) rounded += group * length;
  float x[WIDTH], g[WIDTH], made[WIDTH], largest = 0.0f;  // with its sign
  int place = 0;
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (fabsf(x[i]) > fabsf(largest)) largest = x[i], place = at + i;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = __shfl_xor_sync(ALL_LANES, largest, mask);
    const int other_place = __shfl_xor_sync(ALL_LANES, place, mask);
    const bool ahead = fabsf(other) > fabsf(largest) || (fabsf(other) == fabsf(largest) && other_place < place);
    if (ahead) largest = other, place = other_place;
  }
  const float by_absmax = expf(*log_clip) / code_max, scale = fmaxf(fabsf(largest) * by_absmax, scale_min);
  float by_scale = 0.0f;
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
    load(g, gradient + at);
    if (rounded != nullptr) load(made, rounded + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float ratio = __fdiv_rn(x[i], scale);
      const float code = code_of(rounded != nullptr ? __fdiv_rn(made[i], scale) : ratio, code_max);
      by_scale = fmaf(g[i], fabsf(ratio) <= code_max + 0.5f ? code - ratio : code, by_scale);
    }
  }
  by_scale = sum_of_warp(by_scale);
  if (lane == 0) by_clip[group] = by_scale * scale;
  const float by_largest = by_scale * by_absmax * (largest > 0.0f ? 1.0f : largest < 0.0f ? -1.0f : 0.0f);
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
    load(g, gradient + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float passed = fabsf(__fdiv_rn(x[i], scale)) <= code_max + 0.5f ? g[i] : 0.0f;
      g[i] = at + i == place ? passed + by_largest : passed;
    }
    store(by_y + at, g);
  }
}
