// 4-bit codes of layout s8 to folded int8, where activations have 8 bits: w8 = sign(q) ((|q| R + 128) >> 8), R the ratio of a row's
// group (kernels/folding.py).
//
// Codes have eight magnitudes, so that the folded ones of a row and group are a table of eight bytes: two registers, and PRMT looks
// four up at once, by the low three bits of the codes. Of negative codes these are 8 - |q|, and they have a table of their own.
#pragma once

#include "common/ptx.cuh"

// What eight consecutive codes are folded to, a byte each.
struct Table {
  uint32 low, high;

  // Of 0 .. 7. c R + 128 < 2^15 for R <= 4608, so that two of them share a register and one multiplication makes both.
  __device__ __forceinline__ void make(uint32 ratio) {
    constexpr uint32 ROUND = 0x00800080u, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * pair(0) + ROUND, ratio * pair(2) + ROUND, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * pair(4) + ROUND, ratio * pair(6) + ROUND, HIGH_BYTES);
  }
  // Of -8 .. -1, of which -8 does not occur: -((|q| R + 128) >> 8) is (q R + 127) >> 8. The higher half has 1 more, which the lower one
  // borrows where it is negative; where it is not, R is so small that the 1 changes nothing.
  __device__ __forceinline__ void make_negative(uint32 ratio) {
    constexpr uint32 ROUND = 0x0080007fu, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * pair(-8) + ROUND, ratio * pair(-6) + ROUND, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * pair(-4) + ROUND, ratio * pair(-2) + ROUND, HIGH_BYTES);
  }
  // Of four codes' low bits, in the low 16 bits; bits 3 are zero.
  __device__ __forceinline__ uint32 look_up(uint32 codes) const { return ptx::permute_bytes(low, high, codes); }

 private:
  // q and q + 1, in the halves of a register.
  static __device__ __forceinline__ constexpr uint32 pair(int q) { return static_cast<uint32>(65536 * (q + 1) + q); }
};

// What the codes of a row's group become.
struct FoldTable {
  Table plus, minus;

  FoldTable() = default;
  __device__ __forceinline__ explicit FoldTable(uint32 ratio) { plus.make(ratio), minus.make_negative(ratio); }
  // `negative`: bytes of ones where codes are.
  __device__ __forceinline__ uint32 look_up(uint32 codes, uint32 negative) const {
    return (plus.look_up(codes) & ~negative) | (minus.look_up(codes) & negative);
  }
};

// One word, eight codes of one row in two's complement (layouts.py), to its registers of the A operand: of k = 4q .. 4q+3, and 16 further.
__device__ __forceinline__ void widen(uint32 word, const FoldTable& row, uint32& near, uint32& far) {
  const uint32 codes = word & 0x77777777, upper = ptx::permute_bytes(codes, 0, 0x4432);
  // A selector with bit 3 set repeats the sign of a byte: of odd nibbles from the word, of even ones from the word << 4.
  near = row.look_up(codes, ptx::permute_bytes(word, word << 4, 0x9d8c));
  far = row.look_up(upper, ptx::permute_bytes(word, word << 4, 0xbfae));
}
