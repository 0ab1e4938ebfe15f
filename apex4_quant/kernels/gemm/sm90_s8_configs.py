"""Tile configurations of the 8-bit GEMMs of sm_90a, and which one a shape gets. Torch-free.

Two kernels: gemm_sm90_s8.cu for many tokens, gemm_sm90_decode_s8.cu for up to 64. `choose_sm90_s8` ranks plans by a small model of
the time of a tile, as configs.py does for 4-bit activations; winners that `apex4 kernels tune` measured on this kind of GPU come
before it, and `APEX4_GEMM` overrides both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...format.layout_name import KERNEL_TILE_N
from ...format.number_format import BLOCK, round_up
from . import sharing, tuned
from .configs import DECODE_PARTS, PlanSource

PREFIX = "sm90_s8_"  # of the names that APEX4_GEMM takes
_LAYOUT_BYTES = KERNEL_TILE_N * BLOCK // 2  # of a tile of weights
_CONSUMERS = 2  # warpgroups that multiply, of the kernel for many tokens
_CHUNK = 32  # tokens that a warpgroup stores at a time
FEW_TOKENS = 64  # beyond them, reading weights is not what a GEMM is about
WARPGROUPS_FROM = 64  # tokens of a tile for which the kernel for few multiplies with wgmma


def few_tokens_shared_bytes(
    tile_m: int, stages: int, token_bytes: int, parts: int = DECODE_PARTS, tiles: int = 1
) -> int:
    """Of struct Shared of gemm_sm90_decode_s8.cu, which asserts it. `token_bytes`: tokens' codes of a block in a stage."""
    alignment = 1024 if tile_m >= WARPGROUPS_FROM else BLOCK
    stage = round_up(parts * (token_bytes + tiles * (_LAYOUT_BYTES + 2 * KERNEL_TILE_N)) + 16, alignment)
    # y; sums of the other warpgroups, and of a cluster's second block; units and biases; the tokens' scales and absmax; two barriers.
    output = tile_m * tiles * KERNEL_TILE_N * (2 + 4 * parts) + 8 * tiles * KERNEL_TILE_N + 8 * tile_m + 16
    return round_up(stages * stage + output, alignment)


