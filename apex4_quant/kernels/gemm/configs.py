"""Tile configurations of the W4A4 GEMMs, and which one a shape gets. Torch-free.

A configuration is one cubin. `choose_gemm` ranks them by a small model of the time of a tile, whose few constants stand
below; winners that `apex4 kernels tune` measured on this kind of GPU come before it (tuned.py; not if `measured` is false).
`explain` prints the ranking, and `APEX4_GEMM` overrides all (a configuration's name, with `/CUT` if wanted, `GemmPlan.cut`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from ...environment import GEMM as VARIABLE
from ...environment import reader
from ...errors import UsageError
from ...format.layout_name import KERNEL_TILE_N
from ...format.number_format import BLOCK, CODE_MAX, round_up
from . import sharing, tuned

ROW_ALIGNMENT = 16  # m_stride, the rows that activations are allocated for, is M rounded up to this
_LAYOUT_BYTES = KERNEL_TILE_N * BLOCK // 2  # of a tile of weights
DECODE_PARTS = 4  # warpgroups of the sm_90 kernel for few tokens: they share the input features of one tile of weights

# sm -> (shared memory a thread block may have, shared memory of a multiprocessor, registers of a multiprocessor), bytes
# and 32-bit registers: CUDA C++ programming guide, compute capabilities.
SHARED_LIMITS = {80: (166912, 167936), 86: (101376, 102400), 89: (101376, 102400), 90: (232448, 233472)}
_RESERVED_SHARED = 1024  # of every thread block, for the system
# sm80: integer sums live in the mantissa of 1.5 * 2^23 and must stay below 2^22 (docs/kernels.md): blocks of a group.
_MOST_GROUP_BLOCKS = (2**22 - 1) // (CODE_MAX**2 * BLOCK)


@dataclass(frozen=True)
class GemmConfig:
    """One kernel. Tiles in tokens (m) and outputs (n); `wide_groups`: for groups of more than 128; `out`: dtype of y.

    `experts`, sm80 only: of all experts in one launch (kernels/experts/).
    """

    family: str  # "sm80": also for sm_86 and sm_89; "sm90"
    tile_m: int
    tile_n: int
    warps_m: int  # sm80 only: warps along the tile's tokens, and along its outputs
    warps_n: int
    stages: int
    wide_groups: bool = False
    out: str = "bf16"  # or "fp16"
    experts: bool = False

    entry = "apex4_gemm"

    @cached_property
    def name(self) -> str:
        return f"{self.tile_name}{'_wide' if self.wide_groups else ''}_{self.out}{'_experts' if self.experts else ''}"

    @property
    def tile_name(self) -> str:
        """Without group size and dtype: what `APEX4_GEMM` takes."""
        return f"{self.family}_m{self.tile_m}n{self.tile_n}s{self.stages}"

    @property
    def few_tokens(self) -> bool:
        """sm90: the kernel for decoding, gemm_sm90_decode.cu."""
        return self.family == "sm90" and self.tile_m < 64

    @property
    def source(self) -> str:
        return f"gemm/gemm_{self.family}{'_decode' if self.few_tokens else ''}.cu"

    @cached_property
    def defines(self) -> dict[str, int]:
        common = {"TILE_M": self.tile_m, "STAGES": self.stages, "OUT_BF16": int(self.out == "bf16")}
        # The kernel asserts that its own struct has this size.
        common["SHARED_BYTES"] = self.shared_bytes
        if self.family == "sm90":
            if self.few_tokens:
                return common | {"PARTS": self.consumers, "QUANTIZES": 0}
            return common | {"CONSUMERS": self.consumers}
        return common | {
            "TILE_N": self.tile_n,
            "WARPS_M": self.warps_m,
            "WARPS_N": self.warps_n,
            "WIDE_GROUPS": int(self.wide_groups),
            "EXPERTS": int(self.experts),
        }

    @property
    def consumers(self) -> int:
        """sm90: warpgroups that multiply."""
        return DECODE_PARTS if self.few_tokens else self.tile_n // KERNEL_TILE_N

    @cached_property
    def threads(self) -> int:
        if self.family != "sm90":
            return 32 * self.warps_m * self.warps_n
        return 128 * self.consumers + (96 if self.few_tokens else 128)  # and those that copy

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block: struct Stage times STAGES, or struct Shared."""
        if self.few_tokens:
            block = self.tile_m * (BLOCK + 4) + _LAYOUT_BYTES + 2 * KERNEL_TILE_N
            stage = round_up(DECODE_PARTS * block + 16, 1024)
            output = self.tile_m * KERNEL_TILE_N * (2 + 4 * DECODE_PARTS) + 16  # y, sums of others, two barriers
            return round_up(self.stages * stage + output, 1024)
        if self.family == "sm90":  # parts of the tokens' scales, too, and three barriers
            block = self.tile_m * (BLOCK + 4 + 16) + self.consumers * (_LAYOUT_BYTES + 2 * KERNEL_TILE_N) + 24
            return round_up(self.stages * round_up(block, 1024) + self.tile_n * self.tile_m * 2 + self.consumers, 1024)
        return self.stages * (self.tile_m * (BLOCK // 2 + 4) + self.tile_n * (BLOCK // 2 + 2))

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tile_m) * -(-n // self.tile_n)


def _sm80(tile_m: int, tile_n: int, warps_m: int, warps_n: int, stages: int, wide: bool = False) -> GemmConfig:
    return GemmConfig("sm80", tile_m, tile_n, warps_m, warps_n, stages, wide)


def _sm90(tile_m: int, tile_n: int, stages: int) -> GemmConfig:
    return GemmConfig("sm90", tile_m, tile_n, 0, 0, stages)


# Large tiles: a warp computes 64 x 64, which reads shared memory least; 164 KB hold two such blocks on sm_80, 100 KB one.
# Groups wider than 128 keep their integers between blocks beside the floats, so that a warp computes half as much.
_TILES: dict[int, tuple[GemmConfig, ...]] = {
    80: (
        _sm80(128, 256, 2, 4, 4),
        _sm80(128, 128, 2, 2, 4),
        _sm80(64, 128, 2, 2, 5),
        _sm80(32, 128, 1, 4, 6),
        _sm80(16, 128, 1, 4, 8),
        _sm80(128, 128, 2, 4, 4, wide=True),
        _sm80(64, 128, 2, 4, 5, wide=True),
        _sm80(16, 128, 1, 4, 8, wide=True),
    ),
    86: (
        _sm80(128, 256, 2, 4, 3),
        _sm80(128, 128, 2, 4, 4),
        _sm80(64, 128, 2, 2, 3),
        _sm80(32, 128, 1, 4, 4),
        _sm80(16, 128, 1, 4, 5),
        _sm80(128, 128, 2, 4, 4, wide=True),
        _sm80(64, 128, 2, 4, 3, wide=True),
        _sm80(16, 128, 1, 4, 5, wide=True),
    ),
    90: (_sm90(128, 128, 6), _sm90(64, 128, 8), _sm90(32, 64, 5), _sm90(16, 64, 8), _sm90(8, 64, 10)),
}
_TILES[89] = _TILES[86]


def all_configs(sm: int) -> list[GemmConfig]:
    """Every kernel of an architecture, for both output dtypes."""
    return [replace(config, out=out) for config in _TILES.get(sm, ()) for out in ("bf16", "fp16")]


@dataclass(frozen=True)
class GemmPlan:
    """How one shape is computed: the kernel, and what its launch needs.

    A tile's blocks of 128 input features are shared by several thread blocks where tiles alone do not fill the GPU:
    sm80, in `splits` equal ranges; sm90, in spans of `span` blocks of all tiles in a row, or not at all (0); sm90 with few
    tokens, by clusters of `cluster` thread blocks.
    """

    config: GemmConfig
    m: int
    n: int
    k_blocks: int
    sm_count: int
    splits: int = 1
    span: int = 0
    cluster: int = 1

    @property
    def cut(self) -> int:
        """How tiles are shared: `span`, `cluster` or `splits`."""
        if self.config.few_tokens:
            return self.cluster
        return self.span if self.config.family == "sm90" else self.splits

    @property
    def arguments(self) -> tuple[int, ...]:
        """The last arguments of the kernel."""
        if self.config.family != "sm90":
            return (self.splits,)
        return self.span, -(-self.m // self.config.tile_m), -(-self.n // self.config.tile_n)

    @property
    def label(self) -> str:
        """As `APEX4_GEMM` takes it."""
        return f"{self.config.tile_name}/{self.cut}"

    @property
    def block(self) -> int:
        return self.config.threads

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        tiles = self.config.tiles(self.m, self.n)
        if self.config.family != "sm90":
            return tiles, self.splits, 1
        return sharing.sm90_grid(tiles, self.k_blocks, self.sm_count, self.span, self.cluster)

    @cached_property
    def parts(self) -> int:
        """Thread blocks that may share a tile; 1: there is nothing to add up."""
        if self.config.family != "sm90":
            return self.splits
        return sharing.span_parts(self.k_blocks, self.span)

    @property
    def counters(self) -> int:
        """uint32 zeros needed if `parts` > 1."""
        if self.config.family == "sm90":
            return -(-self.m // self.config.tile_m) * -(-self.n // KERNEL_TILE_N)
        return self.config.tiles(self.m, self.n)

    @property
    def workspace_floats(self) -> int:
        """float32 of partial sums needed if `parts` > 1."""
        if self.parts == 1:
            return 0
        tile_n = KERNEL_TILE_N if self.config.family == "sm90" else self.config.tile_n
        return self.counters * self.parts * self.config.tile_m * tile_n


# ---- the heuristic -----------------------------------------------------------------------------------------------------

# Multiply-adds a multiprocessor's tensor cores do in a clock (4 bits; 8 bits on sm_90).
_MACS = {80: 4096, 86: 2048, 89: 2048, 90: 4096}
_SHARE_OF_PEAK = 0.6
_BYTES_PER_CLOCK = {80: 13.0, 86: 7.0, 89: 5.0, 90: 19.0}  # of memory, a multiprocessor's part
_LATENCY = 700.0  # clocks until the first block's copies have landed
_STAGE_OVERHEAD = 60.0  # clocks of a block's barrier and addresses, where nothing else runs on the multiprocessor
_REDUCTION = 1200.0  # clocks of adding partial sums, and of the tile's store
_REDUCTION_PER_PART = 60.0
_BLOCK_LATENCY = 500.0  # sm90: clocks of a block that is bound by nothing else (measured, H200)
_SPANS = 12500.0  # sm90: clocks that sharing tiles costs: writing, announcing and adding partial sums (measured, H200)
_DECODE = sharing.DecodeClocks(block=(80.0, 5.0), tile=600.0, adding=(1500.0, 100.0))  # measured, H100
_FEW_TOKENS = 64  # beyond them, reading weights is not what a GEMM of sm90 is about


def clocks(sm: int, plan: GemmPlan) -> float:
    """Modelled clocks of one GEMM. Not a prediction of times: an order of candidates."""
    config, k_blocks, sm_count = plan.config, plan.k_blocks, plan.sm_count
    tiles = config.tiles(plan.m, plan.n)
    rows = min(config.tile_m, plan.m)
    tensor = config.tile_m * config.tile_n * BLOCK / (_MACS[sm] * _SHARE_OF_PEAK)
    # Activations are re-read by every column of tiles, mostly from L2, which has about three times the bandwidth.
    memory = (config.tile_n * BLOCK / 2 + rows * BLOCK / 6) / _BYTES_PER_CLOCK[sm]
    if config.few_tokens:
        return _LATENCY + _DECODE.of(tiles, k_blocks, sm_count, plan.cluster, config.tile_m, memory)
    if config.family == "sm90":
        a_block = max(tensor, memory, _BLOCK_LATENCY)
        if plan.span:
            return _LATENCY + plan.span * a_block + _SPANS
        return _LATENCY + -(-tiles // sm_count) * (k_blocks * a_block + _REDUCTION)
    items = tiles * plan.splits
    blocks = -(-k_blocks // plan.splits)
    busy = min(max(1, _resident(sm, config)), -(-items // sm_count))  # thread blocks that share a multiprocessor
    a_block = max(tensor * busy, memory * busy, tensor + _STAGE_OVERHEAD)
    total = -(-items // (sm_count * busy)) * (blocks * a_block + _REDUCTION) + _LATENCY
    return total + (_REDUCTION + plan.splits * _REDUCTION_PER_PART if plan.splits > 1 else 0.0)


def _resident(sm: int, config: GemmConfig) -> int:
    """Thread blocks of a multiprocessor: by shared memory and by registers (255 a thread at warp tiles of 64 x 64)."""
    registers = 256 if config.tile_m * config.tile_n // (config.warps_m * config.warps_n) >= 4096 else 128
    if config.wide_groups:
        registers = 256
    by_shared = SHARED_LIMITS[sm][1] // (config.shared_bytes + _RESERVED_SHARED)
    return min(by_shared, 65536 // (registers * config.threads))


def candidates(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str
) -> list[GemmPlan]:
    """Every plan that may compute the shape."""
    wide = blocks_per_group > 1 and sm != 90
    found = []
    fitting = [config for config in all_configs(sm) if (config.out, config.wide_groups) == (out, wide)]
    smallest = min((config.tile_m for config in fitting), default=0)
    for config in fitting:
        if config.tile_m > smallest and config.tile_m >= 2 * m:  # mostly padding
            continue
        if config.few_tokens and m > _FEW_TOKENS:
            continue
        plan = GemmPlan(config, m, n, k_blocks, sm_count)
        if config.few_tokens:
            found += [replace(plan, cluster=cluster) for cluster in range(1, sharing.MOST_CLUSTER + 1)]
        elif config.family == "sm90":
            spans = sharing.span_lengths(config.tiles(m, n), k_blocks, sm_count)
            found += [replace(plan, span=span) for span in spans]
        else:
            splits = sharing.split_counts(config.tiles(m, n), k_blocks, sm_count)
            found += [replace(plan, splits=each) for each in splits]
    return found


class PlanSource(NamedTuple):
    """What a plan is chosen by beside the shape: part of the key of whatever keeps plans."""

    forced: str | None  # APEX4_GEMM
    winners: int  # tuned.generation


_forced_plan = reader(VARIABLE)
_last_source = PlanSource(None, 0)


def plan_source() -> PlanSource:
    """As it is now: the environment and the winners may change at any time."""
    global _last_source
    last, forced, winners = _last_source, _forced_plan() or None, tuned.generation()
    if last.forced != forced or last.winners != winners:
        _last_source = last = PlanSource(forced, winners)
    return last


def choose_gemm(
    sm: int,
    sm_count: int,
    m: int,
    n: int,
    k_blocks: int,
    blocks_per_group: int,
    out: str = "bf16",
    measured: bool = True,
    source: PlanSource | None = None,
) -> GemmPlan:
    """The kernel of an [m, k_blocks * 128] by [n, k_blocks * 128]^T product on a GPU of `sm_count` multiprocessors.

    `source`: what `plan_source` says, if it was asked already. Raises UsageError if there is no kernel for `sm` or for so wide
    a group, or APEX4_GEMM names none of its configurations.
    """
    return _choose_gemm(sm, sm_count, m, n, k_blocks, blocks_per_group, out, measured, source or plan_source())


@lru_cache(maxsize=4096)
def _choose_gemm(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, measured: bool, source: PlanSource
) -> GemmPlan:  # fmt: skip
    if sm != 90 and min(blocks_per_group, k_blocks) > _MOST_GROUP_BLOCKS:
        raise UsageError(
            f"a group of {blocks_per_group * BLOCK} input features is wider than the {_MOST_GROUP_BLOCKS * BLOCK} whose sums "
            f"the kernel of sm_{sm} can hold: quantize with smaller groups, or set APEX4_KERNEL=reference"
        )
    options = candidates(sm, sm_count, m, n, k_blocks, blocks_per_group, out)
    if not options:
        raise UsageError(f"there is no W4A4 kernel for sm_{sm}")
    if source.forced is not None:
        return _named(source.forced, sm, GemmPlan(options[0].config, m, n, k_blocks, sm_count))
    if measured:
        won = tuned.winners(sm, sm_count).get(tuned.key(m, n, k_blocks, blocks_per_group, out))
        if won is not None:
            return _named(won["plan"], sm, GemmPlan(options[0].config, m, n, k_blocks, sm_count))
    return min(options, key=lambda plan: clocks(sm, plan))


def _named(wanted: str, sm: int, shape: GemmPlan) -> GemmPlan:
    """The plan that `NAME` or `NAME/CUT` names, for the shape, group kind and dtype of `shape`."""

    def cut(config: GemmConfig, number: int | None) -> GemmPlan | None:
        plan, shares = replace(shape, config=config), 1 if number is None else number
        if config.few_tokens:
            return replace(plan, cluster=shares) if 1 <= shares <= sharing.MOST_CLUSTER else None
        if config.family == "sm90":
            return replace(plan, span=number or 0)
        return replace(plan, splits=shares) if 1 <= shares <= min(sharing.MOST_SPLITS, shape.k_blocks) else None

    alike = [
        each for each in all_configs(sm) if (each.out, each.wide_groups) == (shape.config.out, shape.config.wide_groups)
    ]
    return sharing.named_plan(wanted, alike, cut, "", "CUT")


def explain(sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, count: int = 8) -> str:
    """The best candidates of the heuristic and their modelled clocks, one a line."""
    plans = candidates(sm, sm_count, m, n, k_blocks, blocks_per_group, "bf16")
    return sharing.as_text(((clocks(sm, plan), plan.label) for plan in plans), count)
