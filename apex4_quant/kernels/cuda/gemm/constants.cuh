// Numbers that all GEMMs agree about.
#pragma once

#include "common/index.cuh"
#include "common/ptx.cuh"

// The tile that weights are stored in, whatever the layout: 64 outputs by 128 inputs.
constexpr int WEIGHT_TILE_N = 64;
constexpr int WEIGHT_TILE_BYTES = WEIGHT_TILE_N * BLOCK / 2;
constexpr int WEIGHT_SCALE_BYTES = 2 * WEIGHT_TILE_N;  // scales, or ratios, of a tile and group

constexpr int WARPGROUP = 128;         // threads, sm_90a
constexpr uint32 NONE = 0xffffffffu;  // no address in shared memory
