"""Launches of the 8-bit GEMMs and what must hold of them: their outputs are those of integer sums, bit for bit; those of the kernel
for few tokens, which scales the sums of every group in float32, are within its roundings.

tests/gpu/test_gemm_s8.py and test_gemm_sm90_s8.py run the checks on a GPU, tests/kernels/gemm/test_s8_kernels.py those that it can on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from apex4_quant.format.layouts import S8
from apex4_quant.format.number_format import BLOCK, CODE_MAX
from apex4_quant.kernels import reference
from apex4_quant.kernels.folding import fold, fold_codes
from apex4_quant.kernels.gemm.s8_configs import S8Config, S8Plan
from apex4_quant.kernels.gemm.sm90_s8_configs import Sm90S8Config, Sm90S8Plan
from apex4_quant.kernels.operands import fold_scales, pack_activations
from apex4_quant.kernels.runtime import launcher

Config = S8Config | Sm90S8Config
Plan = S8Plan | Sm90S8Plan
SM_COUNT = 8  # of the plans that are checked: thread blocks take several tiles

POISON = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKEN_CODE_MAX = 127


@dataclass
class Operands:
    """int8 codes_a [M, K] and codes_w [N, K], float32 scale_a [M], float16 scale_w [N, G], float32 bias [N] or None."""

    codes_a: torch.Tensor
    scale_a: torch.Tensor
    codes_w: torch.Tensor
    scale_w: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.codes_a), len(self.codes_w), self.codes_a.shape[1]


def random_operands(
    m: int, n: int, blocks: int, per_group: int, generator: torch.Generator, bias: bool = True
) -> Operands:
    device, k = generator.device, blocks * BLOCK

    def codes(rows: int, most: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, (rows, k), generator=generator, device=device, dtype=torch.int8)

    # Scales of a row differ by up to 500 times, so that some codes fold to zero.
    spread = torch.rand(n, blocks // per_group, generator=generator, device=device)
    return Operands(
        codes(m, TOKEN_CODE_MAX),
        torch.rand(m, generator=generator, device=device) * 0.02 + 0.001,
        codes(n, CODE_MAX),
        (0.02 * torch.exp(-6.2 * spread)).half(),
        torch.randn(n, generator=generator, device=device) if bias else None,
    )


class Launch:
    """One launch with its packed operands kept alive; `run` may be called again and again."""

    def __init__(self, plan: Plan, operands: Operands, pad_columns: int = 0) -> None:
        config, (m, n, k) = plan.config, operands.shape
        device = operands.codes_a.device
        self.plan, self.operands = plan, operands
        self.a_codes, a_scale = pack_activations(operands.codes_a, operands.scale_a[:, None], "s8")
        stride = a_scale.shape[1]
        self.a_codes[:, m:] = 0x80  # nobody may read the padding into a result
        self.a_scale = a_scale.clone()
        self.a_scale[:, m:] = POISON
        self.w_packed = S8.pack(operands.codes_w)
        self.w_ratio, self.w_unit = fold_scales(operands.scale_w)
        self.ldy = n + pad_columns
        self.y = torch.full((m, self.ldy), POISON, dtype=DTYPES[config.out], device=device)
        self.partial = torch.full((max(1, plan.workspace_words),), -(2**31), dtype=torch.int32, device=device)
        self.counter = torch.zeros(plan.counters, dtype=torch.int32, device=device)
        self.kernel = launcher.kernel(config.source, config.entry, config.defines, device.index or 0)
        tensors = (self.y, self.a_codes, self.a_scale, self.w_packed, self.w_ratio, self.w_unit)
        self.pointers = [tensor.data_ptr() for tensor in tensors]
        self.pointers += [0 if operands.bias is None else operands.bias.data_ptr()]
        self.pointers += [self.partial.data_ptr(), self.counter.data_ptr()]
        numbers = (m, n, k // BLOCK, k // BLOCK // operands.scale_w.shape[1], stride, self.ldy, *plan.arguments)
        self.numbers = [ctypes.c_int(number) for number in numbers]

    def run(self) -> torch.Tensor:
        plan = self.plan
        launch = self.kernel.bind(
            plan.grid, plan.block, len(self.pointers), self.numbers, shared_bytes=plan.config.shared_bytes,
            cluster=plan.cluster, programmatic=plan.programmatic,
        )  # fmt: skip
        launch(torch.cuda.current_stream().cuda_stream, *self.pointers)
        return self.y[:, : self.operands.shape[1]]


def expected(operands: Operands, dtype: torch.dtype) -> torch.Tensor:
    """y [M, N] as the format defines it: exact sums, and then the same operations of float32 in the same order."""
    ratio, unit = fold(operands.scale_w)
    folded = fold_codes(operands.codes_w, ratio)
    sums = operands.codes_a.double() @ folded.double().t()  # of integers below 2^53
    y = sums.float() * operands.scale_a[:, None] * unit
    return (y if operands.bias is None else y + operands.bias).to(dtype)


def same(y: torch.Tensor, want: torch.Tensor) -> bool:
    """Bit for bit, NaN being NaN."""
    return torch.equal(y.isnan(), want.isnan()) and torch.equal(y.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))


def unfolded(operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """y float64 [M, N] of weights that are not folded, and what float32 may add to it.

    A product R S is rounded once a block, into a sum of them; then sums are added, at most 8 times, and there are a few products.
    """
    ratio, unit = reference.ratios(operands.scale_w)
    a, w = operands.codes_a.double(), operands.codes_w.double()  # sums are below 2^53
    blocks = operands.codes_a.shape[1] // BLOCK
    of_blocks = ratio.double().repeat_interleave(blocks // ratio.shape[1], dim=1)
    y = torch.zeros(len(a), len(w), dtype=torch.float64, device=a.device)
    size = torch.zeros_like(y)
    # A group's blocks are scaled one by one: their sums may be larger than the group's.
    for part_a, part_w, of_block in zip(a.chunk(blocks, 1), w.chunk(blocks, 1), of_blocks.t(), strict=True):
        term = (part_a @ part_w.t()) * of_block
        y += term
        size += term.abs()
    factor = operands.scale_a.double()[:, None] * unit / 256
    error = size * factor * (blocks + 12) * 2.0**-24
    if operands.bias is not None:
        y, error = y * factor + operands.bias.double(), error + operands.bias.double().abs() * 2.0**-23
        return y, error
    return y * factor, error


def wrong(config: Config, y: torch.Tensor, operands: Operands) -> int:
    """How many outputs [M, N] are not what `config` must give."""
    if not (isinstance(config, Sm90S8Config) and config.few_tokens):
        want = expected(operands, y.dtype)
        return int((~((y == want) | (y.isnan() & want.isnan()))).sum())
    want64, error = unfolded(operands)
    least, most = (want64 - error).to(y.dtype), (want64 + error).to(y.dtype)
    return int((~((least <= y) & (y <= most) | (y.isnan() & want64.isnan()))).sum())


# ---- the checks: each raises AssertionError -------------------------------------------------------------------------


def shapes(config: Config) -> list[tuple[int, int, int, int]]:
    """(M, N, blocks, blocks per group): one tile, ragged in every direction, several tiles, wide groups."""
    tall = config.tile_m
    return [
        (1, 64, 1, 1), (1, 8, 3, 1), (3, 200, 2, 2), (16, 128, 17, 1), (tall + 1, 136, 5, 5), (2 * tall - 5, 321, 4, 2),
        (2 * tall, 512, 8, 4), (17 * 16, 1000, 3, 1), (7, 4096, 32, 1), (33, 321, 12, 3), (9, 264, 16, 16),
    ]  # fmt: skip


def plan_of(config: Config, m: int, n: int, blocks: int, splits: int = 1) -> Plan:
    """Whole tiles, or tiles that about as many thread blocks share where the kernel can."""
    if isinstance(config, S8Config):
        return S8Plan(config, m, n, blocks, splits)
    plan = Sm90S8Plan(config, m, n, blocks, SM_COUNT)
    if config.few_tokens:
        return replace(plan, cluster=min(splits, 2))
    return replace(plan, span=-(-blocks // splits) if splits > 1 else 0)


def plans(config: Config, m: int, n: int, blocks: int) -> Iterator[Plan]:
    """Whole tiles, and tiles shared by some thread blocks; the last gives each one block."""
    if isinstance(config, Sm90S8Config) and config.few_tokens:
        yield from (plan_of(config, m, n, blocks, cluster) for cluster in (1, 2))
        return
    for splits in sorted({1, 2, 3, blocks} & set(range(1, min(blocks, 32) + 1))):
        yield plan_of(config, m, n, blocks, splits)
    if isinstance(config, Sm90S8Config):  # a span that ends within tiles and goes on in the next
        yield replace(Sm90S8Plan(config, m, n, blocks, SM_COUNT), span=blocks + 1)


def check_shapes(config: Config, generator: torch.Generator) -> None:
    for m, n, blocks, per_group in shapes(config):
        operands = random_operands(m, n, blocks, per_group, generator, bias=(m + n) % 2 == 1)
        for number, plan in enumerate(plans(config, m, n, blocks)):
            launch = Launch(plan, operands, pad_columns=(8, 3, 0)[number % 3])
            y = launch.run()
            differ = wrong(config, y, operands)
            shape = f"M {m} N {n} blocks {blocks}/{per_group} {plan.label}"
            assert not differ, f"{shape}: {differ} of {y.numel()} outputs differ"
            assert launch.ldy == n or launch.y[:, n:].isnan().all(), f"{shape}: wrote past the columns"
            assert not launch.counter.any(), f"{shape}: counters are not zero again"


def check_integers(config: Config, generator: torch.Generator) -> None:
    """The largest sums, their signs and last bits; every code with every ratio's rounding."""
    few = isinstance(config, Sm90S8Config) and config.few_tokens
    m, n, blocks = (
        min(config.tile_m, 40),
        128,
        4 if few else 12,
    )  # one more or less is beyond the roundings of four groups
    device = generator.device
    random = random_operands(m, n, blocks, 1, generator, bias=False)
    most_a = torch.full_like(random.codes_a, TOKEN_CODE_MAX)
    most_w = torch.full_like(random.codes_w, CODE_MAX)
    position = torch.arange(blocks * BLOCK, device=device)
    every = (position % 15 - CODE_MAX).to(torch.int8).expand_as(random.codes_w)
    one = torch.where(position == 77, most_a, 0)  # one product a sum: the folded weights themselves
    ones = torch.ones_like(random.scale_w)
    ramp = torch.linspace(1 / 600, 1, random.scale_w.numel(), device=device).reshape(random.scale_w.shape).half()
    patterns = {
        "all 127 and 7": (most_a, most_w, ones),
        "all 127 and -7": (most_a, -most_w, ones),
        "alternating": (most_a, torch.where(position % 2 == 0, most_w, -most_w), ones),
        "odd": (torch.where(position == 0, most_a - 126, most_a), most_w, ones),
        "every code": (random.codes_a, every.contiguous(), ramp),
        "one product": (one.contiguous(), random.codes_w, ramp),
    }
    for name, (codes_a, codes_w, scale_w) in patterns.items():
        operands = Operands(codes_a, torch.ones(m, device=device), codes_w, scale_w, None)
        want = expected(operands, torch.float32)
        error = torch.zeros_like(want)
        if few:
            exact, roundings = unfolded(operands)
            want, error = exact.float(), (roundings + exact.abs() * 2.0**-23).float()
        for plan in plans(config, m, n, blocks):
            # A bias of minus the sum leaves zero: 16 bits could not tell sums from their neighbours.
            for token in {0, m - 1}:
                y = Launch(plan, replace(operands, bias=-want[token])).run()
                differ = int((y[token].float().abs() > error[token] * 1.01).sum())
                assert not differ, f"{name}, token {token}, {plan.label}: {differ} sums differ"


