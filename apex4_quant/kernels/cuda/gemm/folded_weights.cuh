// Weights of 4 bits as int8, where activations have 8 bits: w8 = sign(q) ((|q| R + 128) >> 8), R the ratio of a row's group.
#pragma once

#include "common/ptx.cuh"

// What the codes of a row's group become, a byte each.
struct FoldTable {
  uint32 low, high;                    // of 0 .. 3, 4 .. 7
  uint32 negative_low, negative_high;  // of -8 .. -5, -4 .. -1, of which -8 does not occur

  // c R + 128 < 2^15 for R <= 4608, so that two products share a register. -((|q| R + 128) >> 8) is (q R + 127) >> 8; the higher half
  // has 1 more, which the lower one borrows where it is negative. Where it is not, R is so small that the 1 changes nothing.
  FoldTable() = default;
  __device__ __forceinline__ explicit FoldTable(uint32 ratio) {
    constexpr uint32 ROUND = 0x00800080, ROUND_NEGATIVE = 0x0080007f, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * pair(0) + ROUND, ratio * pair(2) + ROUND, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * pair(4) + ROUND, ratio * pair(6) + ROUND, HIGH_BYTES);
    negative_low = ptx::permute_bytes(ratio * pair(-8) + ROUND_NEGATIVE, ratio * pair(-6) + ROUND_NEGATIVE, HIGH_BYTES);
    negative_high = ptx::permute_bytes(ratio * pair(-4) + ROUND_NEGATIVE, ratio * pair(-2) + ROUND_NEGATIVE, HIGH_BYTES);
  }
  // Of the low three bits of codes in the four lowest nibbles of `codes`, whose bits 3 are zero; `negative`: bytes of ones.
  __device__ __forceinline__ uint32 look_up(uint32 codes, uint32 negative) const {
    return (ptx::permute_bytes(low, high, codes) & ~negative) | (ptx::permute_bytes(negative_low, negative_high, codes) & negative);
  }

 private:
  // q and q + 1, in the halves of a register.
  static __device__ __forceinline__ constexpr uint32 pair(int q) { return static_cast<uint32>(65536 * (q + 1) + q); }
};

// One word of layout s8: eight codes of one row, in two's complement (layouts.py), to its registers of the A operand: of
// k = 4q .. 4q+3, and 16 further.
__device__ __forceinline__ void widen(uint32 word, const FoldTable& row, uint32& near, uint32& far) {
  const uint32 codes = word & 0x77777777, upper = ptx::permute_bytes(codes, 0, 0x4432);
  // A selector with bit 3 set repeats the sign of a byte: of odd nibbles from the word, of even ones from the word << 4.
  near = row.look_up(codes, ptx::permute_bytes(word, word << 4, 0x9d8c));
  far = row.look_up(upper, ptx::permute_bytes(word, word << 4, 0xbfae));
}
