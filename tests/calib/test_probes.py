"""Which rows of what linears read are kept."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.calib.probes import InputProbe, stratified


def kept_of(total: int, tokens: int, batch: int = 2048, cuts: tuple[int, ...] = ()) -> list[int]:
    """The numbers of the rows that are kept, of probes that see what lies between `cuts`."""
    numbers = torch.arange(total)[:, None]
    kept = []
    for first, stop in zip((0, *cuts), (*cuts, total), strict=True):
        probe = InputProbe(total, tokens, before=first)
        for rows in numbers[first:stop].split(batch):
            probe.add(rows)
        kept += probe.rows().flatten().tolist()
    return kept


@pytest.mark.parametrize(("total", "tokens"), [(1, 4), (7, 7), (8, 7), (100, 30), (4099, 64)])
def test_one_row_of_every_so_many(total: int, tokens: int) -> None:
    kept = kept_of(total, tokens, batch=13)
    stride = -(-total // tokens)
    assert len(kept) <= tokens
    assert [number // stride for number in kept] == list(range(-(-total // stride)))
    assert kept == stratified(torch.arange(total), tokens).tolist()


def test_of_no_rows_none() -> None:
    assert stratified(torch.zeros(0, 3), 4).shape == (0, 3)


def test_which_rows() -> None:
    assert kept_of(40, 8) == [4, 8, 12, 19, 23, 28, 30, 36]


@pytest.mark.parametrize("cuts", [(2048,), (1, 7, 6000), (0, 3, 8192)])
def test_several_probes_keep_what_one_keeps(cuts: tuple[int, ...]) -> None:
    assert kept_of(8192, 100, cuts=cuts) == kept_of(8192, 100)


@pytest.mark.parametrize("window", [256, 300, 512, 2048])
@pytest.mark.parametrize("stride", [2, 4, 16, 30, 32, 64])
def test_every_place_in_a_window_is_kept_as_often(window: int, stride: int) -> None:
    """First tokens are like no others: their share among what is kept has to be their share of the text."""
    windows = 128
    total = windows * window
    kept = torch.tensor(kept_of(total, total // stride))
    firsts = int((kept % window == 0).sum())
    assert abs(firsts - windows / stride) <= 4 * (windows / stride) ** 0.5
    quarters = torch.bincount(kept % window * 4 // window)
    assert quarters.sub(len(kept) / 4).abs().max() <= 0.02 * len(kept)
