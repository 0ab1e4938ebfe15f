// Where things stand in memory: every index function that a kernel, the packer or the lane simulation uses.
//
// APEX4_INDEX(name, (arguments), expression) is one line. The expression is integer arithmetic that C++ and Python read
// alike: + - * << >> & ^ | and parentheses, no / % or comparison. kernels/index.py reads this file and evaluates the
// same text in NumPy, so that a simulation of the lanes cannot disagree with the kernel about an address.
#pragma once

constexpr int BLOCK = 128;  // input features of a block: of a transform, of a tile of weights

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

// ---- mma.m16n8k32 (s8), weights as the A operand: that of one warp of wgmma, below ------------------------------------
// ldmatrix.x4 for B, the tokens: the row and the chunk whose address this lane gives; registers b0, b1 of k32 step 2 * half,
// then those of the next step, result.
APEX4_INDEX(s8_ldmatrix_row, (int lane), lane & 7)
APEX4_INDEX(s8_ldmatrix_chunk, (int lane, int half), 4 * half + (lane >> 3))
// y on its way out, [tokens][tile_n] of 16 bits: bytes, 16 more a row so that eight rows touch different banks.
APEX4_INDEX(s8_output_byte, (int tile_n, int token, int column), (2 * tile_n + 16) * token + 2 * column)

// ---- wgmma m64nNk32 (8 bit), weights as the register operand ----------------------------------------------------------
// The 16 bytes, of tile half c (k32 steps 2c and 2c + 1), that this lane of warp `warp` of the warpgroup owns.
APEX4_INDEX(sm90_weight_byte, (int half, int warp, int lane), 2048 * half + 512 * warp + 16 * lane)
// The pair of float16 scales, of rows r and r + 8 of the warp's sixteen, in a row of 64.
APEX4_INDEX(sm90_scale_position, (int warp, int lane), 16 * warp + 2 * (lane >> 2))

// Tokens that a thread block quantizes for itself, as wgmma's operand without swizzle: `rows` of them, 16 bytes of each in turn.
// `chunk` counts 16 input features, through all blocks. A core matrix is eight rows of 16 bytes: with fewer tokens its last
// rows are the next chunk's.
APEX4_INDEX(sm90_token_byte, (int rows, int row, int chunk), 16 * (rows * chunk + row))

// Kernels that widen even and odd nibbles of layout s8 apart (gemm/exact_fragments.cuh) multiply the inputs of a k32 step in another
// order. Of a token's block of 128 codes, the byte of input feature k where a lane's B operands of all steps stand together: 32 bytes
// for each of the four lanes of a token, 8 for each step, 4 for each of b0 and b1.
APEX4_INDEX(exact_token_byte, (int k), 32 * (k >> 2 & 3) + 8 * (k >> 5) + 4 * (k & 1) + 2 * (k >> 4 & 1) + (k >> 1 & 1))

// ---- activation quantizers --------------------------------------------------------------------------------------------
// quantize_rows: eight lanes hold a slice, one block of one row; a CTA's slices are numbered rows first.
APEX4_INDEX(rows_column, (int lane), 16 * (lane & 7))
// After the Hadamard transform, of the first or second octet.
APEX4_INDEX(rows_transformed_column, (int lane, int half), 8 * (lane & 7) + 64 * half)
APEX4_INDEX(rows_slice_row, (int slice, int rows_log2), slice & ((1 << rows_log2) - 1))
APEX4_INDEX(rows_slice_block, (int slice, int rows_log2), slice >> rows_log2)
// Where an octet (eight codes of consecutive k) stands, from k in the block: sm80_activation_byte and sm90_activation_byte
// with the place in the chunk.
APEX4_INDEX(sm80_octet_byte, (int row, int k), 64 * row + (k >> 1 ^ 16 * (row >> 1 & 3)))
APEX4_INDEX(sm90_octet_byte, (int row, int k), 128 * row + (k ^ 16 * (row & 7)))
// The nibble in which code `element` of an octet is collected. For sm90 a code and the one four further share a byte, so
// that the low nibbles are the bytes of the first four codes and the high nibbles those of the last four.
APEX4_INDEX(sm80_octet_nibble, (int element), element)
APEX4_INDEX(sm90_octet_nibble, (int element), 2 * (element & 3) + (element >> 2))

