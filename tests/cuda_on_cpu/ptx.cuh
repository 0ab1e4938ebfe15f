// kernels/cuda/ptx.cuh on a CPU, as far as gemm_sm80.cu, gemm_s8.cu and gemm_sm90_decode_s8.cu need it: the same functions, and the 16-bit
// types that CUDA's headers have; of wgmma.cuh the products of int8. Lanes of a warp give their registers to `exchange`; the last one does the warp's work (meet_warp).
#pragma once

typedef unsigned char uint8;
typedef unsigned int uint32;
typedef unsigned long long uint64;
#define __CUDA_ARCH_FEAT_SM90_ALL 1

// ---- cuda_fp16.h, cuda_bf16.h -----------------------------------------------------------------------------------------
struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float2 __half22float2(__half2 pair) {
  _Float16 values[2];
  std::memcpy(values, &pair, 4);
  return {static_cast<float>(values[0]), static_cast<float>(values[1])};
}
inline __half __float2half_rn(float value) {
  const _Float16 narrow = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &narrow, 2);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32 bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<uint32>(value.bits) << 16); }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}

namespace ptx {

inline uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(static_cast<const unsigned char*>(pointer) - cpu::window);
}

// ---- asynchronous copies ----------------------------------------------------------------------------------------------
inline void cp_async_16(uint32 shared_wr, const void* gmem_rd) {
  cpu::copy_later(cpu::at_shared(shared_wr, 16), gmem_rd);
}
inline void cp_async_4(uint32 shared_wr, const void* gmem_rd) {
  cpu::copy_later(cpu::at_shared(shared_wr, 4), gmem_rd, 4);
}
inline void cp_async_commit() { cpu::commit_group(); }
template <int pending>
void cp_async_wait() { cpu::wait_for_groups(pending); }

// ---- shared-memory reads ----------------------------------------------------------------------------------------------
template <class T>
T shared_read(uint32 shared_rd) {
  T value;
  std::memcpy(&value, cpu::at_shared(shared_rd, sizeof(T)), sizeof(T));
  return value;
}
inline uint4 shared_read_128(uint32 shared_rd) { return shared_read<uint4>(shared_rd); }
inline uint32 shared_read_32(uint32 shared_rd) { return shared_read<uint32>(shared_rd); }
inline void shared_write_32(uint32 shared_wr, uint32 v) { std::memcpy(cpu::at_shared(shared_wr, 4), &v, 4); }
inline float2 shared_read_float2(uint32 shared_rd) { return shared_read<float2>(shared_rd); }

// Lane 8 i + r gives the address of row r, 16 bytes, of matrix i; lane l gets word l % 4 of row l / 4 of each.
inline void ldmatrix_x4(uint32 (&d)[4], uint32 shared_rd) {
  cpu::mine()[0] = shared_rd;
  cpu::meet_warp([] {
    for (int row = 0; row < 32; ++row) {
      uint32 words[4];
      std::memcpy(words, cpu::at_shared(cpu::of_lane(row)[0], 16), 16);
      for (int word = 0; word < 4; ++word) cpu::result_of_lane(4 * (row % 8) + word)[row / 8] = words[word];
    }
  });
  std::memcpy(d, cpu::my_result(), 16);
}

// ---- mma.m16n8k64.row.col.s32.s4.s4.s32 ---------------------------------------------------------------------------------
// Registers, PTX ISA: lane l = 4 g + q. Nibble i of A register r is row g + 8 (r % 2), column 8 q + i + 32 (r / 2); nibble i
// of B register r is row 8 q + i + 32 r, column g; C and D element c is row g + 8 (c / 2), column 2 q + c % 2.
__attribute__((optimize("O3"))) inline void multiply(
    int (&sums)[16][8], const short (&rows)[16][64], const short (&columns)[8][64]) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += rows[m][k] * columns[n][k];
      sums[m][n] = sum;
    }
}
inline void mma_s4(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
  uint32_t (&own)[8] = cpu::mine();
  std::memcpy(own, a, 16);
  own[4] = b0, own[5] = b1;
  cpu::meet_warp([] {
    short rows[16][64], columns[8][64];
    int sums[16][8];
    const auto widen = [](short* to, uint32 codes) {
      for (int i = 0; i < 8; ++i) to[i] = static_cast<short>((codes >> 4 * i & 15) ^ 8) - 8;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 4; ++r) widen(&rows[g + 8 * (r % 2)][8 * q + 32 * (r / 2)], cpu::of_lane(lane)[r]);
      for (int r = 0; r < 2; ++r) widen(&columns[g][8 * q + 32 * r], cpu::of_lane(lane)[4 + r]);
    }
    multiply(sums, rows, columns);
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) cpu::result_of_lane(lane)[e] = sums[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2];
  });
  for (int e = 0; e < 4; ++e) d[e] = c[e] + static_cast<int>(cpu::my_result()[e]);
}

