"""Operands, launches and comparisons of the kernels of experts: what tests/gpu does on a GPU and tests/kernels on a CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from apex4_quant.format.feedback import clip_row
from apex4_quant.format.number_format import BLOCK, FEEDBACK_ROWS, round_up
from apex4_quant.kernels import reference
from apex4_quant.kernels.experts import configs
from apex4_quant.kernels.experts.configs import ExpertConfig, ExpertPlan
from apex4_quant.kernels.gemm.s8_configs import S8Config
from apex4_quant.kernels.operands import fold_scales, layout_of_format, pack_activations
from apex4_quant.kernels.quantize.configs import FEEDBACKS, prepack_matrix
from apex4_quant.kernels.runtime import launcher

from . import s8

POISON = float("nan")
GARBAGE = -0x123456  # in tables that a kernel must write


def run(
    config: Any, grid: tuple[int, int, int], block: int, pointers: list[Any], numbers: list[int], shared: int
) -> None:
    """Tensors, or None, and integers."""
    addresses = [0 if each is None else each.data_ptr() for each in pointers]
    index = next(each for each in pointers if each is not None).device.index or 0
    kernel = launcher.kernel(config.source, config.entry, config.defines, index)
    values = [ctypes.c_int(number) for number in numbers]
    launch = kernel.bind(grid, block, len(addresses), values, shared_bytes=shared)
    launch(torch.cuda.current_stream().cuda_stream, *addresses)


# ---- the router ------------------------------------------------------------------------------------------------------


@dataclass
class Routed:
    """What route.cu wrote: rows int32 [choices], tiles and small_tiles int32 [most, 4]."""

    rows: torch.Tensor
    tiles: torch.Tensor
    small_tiles: torch.Tensor


def route(ids: torch.Tensor, experts: int, tile_rows: int, expert_map: torch.Tensor | None = None) -> Routed:
    choices = ids.numel()
    most = configs.most_tiles(choices, experts, tile_rows)
    most_small = configs.most_tiles(choices, experts, configs.SMALL_TILE)

    around = 4 * choices + 64  # a kernel that is wrong stays in here

    def table(*shape: int) -> torch.Tensor:
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        memory = torch.full((size + 2 * around,), GARBAGE, dtype=torch.int32, device=ids.device)
        memories.append((memory, size))
        return memory[around : around + size].view(shape)

    memories: list[tuple[torch.Tensor, int]] = []
    made = Routed(table(choices), table(most, 4), table(most_small, 4))
    numbers = [
        choices,
        2 if ids.dtype == torch.int64 else 1,
        experts if expert_map is None else len(expert_map),
        experts,
    ]
    run(
        configs.route_config(), (experts, 1, 1), configs.ROUTE_THREADS,
        [made.rows, made.tiles, made.small_tiles, ids, expert_map],
        [*numbers, tile_rows, most, configs.SMALL_TILE, most_small], 4 * experts,
    )  # fmt: skip
    for memory, size in memories:
        beside = torch.cat([memory[:around], memory[around + size :]])
        assert bool((beside == GARBAGE).all()), "wrote outside of a table"
    return made


def local_ids(ids: torch.Tensor, experts: int, expert_map: torch.Tensor | None) -> torch.Tensor:
    """int64 [choices], by the words of the operator's docstring: -1 where the expert is not here."""
    everywhere = experts if expert_map is None else len(expert_map)
    found = []
    for id in ids.flatten().tolist():
        here = -1 if not 0 <= id < everywhere else id if expert_map is None else int(expert_map[id])
        found.append(here if 0 <= here < experts else -1)
    return torch.tensor(found, dtype=torch.int64)


