// What GEMMs do with finished sums: 16-bit outputs, how they are stored, and the order in which tiles are visited.
#pragma once

#include "common/ptx.cuh"

#if OUT_BF16
typedef __nv_bfloat16 Out;
typedef __nv_bfloat162 Out2;
__device__ __forceinline__ uint32 pack_pair(float low, float high) {
  const Out2 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32*>(&pair);
}
#else
typedef __half Out;
typedef __half2 Out2;
__device__ __forceinline__ uint32 pack_pair(float low, float high) {
  const Out2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32*>(&pair);
}
#endif

// Whether y may be written 16 bytes at a time.
__device__ __forceinline__ bool has_vectors(const Out* y, int ldy) {
  return ldy % 8 == 0 && (reinterpret_cast<uint64>(y) & 15) == 0;
}

// Eight outputs of a token one by one, of which those before column n exist.
__device__ __forceinline__ void store_singly(Out* y_gmem_wr, const uint32 (&words)[4], int column, int n) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const unsigned short word = static_cast<unsigned short>(words[c / 2] >> (16 * (c % 2)));
    if (column + c < n) y_gmem_wr[c] = *reinterpret_cast<const Out*>(&word);
  }
}

// Tiles are visited in bands of `BAND` tiles along m: within a band all n, so that what runs at one time shares both
// operands in L2.
struct Tile {
  int m, n;
};
constexpr int BAND = 8;
__device__ __forceinline__ Tile tile_at(int index, int tiles_m, int tiles_n) {
  const int band = index / (BAND * tiles_n);
  const int first = band * BAND;
  const int height = min(BAND, tiles_m - first);
  const int within = index - first * tiles_n;
  return {first + within % height, within / height};
}
