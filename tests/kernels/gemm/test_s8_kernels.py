"""gemm_s8.cu without a GPU: plans, every configuration compiled, and its own source run on a CPU against exact sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels.gemm import s8_configs
from apex4_quant.kernels.gemm.configs import plan_source
from apex4_quant.kernels.gemm.eight_bit import choose_eight_bit_gemm
from apex4_quant.kernels.gemm.s8_configs import ARCHITECTURES, SHARED_LIMITS, S8Config, S8Plan, all_configs, candidates
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.compiler import arch_of, compile_kernel

from ... import cuda_on_cpu
from ...kernel_cases import s8

STATIC_SHARED = 128  # `origin`, up to where the dynamic part starts
SM_COUNTS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("APEX4_GEMM", raising=False)
    yield


# ---- configurations and plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_configuration_fits_a_multiprocessor(sm: int) -> None:
    a_block, a_multiprocessor = SHARED_LIMITS[sm]
    configs = all_configs(sm)
    assert len({config.name for config in configs}) == len(configs)
    for config in configs:
        assert config.shared_bytes + STATIC_SHARED <= a_block, config.name
        taken = s8_configs.resident(sm, config) * (config.shared_bytes + STATIC_SHARED + (1024 if sm >= 80 else 0))
        assert 0 < taken <= a_multiprocessor, config.name
        if sm >= 80:
            assert s8_configs.resident(sm, config) >= 2, "one multiplies while the other widens"


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_heuristic_takes_small_tiles_for_few_tokens_and_fills_the_gpu(sm: int) -> None:
    count = SM_COUNTS[sm]

    def plan(m: int, n: int, blocks: int) -> S8Plan:
        return s8_configs.choose_s8(sm, count, m, n, blocks, 1, "bf16", plan_source())

    assert plan(1, 4096, 32).config.tile_m == 16
    assert plan(1, 512, 112).splits > 1
    assert plan(8192, 8192, 64).config.tile_m == 128 and plan(8192, 8192, 64).splits == 1
    for m, n, blocks in ((1, 8, 1), (17, 1000, 3), (100, 4096, 32), (300, 28672, 64)):
        chosen, options = plan(m, n, blocks), candidates(sm, count, m, n, blocks, "bf16")
        assert chosen in options and len(set(options)) == len(options)
        for option in options:
            ends = [blocks * split // option.splits for split in range(option.splits + 1)]
            assert all(first < last for first, last in pairwise(ends)), "a thread block without a block"
            assert option.grid == (option.counters, option.splits, 1)
            words = option.counters * option.splits * option.config.tile_m * option.config.tile_n
            assert option.workspace_words == (words if option.splits > 1 else 0)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_variable_names_a_plan(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = all_configs(sm)[-1].tile_name
    monkeypatch.setenv("APEX4_GEMM", f"{name}/3")
    plan = choose_eight_bit_gemm(sm, SM_COUNTS[sm], 40, 1000, 40, 2, "fp16")
    assert (plan.config.name, plan.arguments, plan.parts) == (f"{name}_fp16", (3,), 3)
    assert isinstance(plan, S8Plan) and plan.label == f"{name}/3"
    for wrong in (f"{name}/0", f"{name}/33", f"{name}/x", "s8_m128"):
        monkeypatch.setenv("APEX4_GEMM", wrong)
        with pytest.raises(
            UsageError, match=f"^APEX4_GEMM='{wrong}' names no kernel for 8-bit activations here: .*{name}"
        ):
            choose_eight_bit_gemm(sm, SM_COUNTS[sm], 40, 1000, 40, 2, "fp16")
    monkeypatch.setenv("APEX4_GEMM", f"{name}/3")
    with pytest.raises(UsageError, match="names no kernel"):
        choose_eight_bit_gemm(sm, SM_COUNTS[sm], 40, 1000, 2, 2, "fp16")


def test_an_architecture_without_kernels() -> None:
    with pytest.raises(Apex4Error, match="no kernel for 8-bit activations for sm_87"):
        choose_eight_bit_gemm(87, 16, 1, 64, 1, 1, "bf16")


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_configuration_compiles_without_spills(sm: int) -> None:
    for config in all_configs(sm):
        try:
            compiled = compile_kernel(config.source, config.defines, arch_of(sm))
        except Apex4Error as error:
            if "needed" in str(error):
                pytest.skip(str(error))
            raise
        assert compiled.warnings == "", config.name
        used = compiled.resources
        assert used.spill_store_bytes == used.spill_load_bytes == 0, config.name
        # What the heuristic counts with.
        fits = 65536 // (-(-used.registers // 8) * 8 * config.threads)
        assert fits >= s8_configs.resident(sm, config), (config.name, used.registers)


# ---- the kernel's source on a CPU -----------------------------------------------------------------------------------

UNTOUCHED = 12345.0
M16, M32 = S8Config(16, 128, 2), S8Config(32, 128, 3, "fp16")
M64, M128 = S8Config(64, 128, 3), S8Config(128, 128, 2)


Case = tuple[S8Plan, int, int]  # a plan, blocks of a group, columns that y has more
CASES: list[Case] = [
    (S8Plan(M16, 1, 8, 1), 1, 0), (S8Plan(M16, 17, 200, 6, 2), 3, 8), (S8Plan(M16, 5, 133, 5, 5), 1, 3),
    (S8Plan(M32, 33, 136, 4), 4, 0), (S8Plan(M32, 3, 64, 7, 3), 1, 3), (S8Plan(M64, 70, 192, 5, 2), 5, 0),
    (S8Plan(M128, 130, 136, 3), 1, 8), (S8Plan(M128, 16, 321, 2, 2), 2, 3),
]  # fmt: skip


def problems(case: Case) -> list[str]:
    """What is wrong with a launch; empty if nothing is."""
    plan, per_group, pad = case
    generator = torch.Generator().manual_seed(plan.m * 1000 + plan.n)
    operands = s8.random_operands(plan.m, plan.n, plan.k_blocks, per_group, generator, bias=plan.n != 64)
    launch = s8.Launch(plan, operands, pad)
    around = plan.config.tile_m * launch.ldy + plan.config.tile_n  # also a kernel that is wrong stays in here
    memory = torch.full((launch.y.numel() + 2 * around + 8,), UNTOUCHED, dtype=launch.y.dtype)
    first = -(-around // 8) * 8
    launch.y = memory[first : first + launch.y.numel()].view_as(launch.y)
    launch.pointers[0] = launch.y.data_ptr()
    try:
        y = launch.run().clone()
        again = launch.run() if plan.splits > 1 else y
    except cuda_on_cpu.KernelFault as fault:
        return [str(fault)]
    want = s8.expected(operands, y.dtype)
    found = [] if s8.same(y, want) else [f"{int((y != want).sum())} outputs of {y.numel()} are wrong"]
    if not s8.same(again, y):
        found.append("the second launch gives something else")
    beside = torch.cat([memory[:first], memory[first + launch.y.numel() :], launch.y[:, plan.n :].flatten()])
    if not bool((beside == UNTOUCHED).all()):
        found.append("wrote outside of y")
    if launch.counter.any():
        found.append("counters are not zero again")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].config.name} {case[0].m}x{case[0].n}")
def test_outputs_are_those_of_integer_sums(case: Case, on_cpu: None) -> None:
    assert problems(case) == []


def test_sums_at_the_ends_of_the_range(on_cpu: None) -> None:
    """Every magnitude with many ratios, both signs: the widening of gemm/folded_weights.cuh on the way."""
    s8.check_integers(replace(M16, tile_m=16), torch.Generator().manual_seed(1))


def test_huge_tiny_and_undefined_scales(on_cpu: None) -> None:
    s8.check_extremes(M16, torch.Generator().manual_seed(2))


KERNEL, SHARED, FOLD, INDEX = "gemm_s8.cu", "gemm_mma_sync.cuh", "folded_weights.cuh", "index.cuh"
FEW, SPLIT = CASES[1], CASES[2]
MUTATIONS: dict[str, tuple[list[tuple[str, str, str]], Case]] = {
    "row of ldmatrix": ([(INDEX, "s8_ldmatrix_row, (int lane), lane & 7)", "s8_ldmatrix_row, (int lane), lane & 3)")], FEW),
    "chunk of ldmatrix": ([(INDEX, "4 * half + (lane >> 3))", "2 * half + (lane >> 3))")], FEW),
    "order of ratios": ([(INDEX, "16 * warp + 2 * (lane >> 2))", "16 * warp + 2 * (lane >> 2 ^ 1))")], FEW),
    "rounding": ([(FOLD, "ROUND = 0x00800080", "ROUND = 0x007f007f")], FEW),
    "signs of the second half": ([(FOLD, "word << 4, 0xbfae", "word << 4, 0xfbea")], FEW),
    "negative codes forwards": ([(FOLD, "pair(-4)", "pair(-3)")], FEW),
    "a borrow of the next half": ([(FOLD, "ROUND = 0x0080007f", "ROUND = 0x007f007f")], FEW),
    "group of a split": ([(KERNEL, "blocks_left = (group + 1) * p.blocks_per_group - kb;", "blocks_left = p.blocks_per_group;")], (S8Plan(M16, 17, 200, 6, 3), 3, 0)),
    "wait": ([(KERNEL, "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>")], FEW),
    "barrier": ([(KERNEL, "__syncthreads();  // the stage", "// the stage")], (S8Plan(M16, 17, 200, 12), 1, 0)),
    "stages left before y": ([(KERNEL, "__syncthreads();  // everyone has left the stages", "")], (S8Plan(M16, 5, 133, 1), 1, 0)),
    "counter": ([(SHARED, "if (last) counter[tile] = 0;", "")], SPLIT),
    "own part twice": ([(KERNEL, "if (s == split) continue;", "")], SPLIT),
    "edge": ([(KERNEL, "vectors && n0 + column + 8 <= p.n", "vectors")], (S8Plan(M16, 5, 133, 1), 1, 3)),
    "outputs trade": ([(KERNEL, "odd ? 0x3276 : 0x5410", "odd ? 0x7632 : 0x5410")], FEW),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged(cpu_launcher: Any) -> Any:
    return cuda_on_cpu.CpuLauncher((), "-O0")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_noticed(name: str, on_cpu: None, unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edits, case = MUTATIONS[name]
    monkeypatch.setattr(launcher, "kernel", unchanged.kernel)
    assert problems(case) == []
    monkeypatch.setattr(launcher, "kernel", cuda_on_cpu.CpuLauncher(edits, "-O0").kernel)
    assert problems(case) != []