@dataclass(frozen=True)
class Sm90S8Config:
    """One cubin. A tile has `tile_m` tokens. `out`: dtype of y.

    `parts`: 0, the kernel for many tokens, whose tiles have 128 outputs; otherwise the one for few: warpgroups that share the
    input features of a tile, which has 64 outputs of each of `tiles_n` tiles of weights.
    """

    tile_m: int
    stages: int
    parts: int = 0
    tiles_n: int = 1
    out: str = "bf16"  # or "fp16"

    entry = "apex4_gemm"

    @property
    def few_tokens(self) -> bool:
        """The kernel for decoding."""
        return self.parts > 0

    @property
    def tile_n(self) -> int:
        return KERNEL_TILE_N * (self.tiles_n if self.few_tokens else _CONSUMERS)

    @property
    def tile_name(self) -> str:
        """Without the dtype: what `APEX4_GEMM` takes."""
        return f"{PREFIX}m{self.tile_m}n{self.tile_n}s{self.stages}"

    @cached_property
    def name(self) -> str:
        return f"{self.tile_name}_{self.out}"

    @property
    def source(self) -> str:
        return f"gemm/gemm_sm90{'_decode' if self.few_tokens else ''}_s8.cu"

    @property
    def threads(self) -> int:
        if not self.few_tokens:
            return 128 * (_CONSUMERS + 1)
        return 128 * self.parts + (128 if self.tile_m >= WARPGROUPS_FROM else 64)

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block: struct Shared. The kernel asserts it."""
        if self.few_tokens:
            return few_tokens_shared_bytes(self.tile_m, self.stages, self.tile_m * BLOCK, self.parts, self.tiles_n)
        chunk = min(self.tile_m, _CHUNK)
        tile = _LAYOUT_BYTES + 2 * KERNEL_TILE_N  # weights and their ratios
        stage = round_up(self.tile_m * BLOCK + _CONSUMERS * tile + 16, 1024)
        output = _CONSUMERS * (2 * chunk * KERNEL_TILE_N * 2 + self.tile_m * 4 + 1)
        return round_up(self.stages * stage + output, 1024)

    @cached_property
    def defines(self) -> dict[str, int]:
        found = {
            "TILE_M": self.tile_m, "STAGES": self.stages, "SHARED_BYTES": self.shared_bytes, "OUT_BF16": int(self.out == "bf16")
        }  # fmt: skip
        few = {"PARTS": self.parts, "TILES": self.tiles_n, "QUANTIZES": 0}
        return found | (few if self.few_tokens else {"CONSUMERS": _CONSUMERS})

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tile_m) * -(-n // self.tile_n)


_TILES = (
    Sm90S8Config(256, 5), Sm90S8Config(128, 8), Sm90S8Config(64, 12), Sm90S8Config(64, 4, 2, 2), Sm90S8Config(64, 3, DECODE_PARTS),
    Sm90S8Config(32, 7, 2, 2), Sm90S8Config(32, 5, DECODE_PARTS),
    Sm90S8Config(16, 8, DECODE_PARTS), Sm90S8Config(8, 10, DECODE_PARTS),
)  # fmt: skip


def all_configs(sm: int) -> list[Sm90S8Config]:
    """Every kernel of an architecture, for both output dtypes."""
    return [replace(config, out=out) for config in _TILES for out in ("bf16", "fp16")] if sm == 90 else []


@dataclass(frozen=True)
class Sm90S8Plan:
    """How one shape is computed: an eight_bit.EightBitPlan.

    Blocks of a tile are shared by thread blocks in spans of `span` blocks of all tiles in a row, or not (0); where tokens are
    few, by clusters of `cluster` thread blocks.
    """

    config: Sm90S8Config
    m: int
    n: int
    k_blocks: int
    sm_count: int
    span: int = 0
    cluster: int = 1

    programmatic = True

    @property
    def cut(self) -> int:
        """How tiles are shared: `cluster` or `span`."""
        return self.cluster if self.config.few_tokens else self.span

    @property
    def label(self) -> str:
        """As `APEX4_GEMM` takes it."""
        return f"{self.config.tile_name}/{self.cut}"

    @property
    def arguments(self) -> tuple[int, ...]:
        """The last arguments of the kernel."""
        return self.span, -(-self.m // self.config.tile_m), -(-self.n // self.config.tile_n)

    @property
    def block(self) -> int:
        return self.config.threads

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        tiles = self.config.tiles(self.m, self.n)
        return sharing.sm90_grid(tiles, self.k_blocks, self.sm_count, self.span, self.cluster)

    @cached_property
    def parts(self) -> int:
        """Thread blocks that may share a tile; 1: there is nothing to add up in global memory."""
        return sharing.span_parts(self.k_blocks, self.span)

    @property
    def counters(self) -> int:
        """uint32 zeros needed if `parts` > 1."""
        return -(-self.m // self.config.tile_m) * -(-self.n // KERNEL_TILE_N)

    @property
    def workspace_words(self) -> int:
        """int32 of partial sums needed if `parts` > 1."""
        return self.counters * self.parts * self.config.tile_m * KERNEL_TILE_N if self.parts > 1 else 0


# ---- the heuristic (measured, H200: docs/kernel_measurements.md, item 17) ----------------------------------------------
# Numbers are fitted to times of all plans on weights that come from memory, in clocks of 1674 MHz.

_LATENCY = 2320.0  # clocks until the first block's products, and of a kernel's end
# Clocks of a block of 128 inputs, and of a tile's end, by the tokens of a tile.
_BLOCK = {256: 1044.0, 128: 756.0, 64: 649.0}
_TILE = {256: 2320.0, 128: 2120.0, 64: 1220.0}
_SPANS = (
    4320.0,
    70.0,
)  # that sharing tiles costs, and more for each token of a tile: writing, announcing and adding partial sums
_BYTES_PER_CLOCK = 19.0  # of memory, a multiprocessor's part

# Of few tokens. Bytes a clock: of memory, a multiprocessor's part; likewise of L2, which also has the tokens; of a multiprocessor that
# reads alone.
_FEW_LATENCY = 3280.0
_FEW_MEMORY, _FEW_L2, _FEW_ALONE = 24.0, 41.5, 33.0
_FEW_TILE = 10.0  # of a tile's end, for each token by 64 outputs
_FEW_ADDING = 2500.0  # of a cluster's sums
# The same of tiles of 64 tokens, whose products are wgmma's (item 20): bytes a clock of a multiprocessor that reads alone, by the tiles of
# weights side by side; a block's clocks at least; of a cluster's sums. For so few tokens the kernel for many takes longer than is modelled.
_WARPGROUPS_ALONE = {1: 39.0, 2: 36.0}
_WARPGROUPS_BLOCK = 290.0
_WARPGROUPS_ADDING = 4500.0
_MANY_FOR_FEW = 1.12


def _clocks(plan: Sm90S8Plan) -> float:
    """Modelled clocks of one GEMM. Not a prediction of times: an order of candidates."""
    config, k_blocks, sm_count = plan.config, plan.k_blocks, plan.sm_count
    tiles, rows = config.tiles(plan.m, plan.n), min(config.tile_m, plan.m)
    weights = config.tile_n * (BLOCK // 2 + 2)  # bytes of a block
    if config.few_tokens:
        waves, own = -(-tiles // (sm_count // plan.cluster)), -(-k_blocks // plan.cluster)
        everything = weights + rows * BLOCK
        read_by_all = tiles * k_blocks / sm_count * max(weights / _FEW_MEMORY, everything / _FEW_L2)
        alone, adding = everything / _FEW_ALONE, _FEW_ADDING
        if config.tile_m >= WARPGROUPS_FROM:
            alone, adding = max(everything / _WARPGROUPS_ALONE[config.tiles_n], _WARPGROUPS_BLOCK), _WARPGROUPS_ADDING
        a_tile = _FEW_TILE * config.tile_m * config.tile_n / KERNEL_TILE_N + (plan.cluster - 1) * adding
        return _FEW_LATENCY + max(read_by_all, waves * own * alone) + waves * a_tile
    # Activations are re-read by every column of tiles, mostly from L2, which has about three times the bandwidth.
    a_block = max(_BLOCK[config.tile_m], (weights + rows * BLOCK / 6) / _BYTES_PER_CLOCK)
    slower = _MANY_FOR_FEW if plan.m <= FEW_TOKENS else 1.0
    if plan.span:
        return slower * (_LATENCY + plan.span * a_block + _SPANS[0] + _SPANS[1] * config.tile_m)
    return slower * (_LATENCY + -(-tiles // sm_count) * (k_blocks * a_block + _TILE[config.tile_m]))


def candidates(sm_count: int, m: int, n: int, k_blocks: int, out: str) -> list[Sm90S8Plan]:
    """Every plan that may compute the shape; groups of any width are alike."""
    found = []
    smallest = min(config.tile_m for config in _TILES)
    for config in (each for each in all_configs(90) if each.out == out):
        if config.tile_m > smallest and config.tile_m >= 2 * m:  # mostly padding
            continue
        plan = Sm90S8Plan(config, m, n, k_blocks, sm_count)
        if config.few_tokens:
            if m <= min(FEW_TOKENS, 2 * config.tile_m):
                found += [replace(plan, cluster=cluster) for cluster in range(1, sharing.MOST_CLUSTER + 1)]
            continue
        spans = sharing.span_lengths(config.tiles(m, n), k_blocks, sm_count)
        found += [replace(plan, span=span) for span in spans]
    return found


def choose_sm90_s8(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, source: PlanSource,
    measured: bool = True,
) -> Sm90S8Plan:  # fmt: skip
    """The plan of an [m, k_blocks * 128] by [n, k_blocks * 128]^T product: an eight_bit.Chooser.

    `measured`: winners of `apex4 kernels tune` are asked for. Raises UsageError if APEX4_GEMM names none of its configurations.
    """
    return _choose(sm, sm_count, m, n, k_blocks, blocks_per_group, out, source, measured)


@lru_cache(maxsize=4096)
def _choose(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, source: PlanSource, measured: bool
) -> Sm90S8Plan:  # fmt: skip
    options = candidates(sm_count, m, n, k_blocks, out)
    if source.forced is not None:
        return _named(source.forced, options[0])
    if measured:
        won = tuned.winners(sm, sm_count).get(tuned.key(m, n, k_blocks, blocks_per_group, out, activation_bits=8))
        if won is not None:
            return _named(won["plan"], options[0])
    return min(options, key=_clocks)


def _named(wanted: str, shape: Sm90S8Plan) -> Sm90S8Plan:
    """The plan that `NAME` or `NAME/CUT` names, for the shape and dtype of `shape`."""

    def cut(config: Sm90S8Config, number: int | None) -> Sm90S8Plan | None:
        plan, blocks = replace(shape, config=config, span=0, cluster=1), 1 if number is None else number
        if not config.few_tokens:
            return replace(plan, span=number or 0)
        return replace(plan, cluster=blocks) if 1 <= blocks <= sharing.MOST_CLUSTER else None

    alike = [config for config in all_configs(90) if config.out == shape.config.out]
    return sharing.named_plan(wanted, alike, cut, " for 8-bit activations", "CUT")


def explain(sm_count: int, m: int, n: int, k_blocks: int, count: int = 8) -> str:
    """The best candidates of the heuristic and their modelled clocks, one a line."""
    plans = candidates(sm_count, m, n, k_blocks, "bf16")
    return sharing.as_text(((_clocks(plan), plan.label) for plan in plans), count)
