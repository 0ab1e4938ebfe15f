"""The kernels of mixtures of experts, and which ones a layer gets. Torch-free.

The GEMMs are those of linears under the macro EXPERTS (cuda/gemm/tile_rows.cuh). How many tokens an expert gets is known on the
GPU alone, so that grids are as large as they may have to be: `most_tiles`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ...errors import Apex4Error
from ...format.number_format import BLOCK
from ..gemm import configs as gemm_configs
from ..gemm import s8_configs
from ..gemm.configs import GemmConfig, GemmPlan
from ..gemm.s8_configs import S8Config, S8Plan
from ..gemm.sharing import split_counts
from ..quantize.configs import DTYPES, FEEDBACKS, FEW_ROWS, QuantizeConfig, dense_config, measuring_config
from ..runtime.configuration import Configuration

ROUTE_THREADS = 256  # of a thread block of route.cu
COMBINE_COLUMNS = 8 * 128  # of a thread block of combine.cu
SMALL_TILE = FEW_ROWS  # rows of a tile of the quantizer
_MOST_SPLITS = 8
_SM80_FAMILY = (80, 86, 89)

ExpertConfig = S8Config | GemmConfig


def why_none(sm: int, format: str, blocks_per_group: int) -> str | None:
    """Why experts of this activation format and group size have no kernels of their own on `sm`; None: they have."""
    if format == "s8":
        return None if sm in s8_configs.ARCHITECTURES else f"there is none for 8-bit activations on sm_{sm}"
    if format != "sm80":
        return f"there is none for 4-bit activations on sm_{sm}"
    if blocks_per_group > 1:
        return f"there is none for 4-bit activations with groups of {blocks_per_group * BLOCK}"
    return None


def gemm_configs_of(sm: int, format: str) -> list[ExpertConfig]:
    """Every GEMM of experts for the activation format, for both output dtypes. `sm80` on sm_90: for checks."""
    if format == "s8":
        return [replace(config, experts=True) for config in s8_configs.all_configs(sm)]
    # A warp of the largest tile has no register for where its rows are.
    return [
        replace(config, experts=True)
        for config in gemm_configs.all_configs(80 if sm == 90 else sm)
        if config.family == "sm80" and not config.wide_groups and config.tile_n <= 128
    ]


def quantizer_config(dtype: str, format: str, feedback: str = "") -> QuantizeConfig:
    """The quantizer of SiLU(gate) * up with a matrix for each expert; to eight bits the one that makes codes."""
    config = dense_config(1, "silu_mul", dtype, format, feedback=feedback)
    macros = (*config.macros, ("APEX4_EXPERTS", 1))
    return QuantizeConfig(f"{config.name}_experts", config.source, config.entry, macros)


def route_config() -> Configuration:
    return Configuration("route", "experts/route.cu", "apex4_route", {})


def combine_config(out: str) -> Configuration:
    return Configuration(f"combine_{out}", "experts/combine.cu", "apex4_combine", {"OUT_BF16": int(out == "bf16")})


def all_configs(sm: int) -> list[Configuration]:
    """Every kernel of experts that an architecture may use."""
    formats = ["s8"] if sm in s8_configs.ARCHITECTURES else []
    formats += ["sm80"] if sm in _SM80_FAMILY else []
    found = [route_config(), *map(combine_config, ("bf16", "fp16"))] if formats else []
    for format in formats:
        found += [
            Configuration(each.name, each.source, each.entry, {**each.defines}) for each in gemm_configs_of(sm, format)
        ]
        for dtype in DTYPES if sm >= 80 else DTYPES[:1]:
            codes = [
                quantizer_config(dtype, format, feedback) for feedback in (FEEDBACKS if format == "sm80" else [""])
            ]
            for each in (*codes, measuring_config(codes[0])) if format == "s8" else codes:
                found.append(Configuration(each.name, each.source, each.entry, {**each.defines}))
    return found


def most_tiles(choices: int, experts: int, rows: int) -> int:
    """Tiles of `rows` rows that `choices` rows of so many experts have at most: every expert may have one that is not full."""
    chosen = min(experts, choices)
    return chosen + (choices - chosen) // rows


@lru_cache(maxsize=4096)
def expected_tiles(choices: int, experts: int, rows: int) -> int:
    """Tiles of `rows` rows, rounded up, that `choices` rows have on average if every one falls to any expert alike.

    An expert's rows are binomial, and it has a tile for every multiple of `rows` that they exceed. With as many rows an expert as a
    tile has, half of the experts have a second one, which evenly spread choices would not (measured: docs/kernel_measurements.md,
    item 17).
    """
    if experts == 1:
        return -(-choices // rows)
    mean = choices / experts
    reach = 8 * math.sqrt(mean) + 8
    least, most = max(0, int(mean - reach)), min(choices, int(mean + reach))
    tiles = 0.0
    for own in range(least, most + 1):
        probability = math.exp(
            math.lgamma(choices + 1) - math.lgamma(own + 1) - math.lgamma(choices - own + 1)
            - own * math.log(experts) + (choices - own) * math.log1p(-1 / experts)
        )  # fmt: skip
        tiles += probability * -(-own // rows)
    return math.ceil(experts * tiles)


@dataclass(frozen=True)
class ExpertPlan:
    """How one product of all experts is computed. `tiles_m`: the most there may be; a tile's blocks are shared by `splits`."""

    config: ExpertConfig
    tiles_m: int
    n: int
    splits: int

    @property
    def m(self) -> int:
        """The argument of the kernel."""
        return self.tiles_m * self.config.tile_m

    @property
    def counters(self) -> int:
        return self.config.tiles(self.m, self.n)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.counters, self.splits, 1

    @property
    def workspace_words(self) -> int:
        """32-bit words of partial sums needed if there are splits."""
        return self.counters * self.splits * self.config.tile_m * self.config.tile_n if self.splits > 1 else 0