def check_long_rows(config: Config, generator: torch.Generator) -> None:
    m, n, blocks = 3, 64, 28672 // BLOCK
    operands = random_operands(m, n, blocks, 1, generator, bias=False)
    operands.codes_a.fill_(TOKEN_CODE_MAX)
    operands.codes_w.fill_(CODE_MAX)
    operands.codes_w[1::2] = -CODE_MAX
    operands.scale_w.fill_(1)
    for plan in plans(config, m, n, blocks):
        assert not wrong(config, Launch(plan, operands).run(), operands), plan.label


def check_extremes(config: Config, generator: torch.Generator) -> None:
    """Huge and tiny scales, a token of zeros, NaN in one token's scale: NaN there and nowhere else."""
    m, n, blocks = config.tile_m + 3, 200, 4
    for factor_a, factor_w in ((1e6, 60000.0), (2.0**-60, 2.0**-24), (1e20, 2.0**-24)):
        operands = random_operands(m, n, blocks, 2, generator, bias=False)
        operands.scale_a.fill_(factor_a)
        operands.scale_w.fill_(factor_w)
        y = Launch(plan_of(config, m, n, blocks), operands).run()
        assert not wrong(config, y, operands), f"scales {factor_a:g} and {factor_w:g}"
    operands = random_operands(m, n, blocks, 1, generator)
    operands.codes_a[0] = 0
    operands.scale_a[1] = POISON
    y = Launch(plan_of(config, m, n, blocks, 2), operands).run()
    assert operands.bias is not None and torch.equal(y[0], operands.bias.to(y.dtype)), "a token of zeros gives the bias"
    assert y[1].isnan().all() and not y[2:].isnan().any(), "a NaN scale must reach its token and no other"


def check_replay(config: Config, generator: torch.Generator) -> None:
    """The same bits from two runs, from a graph, and from many streams at once."""
    operands = random_operands(config.tile_m + 5, 700, 12, 1, generator)
    for plan in plans(config, *operands.shape[:2], 12):
        launch = Launch(plan, operands)
        first = launch.run().clone()
        assert torch.equal(launch.run(), first), f"{plan.label}: two runs differ"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch.run()
            launch.run()
        launch.y.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(launch.y[:, : operands.shape[1]], first), f"{plan.label}: the graph's replay differs"
        launches = [Launch(plan, operands) for _ in range(8)]
        streams = [torch.cuda.Stream() for _ in launches]
        torch.cuda.synchronize()
        for each, stream in zip(launches, streams, strict=True):
            with torch.cuda.stream(stream):
                each.run()
        torch.cuda.synchronize()
        assert all(torch.equal(each.y, first) for each in launches), f"{plan.label}: streams differ"
