"""How thread blocks share the tiles of a GEMM, and how a plan is named: what plans of all GEMMs have in common. Torch-free.

A tile's blocks of 128 input features are one thread block's; or, where tiles alone do not fill the GPU, of several: `splits`
equal ranges (mma.sync); `span` blocks of all tiles in a row (sm_90, many tokens); every second stage, in clusters of two thread
blocks (sm_90, few tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from ...environment import GEMM as VARIABLE
from ...errors import UsageError

MOST_CLUSTER = 2
MOST_SPLITS = 32
_MOST_SHARED_WAVES = 4  # tiles are shared while the thread blocks fill the GPU at most so many times


def split_counts(tiles: int, k_blocks: int, sm_count: int, most: int = MOST_SPLITS) -> list[int]:
    """Numbers of ranges worth trying: partial sums are written and read again, so several only while thread blocks are few."""
    most = min(k_blocks // 2, _MOST_SHARED_WAVES * sm_count // tiles, most)
    return [1, *(each for each in (2, 3, 4, 6, 8, 12, 16, 24, MOST_SPLITS) if each <= most)]


def span_lengths(tiles: int, k_blocks: int, sm_count: int) -> list[int]:
    """Spans worth trying; 0: whole tiles, which were faster wherever they fill the GPU once (measured, H200)."""
    even = -(-tiles * k_blocks // sm_count)  # blocks of each multiprocessor
    return sorted({0} | ({max(even, least) for least in (4, 8)} if tiles < sm_count else set()))


def sm90_grid(tiles: int, k_blocks: int, sm_count: int, span: int, cluster: int) -> tuple[int, int, int]:
    """Thread blocks of a plan: one for each span, or as many as run at once, which take several tiles each."""
    if span:
        return -(-tiles * k_blocks // span), 1, 1
    return min(tiles, sm_count // cluster) * cluster, 1, 1


def span_parts(k_blocks: int, span: int) -> int:
    """Thread blocks that may share a tile; 1: there is nothing to add up in global memory."""
    return -(-k_blocks // span) + 1 if span else 1


class DecodeClocks(NamedTuple):
    """Clocks of a GEMM for few tokens: of a block of 128 inputs where a thread block reads alone, and of adding a cluster's sums,
    both with no token and more for each; of a tile's end."""

    block: tuple[float, float]
    tile: float
    adding: tuple[float, float]

    def of(self, tiles: int, k_blocks: int, sm_count: int, cluster: int, tile_m: int, memory: float) -> float:
        """Of all tiles: reading everything, `memory` clocks a block of a tile, or the longest chain."""
        waves = -(-tiles // (sm_count // cluster))
        own = -(-k_blocks // cluster)
        everything = tiles * k_blocks * memory / sm_count
        a_block, adding = (start + tile_m * each for start, each in (self.block, self.adding))
        chain = waves * (own * a_block + self.tile + (cluster - 1) * adding)
        return max(everything, chain)


# ---- names of plans: NAME or NAME/CUT ------------------------------------------------------------------------------------


class Named(Protocol):
    @property
    def tile_name(self) -> str: ...


Config = TypeVar("Config", bound=Named)
Plan = TypeVar("Plan")


def named_plan(
    wanted: str, configs: Sequence[Config], plan: Callable[[Config, int | None], Plan | None], what: str, cut: str
) -> Plan:
    """The plan that `wanted` names, among those of `configs`. `plan` makes it of a configuration and of CUT, None if none is
    given; None: there is no such cut. Raises UsageError, in which `what` is a kernel here, and `cut` the name of CUT."""
    name, _, number = wanted.partition("/")
    for config in configs:
        if config.tile_name == name and (not number or number.isdecimal()):
            found = plan(config, int(number) if number else None)
            if found is not None:
                return found
    raise UsageError(
        f"{VARIABLE}={wanted!r} names no kernel{what} here: give NAME or NAME/{cut} with one of "
        f"{', '.join(sorted({config.tile_name for config in configs}))}"
    )


def as_text(ranked: Iterable[tuple[float, str]], count: int) -> str:
    """The best of plans by their modelled clocks, one a line."""
    return "\n".join(f"{clocks:12.0f} clocks  {label}" for clocks, label in sorted(ranked)[:count])
