// KL(theirs || ours) of every token's predictions, and its gradient by our logits, without the vocabulary in float32 in memory.
//
// A thread block has a token. With p and q the softmax of theirs and ours, and L their logarithmic normalizers:
//   KL = sum p (theirs - ours) - (L_theirs - L_ours)        gradient = weight (q - p)
//
// Operands: losses float32 [tokens], written; gradient Element [tokens, vocabulary], written, or null; ours, theirs Element
//           [tokens, vocabulary]; vocabulary, weight
// Grid: (tokens), THREADS threads. Macros: APEX4_FLOAT32 (elements.cuh); APEX4_WHOLE, 1 where the vocabulary is a multiple of 4
// and the operands are aligned to four elements.
#include "training/elements.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;

#if APEX4_WHOLE
constexpr int AT_ONCE = WIDTH;
__device__ __forceinline__ void load_some(float (&x)[AT_ONCE], const Element* at) { load(x, at); }
__device__ __forceinline__ void store_some(Element* at, const float (&x)[AT_ONCE]) { store(at, x); }
#else
constexpr int AT_ONCE = 1;
__device__ __forceinline__ void load_some(float (&x)[AT_ONCE], const Element* at) { x[0] = as_float(*at); }
__device__ __forceinline__ void store_some(Element* at, const float (&x)[AT_ONCE]) { *at = as_element(x[0]); }
#endif

// Sums relative to the largest logit so far, of which there may be none yet: then largest is -inf and the sums are 0.
struct Sums {
  float largest, exponentials, differences;  // the last: of exponentials times (theirs - ours)

  __device__ __forceinline__ void add(float logit, float difference) {
    if (logit > largest) {
      const float shrink = expf(largest - logit);
      exponentials *= shrink, differences *= shrink, largest = logit;
    }
    const float exponential = expf(logit - largest);
    exponentials += exponential;
    differences = fmaf(exponential, difference, differences);
  }

  __device__ __forceinline__ void join(const Sums& other) {
    if (other.exponentials == 0.0f) return;
    const float top = fmaxf(largest, other.largest), mine = expf(largest - top), its = expf(other.largest - top);
    exponentials = exponentials * mine + other.exponentials * its;
    differences = differences * mine + other.differences * its;
    largest = top;
  }

  __device__ __forceinline__ void join_warp() {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
      join({__shfl_xor_sync(ALL_LANES, largest, mask), __shfl_xor_sync(ALL_LANES, exponentials, mask),
            __shfl_xor_sync(ALL_LANES, differences, mask)});
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    apex4_divergence(float* losses, Element* gradient, const Element* ours, const Element* theirs, int vocabulary,
                     float weight) {
  __shared__ Sums of_ours[WARPS], of_theirs[WARPS];
  const int64 token = blockIdx.x;
  ours += token * vocabulary, theirs += token * vocabulary;
  const float none = -__int_as_float(0x7f800000);
  Sums q{none, 0.0f, 0.0f}, p{none, 0.0f, 0.0f};
  float x[AT_ONCE], y[AT_ONCE];
  for (int at = AT_ONCE * threadIdx.x; at < vocabulary; at += AT_ONCE * THREADS) {
    load_some(x, ours + at);
    load_some(y, theirs + at);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) q.add(x[i], 0.0f), p.add(y[i], y[i] - x[i]);
  }
  q.join_warp();
  p.join_warp();
  if ((threadIdx.x & 31) == 0) of_ours[threadIdx.x >> 5] = q, of_theirs[threadIdx.x >> 5] = p;
  __syncthreads();
  q = of_ours[0], p = of_theirs[0];
  for (int warp = 1; warp < WARPS; ++warp) q.join(of_ours[warp]), p.join(of_theirs[warp]);
  const float log_q = q.largest + logf(q.exponentials), log_p = p.largest + logf(p.exponentials);
  if (threadIdx.x == 0) losses[token] = p.differences / p.exponentials - (log_p - log_q);
  if (gradient == nullptr) return;
  gradient += token * vocabulary;
  for (int at = AT_ONCE * threadIdx.x; at < vocabulary; at += AT_ONCE * THREADS) {
    load_some(x, ours + at);
    load_some(y, theirs + at);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) x[i] = weight * (expf(x[i] - log_q) - expf(y[i] - log_p));
    store_some(gradient + at, x);
  }
}
