// 4-bit codes of layout s8 to int8 as they are, times 16, as the A operand of mma.m16n8k32; and the tokens' codes to match.
//
// A nibble in two's complement, in the upper half of a byte, is int8 already: 16 q. So the even nibbles of a word, moved up, and the
// odd ones are a register each. The inputs k of a step are then multiplied in another order: of a word of k = 4q .. 4q+3 and
// 16 further, a register has k = 4q, 4q+2, 4q+16, 4q+18, the other the odd ones. The tokens' codes are put into the same order.
#pragma once

#include "common/ptx.cuh"

constexpr int WEIGHT_FACTOR = 16;  // of these weights

// One word of a row: `even` and `odd` nibbles.
__device__ __forceinline__ void widen(uint32 word, uint32& even, uint32& odd) {
  even = word << 4 & 0xf0f0f0f0u;
  odd = word & 0xf0f0f0f0u;
}

// The A fragment of one k32 step from a lane's words of rows r and r + 8.
__device__ __forceinline__ void widen(uint32 (&a)[4], uint32 first, uint32 second) {
  widen(first, a[0], a[2]);
  widen(second, a[1], a[3]);
}

// The same with inputs in their order, for tokens' codes that are read as they are: those of k = 4q .. 4q+3, and 16 further.
__device__ __forceinline__ void widen_in_order(uint32 word, uint32& near, uint32& far) {
  uint32 even, odd;
  widen(word, even, odd);
  near = ptx::permute_bytes(even, odd, 0x5140);
  far = ptx::permute_bytes(even, odd, 0x7362);
}
__device__ __forceinline__ void widen_in_order(uint32* a, uint32 first, uint32 second) {
  widen_in_order(first, a[0], a[2]);
  widen_in_order(second, a[1], a[3]);
}

// The B fragment of one k32 step, from the registers that ldmatrix gives.
__device__ __forceinline__ void reorder(uint32& b0, uint32& b1) {
  const uint32 even = ptx::permute_bytes(b0, b1, 0x6420), odd = ptx::permute_bytes(b0, b1, 0x7531);
  b0 = even, b1 = odd;
}
