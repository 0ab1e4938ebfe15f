"""The 8-bit GEMM of Hopper for few tokens, and the linear that is one kernel, from their own source on a CPU; without clusters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apex4_quant.kernels.gemm.sm90_s8_configs import Sm90S8Config, Sm90S8Plan, all_configs
from apex4_quant.kernels.runtime import launcher

from ... import cuda_on_cpu
from ...kernel_cases import s8

CONFIGS = {config.tile_name: config for config in all_configs(90) if config.few_tokens and config.out == "bf16"}
WIDE = next(config for config in CONFIGS.values() if config.tiles_n == 2)
M8, M16 = (next(config for config in CONFIGS.values() if config.tile_m == rows) for rows in (8, 16))
UNTOUCHED = 12345.0
MULTIPROCESSORS = 2  # a thread block takes several tiles
# A configuration; tokens, outputs, blocks, blocks of a group, columns that y has more: a ring that wraps, ragged in all directions,
# an odd number of tiles of weights.
Case = tuple[Sm90S8Config, int, int, int, int, int]
CASES: list[Case] = [
    (M8, 3, 200, 45, 1, 3),
    (M16, 17, 136, 6, 3, 0),
    (WIDE, 33, 300, 17, 1, 4),
    (WIDE, 20, 128, 3, 3, 3),
]


@pytest.fixture(scope="module")
def cpu_launcher() -> Any:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    return cuda_on_cpu.CpuLauncher()


@pytest.fixture
def on_cpu(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))


def problems(case: Case) -> list[str]:
    """What is wrong with a launch; empty if nothing is."""
    config, m, n, blocks, per_group, pad = case
    operands = s8.random_operands(m, n, blocks, per_group, torch.Generator().manual_seed(m + n), bias=n != 128)
    launch = s8.Launch(Sm90S8Plan(config, m, n, blocks, MULTIPROCESSORS), operands, pad)
    around = config.tile_m * launch.ldy + config.tile_n  # also a kernel that is wrong stays in here
    memory = torch.full((launch.y.numel() + 2 * around + 8,), UNTOUCHED, dtype=launch.y.dtype)
    first = -(-around // 8) * 8
    launch.y = memory[first : first + launch.y.numel()].view_as(launch.y)
    launch.pointers[0] = launch.y.data_ptr()
    try:
        y = launch.run()
    except cuda_on_cpu.KernelFault as fault:
        return [str(fault)]
    found = [f"{wrong} outputs are wrong"] if (wrong := s8.wrong(config, y, operands)) else []
    beside = torch.cat([memory[:first], memory[first + launch.y.numel() :], launch.y[:, n:].flatten()])
    if not bool((beside == UNTOUCHED).all()):
        found.append("wrote outside of y")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].tile_name} {case[1]}x{case[2]}x{case[3]}")
def test_outputs_are_within_the_roundings(case: Case, on_cpu: None) -> None:
    assert problems(case) == []


KERNEL, SHARED, INDEX = "gemm_sm90_decode_s8.cu", "decode_sm90.cuh", "index.cuh"
MUTATIONS: dict[str, tuple[tuple[str, str, str], Case]] = {
    "the second tile of weights": ((KERNEL, "w_lane + t * PARTS * WEIGHT_TILE_BYTES", "w_lane"), CASES[2]),
    "its ratios": ((KERNEL, "ratio_lane + t * PARTS * WEIGHT_SCALE_BYTES", "ratio_lane"), CASES[2]),
    "where it is copied to": ((SHARED, "w_packed) + t * PARTS * WEIGHT_TILE_BYTES", "w_packed) + t * WEIGHT_TILE_BYTES"), CASES[2]),
    "its units": ((KERNEL, "t * WEIGHT_TILE_N + 16 * warp", "16 * warp"), CASES[2]),
    "its place in y": ((KERNEL, "t * TILE_M + row, chunk", "row, chunk"), CASES[2]),
    "a block past the end": ((KERNEL, "block + part < p.k_blocks ? ratios : 0", "ratios"), (M8, 3, 64, 5, 1, 0)),
    "where sums start": ((KERNEL, "START_VALUE = 12582912.0f", "START_VALUE = 12582911.0f"), CASES[1]),
    "order of the tokens' codes": (("exact_fragments.cuh", "0x6420", "0x6240"), CASES[1]),
    "sums of others": ((SHARED, "other < PARTS - 1; ++other", "other < PARTS - 2; ++other"), CASES[0]),
    "a stage that is left late": ((KERNEL, "if (ptx::elect_one()) ptx::barrier_arrive(stage", "if (false) ptx::barrier_arrive(stage"), CASES[0]),
    "the ring's parity": ((SHARED, "parity ^= 1;\n  }\n};", "parity ^= 0;\n  }\n};"), CASES[0]),
    "edge": ((KERNEL, "vectors && column + 8 <= p.n", "vectors"), (M8, 3, 196, 4, 1, 4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def unchanged() -> Any:
    return cuda_on_cpu.CpuLauncher((), "-O0")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_noticed(name: str, on_cpu: None, unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, case = MUTATIONS[name]
    monkeypatch.setattr(launcher, "kernel", unchanged.kernel)
    assert problems(case) == []
    monkeypatch.setattr(launcher, "kernel", cuda_on_cpu.CpuLauncher([edit], "-O0").kernel)
    assert problems(case) != []
