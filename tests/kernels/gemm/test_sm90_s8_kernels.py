"""The 8-bit GEMMs of sm_90a without a GPU: how codes are folded, plans, every configuration compiled, and its machine code."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from apex4_quant.errors import UsageError
from apex4_quant.format.layouts import S8
from apex4_quant.kernels.analysis import sass
from apex4_quant.kernels.folding import fold_codes
from apex4_quant.kernels.gemm import tuned
from apex4_quant.kernels.gemm.configs import SHARED_LIMITS, PlanSource
from apex4_quant.kernels.gemm.eight_bit import choose_eight_bit_gemm
from apex4_quant.kernels.gemm.sm90_s8_configs import (
    FEW_TOKENS,
    WARPGROUPS_FROM,
    Sm90S8Config,
    Sm90S8Plan,
    all_configs,
    candidates,
    choose_sm90_s8,
    explain,
)
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.runtime.compiler import SOURCES, compile_kernel

from ... import cuda_on_cpu

SMS = 132
NOTHING = PlanSource(None, 0)


# ---- folding ----------------------------------------------------------------------------------------------------------

# What fold_fragments.cuh and folded_weights.cuh take from CUDA, and the former's functions for a caller in C.
_BEFORE = """
#include <cstdint>
#define __device__
#define __forceinline__ inline
typedef uint32_t uint32;
struct uint4 { uint32 x, y, z, w; };
namespace ptx {
inline uint32 permute_bytes(uint32 low, uint32 high, uint32 selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32 nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 255;
    result |= (nibble < 8 ? byte : byte >> 7 ? 255 : 0) << 8 * i;
  }
  return result;
}
}
"""
_BEHIND = """
extern "C" void fold_block(const uint32* words, uint32 ratios, uint32* a) {
  SignedTables tables;
  tables.make(ratios);
  for (int step = 0; step < 4; ++step) {
    fold(*reinterpret_cast<uint32(*)[4]>(a + 4 * step), words[2 * step], words[2 * step + 1], tables);
  }
}
"""


@pytest.fixture(scope="module")
def fold_block(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("fold")
    text = "".join((SOURCES / "gemm" / name).read_text() for name in ("folded_weights.cuh", "fold_fragments.cuh"))
    header = re.sub(r"^#(include .*|pragma once)$", "", text, flags=re.MULTILINE)
    (folder / "fold.cpp").write_text(_BEFORE + header + _BEHIND)
    command = [cuda_on_cpu.COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", "fold.so", "fold.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    function: Callable[..., None] = ctypes.CDLL(str(folder / "fold.so")).fold_block
    return function


RATIOS = [0, 1, 18, 19, 127, 128, 129, 4607, 4608]  # 18 and 19: 7 R + 128 on both sides of 256


@pytest.mark.parametrize("ratios", [RATIOS, None], ids=["edges", "random"])
def test_a_lane_folds_the_a_fragment_of_its_words(ratios: list[int] | None, fold_block: Callable[..., None]) -> None:
    """All lanes of a warpgroup, against the tables of wgmma's register operand in the PTX ISA."""
    generator = torch.Generator().manual_seed(1)
    ratio = torch.randint(0, 4609, (64, 1), dtype=torch.int16, generator=generator)
    if ratios:
        ratio[:, 0] = torch.tensor(ratios, dtype=torch.int16).repeat(8)[:64]
    codes = torch.randint(-7, 8, (64, 128), dtype=torch.int8, generator=generator)
    codes[:, :15] = torch.arange(-7, 8, dtype=torch.int8)
    want = fold_codes(codes, ratio).numpy()
    layout = S8
    words = layout.pack(codes)[0, 0].numpy().view(np.uint32)
    stored = layout.pack_scales(ratio)[0, 0].tolist()
    weight_byte, scale_position = index_function("sm90_weight_byte"), index_function("sm90_scale_position")
    for warp in range(4):
        for lane in range(32):
            own = np.concatenate([words[weight_byte(half, warp, lane) // 4 :][:4] for half in range(2)])
            at = scale_position(warp, lane)
            folded = np.zeros(16, np.uint32)
            fold_block(
                np.ascontiguousarray(own).ctypes.data_as(ctypes.c_void_p), ctypes.c_uint32(stored[at] | stored[at + 1] << 16),
                folded.ctypes.data_as(ctypes.c_void_p),
            )  # fmt: skip
            for step, register in np.ndindex(4, 4):
                row, k = 16 * warp + lane // 4 + 8 * (register % 2), 32 * step + 16 * (register // 2) + 4 * (lane % 4)
                got = folded[4 * step + register : 4 * step + register + 1].view(np.int8)
                assert (got == want[row, k : k + 4]).all(), (warp, lane, step, register)


def test_a_forbidden_code_stays_in_its_byte(fold_block: Callable[..., None]) -> None:
    """No code is stored as -8; what a damaged file holds must not spill into the next byte."""
    words = np.full(8, 0x08080808, np.uint32)
    folded = np.full(16, 7, np.uint32)
    fold_block(
        words.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint32(4608 << 16 | 4608),
        folded.ctypes.data_as(ctypes.c_void_p),
    )
    assert not folded.view(np.int8)[1::2].any()


# ---- configurations and plans ---------------------------------------------------------------------------------------

SHAPES = [
    (m, n, blocks)
    for m in (1, 8, 16, 17, 64, 65, 300, 8192)
    for n, blocks in ((8, 1), (64, 3), (4096, 32), (1000, 112), (28672, 64), (128256, 32))
]


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("APEX4_GEMM", raising=False)
    yield


def choose(m: int, n: int, blocks: int, out: str = "bf16", forced: str | None = None) -> Sm90S8Plan:
    return choose_sm90_s8(90, SMS, m, n, blocks, 1, out, PlanSource(forced, 0), measured=False)


def test_every_configuration_fits_a_multiprocessor() -> None:
    configs = all_configs(90)
    assert {config.tile_m for config in configs} >= {256, 128, 16, 8} and not all_configs(80)
    assert len({config.name for config in configs}) == len(configs)
    for config in configs:
        assert config.shared_bytes <= SHARED_LIMITS[90][0] and config.shared_bytes % 128 == 0, config.name


@pytest.mark.parametrize(("m", "n", "blocks"), SHAPES)
def test_plans_cover_the_shape(m: int, n: int, blocks: int) -> None:
    options = candidates(SMS, m, n, blocks, "bf16")
    assert choose(m, n, blocks) in options
    for plan in options:
        config = plan.config
        tiles = plan.arguments[1] * plan.arguments[2]
        assert config.tile_m * plan.arguments[1] >= m and config.tile_n * plan.arguments[2] >= n
        assert config.few_tokens or config.tile_n == 128
        assert not config.few_tokens or m <= min(FEW_TOKENS, 2 * config.tile_m)
        (blocks_of_grid, *others) = plan.grid
        assert others == [1, 1] and blocks_of_grid % plan.cluster == 0
        if plan.span:
            assert blocks_of_grid * plan.span >= tiles * blocks > (blocks_of_grid - 1) * plan.span
            assert plan.workspace_words == plan.counters * plan.parts * config.tile_m * 64
            spans_of_a_tile = max(
                (first + blocks - 1) // plan.span - first // plan.span + 1 for first in range(0, tiles * blocks, blocks)
            )
            assert spans_of_a_tile <= plan.parts
        else:
            assert blocks_of_grid <= SMS and plan.parts == 1 and plan.workspace_words == 0


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for plan in candidates(SMS, 40, 4096, 32, "fp16"):
        assert choose(40, 4096, 32, "fp16", plan.label) == plan
    assert choose(300, 4096, 32, forced="sm90_s8_m128n128s8").span == 0
    for wrong in ("sm90_s8_m128n128s9", "sm90_s8_m8n64s10/3", "sm90_m128n128s6", "sm90_s8_m8n64s10/x"):
        with pytest.raises(UsageError, match=r"names no kernel for 8-bit activations here.*sm90_s8_m256n128s5"):
            choose(300, 4096, 32, forced=wrong)
    assert explain(SMS, 1, 4096, 32).count("\n") >= 1 and explain(SMS, 1, 4096, 32).splitlines()[0].endswith(
        choose(1, 4096, 32).label
    )


def test_the_gpu_gets_them() -> None:
    plan = choose_eight_bit_gemm(90, SMS, 2048, 4096, 32, 1, "bf16", NOTHING)
    assert isinstance(plan, Sm90S8Plan) and plan.config.tile_m == 256


def test_measured_winners_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    key = tuned.key(2048, 4096, 32, 1, "bf16", activation_bits=8)
    assert key != tuned.key(2048, 4096, 32, 1, "bf16")
    monkeypatch.setattr(tuned, "winners", lambda sm, sm_count: {key: {"plan": "sm90_s8_m128n128s8/0"}})
    source = PlanSource(None, 1)
    assert choose_sm90_s8(90, SMS, 2048, 4096, 32, 1, "bf16", source).config.tile_m == 128
    assert choose_sm90_s8(90, SMS, 2048, 4096, 32, 1, "bf16", source, measured=False).config.tile_m == 256


# ---- machine code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", all_configs(90), ids=lambda config: config.name)
def test_it_compiles_without_spills_and_with_little_to_do_for_a_group(config: Sm90S8Config) -> None:
    compiled = compile_kernel(config.source, config.defines, "sm_90a")
    assert compiled.warnings == ""
    assert compiled.resources.spill_store_bytes == compiled.resources.stack_bytes == 0
    assert compiled.resources.registers * 32 * -(-config.threads // 128) * 4 <= 65536
    try:
        sass.find_nvdisasm()
    except Exception as error:
        pytest.skip(str(error))
    function = sass.parse(sass.disassemble(compiled.cubin))[config.entry]
    loop = sass.count(sass.main_loop(function))
    if (
        config.few_tokens
    ):  # a group's sums are scaled: one FFMA each, and two FADD for the ratios of both rows of a tile
        tiles = config.tiles_n
        assert loop.classes["ffma"] == loop.products == config.tile_m / 2 * tiles
        if config.tile_m >= WARPGROUPS_FROM:  # and one I2F
            assert loop.classes["i2f"] == loop.products and loop.classes["fadd"] == 2 * tiles
            assert loop.opcodes[f"IGMMA.64x{config.tile_m}x32.S8.S8"] == 4 * tiles
            assert not {"fmul", "convert", "half", "spill"} & set(loop.classes)
            return
        assert loop.classes["fadd"] == loop.products + 2 * tiles  # and one FADD
        assert (
            loop.opcodes["IMMA.16832.S8.S8"] == config.tile_m / 2 * tiles
            and loop.opcodes["LDSM.16.M88.4"] == config.tile_m / 4
        )
        assert not {"fmul", "i2f", "convert", "half", "spill"} & set(loop.classes)
        return
    assert any(opcode == f"IGMMA.64x{config.tile_m}x32.S8.S8" for opcode in loop.opcodes)
    assert not {"ffma", "fmul", "fadd", "i2f", "convert", "half", "spill"} & set(loop.classes)