// quantize_whole_rows: a warp holds eight slices, four lanes each; a lane has 32 columns, in two parts of sixteen.
APEX4_INDEX(whole_slice, (int lane), lane >> 2)
APEX4_INDEX(whole_column, (int lane, int part), 16 * (lane & 3) + 64 * part)
// After the Hadamard transform, as mma.m16n8k16 and additions make it, a part is sixteen columns of another slice.
APEX4_INDEX(whole_transformed_slice, (int lane, int part), 2 * (lane & 3) + part)
APEX4_INDEX(whole_transformed_column, (int lane), 16 * (lane >> 2))
// A multiplies by one 16 x 16 matrix, over the column's bits 0, 4, 5 and 6: from k, those of the input; from the row m of A,
// those of the output. The eight products are those of the other bits, 1, 2 and 3.
APEX4_INDEX(whole_product_input, (int k), (k & 1) + 16 * (k >> 1 & 3) + 64 * (k >> 3))
APEX4_INDEX(whole_product_output, (int row), (row >> 3) + 16 * (row & 7))
// FEW: eight lanes hold a slice, four slices a warp; a lane has two octets, which are parts. Without a transform it has those of
// rows_column; before one the columns' bit 3 tells the two halves of mma's n apart, so that a lane ends with sixteen in a row.
APEX4_INDEX(few_slice, (int lane), lane >> 3)
APEX4_INDEX(few_column, (int lane, int part), 8 * (lane >> 2 & 1) + 16 * (lane & 3) + 64 * part)
APEX4_INDEX(few_transformed_slice, (int lane), lane & 3)
// STREAM: rows are copied so that four lanes copy 64 bytes together, octet 4 i + q of a slice being copy i of lane q; they are read
// by the lanes that want them. Both the 32 slots of a warp's copy that are written and those that are read are in all banks.
APEX4_INDEX(whole_copy_column, (int lane, int copy), 32 * copy + 8 * (lane & 3))
APEX4_INDEX(whole_copy_slot, (int lane, int copy), lane ^ (copy & 1))
APEX4_INDEX(whole_read_copy, (int lane, int part), 2 * part + (lane >> 1 & 1))
APEX4_INDEX(whole_read_slot, (int lane, int octet), (lane & 28) + (2 * (lane & 1) + octet ^ (lane >> 1 & 1)))

// quantize_dense: mma.m16n8k16 with its k and n renamed. k is renamed so that lane q of a quad reads eight consecutive
// columns at once: word 2 * (step & 1) + half of its piece step >> 1 is the A register of k = 2 q + 8 * half and the next.
APEX4_INDEX(dense_piece_column, (int piece, int lane), 32 * piece + 8 * (lane & 3))
APEX4_INDEX(dense_piece_word, (int step, int half), 2 * (step & 1) + half)
APEX4_INDEX(dense_input, (int step, int k), 32 * (step >> 1) + 8 * (k >> 1 & 3) + 4 * (step & 1) + 2 * (k >> 3) + (k & 1))
// n is renamed so that lane q ends with the 32 consecutive columns from 32 q, two from each of the sixteen tiles.
APEX4_INDEX(dense_output, (int tile, int n), 32 * (n >> 1) + 2 * tile + (n & 1))
// The prepacked matrix: 16 bytes of a lane are b0, b1 of step 2 * pair, then b0, b1 of step 2 * pair + 1.
APEX4_INDEX(dense_fragment_byte, (int pair, int tile, int lane), 512 * (16 * pair + tile) + 16 * lane)
// Error feedback behind it: 16 bytes of a lane are b0, b1 of tile 2 * pair, then b0, b1 of tile 2 * pair + 1, of the columns that
// the errors of step `step` go to. Step j has the columns of tiles 2 j and 2 j + 1, and goes to the j pairs of tiles before them.
APEX4_INDEX(feedback_fragment_byte, (int step, int pair, int lane), 512 * ((step * (step - 1) >> 1) + pair) + 16 * lane)
// The same as wgmma reads it from shared memory: core matrices of eight columns and eight k, in words; a word of a core matrix
// is b0 (half 0) or b1 (half 1) of a lane.
APEX4_INDEX(dense_core_word, (int step, int tile, int half, int lane), 1024 * step + 64 * tile + 32 * half + lane)
