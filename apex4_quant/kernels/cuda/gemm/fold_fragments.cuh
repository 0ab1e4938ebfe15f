// 4-bit codes of layout s8 to folded int8 (folded_weights.cuh), as wgmma's register operand.
#pragma once

#include "gemm/folded_weights.cuh"

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

// What a word, eight codes of one row, says of those of k = 4q .. 4q+3 (half 0) and 16 further (half 1): their low bits in the low 16
// bits, and bytes of ones where they are negative.
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