// ---- mma.m16n8k32.row.col.s32.s8.s8.s32 -----------------------------------------------------------------------------------
// Registers, PTX ISA: byte i of A register r is row g + 8 (r % 2), column 4 q + i + 16 (r / 2); byte i of B register r is row
// 4 q + i + 16 r, column g; C and D as above.
inline void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  uint32_t (&own)[8] = cpu::mine();
  std::memcpy(own, a, 16);
  own[4] = b0, own[5] = b1;
  cpu::meet_warp([] {
    short rows[16][64] = {}, columns[8][64] = {};
    int sums[16][8];
    const auto widen = [](short* to, uint32 codes) {
      for (int i = 0; i < 4; ++i) to[i] = static_cast<signed char>(codes >> 8 * i);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 4; ++r) widen(&rows[g + 8 * (r % 2)][4 * q + 16 * (r / 2)], cpu::of_lane(lane)[r]);
      for (int r = 0; r < 2; ++r) widen(&columns[g][4 * q + 16 * r], cpu::of_lane(lane)[4 + r]);
    }
    multiply(sums, rows, columns);
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) cpu::result_of_lane(lane)[e] = sums[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2];
  });
  for (int e = 0; e < 4; ++e) d[e] += static_cast<int>(cpu::my_result()[e]);
}

// D = A B + C.
inline void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
  std::memcpy(d, c, sizeof(d));
  mma_s8(d, a, b0, b1);
}

// ---- bytes ----------------------------------------------------------------------------------------------------------------
inline uint32 permute_bytes(uint32 low, uint32 high, uint32 selector) {
  const uint64 both = static_cast<uint64>(high) << 32 | low;
  uint32 d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32 nibble = selector >> 4 * i & 15, byte = static_cast<uint32>(both >> 8 * (nibble & 7)) & 255;
    d |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return d;
}
inline uint32 multiply_add(uint32 a, uint32 b, uint32 c) { return a * b + c; }
template <uint32 value>
uint32 hidden() { return value; }

// ---- sm_90a: mbarriers and bulk copies; a cluster is one thread block -----------------------------------------------------
inline int thread() { return static_cast<int>(threadIdx.x); }
inline void barrier_init(uint32 barrier, int arrivals) {
  cpu::at_shared(barrier, 8);
  cpu::phases[barrier] = {{}, arrivals, arrivals, 0};
}
inline void arrive(uint32 barrier, int arrivals, int bytes) {
  cpu::at_shared(barrier, 8);
  const auto found = cpu::phases.find(barrier);
  if (found == cpu::phases.end()) return cpu::fail("a barrier is not initialised");
  cpu::Phase& phase = found->second;
  phase.missing -= arrivals, phase.bytes += bytes;
  if (phase.missing < 0) return cpu::fail("a barrier has more arrivals than it expects");
  if (phase.missing > 0 || phase.bytes != 0) return;
  phase.missing = phase.arrivals;
  ++phase.done.generation;
}
inline void barrier_expect_bytes(uint32 barrier, int bytes) { arrive(barrier, 1, bytes); }
inline void barrier_arrive(uint32 barrier) { arrive(barrier, 1, 0); }
// Until the phase of this parity is complete; phases count from 0.
inline void barrier_wait(uint32 barrier, uint32 parity) {
  const cpu::Barrier& done = cpu::phases[barrier].done;
  while ((done.generation & 1) == static_cast<int>(parity)) cpu::wait_for(done);
}
inline void fence_barrier_init() {}
inline void bulk_copy(uint32 shared_wr, const void* gmem_rd, int bytes, uint32 barrier) {
  if (bytes <= 0 || bytes % 16 != 0) return cpu::fail("a bulk copy is not of 16 bytes each");
  for (int i = 0; i < bytes; i += 16) cpu::land({cpu::at_shared(shared_wr + i, 16), static_cast<const char*>(gmem_rd) + i});
  arrive(barrier, 0, -bytes);
}
inline bool elect_one() { return cpu::current % 32 == 0; }
inline int cluster_rank() { return 0; }
inline int cluster_size() { return 1; }
inline uint32 shared_of_rank(uint32 shared, int) { return shared; }
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline void remote_write_float4(uint32, float4) { cpu::fail("there is no other thread block"); }
inline void remote_barrier_arrive(uint32) { cpu::fail("there is no other thread block"); }
inline void barrier_wait_cluster(uint32, uint32) { cpu::fail("there is no other thread block"); }
inline void named_barrier(int id, int threads) { cpu::meet(cpu::named[id], threads, [] {}); }
inline void named_barrier_arrive(int id, int threads) { cpu::pass(cpu::named[id], threads); }
template <int>
void more_registers() {}
template <int>
void fewer_registers() {}

