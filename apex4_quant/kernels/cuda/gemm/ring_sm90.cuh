// The ring of stages of the many-token GEMMs of sm_90a, which producers fill and consumers empty. The includer has defined Shared,
// with `stages`, STAGES and STAGE_BYTES.
#pragma once

#include "common/ptx.cuh"

// Where the ring of stages stands: the stage's address in shared memory, and the phase parity of its barriers.
struct Ring {
  uint32 stage, parity, end;
  uint32 descriptor;  // the part of matrix descriptors that says where the stage is
  __device__ __forceinline__ explicit Ring(const Shared& s) : stage(ptx::shared_address(s.stages)), parity(0) {
    asm volatile("" : "+r"(stage));  // kept in a register, rather than worked out again in the main loop
    end = stage + STAGES * STAGE_BYTES;
    descriptor = ptx::descriptor_address(stage);
    asm volatile("" : "+r"(descriptor));
  }
  __device__ __forceinline__ void next() {
    stage += STAGE_BYTES, descriptor += STAGE_BYTES >> 4;
    if (stage == end) stage -= STAGES * STAGE_BYTES, descriptor -= STAGES * STAGE_BYTES >> 4, parity ^= 1;
  }
};
