// Weights of 4 bits as int8, where activations have 8 bits: w8 = sign(q) ((|q| R + 128) >> 8), R the ratio of a row's group.
#pragma once

#include "common/ptx.cuh"

// What the eight magnitudes of a row's group become, a byte each, with bit 7 set: 128 + |w8|.
struct FoldTable {
  uint32 low, high;  // of magnitudes 0 .. 3, 4 .. 7

  // c R + 128 < 2^15 for R <= 4608, so that two products share a register. Bits 15 and 31 become bit 7 of a byte.
  FoldTable() = default;
  __device__ __forceinline__ explicit FoldTable(uint32 ratio) {
    constexpr uint32 ROUND = 0x80808080, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * 0x00010000 + ROUND, ratio * 0x00030002 + ROUND, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * 0x00050004 + ROUND, ratio * 0x00070006 + ROUND, HIGH_BYTES);
  }
  // Of the magnitudes in the four lowest nibbles of `magnitudes`, whose bits 3 are zero.
  __device__ __forceinline__ uint32 look_up(uint32 magnitudes) const {
    return ptx::permute_bytes(low, high, magnitudes);
  }
};

// Four magnitudes as 128 + |w8| and, of the same bytes, 255 where the code is negative and 0 elsewhere: four int8.
__device__ __forceinline__ uint32 with_signs(uint32 magnitudes, uint32 negative, uint32 minus_two) {
  // 128 - |w8| is 128 + |w8| less twice |w8|. No byte borrows from the next: all are 2 .. 254.
  return ptx::multiply_add(magnitudes & negative & 0x7f7f7f7f, minus_two, magnitudes) ^ 0x80808080;
}

// One word of layout s8: eight codes of one row, in sign and magnitude (layouts.py), to its registers of the A operand: of
// k = 4q .. 4q+3, and 16 further.
__device__ __forceinline__ void widen(uint32 word, const FoldTable& row, uint32 minus_two, uint32& near, uint32& far) {
  const uint32 magnitudes = word & 0x77777777, upper = ptx::permute_bytes(magnitudes, 0, 0x4432);
  // A selector with bit 3 set repeats the sign of a byte: of odd nibbles from the word, of even ones from the word << 4.
  near = with_signs(row.look_up(magnitudes), ptx::permute_bytes(word, word << 4, 0x9d8c), minus_two);
  far = with_signs(row.look_up(upper), ptx::permute_bytes(word, word << 4, 0xbfae), minus_two);
}
