"""The kernels of experts without a GPU: plans, every configuration compiled, and their own source run on a CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.experts import configs
from apex4_quant.kernels.experts.configs import (
    ExpertConfig,
    choose_experts,
    expected_tiles,
    gemm_configs_of,
    most_tiles,
    why_none,
)
from apex4_quant.kernels.gemm.s8_configs import SHARED_LIMITS
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.architectures import ARCHITECTURES
from apex4_quant.kernels.runtime.compiler import arch_of, compile_kernel

from ... import cuda_on_cpu
from ...kernel_cases import experts as cases

QWEN = ((1536, 16), (2048, 6))  # Qwen3-30B-A3B: outputs and blocks of the two products
MIXTRAL = ((28672, 32), (4096, 112))


# ---- configurations and plans ----------------------------------------------------------------------------------------


def test_which_experts_have_kernels() -> None:
    assert [sm for sm in (*ARCHITECTURES, 87) if why_none(sm, "s8", 4) is None] == list(ARCHITECTURES)
    assert why_none(86, "sm80", 1) is None
    assert why_none(86, "sm80", 2) == "there is none for 4-bit activations with groups of 256"
    assert why_none(90, "sm90", 1) == "there is none for 4-bit activations on sm_90"
    assert why_none(87, "s8", 1) == "there is none for 8-bit activations on sm_87"


@pytest.mark.parametrize(
    ("choices", "experts", "rows", "most"), [(8, 128, 16, 8), (1, 4, 16, 1), (512, 128, 16, 152), (64, 4, 16, 7), (4, 4, 64, 4)]
)  # fmt: skip
def test_there_is_room_for_every_split_of_choices(choices: int, experts: int, rows: int, most: int) -> None:
    assert most_tiles(choices, experts, rows) == most
    chosen = min(experts, choices)
    worst = [1] * (chosen - 1) + [choices - chosen + 1]  # as many tiles as can be that are not full
    assert sum(-(-count // rows) for count in worst) <= most


@pytest.mark.parametrize(
    ("choices", "experts", "rows"), [(1, 4, 16), (30, 4, 16), (16, 1, 16), (2048, 128, 16), (70, 3, 32)]
)
def test_tiles_of_choices_that_fall_anywhere(choices: int, experts: int, rows: int) -> None:
    draws = np.random.default_rng(5).multinomial(choices, [1 / experts] * experts, size=4000)
    mean = (-(-draws // rows)).sum(1).mean()
    spread = (-(-draws // rows)).sum(1).std() / 4000**0.5
    assert mean - 4 * spread <= expected_tiles(choices, experts, rows) <= math.ceil(mean + 4 * spread)


# Choices of a layer on an H200, experts, and the rows of the tile that was fastest (docs/kernel_measurements.md, item 17).
FASTEST = [
    (8, 128, 16), (1024, 128, 16), (2048, 128, 32), (4096, 128, 64), (16384, 128, 64), (64, 8, 16), (128, 8, 32), (1024, 8, 64),
    (4096, 8, 128),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "experts", "rows"), FASTEST)
def test_the_fastest_tile_is_chosen(choices: int, experts: int, rows: int) -> None:
    plans = choose_experts(90, 132, choices, experts, QWEN if experts == 128 else MIXTRAL, "s8", "bf16")
    assert {each.config.tile_m for each in plans} == {rows}


@pytest.mark.parametrize("format", ["s8", "sm80"])
def test_plans(format: str) -> None:
    sm, count = (90, 132) if format == "s8" else (86, 84)

    def plan(tokens: int, top_k: int, experts: int, shapes: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
        return choose_experts(sm, count, tokens * top_k, experts, shapes, format, "bf16")

    for tokens, rows in ((1, 16), (64, 16), (4096, 128)):
        plans = plan(tokens, 8, 128, QWEN)
        assert {each.config.tile_m for each in plans} == {rows}, "one table of tiles serves both products"
        assert all(each.tiles_m == most_tiles(8 * tokens, 128, rows) for each in plans)
    assert plan(1, 1, 4, ((256, 16), (256, 16)))[0].splits > 1, "few tiles are shared"
    assert all(each.splits == 1 for each in plan(512, 2, 8, MIXTRAL))
    for each in plan(1, 2, 8, ((512, 8), (512, 8))):
        words = each.counters * each.splits * each.config.tile_m * each.config.tile_n
        assert each.workspace_words == (words if each.splits > 1 else 0)
        assert each.grid == (each.counters, each.splits, 1) and each.m == each.tiles_m * each.config.tile_m
    with pytest.raises(Apex4Error, match="no kernel for experts with activations in the format s8 for sm_87"):
        choose_experts(87, 16, 8, 4, QWEN, "s8", "bf16")


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_configuration_compiles_without_spills(sm: int) -> None:
    found = configs.all_configs(sm)
    assert len({each.name for each in found}) == len(found) > 8
    for each in found:
        try:
            compiled = compile_kernel(each.source, each.defines, arch_of(sm))
        except Apex4Error as error:
            if "needed" in str(error):
                pytest.skip(str(error))
            raise
        used = compiled.resources
        assert compiled.warnings == "", each.name
        assert used.spill_store_bytes == used.spill_load_bytes == 0, each.name
        shared = used.static_shared_bytes + int(each.defines.get("SHARED_BYTES", 0))
        assert shared <= SHARED_LIMITS[sm][0], each.name


# ---- the kernels' source on a CPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_launcher() -> Any:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    return cuda_on_cpu.CpuLauncher((), "-O0")


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FAR = torch.tensor([-1, 0, 2, -1, 1, 3], dtype=torch.int32)


def route_problems(case: str) -> list[str]:
    try:
        if case == "many":  # more than the threads of a thread block read at once
            cases.check_route(cases.ids_of("spread", 1200, 2, 8, generator()).int(), 8, 64)
        elif case == "map":
            cases.check_route(cases.ids_of("spread", 37, 3, 6, generator()), 4, 32, FAR)
        else:
            tokens, top_k, experts = (1, 8, 128) if case == "decode" else (37, 3, 5)
            cases.check_route(cases.ids_of(case, tokens, top_k, experts, generator()), experts, 32)
    except (AssertionError, cuda_on_cpu.KernelFault) as problem:
        return [str(problem)]
    return []


@pytest.mark.parametrize("case", [*cases.ID_CASES, "decode", "map", "many"])
def test_the_router(case: str, on_cpu: None) -> None:
    assert route_problems(case) == []


def config_of(format: str, rows: int, out: str = "bf16") -> ExpertConfig:
    return next(each for each in gemm_configs_of(86, format) if (each.tile_m, each.out) == (rows, out))


# rows of the experts: none, one, more than a tile, all in one; n, blocks, blocks of a group, splits, divisor, columns more
Case = tuple[str, int, list[int], int, int, int, int, int, int]
CASES: dict[str, Case] = {
    "ragged": ("s8", 16, [0, 1, 19, 0, 5], 136, 5, 1, 2, 3, 3),
    "all in one": ("s8", 16, [0, 0, 33, 0], 64, 4, 2, 1, 1, 0),
    "one expert": ("s8", 32, [40], 200, 3, 3, 3, 2, 8),
    "large tiles": ("s8", 128, [130, 0, 2], 136, 2, 1, 1, 1, 0),
    "4 bits, ragged": ("sm80", 16, [0, 1, 19, 0, 5], 136, 5, 1, 2, 3, 3),
    "4 bits, all in one": ("sm80", 32, [0, 0, 40, 0], 64, 3, 1, 1, 1, 0),
    "4 bits, large tiles": ("sm80", 128, [130, 0, 2], 136, 2, 1, 1, 2, 0),
}


def problems(case: Case) -> list[str]:
    format, rows, counts, n, blocks, per_group, splits, divisor, pad = case
    launch = cases.Launch(
        config_of(format, rows), counts, n, blocks, per_group, splits, generator(), divisor=divisor, pad_columns=pad
    )
    try:
        return launch.problems()
    except cuda_on_cpu.KernelFault as fault:
        return [str(fault)]


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_every_expert(case: str, on_cpu: None) -> None:
    assert problems(CASES[case]) == []


def test_many_experts(on_cpu: None) -> None:
    """128 experts of which most have no row."""
    counts = [0] * 128
    counts[3], counts[64], counts[127] = 2, 17, 1
    assert problems(("s8", 16, counts, 64, 1, 1, 1, 1, 0)) == []


def sum_problems(aligned: bool, dtype: torch.dtype) -> list[str]:
    """combine.cu against the same operations in float32, bit for bit."""
    tokens, top_k, n, experts = 5, 3, 24 if aligned else 21, 4
    made = generator(3)
    outputs = torch.randn(tokens * top_k, n, generator=made).to(dtype)
    weights = torch.rand(tokens, top_k, generator=made)
    ids = cases.ids_of("some far away", tokens, top_k, experts, made)
    local = cases.local_ids(ids, experts, None).reshape(ids.shape)
    outputs[local.flatten() < 0] = float("nan")  # nobody has written there
    y = torch.full((tokens, n), float("nan"), dtype=dtype)
    numbers = [top_k, n, 2, experts, experts, int(aligned)]
    config = configs.combine_config("bf16" if dtype == torch.bfloat16 else "fp16")
    cases.run(config, (tokens, 1, 1), 128, [y, outputs, weights, ids, None], numbers, 0)
    want = torch.zeros(tokens, n, dtype=torch.float64)
    for place in range(top_k):
        term = outputs.view(tokens, top_k, n)[:, place].double() * weights[:, place, None].double()
        want += torch.where(local[:, place, None] >= 0, term, 0.0)
        want = want.float().double()  # as fma rounds
    return (
        [] if torch.equal(y, want.to(torch.float32).to(dtype)) else [f"{int((y != want.to(dtype)).sum())} sums differ"]
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weighted_sum(aligned: bool, dtype: torch.dtype, on_cpu: None) -> None:
    assert sum_problems(aligned, dtype) == []


ROWS, CODES, EIGHT, FOUR = "tile_rows.cuh", "gemm_mma_sync.cuh", "gemm_s8.cu", "gemm_sm80.cu"
ROUTE, SUM = "route.cu", "combine.cu"
MUTATIONS: dict[str, tuple[tuple[str, str, str], Any]] = {
    "divisor": ((ROWS, ") / divisor", ")"), CASES["ragged"]),
    "first row of a tile": ((ROWS, "tile.y + row", "row"), CASES["ragged"]),
    "target": ((ROWS, "sorted : target_rows[sorted]", "sorted : sorted"), CASES["ragged"]),
    "units of an expert": ((ROWS, "tile.x * units", "tile.x"), CASES["ragged"]),
    "rows of a tile": ((ROWS, "rows = tile.z", "rows = TILE_M"), CASES["ragged"]),
    "chunks of a row": ((CODES, "place(rows.source(row), chunk)", "place(rows.source(row), chunk_wr)"), CASES["ragged"]),
    "weights": ((ROWS, "w_packed += expert_tiles * k_blocks", "w_packed += k_blocks"), CASES["ragged"]),
    "ratios": ((ROWS, "w_scale += expert_tiles * groups", "w_scale += groups"), CASES["ragged"]),
    "scales of tokens": ((EIGHT, "p.a_scale[rows.source(token)]", "p.a_scale[token]"), CASES["ragged"]),
    "4 bits: chunks of a row": ((CODES, "place(rows.source(row), chunk)", "place(rows.source(row), chunk_wr)"), CASES["4 bits, ragged"]),
    "4 bits: scales of tokens": ((FOUR, "a_scale_gmem_rd + rows.source(row)", "a_scale_gmem_rd + row"), CASES["4 bits, ragged"]),
    "4 bits: their group": ((FOUR, "a_scale_gmem_rd += p.m_stride;", ""), CASES["4 bits, ragged"]),
    "4 bits: target": ((FOUR, "rows.target(row)", "row"), CASES["4 bits, ragged"]),
    "route: before this expert": ((ROUTE, "if (expert < own) sum[0]", "if (expert <= own) sum[0]"), "spread"),
    "route: small tiles": ((ROUTE, "(count + small_tile_rows - 1) / small_tile_rows", "(count + tile_rows - 1) / tile_rows"), "spread"),
    "route: order": ((ROUTE, "((1u << lane) - 1)", "~((2u << lane) - 1)"), "spread"),
    "route: next load": ((ROUTE, "place += __popc(matches[i]);", ""), "many"),
    "route: other warps": ((ROUTE, "if (w < warp) place", "if (w <= warp) place"), "many"),
    "route: words of an id": (("routing.cuh", "index) * id_words", "index)"), "spread"),
    "route: where experts are": (("routing.cuh", "id = expert_map[id];", "id = id;"), "map"),
    "route: tiles that are none": ((ROUTE, "table[tile] = make_int4(-1, 0, 0, 0)", "table[tile] = make_int4(0, 0, 0, 0)"), "all in one"),
    "sum: weights": ((SUM, "const float weight = weights[choice];", "const float weight = weights[j];"), None),
    "sum: experts that are not here": ((SUM, "if (routing.expert(choice) < 0) continue;", ""), None),
    "sum: columns": ((SUM, "words[c / 2] >> 16 * (c % 2)", "words[c / 2] >> 8 * (c % 2)"), None),
}  # fmt: skip


def _problems(case: Any) -> list[str]:
    if case is None:
        return sum_problems(True, torch.bfloat16)
    return route_problems(case) if isinstance(case, str) else problems(case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_noticed(name: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, case = MUTATIONS[name]
    assert _problems(case) == []
    monkeypatch.setattr(launcher, "kernel", cuda_on_cpu.CpuLauncher([edit], "-O0").kernel)
    assert _problems(case) != []
