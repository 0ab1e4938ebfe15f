"""What decoding with 8-bit activations multiplies (exact_fragments.cuh): a lane's words and codes as operands of mma.m16n8k32."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from apex4_quant.format.layouts import S8
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.operands import pack_activations
from apex4_quant.kernels.runtime.compiler import SOURCES

from ... import cuda_on_cpu

_BEFORE = """
#include <cstdint>
#define __device__
#define __forceinline__ inline
typedef uint32_t uint32;
namespace ptx {
inline uint32 permute_bytes(uint32 low, uint32 high, uint32 selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32 result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
}
"""
_BEHIND = """
extern "C" void a_fragment(uint32* a, uint32 first, uint32 second) { widen(*reinterpret_cast<uint32(*)[4]>(a), first, second); }
extern "C" void b_fragment(uint32* b) { reorder(b[0], b[1]); }
extern "C" int factor() { return WEIGHT_FACTOR; }
"""
BLOCK, TOKENS = 128, 8


def library(folder: Path, header: str) -> ctypes.CDLL:
    header = header.replace('#include "common/ptx.cuh"', "").replace("#pragma once", "")
    (folder / "exact.cpp").write_text(_BEFORE + header + _BEHIND)
    command = [str(cuda_on_cpu.COMPILER), "-std=c++17", "-O1", "-shared", "-fPIC", "-o", "exact.so", "exact.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "exact.so"))


@pytest.fixture(scope="module")
def operands() -> tuple[np.ndarray, np.ndarray]:
    """Codes of 64 outputs and of 8 tokens, int8 [64, 128] and [8, 128]; every code of a weight and the extremes of tokens occur."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-7, 8, (64, BLOCK), dtype=torch.int8, generator=generator)
    tokens = torch.randint(-127, 128, (TOKENS, BLOCK), dtype=torch.int8, generator=generator)
    tokens[0], weight[0] = 127, 7
    return weight.numpy(), tokens.numpy()


def products(code: ctypes.CDLL, weight: np.ndarray, tokens: np.ndarray, by_itself: bool) -> np.ndarray:
    """int64 [64, 8]: what the mmas of a block give, lane by lane. `by_itself`: tokens as a thread block that quantizes lays them."""
    words = S8.pack(torch.from_numpy(weight))[0, 0].numpy().view(np.uint32)
    weight_byte = index_function("sm90_weight_byte")
    stored = pack_activations(torch.from_numpy(tokens), torch.ones(TOKENS, 1), "s8")[0][0].numpy()
    activation_byte, chunk_of = index_function("sm90_activation_byte"), index_function("s8_ldmatrix_chunk")
    token_byte = index_function("exact_token_byte")
    own = np.zeros((TOKENS, BLOCK), np.int8)
    for k in range(BLOCK):
        own[:, token_byte(k)] = tokens[:, k]
    a = np.zeros((4, 4, 64, 32), np.int64)  # [warp][step][output of all][k of the step], the rows of a warp alone
    b = np.zeros((4, 32, TOKENS), np.int64)
    for lane in range(32):
        row, q = lane // 4, lane % 4
        for step in range(4):
            two = np.zeros(2, np.uint32)
            if by_itself:
                two[:] = own[row].view(np.uint32)[(token_byte(4 * q) + 8 * step) // 4 :][:2]
            else:
                for half in range(2):  # ldmatrix: four bytes of a row of eight, chunk by chunk
                    chunk = chunk_of(8 * (2 * (step % 2) + half), step // 2)
                    two[half] = stored.reshape(-1)[activation_byte(row, chunk) + 4 * q :][:4].view(np.uint32)[0]
                code.b_fragment(two.ctypes.data_as(ctypes.c_void_p))
            for half in range(2):
                b[step, 16 * half + 4 * q :][:4, row] = two[half : half + 1].view(np.int8)
            for warp in range(4):
                mine = words[weight_byte(step // 2, warp, lane) // 4 :][2 * (step % 2) :]
                four = np.zeros(4, np.uint32)
                code.a_fragment(
                    four.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint32(int(mine[0])), ctypes.c_uint32(int(mine[1]))
                )
                for register in range(4):
                    at = 16 * warp + row + 8 * (register % 2), 16 * (register // 2) + 4 * q
                    a[warp, step, at[0], at[1] : at[1] + 4] = four[register : register + 1].view(np.int8)
    return np.einsum("wsnk,skt->nt", a, b)


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("by_itself", [False, True], ids=["ldmatrix", "own tokens"])
def test_lanes_give_sixteen_times_the_sums(
    by_itself: bool, operands: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    weight, tokens = operands
    code = library(tmp_path, (SOURCES / "gemm" / "exact_fragments.cuh").read_text())
    want = weight.astype(np.int64) @ tokens.T.astype(np.int64)
    assert code.factor() == 16 and np.array_equal(products(code, weight, tokens, by_itself), 16 * want)
    assert np.abs(16 * want).max() < 2**22


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("old", "new"),
    [("word << 4", "word << 3"), ("word & 0xf0", "word & 0x70"), ("0x6420", "0x6240"), ("0x7531", "0x7351")],
)
def test_a_changed_constant_is_noticed(
    old: str, new: str, operands: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    source = (SOURCES / "gemm" / "exact_fragments.cuh").read_text()
    assert source.count(old) == 1
    weight, tokens = operands
    found = products(library(tmp_path, source.replace(old, new)), weight, tokens, False)
    assert not np.array_equal(found, 16 * (weight.astype(np.int64) @ tokens.T.astype(np.int64)))
