// 4-bit codes of layout s8 to folded int8, as wgmma's register operand.
//
// A folded weight is sign(q) * ((|q| R + 128) >> 8), R the ratio of its group (kernels/folding.py). Codes have eight magnitudes,
// so that the folded ones of a row and group are a table of eight bytes: two registers, and PRMT looks four up at once, by the low
// three bits of the codes. Of negative codes these are 8 - |q|, and they have a table of their own.
#pragma once

#include "common/ptx.cuh"

// What the magnitudes 0..7 of a row's codes are folded to, a byte each.
struct Table {
  uint32 low, high;

  // c R + 128 stays below 2^15, so that two of them fit a register and one multiplication makes both.
  __device__ __forceinline__ void make(uint32 ratio) {
    constexpr uint32 HALVES = 0x00800080u, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * 0x00010000u + HALVES, ratio * 0x00030002u + HALVES, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * 0x00050004u + HALVES, ratio * 0x00070006u + HALVES, HIGH_BYTES);
  }
  // Of the codes -8 .. -1 by their low bits; -8 is none: -((|q| R + 128) >> 8) is (q R + 127) >> 8. The higher half has 1 more, which
  // the lower one borrows where it is negative; where it is not, R is so small that the 1 changes nothing.
  __device__ __forceinline__ void make_negative(uint32 ratio) {
    constexpr uint32 HALVES = 0x0080007fu, HIGH_BYTES = 0x7531;
    low = ptx::permute_bytes(ratio * pair(-8) + HALVES, ratio * pair(-6) + HALVES, HIGH_BYTES);
    high = ptx::permute_bytes(ratio * pair(-4) + HALVES, ratio * pair(-2) + HALVES, HIGH_BYTES);
  }
  // q and q + 1, in the halves of a register.
  static __device__ __forceinline__ constexpr uint32 pair(int q) { return static_cast<uint32>(65536 * (q + 1) + q); }
  // Of four codes, in the low 16 bits; bits 3 are zero.
  __device__ __forceinline__ uint32 look_up(uint32 codes) const { return ptx::permute_bytes(low, high, codes); }
};

// Of rows r and r + 8.
struct SignedTables {
  Table plus[2], minus[2];

  // `ratios`: those of both rows.
  __device__ __forceinline__ void make(uint32 ratios) {
    const uint32 first = ratios & 0xffffu, second = ratios >> 16;
    plus[0].make(first), plus[1].make(second);
    minus[0].make_negative(first), minus[1].make_negative(second);
  }
};

// What a word says of its four codes of k = 4q .. 4q+3 (half 0) and 16 further (half 1): their low bits in the low 16 bits, and bytes
// of ones where they are negative.
struct Codes {
  uint32 low[2], negative[2];

  __device__ __forceinline__ explicit Codes(uint32 word) {
    low[0] = word & 0x77777777u;
    low[1] = ptx::permute_bytes(low[0], 0, 0x4432);  // a shift, which the compiler would put before the mask, twice
    // A selector with bit 3 set repeats the sign of a byte: of odd nibbles from the word, of even ones from `even`.
    const uint32 even = word << 4;
    negative[0] = ptx::permute_bytes(word, even, 0x9d8c);
    negative[1] = ptx::permute_bytes(word, even, 0xbfae);
  }
};

// The A fragment of one k32 step, from a lane's words of it, those of rows r and r + 8.
__device__ __forceinline__ void fold(uint32 (&a)[4], uint32 first, uint32 second, const SignedTables& tables) {
  const Codes codes[2] = {Codes(first), Codes(second)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32 low = codes[i % 2].low[i / 2], negative = codes[i % 2].negative[i / 2];
    a[i] = (tables.plus[i % 2].look_up(low) & ~negative) | (tables.minus[i % 2].look_up(low) & negative);
  }
}