// Lane 8 i + r gives the address of row r, 16 bytes, of matrix i; lane l has columns l / 4 of rows 2 (l % 4) and the next.
inline void stmatrix_x2_trans(uint32 shared_wr, uint32 a, uint32 b) {
  uint32_t (&own)[8] = cpu::mine();
  own[0] = shared_wr, own[1] = a, own[2] = b;
  cpu::meet_warp([] {
    for (int row = 0; row < 16; ++row) {
      uint16_t halves[8];
      for (int column = 0; column < 8; ++column) {
        const uint32 pair = cpu::of_lane(4 * column + row % 8 / 2)[1 + row / 8];
        halves[column] = static_cast<uint16_t>(pair >> 16 * (row % 2));
      }
      std::memcpy(cpu::at_shared(cpu::of_lane(row)[0], 16), halves, 16);
    }
  });
}

// ---- wgmma m64nNk32 s32.s8.s8, A in registers ------------------------------------------------------------------------------
// A warp has 16 of the 64 rows, A and D as of mma.m16n8k32; B is [n][k] in shared memory, 128 bytes a row, whose 16-byte chunks are
// swizzled by bits of their address. Products are done at once.
inline uint32 descriptor_address(uint32 shared_rd) { return (shared_rd & 0x3ffff) >> 4; }
inline uint64 wgmma_descriptor(uint32 address) { return address; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int>
void wgmma_wait() {}
template <int N>
struct Wgmma {
  static void s8(int (&d)[N / 2], const uint32* a, uint64 b, int keep) {
    static int sums[64][16][N];  // of every warp
    uint32_t (&own)[8] = cpu::mine();
    std::memcpy(own, a, 16);
    own[4] = static_cast<uint32>(b);
    cpu::meet_warp([] {
      short rows[16][64] = {}, columns[8][64] = {};
      int products[16][8];
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r)
          for (int i = 0; i < 4; ++i)
            rows[lane / 4 + 8 * (r % 2)][4 * (lane % 4) + 16 * (r / 2) + i] =
                static_cast<signed char>(cpu::of_lane(lane)[r] >> 8 * i);
      for (int first = 0; first < N; first += 8) {
        for (int n = 0; n < 8; ++n)
          for (int chunk = 0; chunk < 32; chunk += 16) {
            const uint32 address = 16 * cpu::of_lane(0)[4] + 128 * (first + n) + chunk;
            const unsigned char* codes = cpu::at_shared(address ^ (address >> 7 & 7) << 4, 16);
            for (int i = 0; i < 16; ++i) columns[n][chunk + i] = static_cast<signed char>(codes[i]);
          }
        multiply(products, rows, columns);
        for (int m = 0; m < 16; ++m) std::memcpy(&sums[cpu::current / 32][m][first], products[m], sizeof(products[m]));
      }
    });
    const int lane = cpu::current % 32;
    for (int i = 0; i < N / 2; ++i) {
      const int sum = sums[cpu::current / 32][lane / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (lane % 4) + i % 2];
      d[i] = keep ? d[i] + sum : sum;
    }
  }
};

inline void wait_for_predecessor() {}
inline void let_successor_start() {}

}  // namespace ptx
