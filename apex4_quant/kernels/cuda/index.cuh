// Where things stand in memory: every index function that a kernel, the packer or the lane simulation uses.
//
// APEX4_INDEX(name, (arguments), expression) is one line. The expression is integer arithmetic that C++ and Python read
// alike: + - * << >> & ^ | and parentheses, no / % or comparison. kernels/index.py reads this file and evaluates the
// same text in NumPy, so that a simulation of the lanes cannot disagree with the kernel about an address.
#pragma once

#define APEX4_INDEX(name, arguments, expression) \
  __host__ __device__ constexpr int name arguments { return expression; }

// ---- activations: [K / 128][m_stride] rows of one block of 128 codes, the shared-memory image of a tile ----------------
// sm80: two codes a byte (k = 2b in the low nibble of byte b), 64 bytes a row, four 16-byte chunks permuted so that the
// eight rows of an ldmatrix phase touch all 32 banks.
APEX4_INDEX(sm80_activation_byte, (int row, int chunk), 64 * row + 16 * (chunk ^ (row >> 1 & 3)))
// sm90: one code a byte, 128 bytes a row, in the 128-byte swizzle of wgmma's shared-memory descriptors.
APEX4_INDEX(sm90_activation_byte, (int row, int chunk), 128 * row + 16 * (chunk ^ (row & 7)))

// ---- mma.m16n8k64 (s4) as a warp sees it ------------------------------------------------------------------------------
// ldmatrix.x4 for A: the row and the chunk whose address this lane gives; registers a0..a3 of k64 step `step` result.
APEX4_INDEX(sm80_ldmatrix_row, (int lane), lane & 15)
APEX4_INDEX(sm80_ldmatrix_chunk, (int lane, int step), 2 * step + (lane >> 4))
// B: 16 bytes of fragment j (8 output features) that this lane owns: b0, b1 of step 0, then b0, b1 of step 1.
APEX4_INDEX(sm80_weight_byte, (int fragment, int lane), 512 * fragment + 16 * lane)
// The pair of float16 scales, of columns 8 j + 2 q and 8 j + 2 q + 1, in a row of 64.
APEX4_INDEX(sm80_scale_position, (int fragment, int lane), 16 * (lane & 3) + 2 * fragment)
// C: row and column of accumulator c = 2 * half + e. wgmma's accumulators repeat the same 8 x 8 pattern.
APEX4_INDEX(accumulator_row, (int lane, int half), (lane >> 2) + 8 * half)
APEX4_INDEX(accumulator_column, (int lane, int element), 2 * (lane & 3) + element)

// ---- wgmma m64nNk32 (8 bit), weights as the register operand ----------------------------------------------------------
// The 16 bytes, of tile half c (k32 steps 2c and 2c + 1), that this lane of warp `warp` of the warpgroup owns.
APEX4_INDEX(sm90_weight_byte, (int half, int warp, int lane), 2048 * half + 512 * warp + 16 * lane)
// The pair of float16 scales, of rows r and r + 8 of the warp's sixteen, in a row of 64.
APEX4_INDEX(sm90_scale_position, (int warp, int lane), 16 * warp + 2 * (lane >> 2))
