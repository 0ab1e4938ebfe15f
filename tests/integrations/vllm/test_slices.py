"""What a tensor-parallel rank computes of a stored linear, and which cuts are refused."""

from __future__ import annotations

from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.integrations.vllm.slices import Piece, cut_features, cut_rows


def linear(n: int, k: int, group: int | str = 128, layout: str = "sm90") -> LinearFormat:
    return LinearFormat(n, k, group, get_layout(layout), TransformKind.HADAMARD, 1.0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_parts_of_all_ranks_are_the_whole(ranks: int) -> None:
    format = linear(1024, 4096)
    rows, features = [], []
    for rank in range(ranks):
        for start, count in cut_rows("q_proj", format, [Piece(0, 1024)], rank, ranks):
            rows += range(start, start + count)
        start, count = cut_features("o_proj", format, rank, ranks)
        features += range(start, start + count)
    assert rows == list(range(1024)) and features == list(range(4096))


def test_ranks_share_a_key_value_head_where_there_are_fewer() -> None:
    parts = [cut_rows("k_proj", linear(256, 1024), [Piece(0, 256, heads=2)], rank, 8) for rank in range(8)]
    assert parts == [((0, 128),)] * 4 + [((128, 128),)] * 4


def test_q_k_and_v_in_one_stored_linear() -> None:
    format = linear(1024 + 2 * 256, 1024)
    pieces = [Piece(0, 1024), Piece(1024, 256, 4), Piece(1280, 256, 4)]
    assert cut_rows("qkv_proj", format, pieces, 0, 1) == ((0, 1536),)
    assert cut_rows("qkv_proj", format, pieces, 1, 2) == ((512, 512), (1152, 128), (1408, 128))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            lambda: cut_rows("gate_proj", linear(192, 256), [Piece(0, 192)], 0, 2),
            "192 output features.* of 2 .* 1 or 3, or",
        ),
        (lambda: cut_rows("up_proj", linear(328, 256), [Piece(0, 328)], 0, 3), "tensor-parallel size of 1, or"),
        (lambda: cut_features("down_proj", linear(256, 384), 0, 2), "384 input features.* groups of 128.* 1 or 3$"),
        (lambda: cut_features("down_proj", linear(256, 1024, 512), 0, 4), "groups of 512.* 1 or 2$"),
        (lambda: cut_features("down_proj", linear(256, 328), 0, 2), "tensor-parallel size of 1$"),
        (
            lambda: cut_features("down_proj", linear(256, 512, "channel"), 0, 2),
            "one group for all of its 512 .* of 128$",
        ),
    ],
)
def test_a_cut_through_a_tile_or_a_group_is_refused_with_the_sizes_that_would_do(cut: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut()


def test_a_layout_without_tiles_is_cut_anywhere() -> None:
    assert cut_rows("gate_proj", linear(192, 256, layout="rowmajor"), [Piece(0, 192)], 1, 4) == ((48, 48),)
