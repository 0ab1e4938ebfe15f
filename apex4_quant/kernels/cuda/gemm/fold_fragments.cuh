// 4-bit codes of layout sm90 to folded int8, as wgmma's register operand.
//
// A folded weight is sign(q) * ((|q| R + 128) >> 8), R the ratio of its group (kernels/folding.py). Codes have eight magnitudes,
// so that the folded ones of a row and group are a table of eight bytes: two registers, and PRMT looks four up at once.
#pragma once

#include "common/ptx.cuh"

// What the magnitudes 0..7 of a row's codes are folded to, of positive and of negative codes, a byte each.
struct Table {
  uint32 plus[2], minus[2];

  // c R + 128 stays below 2^15, so that two of them fit a register and one multiplication makes both.
  __device__ __forceinline__ void make(uint32 ratio) {
    constexpr uint32 HALVES = 0x00800080u;
    const uint32 m01 = ratio * 0x00010000u + HALVES, m23 = ratio * 0x00030002u + HALVES;
    const uint32 m45 = ratio * 0x00050004u + HALVES, m67 = ratio * 0x00070006u + HALVES;
    plus[0] = ptx::permute_bytes(m01, m23, 0x7531);
    plus[1] = ptx::permute_bytes(m45, m67, 0x7531);
    // 0x80 - magnitude borrows from no other byte, and the highest bit is then the other one.
    minus[0] = (0x80808080u - plus[0]) ^ 0x80808080u;
    minus[1] = (0x80808080u - plus[1]) ^ 0x80808080u;
  }
  __device__ __forceinline__ uint32 look_up(uint32 magnitudes) const { return ptx::permute_bytes(plus[0], plus[1], magnitudes); }
  // Four codes: magnitudes in the low 16 bits of `magnitudes`, bytes of ones in `negative` where the sign is set.
  __device__ __forceinline__ uint32 fold(uint32 magnitudes, uint32 negative) const {
    const uint32 p = ptx::permute_bytes(plus[0], plus[1], magnitudes), n = ptx::permute_bytes(minus[0], minus[1], magnitudes);
    return (p & ~negative) | (n & negative);
  }
};
struct Tables {
  Table low, high;  // of rows r and r + 8

  // `ratios`: those of both rows.
  __device__ __forceinline__ void make(uint32 ratios) { low.make(ratios & 0xffffu), high.make(ratios >> 16); }
};

// The A fragment of one k32 step, from a lane's two words of it. layouts.py, `_sign_magnitude`: of the even codes of a word (row
// r) the magnitudes are the even nibbles and the signs the bytes' highest bits; of the odd ones (row r + 8), after a rotation by
// four. Both words' magnitudes are looked up together, and the bytes are sorted afterwards.
__device__ __forceinline__ void fold(uint32 (&a)[4], uint32 first, uint32 second, const Tables& tables) {
#if S8_ORDER
  {
    const uint32 y = first & 0x77777777u, z = second & 0x77777777u;
    a[0] = tables.low.fold(y, ptx::permute_bytes(first, first, 0xba98));
    a[1] = tables.high.fold(y >> 16, ptx::permute_bytes(first << 4, 0, 0xba98));
    a[2] = tables.low.fold(z, ptx::permute_bytes(second, second, 0xba98));
    a[3] = tables.high.fold(z >> 16, ptx::permute_bytes(second << 4, 0, 0xba98));
  }
#else
  constexpr uint32 LOW = 0x07070707u, HIGH = 0x70707070u;
  const uint32 first_left = first << 4, second_left = second << 4;
  const uint32 even = (first & LOW) | (second_left & HIGH), odd = ((first >> 4) & LOW) | (second & HIGH);
  const uint32 even01 = tables.low.fold(even, ptx::permute_bytes(first, second, 0xd9c8));
  const uint32 even23 = tables.low.fold(even >> 16, ptx::permute_bytes(first, second, 0xfbea));
  const uint32 odd01 = tables.high.fold(odd, ptx::permute_bytes(first_left, second_left, 0xead9));
  const uint32 odd23 = tables.high.fold(odd >> 16, ptx::permute_bytes(first_left, second_left, 0xc8fb));
  a[0] = ptx::permute_bytes(even01, even23, 0x6420), a[2] = ptx::permute_bytes(even01, even23, 0x7531);
  a[1] = ptx::permute_bytes(odd01, odd23, 0x6420), a[3] = ptx::permute_bytes(odd01, odd23, 0x7531);
#endif
}
// Of step `step` of four, from the two 16-byte words that a lane owns of a block.
__device__ __forceinline__ void fold_step(uint32 (&a)[4], const uint4 (&words)[2], int step, const Tables& tables) {
  const uint4& half = words[step / 2];
  if (step % 2 == 0) {
    fold(a, half.x, half.y, tables);
  } else {
    fold(a, half.z, half.w, tables);
  }
}


// The same in two operands, for kernels whose tensor cores have time: codes that are not negative as above, of negative ones the
// complement, which is one too little; and bytes of ones for those. The sum is that of `a` less that of `negative`.
__device__ __forceinline__ void fold_complements(uint32 (&a)[4], uint32 (&negative)[4], uint32 first, uint32 second, const Tables& tables) {
#if S8_ORDER
  const uint32 y = first & 0x77777777u, z = second & 0x77777777u, first_left = first << 4, second_left = second << 4;
  negative[0] = ptx::permute_bytes(first, first, 0xba98), negative[2] = ptx::permute_bytes(second, second, 0xba98);
  negative[1] = ptx::permute_bytes(first_left, first_left, 0xba98), negative[3] = ptx::permute_bytes(second_left, second_left, 0xba98);
  a[0] = tables.low.look_up(y) ^ negative[0], a[2] = tables.low.look_up(z) ^ negative[2];
  a[1] = tables.high.look_up(y >> 16) ^ negative[1], a[3] = tables.high.look_up(z >> 16) ^ negative[3];
#else
  constexpr uint32 LOW = 0x07070707u, HIGH = 0x70707070u;
  const uint32 first_left = first << 4, second_left = second << 4;
  const uint32 even = (first & LOW) | (second_left & HIGH), odd = ((first >> 4) & LOW) | (second & HIGH);
  const uint32 even01 = tables.low.look_up(even), even23 = tables.low.look_up(even >> 16);
  const uint32 odd01 = tables.high.look_up(odd), odd23 = tables.high.look_up(odd >> 16);
  negative[0] = ptx::permute_bytes(first, first, 0xba98), negative[2] = ptx::permute_bytes(second, second, 0xba98);
  negative[1] = ptx::permute_bytes(first_left, first_left, 0x8ba9), negative[3] = ptx::permute_bytes(second_left, second_left, 0x8ba9);
  a[0] = ptx::permute_bytes(even01, even23, 0x6420) ^ negative[0], a[2] = ptx::permute_bytes(even01, even23, 0x7531) ^ negative[2];
  a[1] = ptx::permute_bytes(odd01, odd23, 0x6420) ^ negative[1], a[3] = ptx::permute_bytes(odd01, odd23, 0x7531) ^ negative[3];
#endif
}
