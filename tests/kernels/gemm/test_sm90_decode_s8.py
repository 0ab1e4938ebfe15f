"""The 8-bit GEMM of Hopper for few tokens, and the linear that is one kernel, from their own source on a CPU; without clusters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apex4_quant.format.layouts import S8
from apex4_quant.format.number_format import BLOCK, round_up
from apex4_quant.kernels.gemm import fused_linear
from apex4_quant.kernels.gemm.configs import PlanSource
from apex4_quant.kernels.gemm.sm90_s8_configs import Sm90S8Config, Sm90S8Plan, all_configs
from apex4_quant.kernels.operands import fold_scales
from apex4_quant.kernels.quantize.launch import rows_are_aligned
from apex4_quant.kernels.runtime import launcher

from ... import cuda_on_cpu
from ...kernel_cases import fused_s8, s8

CONFIGS = {config.tile_name: config for config in all_configs(90) if config.few_tokens and config.out == "bf16"}
WIDE, MOST = (
    next(config for config in CONFIGS.values() if (config.tile_m, config.tiles_n) == (rows, 2)) for rows in (32, 64)
)
MOST_BY_64 = next(config for config in CONFIGS.values() if (config.tile_m, config.tiles_n) == (64, 1))
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
    (MOST, 61, 300, 11, 1, 4),
    (MOST_BY_64, 40, 136, 14, 2, 0),
]


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


# ---- one kernel ------------------------------------------------------------------------------------------------------

ONE_KERNEL = [
    (1, 72, 1000, "plain", 4),
    (2, 130, 4900, "plain", 12),
    (2, 64, 512, "silu_mul", 0),
    (1, 8, 16384, "plain", 0),
    (1, 72, 1000, "rms_norm", 4),
    (2, 64, 4900, "add_rms_norm", 8),
]  # padding of rows


def problems_of_one_kernel(case: tuple[int, int, int, str, int]) -> list[str]:
    m, n, k, input, padding = case
    dtype, padded = torch.float16, round_up(k, BLOCK)
    generator = torch.Generator().manual_seed(m + n)
    codes_w = torch.randint(-7, 8, (n, padded), generator=generator, dtype=torch.int8)
    scale_w = (torch.rand(n, padded // BLOCK, generator=generator) * 0.01 + 1e-4).half()
    bias = torch.randn(n, generator=generator) if n % 3 else None
    inputs = fused_s8.inputs_of(m, k, input, dtype, generator, padding)
    x = fused_s8.input_of_linear(inputs, input)
    least, most = fused_s8.bounds(
        torch.nn.functional.pad(x, (0, padded - k)), codes_w, scale_w, bias, int(input != "plain")
    )
    operands = [(each.data_ptr(), each.stride(0)) for each in inputs]
    ld_second = inputs[1].stride(0) if input in ("silu_mul", "add_rms_norm") else 0
    total = torch.full((m, k), float("nan"), dtype=dtype)
    sums = [inputs[1].data_ptr(), total.data_ptr()] if input == "add_rms_norm" else []
    shape = fused_linear.FusedShape(
        0, 90, MULTIPROCESSORS, m, n, k, padded // BLOCK, inputs[0].stride(0), ld_second, rows_are_aligned(k, *operands),
        "float16", input, 1.0, PlanSource("sm90_s8_m8n64s10/1", 0), 8, fused_s8.EPS,
    )  # fmt: skip
    launch = fused_linear.fused_launch(launcher.kernel, shape)
    assert launch is not None, "the shape is not one kernel's"
    y = torch.full((m, n), float("nan"), dtype=dtype)
    packed, ratio, unit = S8.pack(codes_w), *fold_scales(scale_w)
    second = inputs[-1].data_ptr() if len(inputs) > 1 else 0
    weights = [each.data_ptr() for each in (packed, ratio, unit)]
    try:
        launch(0, y.data_ptr(), inputs[0].data_ptr(), second, *weights, 0 if bias is None else bias.data_ptr(), *sums)
    except cuda_on_cpu.KernelFault as fault:
        return [str(fault)]
    wrong = int((~((least.to(dtype) <= y) & (y <= most.to(dtype)))).sum())
    found = [f"{wrong} outputs are wrong"] if wrong else []
    if sums and not torch.equal(total, inputs[0] + inputs[1]):
        found.append("another sum")
    return found


@pytest.mark.parametrize("case", ONE_KERNEL, ids=str)
def test_one_kernel_quantizes_and_multiplies(case: tuple[int, int, int, str, int], on_cpu: None) -> None:
    assert problems_of_one_kernel(case) == []


# ---- changes ---------------------------------------------------------------------------------------------------------

KERNEL, SHARED, INDEX = "gemm_sm90_decode_s8.cu", "decode_sm90.cuh", "index.cuh"
WHOLE = "quantize_whole_tokens.cuh"
MUTATIONS_OF_ONE_KERNEL: dict[str, tuple[str, str, str]] = {
    "slices of a token": (WHOLE, "(k_blocks + SLICES_OF_WARP - 1) / SLICES_OF_WARP * SLICES_OF_WARP", "k_blocks"),
    "passes": (WHOLE, "const int i = slice + round * SLICES;", "const int i = slice;"),
    "largest of a token": (WHOLE, "atomicMax(&absmax[token[round]]", "atomicMax(&absmax[0]"),
    "codes of an octet": (WHOLE, "of_octet[quad + odd + 2], 0x0040", "of_octet[quad + odd + 1], 0x0040"),
    "order of inputs": (INDEX, "4 * (k & 1) + 2 * (k >> 4 & 1)", "4 * (k >> 4 & 1) + 2 * (k & 1)"),
    "whose codes": (KERNEL, "BLOCK * (part * m + token)", "BLOCK * (part * m)"),
}
MUTATIONS: dict[str, tuple[tuple[str, str, str], Case]] = {
    "the second tile of weights": ((KERNEL, "w_lane + t * PARTS * WEIGHT_TILE_BYTES", "w_lane"), CASES[2]),
    "its ratios": ((KERNEL, "ratio_lane + t * PARTS * WEIGHT_SCALE_BYTES", "ratio_lane"), CASES[2]),
    "where it is copied to": ((SHARED, "w_packed) + t * PARTS * WEIGHT_TILE_BYTES", "w_packed) + t * WEIGHT_TILE_BYTES"), CASES[2]),
    "its units": ((KERNEL, "t * WEIGHT_TILE_N + 16 * warp", "16 * warp"), CASES[2]),
    "its place in y": ((KERNEL, "t * TILE_M + row, chunk", "row, chunk"), CASES[2]),
    "a block past the end": ((KERNEL, "block + part < p.k_blocks ? ratios : 0", "ratios"), (M8, 3, 64, 5, 1, 0)),
    "where sums start": ((KERNEL, "START_VALUE = 12582912.0f", "START_VALUE = 12582911.0f"), CASES[1]),
    "order of the tokens' codes": (("exact_fragments.cuh", "0x6420", "0x6240"), CASES[1]),
    "inputs in their order": (("exact_fragments.cuh", "0x5140", "0x4150"), CASES[4]),
    "inputs 16 further": (("exact_fragments.cuh", "0x7362", "0x6372"), CASES[5]),
    "a stage that wgmma leaves late": ((KERNEL, "wait<0>();\n          if (ptx::elect_one())", "wait<0>();\n          if (false)"), CASES[4]),
    "a step's codes": ((KERNEL, "codes + (32 * step >> 4)", "codes"), CASES[4]),
    "sums of a step": ((KERNEL, "(32 * step >> 4)), step > 0)", "(32 * step >> 4)), step > 1)"), CASES[5]),
    "ratios of a tile": ((KERNEL, "p.k_blocks ? ratios[t] : 0", "p.k_blocks ? ratios[0] : 0"), CASES[4]),
    "a block of wgmma past the end": ((KERNEL, "p.k_blocks ? ratios[t] : 0", "p.k_blocks + 1 ? ratios[t] : 0"), CASES[4]),
    "whose tokens": ((KERNEL, "a_codes) + part * TILE_M * BLOCK);", "a_codes));"), CASES[5]),
    "sums of others": ((SHARED, "other < PARTS - 1; ++other", "other < PARTS - 2; ++other"), CASES[0]),
    "a stage that is left late": ((KERNEL, "__syncwarp();\n      if (ptx::elect_one())", "__syncwarp();\n      if (false)"), CASES[0]),
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


@pytest.mark.parametrize("name", MUTATIONS_OF_ONE_KERNEL)
def test_a_change_of_one_kernel_is_noticed(name: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "kernel", cuda_on_cpu.CpuLauncher([MUTATIONS_OF_ONE_KERNEL[name]], "-O0").kernel)
    assert problems_of_one_kernel(ONE_KERNEL[1]) != []
