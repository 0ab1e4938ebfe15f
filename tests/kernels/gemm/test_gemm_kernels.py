"""The GEMM kernels without a GPU: plans, every configuration compiled, and gemm_sm80.cu's own source run on a CPU against
the reference (tests/cuda_on_cpu)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.layout_name import KERNEL_TILE_N
from apex4_quant.format.number_format import BLOCK
from apex4_quant.kernels import reference
from apex4_quant.kernels.gemm import configs as gemm_configs
from apex4_quant.kernels.gemm.configs import (
    SHARED_LIMITS,
    GemmConfig,
    GemmPlan,
    all_configs,
    candidates,
    choose_gemm,
    explain,
)
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.compiler import arch_of, compile_kernel

from ... import cuda_on_cpu
from ...kernel_cases import gemm as kernel_cases

ROOT = Path(__file__).resolve().parents[3]
SM_COUNTS = {80: 108, 86: 82, 89: 128, 90: 132}
SYSTEM_SHARED = 1024  # of every thread block
STATIC_SHARED = {80: 128, 86: 128, 89: 128, 90: 0}  # `origin` of gemm_sm80.cu, up to where the dynamic part starts


# ---- configurations and plans ---------------------------------------------------------------------------------------

SHAPES = [
    (m, n, blocks)
    for m in (1, 16, 17, 100, 8192)
    for n, blocks in ((8, 1), (64, 3), (4096, 32), (1000, 112), (28672, 64), (128256, 32))
]


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("APEX4_GEMM", raising=False)
    yield


@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_every_configuration_fits_a_multiprocessor(sm: int) -> None:
    a_block, a_multiprocessor = SHARED_LIMITS[sm]
    assert a_block + SYSTEM_SHARED == a_multiprocessor
    configs = all_configs(sm)
    assert len({config.name for config in configs}) == len(configs)
    for config in configs:
        shared = config.shared_bytes + STATIC_SHARED[sm]
        assert shared <= a_block, config.name
        assert config.threads % 32 == 0 and config.threads <= 1024, config.name
        assert config.defines["SHARED_BYTES"] == config.shared_bytes
        assert (
            config.tile_n % KERNEL_TILE_N == 0 and config.tile_m % (8 if sm == 90 else gemm_configs.ROW_ALIGNMENT) == 0
        )
        if config.family == "sm80":
            resident = gemm_configs._resident(sm, config)
            assert resident >= 1 and resident * (shared + SYSTEM_SHARED) <= a_multiprocessor, config.name
            assert config.tile_m % (16 * config.warps_m) == 0 and config.tile_n % (32 * config.warps_n) == 0
    for out in ("bf16", "fp16"):
        kinds = [config.wide_groups for config in configs if config.out == out]
        assert (sm == 90 and not any(kinds)) or set(kinds) == {True, False}  # sm90 has one kernel for all groups


def test_an_ada_gpu_runs_what_ampere_runs() -> None:
    assert all_configs(89) == all_configs(86) and all_configs(75) == []


@pytest.mark.parametrize("sm", SHARED_LIMITS)
@pytest.mark.parametrize("out", ["bf16", "fp16"])
def test_a_chosen_plan_is_the_best_candidate_and_can_be_launched(sm: int, out: str) -> None:
    for m, n, blocks in SHAPES:
        for per_group in {1, blocks}:
            plan = choose_gemm(sm, SM_COUNTS[sm], m, n, blocks, per_group, out)
            options = candidates(sm, SM_COUNTS[sm], m, n, blocks, per_group, out)
            assert plan in options and plan.config in all_configs(sm) and len(set(options)) == len(options)
            assert gemm_configs.clocks(sm, plan) == min(gemm_configs.clocks(sm, option) for option in options)
            for option in options:
                config = option.config
                assert config.out == out and config.wide_groups == (per_group > 1 and sm != 90)
                assert config.tile_m == (8 if sm == 90 else 16) or config.tile_m < 2 * m
                assert (option.m, option.n, option.k_blocks, option.block) == (m, n, blocks, config.threads)
                launchable(option)


def launchable(plan: GemmPlan) -> None:
    config = plan.config
    tiles = -(-plan.m // config.tile_m) * -(-plan.n // config.tile_n)
    assert plan.grid[0] < 2**31 and plan.grid[1] <= 65535 and plan.grid[2] == 1
    if config.family == "sm80":
        assert plan.grid == (tiles, plan.splits, 1) and plan.cut == plan.parts == plan.splits
        assert plan.arguments == (plan.splits,)
        ends = [plan.k_blocks * split // plan.splits for split in range(plan.splits + 1)]
        assert all(first < last for first, last in pairwise(ends)), "a split without a block"
        assert plan.counters == tiles
        assert plan.workspace_floats == (tiles * plan.splits * config.tile_m * config.tile_n if plan.splits > 1 else 0)
        return
    assert plan.cut == (plan.cluster if config.few_tokens else plan.span) and (config.few_tokens or plan.cluster == 1)
    assert plan.arguments == (plan.span, -(-plan.m // config.tile_m), -(-plan.n // config.tile_n))
    if not plan.span:
        assert plan.grid == (min(tiles, plan.sm_count // plan.cluster) * plan.cluster, 1, 1)
        assert plan.parts == 1 and plan.workspace_floats == 0
        return
    assert not config.few_tokens
    assert (plan.grid[0] - 1) * plan.span < tiles * plan.k_blocks <= plan.grid[0] * plan.span
    starts = [tile * plan.k_blocks for tile in range(min(tiles, 50))]
    most = max((start + plan.k_blocks - 1) // plan.span - start // plan.span + 1 for start in starts)
    assert most <= plan.parts
    halves = -(-plan.m // config.tile_m) * -(-plan.n // KERNEL_TILE_N)
    assert plan.counters == halves
    assert plan.workspace_floats == halves * plan.parts * config.tile_m * KERNEL_TILE_N


@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_few_tokens_get_small_tiles_and_many_get_large_ones(sm: int) -> None:
    assert choose_gemm(sm, SM_COUNTS[sm], 1, 4096, 32, 1).config.tile_m == (8 if sm == 90 else 16)
    assert choose_gemm(sm, SM_COUNTS[sm], 8192, 8192, 64, 1).config.tile_m == 128
    shared = choose_gemm(sm, SM_COUNTS[sm], 1, 4096, 112, 1)  # tiles are shared where they do not fill the GPU
    assert (shared.cluster if sm == 90 else shared.parts) > 1


def test_bands_visit_every_tile_once() -> None:
    for tiles_m, tiles_n in ((1, 1), (1, 9), (7, 3), (8, 5), (9, 5), (21, 4)):
        visited = [kernel_cases.band_tile(index, tiles_m, tiles_n) for index in range(tiles_m * tiles_n)]
        assert sorted(visited) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]


@pytest.mark.parametrize(
    ("sm", "wanted", "per_group", "name", "cut"),
    [
        (80, "sm80_m64n128s5", 1, "sm80_m64n128s5_bf16", 1),
        (80, "sm80_m16n128s8/32", 1, "sm80_m16n128s8_bf16", 32),
        (80, "sm80_m64n128s5/3", 4, "sm80_m64n128s5_wide_bf16", 3),
        (86, "sm80_m128n256s3/2", 1, "sm80_m128n256s3_bf16", 2),
        (90, "sm90_m32n64s5", 1, "sm90_m32n64s5_bf16", 1),
        (90, "sm90_m16n64s8/2", 3, "sm90_m16n64s8_bf16", 2),
        (90, "sm90_m64n128s8", 1, "sm90_m64n128s8_bf16", 0),
        (90, "sm90_m128n128s6/5", 2, "sm90_m128n128s6_bf16", 5),
    ],
)
def test_the_environment_names_the_kernel(
    sm: int, wanted: str, per_group: int, name: str, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX4_GEMM", wanted)
    plan = choose_gemm(sm, SM_COUNTS[sm], 40, 1000, 40, per_group)
    assert (plan.config.name, plan.cut) == (name, cut)
    assert (plan.m, plan.n, plan.k_blocks, plan.sm_count) == (40, 1000, 40, SM_COUNTS[sm])
    assert plan.label == (wanted if "/" in wanted else f"{wanted}/{cut}")  # a label is taken again
    launchable(plan)


@pytest.mark.parametrize(
    ("sm", "wanted", "per_group"),
    [
        (80, "fastest", 1),
        (80, "sm80_m64n128s5_bf16", 1),
        (80, "sm90_m64n128s8", 1),
        (80, "sm80_m64n128s3", 1),  # of sm_86
        (80, "sm80_m32n128s6", 2),  # not for wide groups
        (80, "sm80_m64n128s5/0", 1),
        (80, "sm80_m64n128s5/33", 1),
        (80, "sm80_m64n128s5/-1", 1),
        (80, "sm80_m64n128s5/two", 1),
        (80, "sm80_m64n128s5/1/1", 1),
        (90, "sm90_m64n128s8/x", 1),
        (90, "sm80_m64n128s5", 1),
    ],
)
def test_a_kernel_that_is_not_there(sm: int, wanted: str, per_group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_GEMM", wanted)
    with pytest.raises(UsageError) as caught:
        choose_gemm(sm, SM_COUNTS[sm], 40, 1000, 40, per_group)
    sentence = str(caught.value)
    wide = per_group > 1 and sm != 90
    names = sorted({config.tile_name for config in all_configs(sm) if config.wide_groups == wide})
    assert sentence == (
        f"APEX4_GEMM={wanted!r} names no kernel here: give NAME or NAME/CUT with one of {', '.join(names)}"
    )


def test_no_more_splits_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_GEMM", "sm80_m16n128s8/4")
    assert choose_gemm(80, 108, 1, 64, 4, 1).splits == 4
    with pytest.raises(UsageError, match="names no kernel here"):
        choose_gemm(80, 108, 1, 64, 3, 1)


@pytest.mark.parametrize("sm", [75, 87, 100, 120])
def test_an_architecture_without_kernels(sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert candidates(sm, 48, 1, 64, 1, 1, "bf16") == []
    for wanted in ("", "sm80_m16n128s8"):
        monkeypatch.setenv("APEX4_GEMM", wanted)
        with pytest.raises(UsageError, match=f"^there is no W4A4 kernel for sm_{sm}$"):
            choose_gemm(sm, 48, 1, 64, 1, 1)


@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_the_explanation_starts_with_what_is_chosen(sm: int) -> None:
    lines = explain(sm, SM_COUNTS[sm], 32, 4096, 32, 1, count=3).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[-1] == choose_gemm(sm, SM_COUNTS[sm], 32, 4096, 32, 1).label
    assert [float(line.split()[0]) for line in lines] == sorted(float(line.split()[0]) for line in lines)


# ---- what the compiler says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", SHARED_LIMITS)
def test_every_kernel_compiles_without_a_word_and_without_spills(sm: int) -> None:
    """All of them: test_sources.py compiles one of each source, test_sass.py those for bfloat16 outputs."""
    configs = all_configs(sm)

    def compiled(config: GemmConfig) -> Any:
        return compile_kernel(config.source, config.defines, arch_of(sm))

    try:
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(compiled, configs))
    except Apex4Error as error:
        if "is not installed" in str(error) or "is needed" in str(error) or "is found neither" in str(error):
            pytest.skip(str(error))
        raise
    for config, result in zip(configs, results, strict=True):
        assert result.warnings == "", config.name
        used = result.resources
        assert used.spill_store_bytes == used.spill_load_bytes == used.stack_bytes == 0, config.name
        assert used.static_shared_bytes == STATIC_SHARED[sm], config.name
        # The registers that the heuristic's thread blocks of a multiprocessor have together.
        resident = gemm_configs._resident(sm, config) if config.family == "sm80" else 1
        assert used.registers <= 255 and -(-used.registers // 8) * 8 * config.threads * resident <= 65536, config.name


# ---- gemm_sm80.cu on a CPU ------------------------------------------------------------------------------------------

UNTOUCHED = 77.0


@dataclass(frozen=True)
class Case:
    """One launch. y has `pad` columns more, and starts `shift` elements after a multiple of 16 bytes."""

    config: GemmConfig
    m: int
    n: int
    blocks: int
    per_group: int = 1
    splits: int = 1
    bias: bool = True
    pad: int = 0
    shift: int = 0


def configuration(tile: str, sm: int = 80, *, wide: bool = False, out: str = "bf16") -> GemmConfig:
    (found,) = (
        config
        for config in all_configs(sm)
        if (config.tile_name.split("_")[1].split("s")[0], config.wide_groups, config.out) == (tile, wide, out)
    )
    return found


M16, M64, M256 = (configuration(tile) for tile in ("m16n128", "m64n128", "m128n256"))
WIDE_16, WIDE_64, WIDE_128 = (configuration(tile, wide=True) for tile in ("m16n128", "m64n128", "m128n128"))
FP16 = configuration("m64n128", 86, out="fp16")
EMULATED = [M16, M64, M256, WIDE_16, WIDE_64, WIDE_128, FP16]


def generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(case.m * 1000 + case.n * 10 + case.blocks)


def problems(case: Case) -> list[str]:
    """What is wrong with the launch; empty if nothing is."""
    operands = kernel_cases.random_operands(
        case.m, case.n, case.blocks * BLOCK, case.per_group, generator(case), case.bias
    )
    launch = kernel_cases.Launch(
        GemmPlan(case.config, case.m, case.n, case.blocks, 8, case.splits), operands, pad_columns=case.pad
    )
    around = case.config.tile_m * launch.ldy + case.config.tile_n  # also a kernel that is wrong stays in here
    memory = torch.full((case.m * launch.ldy + 2 * around + case.shift + 8,), UNTOUCHED, dtype=launch.y.dtype)
    first = -(-around // 8) * 8 + case.shift
    launch.y = memory[first : first + case.m * launch.ldy].view(case.m, launch.ldy)
    launch.pointers[0] = launch.y.data_ptr()
    try:
        y = launch.run().clone()
        again = launch.run() if case.splits > 1 else y
    except cuda_on_cpu.KernelFault as fault:
        return [str(fault)]
    want = reference.linear(operands.codes_a, operands.scale_a, operands.codes_w, operands.scale_w, operands.bias)
    error = (y.double() - want).abs() / kernel_cases.allowed_error(operands, want, y.dtype)
    found = []
    if not bool((error <= 1).all()):  # NaN is wrong too
        found.append(f"{int((~(error <= 1)).sum())} outputs of {y.numel()} are wrong")
    if not torch.equal(again, y):
        found.append("the second launch gives something else")
    beside = torch.cat([memory[:first], memory[first + launch.y.numel() :], launch.y[:, case.n :].flatten()])
    if not bool((beside == UNTOUCHED).all()):
        found.append("wrote outside of y")
    if launch.counter.any():
        found.append("counters are not zero again")
    return found


def wrong_sums(case: Case) -> int:
    """Unit scales, one block for each thread block: how many of the partial sums are not the integers."""
    case = replace(case, splits=case.blocks)
    operands = kernel_cases.random_operands(case.m, case.n, case.blocks * BLOCK, case.per_group, generator(case), False)
    operands.scale_a.fill_(1)
    operands.scale_w.fill_(1)
    launch = kernel_cases.Launch(GemmPlan(case.config, case.m, case.n, case.blocks, 8, case.splits), operands)
    launch.run()
    got = kernel_cases.partial_sums(launch).permute(1, 2, 0).double()
    return int((got != reference.group_sums(operands.codes_a, operands.codes_w, BLOCK)).sum())


def ragged(config: GemmConfig) -> Iterator[Case]:
    """Every M with every N; K, groups, splits and where y lies take turns."""
    blocks = (4, 2, 6, 12) if config.wide_groups else (3, 1, 11, 5, 2)
    yield Case(config, 5, 133, blocks[0], pad=3, per_group=2 if config.wide_groups else 1)  # whole vectors and a rest
    for i, (m, n) in enumerate((m, n) for m in (1, 3, 17, 130) for n in (8, 64, 136, 200)):
        k = blocks[i % len(blocks)]
        if m == 130:
            k = min(k, 6)
        per_group = (2, k)[i // 2 % 2] if config.wide_groups else 1
        case = Case(config, m, n, k, per_group, bias=i % 3 > 0, pad=(0, 8, 3)[i % 3], shift=(0, 8, 1, 0)[i // 3 % 4])
        yield case
        if k > 1:
            yield replace(case, splits=(2, 3, k)[i % 3] if k > 2 else 2, pad=(3, 0, 8)[i % 3])


@pytest.mark.parametrize("config", EMULATED, ids=lambda config: config.name)
def test_the_kernel_equals_the_reference(config: GemmConfig, on_cpu: None) -> None:
    cases = list(ragged(config))
    assert len(cases) > 26 and {case.splits for case in cases} >= {1, 2, 3}
    assert {(p, s) for p in (0, 3, 8) for s in (0, 1, 8)} - {(case.pad, case.shift) for case in cases} <= {(8, 1)}
    assert {case: found for case in cases if (found := problems(case))} == {}


@pytest.mark.parametrize("config", EMULATED, ids=lambda config: config.name)
def test_sums_of_groups_are_the_integers(config: GemmConfig, on_cpu: None) -> None:
    per_group = 2 if config.wide_groups else 1
    for m, n, blocks in ((1, 8, 10), (3, 200, 4), (17, 136, 2), (130, 64, 2)):
        assert wrong_sums(Case(config, m, n, blocks, per_group)) == 0, (m, n, blocks)


@pytest.mark.parametrize("config", [M16, M64, WIDE_16], ids=lambda config: config.name)
def test_sums_at_the_ends_of_the_range(config: GemmConfig, on_cpu: None) -> None:
    kernel_cases.check_integers(config, 8, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", EMULATED[:-1], ids=lambda config: config.name)  # fp16 has no room for these
def test_huge_tiny_and_undefined_scales(config: GemmConfig, on_cpu: None) -> None:
    """A NaN stays in its token, and tokens of zeros give the bias."""
    kernel_cases.check_extremes(config, 8, torch.Generator().manual_seed(2))


# ---- changes that must be noticed -----------------------------------------------------------------------------------

KERNEL, SHARED, INDEX = "gemm_sm80.cu", "gemm_mma_sync.cuh", "index.cuh"
FEW = Case(M16, 17, 200, 5)
SPLIT = replace(FEW, splits=2)
WIDE = Case(WIDE_16, 3, 136, 6, per_group=3, splits=2)
MUTATIONS: dict[str, tuple[list[tuple[str, str, str]], Case]] = {
    "swizzle": ([(INDEX, "16 * (chunk ^ (row >> 1 & 3))", "16 * (chunk ^ (row & 3))")], FEW),
    "chunk of the second step": ([(INDEX, "2 * step + (lane >> 4)", "step + 2 * (lane >> 4)")], FEW),
    "row of ldmatrix": ([(INDEX, "(int lane), lane & 15)", "(int lane), lane & 7)")], FEW),
    "weight byte": ([(INDEX, "(int fragment, int lane), 512 * fragment + 16 * lane)", "(int fragment, int lane), 512 * fragment + 16 * (lane ^ 1))")], FEW),
    "scale order": ([(INDEX, "16 * (lane & 3) + 2 * fragment)", "16 * (lane & 3) + 2 * (fragment ^ 1))")], FEW),
    "scale order, wide": ([(INDEX, "16 * (lane & 3) + 2 * fragment)", "8 * fragment + 2 * (lane & 3))")], WIDE),
    "row of an accumulator": ([(INDEX, "(lane >> 2) + 8 * half)", "2 * (lane >> 2) + half)")], FEW),
    "column of an accumulator": ([(INDEX, "2 * (lane & 3) + element)", "(lane & 3) + 4 * element)")], FEW),
    "magic integer": ([(KERNEL, "MAGIC = 0x4B400000;", "MAGIC = 0x4B400001;")], FEW),
    "magic in the middle": (  # of no binade: sums below zero lose their last bit
        [(KERNEL, "MAGIC = 0x4B400000;", "MAGIC = 0x4B000000;"), (KERNEL, "MAGIC_VALUE = 12582912.0f;", "MAGIC_VALUE = 8388608.0f;")],
        FEW,
    ),
    "alignment": ([(KERNEL, "__align__(128)", "__align__(16)")], FEW),
    "end of a split": ([(SHARED, "k_blocks) * (split + 1) / splits)", "k_blocks) / splits * (split + 1))")], SPLIT),
    "start of a split": ([(SHARED, "k_blocks) * split / splits)", "k_blocks) / splits * split + split)")], SPLIT),
    "group of a split": ([(KERNEL, "blocks_per_group - blocks.first % blocks_per_group;", "blocks_per_group;")], replace(WIDE, splits=3)),
    "scale of a split": ([(KERNEL, "const int tid = threadIdx.x, group = kb / p.blocks_per_group", "const int tid = threadIdx.x, group = 0 * kb")], SPLIT),
    "counter": ([(SHARED, "if (last) counter[tile] = 0;", "")], SPLIT),
    "last of the splits": ([(SHARED, "== splits - 1;", "== splits - 2;")], replace(FEW, splits=3)),
    "wait": ([(KERNEL, "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>")], replace(FEW, blocks=11)),
    "barrier": ([(KERNEL, "__syncthreads();  // the stage", "// the stage")], replace(FEW, blocks=11)),
    "refilled stage": ([(KERNEL, "refill = at;\n", "refill = at + STAGE_BYTES < STAGES * STAGE_BYTES ? at + STAGE_BYTES : 0;\n")], replace(FEW, blocks=20)),
    "edge": ([(KERNEL, "vectors && column + 8 <= p.n", "vectors && column < p.n")], replace(FEW, n=133, pad=3)),
    "unaligned y": ([(KERNEL, "if (vectors &&", "if (")], replace(FEW, shift=1)),
    "rows": ([(KERNEL, "if (row >= rows.end(p.m)) continue;", "")], FEW),
    "transpose": ([(KERNEL, "give = q & 2 ? v[0] : v[2];", "give = q & 2 ? v[2] : v[0];")], FEW),
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
