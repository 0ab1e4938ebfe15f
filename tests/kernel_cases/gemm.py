"""Launches of the W4A4 GEMM kernels and what must hold of them, against the float64 reference.

tests/gpu/test_gemm.py runs the checks on a GPU, tests/kernels/gemm/test_gemm_kernels.py those that it can on a CPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch

from apex4_quant.format.layout_name import KERNEL_TILE_N
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.number_format import BLOCK, CODE_MAX, SIXTEENTH_CODE
from apex4_quant.kernels import reference
from apex4_quant.kernels.gemm import configs as gemm_configs
from apex4_quant.kernels.gemm.configs import GemmConfig, GemmPlan
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.runtime import launcher

POISON = float("nan")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Operands:
    """Codes and scales of one product, in plain order: int8 codes [M, K], [N, K], scales float32 [M, G], float16 [N, G]."""

    codes_a: torch.Tensor
    scale_a: torch.Tensor
    codes_w: torch.Tensor
    scale_w: torch.Tensor
    bias: torch.Tensor | None
    blocks_per_group: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.codes_a), len(self.codes_w), self.codes_a.shape[1]


def random_operands(m: int, n: int, k: int, blocks_per_group: int, generator: torch.Generator, bias: bool) -> Operands:
    device = generator.device
    groups = -(-k // BLOCK // blocks_per_group)

    def codes(rows: int, lowest: int) -> torch.Tensor:
        return torch.randint(lowest, CODE_MAX + 1, (rows, k), generator=generator, device=device, dtype=torch.int8)

    def scales(rows: int) -> torch.Tensor:
        return torch.rand(rows, groups, generator=generator, device=device) * 0.02 + 0.001

    sign = (
        torch.randint(0, 2, (m, groups), generator=generator, device=device) * 2 - 1
    )  # with sixteen levels scales have one
    return Operands(
        codes(m, SIXTEENTH_CODE),
        scales(m) * sign,
        codes(n, -CODE_MAX),
        scales(n).half(),
        torch.randn(n, generator=generator, device=device) if bias else None,
        blocks_per_group,
    )


def pack_activations(codes: torch.Tensor, family: str) -> torch.Tensor:
    """int8 codes [M, K] -> uint8 [K / 128, m_stride, 64 or 128] as gemm_sm80.cu and gemm_sm90.cu define them."""
    m, k = codes.shape
    stride = -(-m // gemm_configs.ROW_ALIGNMENT) * gemm_configs.ROW_ALIGNMENT
    blocks = codes.new_zeros(k // BLOCK, stride, BLOCK)
    blocks[:, :m] = codes.unflatten(1, (-1, BLOCK)).transpose(0, 1)
    if family == "sm80":
        pairs = blocks.unflatten(2, (-1, 2)).bitwise_and(15).to(torch.uint8)
        bytes_ = pairs[..., 0] | pairs[..., 1] << 4
    else:
        bytes_ = ((blocks < 0).to(torch.uint8) << 7) | blocks.abs().to(torch.uint8)
    row_bytes = bytes_.shape[2]
    rows = torch.arange(stride, device=codes.device)[:, None]
    chunks = torch.arange(row_bytes // 16, device=codes.device)[None]
    at = index_function(f"{family}_activation_byte")(rows, chunks)  # [stride, chunks], bytes
    placed = torch.empty_like(bytes_)
    placed.flatten(1).unflatten(1, (-1, 16))[:, (at // 16).flatten()] = bytes_.flatten(1).unflatten(1, (-1, 16))
    return placed


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """float32 [M, G] -> [G, m_stride]."""
    m, groups = scale.shape
    stride = -(-m // gemm_configs.ROW_ALIGNMENT) * gemm_configs.ROW_ALIGNMENT
    stored = scale.new_full((groups, stride), POISON)  # nobody may read the padding into a result
    stored[:, :m] = scale.t()
    return stored


class Launch:
    """One GEMM launch with its packed operands kept alive; `run` may be called again and again."""

    def __init__(self, plan: GemmPlan, operands: Operands, pad_columns: int = 0) -> None:
        config, (m, n, k) = plan.config, operands.shape
        device = operands.codes_a.device
        layout = get_layout(config.family)
        self.plan, self.operands = plan, operands
        self.a_codes = pack_activations(operands.codes_a, config.family)
        self.a_scale = pack_scales(operands.scale_a)
        self.w_packed = layout.pack(operands.codes_w)
        self.w_scale = layout.pack_scales(operands.scale_w)
        self.ldy = n + pad_columns
        self.y = torch.full((m, self.ldy), POISON, dtype=DTYPES[config.out], device=device)
        self.partial = torch.full((max(1, plan.workspace_floats),), POISON, device=device)
        self.counter = torch.zeros(max(1, plan.counters), dtype=torch.int32, device=device)
        self.kernel = launcher.kernel(config.source, config.entry, config.defines, device.index or 0)
        bias = operands.bias.data_ptr() if operands.bias is not None else 0
        self.pointers = [self.y.data_ptr(), self.a_codes.data_ptr(), self.a_scale.data_ptr(), self.w_packed.data_ptr()]
        self.pointers += [self.w_scale.data_ptr(), bias, self.partial.data_ptr(), self.counter.data_ptr()]
        integers = [m, n, k // BLOCK, operands.blocks_per_group, self.a_scale.shape[1], self.ldy]
        self.numbers = [ctypes.c_int(value) for value in (*integers, *plan.arguments)]

    def run(self, programmatic: bool = False) -> torch.Tensor:
        launch = self.kernel.bind(
            self.plan.grid,
            self.plan.block,
            len(self.pointers),
            self.numbers,
            shared_bytes=self.plan.config.shared_bytes,
            cluster=self.plan.cluster,
            programmatic=programmatic,
        )
        launch(torch.cuda.current_stream().cuda_stream, *self.pointers)
        return self.y[:, : self.operands.shape[1]]


def expected(operands: Operands) -> torch.Tensor:
    """float64 [M, N]: the reference's formula on the device."""
    m, n, k = operands.shape
    groups = operands.scale_a.shape[1]
    y = torch.zeros(m, n, dtype=torch.float64, device=operands.codes_a.device)
    group = operands.blocks_per_group * BLOCK
    for g in range(groups):
        part = slice(g * group, min((g + 1) * group, k))
        sums = operands.codes_a[:, part].double() @ operands.codes_w[:, part].double().t()
        y += sums * operands.scale_a[:, g, None].double() * operands.scale_w[None, :, g].double()
    return y if operands.bias is None else y + operands.bias.double()