@lru_cache(maxsize=4096)
def choose_experts(
    sm: int, sm_count: int, choices: int, experts: int, shapes: tuple[tuple[int, int], ...], format: str, out: str
) -> tuple[ExpertPlan, ...]:
    """The plans of products of `shapes` (n, blocks of k), with tiles of the same rows, so that one table serves all.

    By the models of time that linears are chosen by, for choices that fall to any expert alike. Raises Apex4Error where there is no
    kernel.
    """
    by_rows: dict[int, tuple[float, tuple[ExpertPlan, ...]]] = {}
    of_an_expert = -(-choices // min(experts, choices))
    for config in gemm_configs_of(sm, format):
        if config.out != out or (config.tile_m > SMALL_TILE and config.tile_m > 2 * of_an_expert):  # mostly padding
            continue
        best = [_best_splits(sm, sm_count, config, choices, experts, n, k_blocks) for n, k_blocks in shapes]
        by_rows[config.tile_m] = sum(clocks for clocks, _ in best), tuple(plan for _, plan in best)
    if not by_rows:
        raise Apex4Error(f"there is no kernel for experts with activations in the format {format} for sm_{sm}")
    return min(by_rows.values(), key=lambda found: found[0])[1]


def _best_splits(
    sm: int, sm_count: int, config: ExpertConfig, choices: int, experts: int, n: int, k_blocks: int
) -> tuple[float, ExpertPlan]:
    rows = expected_tiles(choices, experts, config.tile_m) * config.tile_m
    whole = ExpertPlan(config, most_tiles(choices, experts, config.tile_m), n, 1)
    options = []
    for splits in split_counts(config.tiles(rows, n), k_blocks, sm_count, _MOST_SPLITS):
        if isinstance(config, S8Config):
            clocks = s8_configs.clocks(sm, sm_count, S8Plan(config, rows, n, k_blocks, splits))
        else:
            clocks = gemm_configs.clocks(
                80 if sm == 90 else sm, GemmPlan(config, rows, n, k_blocks, sm_count, splits=splits)
            )
        options.append((clocks, replace(whole, splits=splits)))
    return min(options, key=lambda option: option[0])
