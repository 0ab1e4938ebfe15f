// kernels/cuda/quantize_wgmma.cuh on a CPU: a warp's part of the product, as mma of 16 rows.
#pragma once

#include "quantize/quantize_dense.cuh"

inline void multiply_64x128(float (&d)[TILES][4], const unsigned (&a)[STEPS][4], const unsigned* matrix) {
  const int lane = cpu::current % cpu::LANES_OF_WARP;
  for (auto& tile : d)
    for (float& sum : tile) sum = 0.0f;
  for (int step = 0; step < STEPS; ++step)
    for (int tile = 0; tile < TILES; ++tile)
      multiply_16x8x16(
          d[tile], a[step][0], a[step][1], a[step][2], a[step][3], matrix[dense_core_word(step, tile, 0, lane)],
          matrix[dense_core_word(step, tile, 1, lane)]);
}
inline void write_for_wgmma() {}