def check_route(ids: torch.Tensor, experts: int, tile_rows: int, expert_map: torch.Tensor | None = None) -> None:
    made, local = route(ids, experts, tile_rows, expert_map), local_ids(ids, experts, expert_map)
    order = [[i for i, each in enumerate(local.tolist()) if each == expert] for expert in range(experts)]
    flat = [choice for own in order for choice in own]
    assert made.rows.tolist()[: len(flat)] == flat, "choices in the order of experts, then in their own"
    assert set(made.rows.tolist()[len(flat) :]) <= {GARBAGE}, "wrote past the choices that are here"
    for table, size in ((made.tiles, tile_rows), (made.small_tiles, configs.SMALL_TILE)):
        want, first = [], 0
        for expert, own in enumerate(order):
            want += [[expert, first + i, min(size, len(own) - i), 0] for i in range(0, len(own), size)]
            first += len(own)
        assert len(want) <= len(table), "more tiles than there is room for"
        assert table.tolist() == want + [[-1, 0, 0, 0]] * (len(table) - len(want))


ID_CASES = ("spread", "all in one", "one each", "one has one", "some far away")


def ids_of(case: str, tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [tokens, top_k]; a token's experts differ where there are enough."""
    device = generator.device
    scores = torch.rand(tokens, max(experts, top_k), generator=generator, device=device)
    ids = scores.topk(top_k, -1).indices % experts
    if case == "all in one":
        return torch.full_like(ids, experts - 1)
    if case == "one each":
        return torch.arange(tokens * top_k, device=device).reshape(tokens, top_k) % experts
    if case == "one has one":
        ids = torch.zeros_like(ids)
        ids[-1, -1] = experts - 1
    if case == "some far away":
        ids[::3] = experts + 5
        ids[1::3, 0] = -1
    return ids


# ---- the products ----------------------------------------------------------------------------------------------------


class Launch:
    """One launch of a GEMM of experts whose tile table is made here, from `counts`: rows of each expert."""

    def __init__(
        self, config: ExpertConfig, counts: list[int], n: int, blocks: int, per_group: int, splits: int, generator: torch.Generator,
        *, divisor: int = 1, pad_columns: int = 0,
    ) -> None:  # fmt: skip
        device, format = generator.device, "s8" if isinstance(config, S8Config) else "sm80"
        total, k = sum(counts), blocks * BLOCK
        self.config, self.counts, self.format, self.n, self.divisor = config, counts, format, n, divisor
        # More rows than are used, so that where one is read from says which.
        self.source = torch.randperm(total * divisor, generator=generator, device=device)[:total].int()
        self.target = torch.randperm(total, generator=generator, device=device).int()
        rows = -(-max(1, total * divisor) // divisor)
        most = 127 if format == "s8" else 7
        self.codes_a = torch.randint(-most, most + 1, (rows, k), generator=generator, device=device, dtype=torch.int8)
        groups_a = 1 if format == "s8" else blocks
        self.scale_a = torch.rand(rows, groups_a, generator=generator, device=device) * 0.02 + 0.001
        self.weights = [s8.random_operands(1, n, blocks, per_group, generator, bias=False) for _ in counts]
        a_codes, a_scale = pack_activations(self.codes_a, self.scale_a, format)
        a_codes[:, rows:] = 0x80
        a_scale = a_scale.clone()
        a_scale[:, rows:] = POISON
        layout = layout_of_format(format)
        packed = torch.stack([layout.pack(each.codes_w) for each in self.weights])
        if format == "s8":
            ratios, units = zip(*(fold_scales(each.scale_w) for each in self.weights), strict=True)
            scales = [torch.stack(ratios), torch.stack(units)]
        else:
            scales = [torch.stack([layout.pack_scales(each.scale_w) for each in self.weights])]
        table = []
        first = 0
        for expert, count in enumerate(counts):
            table += [[expert, first + i, min(config.tile_m, count - i), 0] for i in range(0, count, config.tile_m)]
            first += count
        tiles_m = configs.most_tiles(max(1, total), len(counts), config.tile_m)
        table += [[-1, 0, 0, 0]] * (tiles_m - len(table))
        self.plan = plan = ExpertPlan(config, tiles_m, n, splits)
        self.ldy = n + pad_columns
        self.y = torch.full((max(1, total), self.ldy), POISON, dtype=s8.DTYPES[config.out], device=device)
        self.partial = torch.full((max(1, plan.workspace_words),), -(2**31), dtype=torch.int32, device=device)
        self.counter = torch.zeros(plan.counters, dtype=torch.int32, device=device)
        self.pointers = [
            self.y, a_codes, a_scale, packed, *scales, None, self.partial, self.counter,
            torch.tensor(table, dtype=torch.int32, device=device), self.source, self.target,
        ]  # fmt: skip
        per_group_stored = blocks // self.weights[0].scale_w.shape[1]
        self.numbers = [plan.m, n, blocks, per_group_stored, a_scale.shape[1], self.ldy, splits, divisor]

    def run(self) -> torch.Tensor:
        plan = self.plan
        run(self.config, plan.grid, self.config.threads, self.pointers, self.numbers, self.config.shared_bytes)
        return self.y[:, : self.n]

    def problems(self) -> list[str]:
        """What is wrong with a launch and the next; empty if nothing is."""
        y = self.run().clone()
        again = self.run() if self.plan.splits > 1 else y
        found = [] if s8.same(again, y) else ["the second launch gives something else"]
        first = 0
        for expert, count in enumerate(self.counts):
            own = slice(first, first + count)
            source, target = self.source[own].long() // self.divisor, self.target[own].long()
            first += count
            if count and not self._right(y[target], source, self.weights[expert]):
                found.append(f"outputs of expert {expert} with {count} rows are wrong")
        if self.ldy > self.n and not bool(self.y[:, self.n :].isnan().all()):
            found.append("wrote past the columns")
        if self.counter.any():
            found.append("counters are not zero again")
        return found

    def _right(self, y: torch.Tensor, source: torch.Tensor, weights: s8.Operands) -> bool:
        codes_a, scale_a = self.codes_a[source], self.scale_a[source]
        if self.format == "s8":
            operands = s8.Operands(codes_a, scale_a[:, 0], weights.codes_w, weights.scale_w, None)
            return s8.same(y, s8.expected(operands, y.dtype))
        want = reference.linear(codes_a.cpu(), scale_a.cpu(), weights.codes_w.cpu(), weights.scale_w.cpu()).to(y.device)
        # Terms of float32 sums are exact to 2^-24 each; y is rounded to 8 or 11 bits.
        terms = reference.linear(codes_a.abs().cpu(), scale_a.cpu(), weights.codes_w.abs().cpu(), weights.scale_w.cpu())
        bound = want.abs() * 2.0 ** (-8 if y.dtype == torch.bfloat16 else -11) + terms.to(y.device) * 2.0**-20 + 1e-7
        return bool(((y.double() - want).abs() <= bound).all())


# ---- the operator ----------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """The experts of a layer as the operator takes them, and as the reference does."""

    arguments: tuple[Any, ...]  # behind expert_map
    codes: list[tuple[torch.Tensor, torch.Tensor]]  # of each expert: gate and up, down
    scales: list[tuple[torch.Tensor, torch.Tensor]]
    in_matrix: torch.Tensor | None
    out_matrices: list[torch.Tensor | None]
    clips: list[float]
    format: str
    hidden: int
    inner: int
    error_dtype: torch.dtype | None = None  # that errors are rounded to where they are fed back


def layer(
    experts: int, hidden: int, inner: int, format: str, generator: torch.Generator, *, transform: str = "hadamard",
    dtype: torch.dtype = torch.bfloat16, clips: bool = False, kernels: bool = True,
) -> Layer:  # fmt: skip
    """transform: "hadamard", "none", "dense" (a matrix for each block and expert), "feedback" and "feedback16" (as well) or "shared" (one for each
    expert)."""
    device, layout = generator.device, layout_of_format(format)
    in_k, out_k = round_up(hidden, BLOCK), round_up(inner, BLOCK)

    def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(-7, 8, (n, k), generator=generator, device=device, dtype=torch.int8)
        scale = (torch.rand(n, k // BLOCK, generator=generator, device=device) + 0.5) * (0.25 / k**0.5)
        return codes, scale.half()

    def matrices(k: int) -> torch.Tensor:
        made = torch.randn(k // BLOCK, BLOCK, BLOCK, generator=generator, device=device) * BLOCK**-0.5
        if transform in FEEDBACKS[1:]:
            behind = torch.randn(k // BLOCK, FEEDBACK_ROWS, BLOCK, generator=generator, device=device)
            made = torch.cat((made, 0.1 * behind), 1)
        if transform == "feedback16":
            made = torch.cat((made, clip_row(torch.full((len(made),), 1.0546875, device=device))), 1)
        return (made[:1].expand(k // BLOCK, -1, -1) if transform == "shared" else made).half()

    def stacked(which: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor | None]:
        packed = torch.stack([layout.pack(codes) for codes, _ in which])
        if format != "s8":
            return [packed, torch.stack([layout.pack_scales(scale) for _, scale in which]), None]
        folded = [fold_scales(scale) for _, scale in which]
        return [packed, torch.stack([ratio for ratio, _ in folded]), torch.stack([unit for _, unit in folded])]

    entering = [weights(2 * inner, in_k) for _ in range(experts)]
    leaving = [weights(hidden, out_k) for _ in range(experts)]
    learned = transform in ("dense", *FEEDBACKS[1:], "shared")
    in_matrix = matrices(in_k) if learned else None
    out_matrices = [matrices(out_k) if learned else None for _ in range(experts)]
    factor = [0.8 + 0.05 * (expert % 4) if clips else 1.0 for expert in range(experts)]

    def given(matrix: torch.Tensor) -> torch.Tensor:
        one = matrix[:1] if transform == "shared" and kernels else matrix
        return prepack_matrix(one, dtype) if kernels else one

    in_given = None if in_matrix is None else given(in_matrix)
    out_given = torch.stack([given(each) for each in out_matrices if each is not None]) if learned else None
    factors = torch.tensor(factor, device=device) / 7 if clips else None
    hadamard = transform == "hadamard"
    arguments = (
        *stacked(entering), in_given, 2 * inner, in_k, 1.0, hadamard,
        *stacked(leaving), out_given, hidden, out_k, 1.0, hadamard, factors, format,
    )  # fmt: skip
    if kernels and in_matrix is not None:  # which have it in 16 bits
        in_matrix, out_matrices = in_matrix.to(dtype), [each.to(dtype) for each in out_matrices if each is not None]
    codes = [(a[0], b[0]) for a, b in zip(entering, leaving, strict=True)]
    scales = [(a[1], b[1]) for a, b in zip(entering, leaving, strict=True)]
    error_dtype = dtype if kernels else None
    return Layer(arguments, codes, scales, in_matrix, out_matrices, factor, format, hidden, inner, error_dtype)


def expected(
    made: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 [T, hidden]: the reference of every expert, one after the other; between them what 16 bits leave."""
    x, weights = x.cpu(), weights.cpu().double()
    local = local_ids(ids.cpu(), len(made.codes), expert_map).reshape(ids.shape)
    total = torch.zeros(len(x), made.hidden, dtype=torch.float64)
    hadamard = made.arguments[7]

    def product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None, clip: float) -> torch.Tensor:  # fmt: skip
        codes, scale = codes.cpu(), scale.cpu()
        x = torch.nn.functional.pad(x, (0, codes.shape[1] - x.shape[1]))
        matrix = None if matrix is None else matrix.cpu()
        if made.format == "s8":
            return reference.folded_linear(
                *reference.quantize_token(x, hadamard, matrix), *reference.fold(codes, scale)
            )
        quantized = reference.quantize_activation(x, BLOCK, clip, hadamard, matrix, made.error_dtype)
        return reference.linear(*quantized, codes, scale)

    for expert in range(len(made.codes)):
        tokens, places = torch.where(local == expert)
        if len(tokens):
            (codes_in, codes_out), (scale_in, scale_out) = made.codes[expert], made.scales[expert]
            both = product(x[tokens], codes_in, scale_in, made.in_matrix, 1.0).to(x.dtype)
            gate, up = both.chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
            y = product(inner, codes_out, scale_out, made.out_matrices[expert], made.clips[expert]).to(x.dtype)
            total.index_put_((tokens,), y.double() * weights[tokens, places, None], accumulate=True)
    return total


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Of the norm. Codes that fall to the other side of a tie are all that may differ but the rounding of y."""
    return float((y.cpu().double() - want).norm() / want.norm().clamp_min(1e-30))
