// The activation quantizer with its gradient, as distillation/trained_linear.py has it: codes times scales, straight through.
//
// A warp has a group. s = max(absmax * exp(log_clip) / code_max, scale_min), r = y / s, q = round(r) within +-code_max.
// Going back: inside where |r| <= code_max + 1/2;  d/dy = gradient there, else 0;  the sum over the group of
// gradient * (inside ? q - r : q) goes to s, and from s to the first largest value of the group and to log_clip.
// With sixteen levels, of groups that are blocks with a log_clip each: s = exp(log_clip) / 8 of the value of largest magnitude, with
// the other sign, q is at least -8, and inside is r >= -8.5.
//
// Operands of the way there:   out, y Element [groups, length]; log_clip float32, one; groups, length, code_max, scale_min
// Operands of the way back:    by_y Element [groups, length], by_clip float32 [groups] (to be summed), both written;
//                              y, log_clip as above; gradient Element [groups, length]; rounded Element [groups, length], what
//                              round_feedback.cu made of y, whose codes are not round(r), or null; the numbers as above; blocks,
//                              of a row, with sixteen levels, or 0
// length is a multiple of 128; everything is aligned to four elements. Grid: (ceil(groups / WARPS)), 32 WARPS threads.
// Macro: APEX4_FLOAT32 (elements.cuh).
#include "training/elements.cuh"

constexpr int WARPS = 8;
constexpr float SIXTEEN_LEVELS_MOST = 8.0f;  // magnitude of a code

// Whether a quotient's gradient passes: clamping does not change it by more than rounding may.
__device__ __forceinline__ bool is_inside(float ratio, float lowest, float highest) {
  return ratio >= lowest - 0.5f && ratio <= highest + 0.5f;
}

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

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)  // or registers of float32 are spilled on sm_80
    apex4_round_activation_back(Element* by_y, float* by_clip, const Element* y, const float* log_clip,
                                const Element* gradient, const Element* rounded, int64 groups, int length, float code_max,
                                float scale_min, int blocks) {
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
      if (fabsf(x[i]) > fabsf(largest) || (blocks && x[i] == -fabsf(largest) && largest > 0.0f))
        largest = x[i], place = at + i;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = __shfl_xor_sync(ALL_LANES, largest, mask);
    const int other_place = __shfl_xor_sync(ALL_LANES, place, mask);
    const bool equal = fabsf(other) == fabsf(largest), first_of_equal = other_place < place;
    const bool ahead = fabsf(other) > fabsf(largest) ||
                       (equal && (blocks && other != largest ? other < largest : first_of_equal));
    if (ahead) largest = other, place = other_place;
  }
  // In 32 bits, which it fits: 64 are divided by a call, which wants a stack.
  const unsigned clip = blocks ? static_cast<unsigned>(group) % blocks : 0;
  const float by_absmax = expf(log_clip[clip]) / (blocks ? SIXTEEN_LEVELS_MOST : code_max);
  const float magnitude = fmaxf(fabsf(largest) * by_absmax, scale_min);
  const float scale = blocks ? copysignf(magnitude, -largest) : magnitude;
  const float lowest = blocks ? -SIXTEEN_LEVELS_MOST : -code_max;
  float by_scale = 0.0f;
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
    load(g, gradient + at);
    if (rounded != nullptr) load(made, rounded + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float ratio = __fdiv_rn(x[i], scale);
      const float code = code_of(rounded != nullptr ? __fdiv_rn(made[i], scale) : ratio, lowest, code_max);
      by_scale = fmaf(g[i], is_inside(ratio, lowest, code_max) ? code - ratio : code, by_scale);
    }
  }
  by_scale = sum_of_warp(by_scale);
  if (lane == 0) by_clip[group] = by_scale * scale;
  const float sign = blocks ? -1.0f : largest > 0.0f ? 1.0f : largest < 0.0f ? -1.0f : 0.0f;  // of ds / d largest
  const float by_largest = by_scale * by_absmax * sign;
  for (int at = first; at < length; at += SPAN) {
    load(x, y + at);
    load(g, gradient + at);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const float passed = is_inside(__fdiv_rn(x[i], scale), lowest, code_max) ? g[i] : 0.0f;
      g[i] = at + i == place ? passed + by_largest : passed;
    }
    store(by_y + at, g);
  }
}
