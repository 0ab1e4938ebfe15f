"""How tiles are shared, by hand; choices of whole plans are tested where the plans are."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.kernels.gemm import sharing
from apex4_quant.kernels.gemm.sharing import DecodeClocks


class Config(NamedTuple):
    tile_name: str


def test_tiles_are_split_while_thread_blocks_are_few() -> None:
    assert sharing.split_counts(tiles=27, k_blocks=32, sm_count=108) == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
    ]  # 16 by k, 16 by tiles
    assert sharing.split_counts(27, 32, 108, most=8) == [1, 2, 3, 4, 6, 8]
    assert sharing.split_counts(433, 32, 108) == sharing.split_counts(1, 3, 108) == [1]
    assert max(sharing.split_counts(1, 1000, 108)) == sharing.MOST_SPLITS


def test_spans_cut_all_blocks_evenly_and_only_where_tiles_do_not_fill_the_gpu() -> None:
    assert sharing.span_lengths(tiles=132, k_blocks=32, sm_count=132) == [0]
    assert sharing.span_lengths(66, 32, 132) == [0, 16]
    assert sharing.span_lengths(8, 32, 132) == [0, 4, 8]
    assert sharing.sm90_grid(66, 32, 132, span=16, cluster=1) == (132, 1, 1)
    assert sharing.sm90_grid(1000, 32, 132, span=0, cluster=1) == (132, 1, 1)
    assert sharing.sm90_grid(64, 32, 133, span=0, cluster=2) == (128, 1, 1)
    assert sharing.sm90_grid(100, 32, 133, span=0, cluster=2) == (132, 1, 1)  # 66 clusters
    assert (sharing.span_parts(32, 0), sharing.span_parts(32, 16), sharing.span_parts(32, 15)) == (1, 3, 4)


def test_few_tokens_take_the_longer_of_reading_and_of_the_chain() -> None:
    model = DecodeClocks(block=(80.0, 5.0), tile=600.0, adding=(1500.0, 100.0))
    # One wave: 32 blocks of 80 + 8 * 5, and the tile's end; in clusters two waves of 66, half of the blocks, and adding.
    assert model.of(132, 32, 132, cluster=1, tile_m=8, memory=0.0) == 32 * 120 + 600
    assert model.of(132, 32, 132, cluster=2, tile_m=8, memory=0.0) == 2 * (16 * 120 + 600 + 1500 + 800)
    assert model.of(132, 32, 132, cluster=1, tile_m=8, memory=500.0) == 32 * 500


def test_a_plan_by_its_name() -> None:
    configs = [Config("a"), Config("b")]

    def plan(config: Config, number: int | None) -> tuple[str, int | None] | None:
        return None if number == 0 else (config.tile_name, number)

    assert sharing.named_plan("b", configs, plan, "", "CUT") == ("b", None)
    assert sharing.named_plan("b/12", configs, plan, "", "CUT") == ("b", 12)
    for wrong in ("c", "b/0", "b/x", "b/-1", ""):
        message = f"APEX4_GEMM='{wrong}' names no kernel of ours here: give NAME or NAME/CUT with one of a, b"
        with pytest.raises(UsageError, match=message):
            sharing.named_plan(wrong, configs, plan, " of ours", "CUT")
