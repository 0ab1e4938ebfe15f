// What the training kernels share: WIDTH elements of a tensor as floats, and reductions over a warp.
//
// Macro: APEX4_FLOAT32, 1 where the model's tensors (Element) are float32, 0 where they are bfloat16.
#pragma once

#include "common/ptx.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WIDTH = 4;             // elements of a lane at once
constexpr int SPAN = 32 * WIDTH;     // of a warp: groups are multiples of it
typedef long long int64;

#if APEX4_FLOAT32
typedef float Element;
__device__ __forceinline__ float as_float(Element x) { return x; }
__device__ __forceinline__ Element as_element(float x) { return x; }
#else
typedef __nv_bfloat16 Element;
__device__ __forceinline__ float as_float(Element x) { return __bfloat162float(x); }
__device__ __forceinline__ Element as_element(float x) { return __float2bfloat16_rn(x); }
#endif

template <typename T>
struct alignas(WIDTH * sizeof(T)) Vector {
  T of[WIDTH];
};

// `at` is aligned to WIDTH elements.
__device__ __forceinline__ void load(float (&x)[WIDTH], const float* at) {
  const Vector<float> v = *reinterpret_cast<const Vector<float>*>(at);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = v.of[i];
}
__device__ __forceinline__ void store(float* at, const float (&x)[WIDTH]) {
  Vector<float> v;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) v.of[i] = x[i];
  *reinterpret_cast<Vector<float>*>(at) = v;
}
#if !APEX4_FLOAT32
__device__ __forceinline__ void load(float (&x)[WIDTH], const Element* at) {
  const Vector<Element> v = *reinterpret_cast<const Vector<Element>*>(at);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = as_float(v.of[i]);
}
__device__ __forceinline__ void store(Element* at, const float (&x)[WIDTH]) {
  Vector<Element> v;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) v.of[i] = as_element(x[i]);
  *reinterpret_cast<Vector<Element>*>(at) = v;
}
#endif

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(ALL_LANES, x, mask);
  return x;
}

// Half to even, and from `lowest` to `highest`.
__device__ __forceinline__ float code_of(float ratio, float lowest, float highest) {
  return fminf(fmaxf(rintf(ratio), lowest), highest);
}
__device__ __forceinline__ float code_of(float ratio, float code_max) { return code_of(ratio, -code_max, code_max); }
