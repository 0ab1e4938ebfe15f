// To which expert of this GPU a token goes: what the kernels around the GEMMs of experts share.
#pragma once

struct Routing {
  const int* ids;         // [tokens][top_k], id_words 32-bit words each, of which the first counts
  const int* expert_map;  // int32 [all_experts]: the expert's number here, or negative; null: all are here
  int id_words, all_experts, experts;

  // Of the choice `index`; -1 where the expert is not here, or there is no such expert.
  __device__ __forceinline__ int expert(int index) const {
    int id = ids[static_cast<long long>(index) * id_words];
    if (id < 0 || id >= all_experts) return -1;
    if (expert_map != nullptr) id = expert_map[id];
    return id < 0 || id >= experts ? -1 : id;
  }
};
