"""Tile configurations of gemm_s8.cu, the W4A8 GEMM of every GPU with mma.sync of 8-bit integers, and which one a shape gets.

`choose_s8` ranks them by a small model of the time of a tile, as configs.py does for 4-bit activations; `APEX4_GEMM` overrides
it. On sm_90 there is a faster kernel, and these are chosen by name only. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

from ...format.layout_name import KERNEL_TILE_N
from ...format.number_format import BLOCK
from . import sharing
from .configs import SHARED_LIMITS as _OTHERS

PREFIX = "s8_"  # of the names that APEX4_GEMM takes
_WARP_N = 32  # outputs of a warp: its codes are widened by no other
_RESERVED_SHARED = 1024  # of every thread block, for the system (sm_80 and later)

# As configs.SHARED_LIMITS: bytes that a thread block may have, bytes of a multiprocessor.
SHARED_LIMITS: Mapping[int, tuple[int, int]] = {
    75: (65536, 65536), **_OTHERS, 100: (232448, 233472), 120: (101376, 102400)
}  # fmt: skip


class Source(Protocol):
    """What is read of configs.PlanSource."""

    @property
    def forced(self) -> str | None: ...


@dataclass(frozen=True)
class S8Config:
    """One cubin. A tile has `tile_m` tokens by `tile_n` outputs, and a warp `tile_m` by 32; `out`: dtype of y.

    `experts`: of all experts in one launch (kernels/experts/).
    """

    tile_m: int
    tile_n: int
    stages: int
    out: str = "bf16"  # or "fp16"
    experts: bool = False

    source = "gemm/gemm_s8.cu"
    entry = "apex4_gemm"

    @property
    def tile_name(self) -> str:
        """Without the dtype: what `APEX4_GEMM` takes."""
        return f"{PREFIX}m{self.tile_m}n{self.tile_n}s{self.stages}"

    @cached_property
    def name(self) -> str:
        return f"{self.tile_name}_{self.out}{'_experts' if self.experts else ''}"

    @property
    def warps(self) -> int:
        return self.tile_n // _WARP_N

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block: struct Stage times STAGES. The kernel asserts it."""
        return self.stages * (self.tile_m * BLOCK + self.tile_n * (BLOCK // 2 + 2))

    @cached_property
    def defines(self) -> dict[str, int]:
        return {
            "TILE_M": self.tile_m, "TILE_N": self.tile_n, "WARPS_M": 1, "WARPS_N": self.warps, "STAGES": self.stages,
            "SHARED_BYTES": self.shared_bytes, "OUT_BF16": int(self.out == "bf16"), "EXPERTS": int(self.experts),
        }  # fmt: skip

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.tile_m) * -(-n // self.tile_n)


# A warp of the largest tile has 32 outputs by 128 tokens: as many sums as registers hold, and every code is widened once.
# Two such thread blocks fit a multiprocessor; their warps take turns at widening and multiplying.
_TILE_N = 2 * KERNEL_TILE_N
_STAGES: dict[int, dict[int, int]] = {  # sm -> tokens of a tile -> stages
    75: {128: 2, 64: 2, 32: 2, 16: 2},
    80: {128: 3, 64: 4, 32: 5, 16: 6},
    86: {128: 2, 64: 3, 32: 3, 16: 4},
    90: {128: 4, 64: 4, 32: 5, 16: 6},
}
_STAGES |= {89: _STAGES[86], 100: _STAGES[90], 120: _STAGES[86]}
ARCHITECTURES = tuple(sorted(_STAGES))


def all_configs(sm: int) -> list[S8Config]:
    """Every kernel of an architecture, for both output dtypes."""
    return [
        S8Config(tile_m, _TILE_N, stages, out)
        for tile_m, stages in _STAGES.get(sm, {}).items()
        for out in ("bf16", "fp16")
    ]


@dataclass(frozen=True)
class S8Plan:
    """How one shape is computed: an eight_bit.EightBitPlan. Blocks of a tile are shared by `splits` thread blocks."""

    config: S8Config
    m: int
    n: int
    k_blocks: int
    splits: int = 1

    cluster = 1
    programmatic = False

    @property
    def arguments(self) -> tuple[int, ...]:
        return (self.splits,)

    @property
    def label(self) -> str:
        """As `APEX4_GEMM` takes it."""
        return f"{self.config.tile_name}/{self.splits}"

    @property
    def block(self) -> int:
        return self.config.threads

    @property
    def counters(self) -> int:
        return self.config.tiles(self.m, self.n)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.counters, self.splits, 1

    @property
    def parts(self) -> int:
        return self.splits

    @property
    def workspace_words(self) -> int:
        """int32 of partial sums needed if `parts` > 1."""
        return self.counters * self.splits * self.config.tile_m * self.config.tile_n if self.splits > 1 else 0


# Multiply-adds of 8 bits that a multiprocessor's tensor cores do in a clock. sm_90 by mma.sync (measured); sm_100 assumed.
_MACS = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 2700, 100: 2048, 120: 1024}
_SHARE_OF_PEAK = 0.75
_BYTES_PER_CLOCK = {
    75: 5.0,
    80: 13.0,
    86: 7.0,
    89: 5.0,
    90: 19.0,
    100: 27.0,
    120: 5.0,
}  # of memory, a multiprocessor's part
_WIDENING = 560.0  # clocks of a scheduler for a block's 32 outputs of a warp: logic of 16 lanes (docs/issue_slots.md)
_LATENCY = 700.0  # clocks until the first block's copies have landed
_STAGE_OVERHEAD = 100.0  # clocks of a block's barrier and addresses, where nothing else runs on the multiprocessor
_REDUCTION = 1200.0  # clocks of adding partial sums, and of the tile's store
_REDUCTION_PER_PART = 60.0


def resident(sm: int, config: S8Config) -> int:
    """Thread blocks of a multiprocessor: by shared memory and by registers (256 a thread where a tile has 128 tokens)."""
    registers = {128: 256, 64: 152, 32: 96}.get(config.tile_m, 72)
    reserved = _RESERVED_SHARED if sm >= 80 else 0
    return min(SHARED_LIMITS[sm][1] // (config.shared_bytes + reserved + 128), 65536 // (registers * config.threads))


def clocks(sm: int, sm_count: int, plan: S8Plan) -> float:
    """Modelled clocks of one GEMM. Not a prediction of times: an order of candidates."""
    config = plan.config
    items = config.tiles(plan.m, plan.n) * plan.splits
    blocks = -(-plan.k_blocks // plan.splits)
    tensor = config.tile_m * config.tile_n * BLOCK / (_MACS[sm] * _SHARE_OF_PEAK)
    # Activations are re-read by every column of tiles, mostly from L2, which has about three times the bandwidth.
    memory = (config.tile_n * BLOCK / 2 + min(config.tile_m, plan.m) * BLOCK / 3) / _BYTES_PER_CLOCK[sm]
    busy = min(max(1, resident(sm, config)), -(-items // sm_count))  # thread blocks that share a multiprocessor
    a_block = max(busy * max(tensor, memory, _WIDENING), tensor + _WIDENING + _STAGE_OVERHEAD)
    total = -(-items // (sm_count * busy)) * (blocks * a_block + _REDUCTION) + _LATENCY
    return total + (_REDUCTION + plan.splits * _REDUCTION_PER_PART if plan.splits > 1 else 0.0)


def candidates(sm: int, sm_count: int, m: int, n: int, k_blocks: int, out: str) -> list[S8Plan]:
    """Every plan that may compute the shape; groups of any width are alike."""
    found = []
    for config in (each for each in all_configs(sm) if each.out == out):
        if config.tile_m > 16 and config.tile_m >= 2 * m:  # mostly padding
            continue
        plan = S8Plan(config, m, n, k_blocks)
        splits = sharing.split_counts(config.tiles(m, n), k_blocks, sm_count)
        found += [replace(plan, splits=each) for each in splits]
    return found


@lru_cache(maxsize=4096)
def choose_s8(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, blocks_per_group: int, out: str, source: Source
) -> S8Plan:
    """The plan of an [m, k_blocks * 128] by [n, k_blocks * 128]^T product: an eight_bit.Chooser.

    Raises UsageError if APEX4_GEMM names none of its configurations.
    """
    options = candidates(sm, sm_count, m, n, k_blocks, out)
    if source.forced is not None:
        return _named(source.forced, sm, options[0])
    return min(options, key=lambda plan: clocks(sm, sm_count, plan))


def _named(wanted: str, sm: int, shape: S8Plan) -> S8Plan:
    """The plan that `NAME` or `NAME/SPLITS` names, for the shape and dtype of `shape`."""

    def cut(config: S8Config, number: int | None) -> S8Plan | None:
        splits = 1 if number is None else number
        fits = 1 <= splits <= min(sharing.MOST_SPLITS, shape.k_blocks)
        return replace(shape, config=config, splits=splits) if fits else None

    alike = [config for config in all_configs(sm) if config.out == shape.config.out]
    return sharing.named_plan(wanted, alike, cut, " for 8-bit activations", "SPLITS")