def worst_error(y: torch.Tensor, operands: Operands) -> float:
    """Largest error in units of what rounding explains; <= 1 passes, NaN is infinite.

    Float32 accumulation over G groups and at most `splits` partial sums errs by at most (G + 40) 2^-24 of the sum of
    magnitudes, and the output's rounding by half an ulp: at most 2^-8 (bf16) or 2^-11 (fp16) of the value.
    """
    want = expected(operands)
    if y.isnan().any():
        return float("inf")
    return float(((y.double() - want).abs() / allowed_error(operands, want, y.dtype)).max())


def allowed_error(operands: Operands, want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    magnitudes = Operands(
        operands.codes_a.abs(), operands.scale_a.abs(), operands.codes_w.abs(), operands.scale_w,
        None if operands.bias is None else operands.bias.abs(), operands.blocks_per_group,
    )  # fmt: skip
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    terms = operands.shape[2] / BLOCK + 40
    allowed = want.abs() * half_ulp * (1 + 1e-6) + expected(magnitudes) * terms * 2.0**-24
    allowed += 2.0**-25 if dtype == torch.float16 else 0.0  # half the smallest fp16
    return allowed.clamp_min(1e-300)


def partial_sums(launch: Launch) -> torch.Tensor:
    """The partial tiles of every part as float32 [parts, M, N]: with unit scales, the kernel's integers themselves."""
    plan, config = launch.plan, launch.plan.config
    m, n, _ = launch.operands.shape
    parts = plan.k_blocks
    thread = torch.arange(config.threads if config.family == "sm80" else 128, device=launch.y.device)
    lane, warp = thread % 32, thread // 32
    row_of, column_of = index_function("accumulator_row"), index_function("accumulator_column")
    tile_n = config.tile_n if config.family == "sm80" else KERNEL_TILE_N
    tiles = launch.partial.reshape(-1, plan.parts, config.tile_m * tile_n // (4 * len(thread)), len(thread), 4)[
        :, :parts
    ]
    tiles_m, tiles_n = -(-m // config.tile_m), -(-n // tile_n)
    out = torch.full((parts, tiles_m * config.tile_m, tiles_n * tile_n), POISON, device=launch.y.device)
    for tile in range(len(tiles)):
        if config.family == "sm80":
            tile_m, tile_at_n = band_tile(tile, tiles_m, tiles_n)
            fragments_n = config.tile_n // config.warps_n // 8
            fragments_m = config.tile_m // config.warps_m // 16
        else:
            tile_at_n, tile_m = divmod(tile, tiles_m)
        for vector in range(tiles.shape[2]):
            for c in range(4):
                if config.family == "sm80":
                    i, j = divmod(vector, fragments_n)
                    row = warp // config.warps_n * 16 * fragments_m + 16 * i + row_of(lane, c // 2)
                    column = warp % config.warps_n * 8 * fragments_n + 8 * j + column_of(lane, c % 2)
                else:  # outputs by tokens
                    row = 8 * vector + column_of(lane, c % 2)
                    column = 16 * warp + row_of(lane, c // 2)
                out[:, tile_m * config.tile_m + row, tile_at_n * tile_n + column] = tiles[tile, :, vector, :, c]
    return out[:, :m, :n]


def band_tile(index: int, tiles_m: int, tiles_n: int, band: int = 8) -> tuple[int, int]:
    """tile_at of epilogue.cuh."""
    first = index // (band * tiles_n) * band
    height = min(band, tiles_m - first)
    within = index - first * tiles_n
    return first + within % height, within // height


# ---- the checks: each raises AssertionError -------------------------------------------------------------------------


def _shapes(config: GemmConfig) -> list[tuple[int, int, int, int]]:
    """(M, N, blocks, blocks per group): one tile, ragged in every direction, several tiles, groups."""
    tall = config.tile_m
    shapes = [
        (1, 64, 1, 1),
        (1, 8, 3, 1),
        (3, 200, 2, 1),
        (16, 128, 17, 1),
        (tall + 1, 136, 5, 1),
        (2 * tall - 5, 321, 4, 1),
    ]
    shapes += [(2 * tall, 512, 8, 1), (17 * 16, 1000, 3, 1), (7, 4096, 32, 1)]
    if config.wide_groups or config.family == "sm90":
        shapes = shapes[:4] * (not config.wide_groups) + [
            (1, 64, 4, 2), (5, 200, 6, 2), (tall + 1, 136, 9, 3), (33, 321, 12, 4), (9, 264, 16, 16), (2 * tall, 256, 7, 7),
        ]  # fmt: skip
    return shapes


def plans(config: GemmConfig, m: int, n: int, blocks: int, sm_count: int) -> list[GemmPlan]:
    """Whole tiles, and tiles cut in every kind of way; the last one gives each thread block one block."""
    plan = GemmPlan(config, m, n, blocks, sm_count)
    if config.few_tokens:  # and few multiprocessors, so that each thread block has several tiles
        return [replace(plan, cluster=cluster, sm_count=sms) for cluster in (1, 2) for sms in (sm_count, 3)]
    if config.family == "sm90":
        return [
            replace(plan, span=span)
            for span in (0, blocks + 3, blocks, 5, 3, 2, 1)
            if span <= blocks * config.tiles(m, n)
        ]
    return [replace(plan, splits=splits) for splits in sorted({1, 2, 3, blocks} & set(range(1, blocks + 1)))]


def check_shapes(config: GemmConfig, sm_count: int, generator: torch.Generator) -> None:
    for m, n, blocks, per_group in _shapes(config):
        operands = random_operands(m, n, blocks * BLOCK, per_group, generator, bias=(m + n) % 2 == 1)
        for plan in plans(config, m, n, blocks, sm_count):
            launch = Launch(plan, operands, pad_columns=8 * (plan.cut % 2))
            error = worst_error(launch.run(), operands)
            shape = f"M {m} N {n} blocks {blocks}/{per_group} {plan.label}"
            assert error <= 1, f"{shape}: error {error:.3g} of what is allowed"
            assert launch.ldy == n or launch.y[:, n:].isnan().all(), f"{shape}: wrote past the columns"
            assert not launch.counter.any(), f"{shape}: counters are not zero again"


def check_integers(config: GemmConfig, sm_count: int, generator: torch.Generator) -> None:
    """Unit scales, a split per block: partial sums are the integers. Adversarial signs and running sums."""
    per_group = 2 if config.wide_groups else 1
    m, n, blocks = min(config.tile_m, 40), 128, 12
    k = blocks * BLOCK
    device = generator.device
    sevens = torch.full((m, k), CODE_MAX, dtype=torch.int8, device=device)
    weights = torch.full((n, k), CODE_MAX, dtype=torch.int8, device=device)
    position = torch.arange(k, device=device)
    patterns = {
        "all 7": (sevens, weights),
        "all -7": (sevens, -weights),
        "alternating": (sevens, torch.where(position % 2 == 0, weights, -weights)),
        # every order of the four k32 steps: two up and two down, so that the running sum peaks and falls
        **{
            f"steps {bits:04b}": (sevens, torch.where((bits >> (position // 32 % 4)) & 1 == 1, weights, -weights))
            for bits in range(16)
        },
        # large sums with an odd remainder: the last bit must survive
        "odd": (torch.where(position % 128 == 127, sevens - 6, sevens), weights),
        "odd first": (torch.where(position % 128 == 0, sevens - 6, sevens), weights),
        "random": tuple(
            random_operands(m, n, k, 1, generator, bias=False).__dict__[name] for name in ("codes_a", "codes_w")
        ),
    }
    if not config.wide_groups:  # sixteen levels are for groups of 128
        eights = torch.full((m, k), SIXTEENTH_CODE, dtype=torch.int8, device=device)
        patterns |= {
            "all -8": (eights, weights),
            "-8 and 7": (
                torch.where(position % 2 == 0, eights, sevens),
                torch.where(position % 2 == 0, -weights, weights),
            ),
            "-8, odd": (torch.where(position % 128 == 127, eights + 1, eights), weights),
            "-8, odd first": (torch.where(position % 128 == 0, eights + 1, eights), -weights),
            "-8, steps": (eights, torch.where(position // 32 % 4 < 2, weights, -weights)),
        }
    for name, (codes_a, codes_w) in patterns.items():
        ones = torch.ones(m, k // BLOCK // per_group, device=device)
        operands = Operands(codes_a, ones, codes_w, torch.ones(n, ones.shape[1], device=device).half(), None, per_group)
        want = reference.group_sums(codes_a.cpu(), codes_w.cpu(), BLOCK).to(device)
        if config.few_tokens:
            check_by_bias(name, config, operands, want, sm_count)
            continue
        launch = Launch(plans(config, m, n, blocks, sm_count)[-1], operands)
        launch.run()
        got = partial_sums(launch).permute(1, 2, 0)
        wrong = (got.double() != want.double()).sum().item()
        assert wrong == 0, (
            f"{name}: {wrong} of {want.numel()} integer sums differ, e.g. {got[got.double() != want][:3].tolist()}"
        )


def check_by_bias(name: str, config: GemmConfig, operands: Operands, sums: torch.Tensor, sm_count: int) -> None:
    """For a kernel that writes no partial sums: one block at a time, and a bias of minus the right integers leaves zeros.

    `sums` [M, N, blocks] are the integers. The bias is added before anything is rounded to 16 bits, and it is a token's.
    """
    position = torch.arange(operands.codes_a.shape[1], device=sums.device) // BLOCK
    for block in (0, 1, 2, 3, 4, 7, sums.shape[2] - 1):
        alone = replace(operands, codes_a=operands.codes_a * (position == block))
        for token in {0, sums.shape[0] // 2, sums.shape[0] - 1}:
            for plan in plans(config, *operands.shape[:2], sums.shape[2], sm_count)[::2]:
                y = Launch(plan, replace(alone, bias=-sums[token, :, block].float())).run()[token]
                wrong = int(torch.count_nonzero(y))
                assert wrong == 0, (
                    f"{name}, block {block}, token {token}, {plan.label}: {wrong} of {y.numel()} integers differ"
                )


def check_extremes(config: GemmConfig, sm_count: int, generator: torch.Generator) -> None:
    """Huge and tiny scales, zeros, NaN in one token's scale: NaN there and nowhere else."""
    per_group = 2 if config.wide_groups else 1
    m, n, blocks = config.tile_m + 3, 200, 4
    for name, factor_a, factor_w in (("huge", 1e6, 60000.0), ("tiny", 2.0**-60, 2.0**-24), ("mixed", 1e20, 2.0**-24)):
        operands = random_operands(m, n, blocks * BLOCK, per_group, generator, bias=False)
        operands.scale_a.fill_(factor_a)
        operands.scale_w.fill_(factor_w)
        launch = Launch(plans(config, m, n, blocks, sm_count)[0], operands)
        y, want = launch.run().double(), expected(operands)
        fits = want.abs() < torch.finfo(launch.y.dtype).max / 2
        close = ((y - want).abs() <= allowed_error(operands, want, launch.y.dtype))[fits]
        assert close.all(), f"{name} scales: {int((~close).sum())} outputs are wrong"
    operands = random_operands(m, n, blocks * BLOCK, per_group, generator, bias=True)
    operands.codes_a[0] = 0
    operands.scale_a[1, -1] = float("nan")
    y = Launch(plans(config, m, n, blocks, sm_count)[0], operands).run()
    assert operands.bias is not None and torch.equal(y[0], operands.bias.to(y.dtype)), "a token of zeros gives the bias"
    assert y[1].isnan().all() and not y[2:].isnan().any(), "a NaN scale must reach its token and no other"


def check_replay(config: GemmConfig, sm_count: int, generator: torch.Generator) -> None:
    per_group = 2 if config.wide_groups else 1
    operands = random_operands(config.tile_m + 5, 700, 12 * BLOCK, per_group, generator, bias=True)
    for plan in plans(config, *operands.shape[:2], 12, sm_count)[::2]:
        launch = Launch(plan, operands)
        first = launch.run().clone()
        for _ in range(5):
            assert torch.equal(launch.run(), first), f"{plan.label}: two runs differ"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch.run(programmatic=config.family == "sm90")
            launch.run(programmatic=config.family == "sm90")
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
        assert all(torch.equal(each.y, launches[0].y) for each in launches), f"{plan.label}: streams differ"
        assert torch.equal(launches[0].y, first)
