"""What ranks tell each other, against what one process has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apex4_quant.distributed.group import Group
from apex4_quant.distributed.shares import Share, share_of
from apex4_quant.errors import UsageError

from .several import Several


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 6, 128])
def test_shares_are_all_of_it_in_order_and_about_equal(total: int, size: int) -> None:
    shares = [share_of(total, rank, size) for rank in range(size)]
    assert [entry for share in shares for entry in range(total)[share.slice]] == list(range(total))
    assert max(share.size for share in shares) - min(share.size for share in shares) <= 1
    assert [share.is_whole for share in shares] == [share.size == total for share in shares]
    assert share_of(total, 0, 1) == Share.whole(total)


def test_one_process_has_everything() -> None:
    alone, values = Group(), torch.randn(5, 3)
    assert alone.is_first and alone.share(5) == Share.whole(5)
    for found in (alone.sum(values), alone.broadcast(values), alone.gather_share(values, 5), alone.gather_rows(values)):
        assert found is values
    assert alone.gather(3) == [3] and alone.from_first(lambda: 4) == 4 and alone.any(True) and not alone.any(False)
    assert alone.sum_of_numbers([0.1]) == [0.1] and alone.norms(values) is values and alone.mean(values, 2) is values


def work(group: Group) -> None:
    rank, ones = group.rank, torch.ones(4, 6)
    assert group.size == 3 and group.is_first == (rank == 0)
    part = (ones * (rank + 1))[:, 1:3]  # not contiguous: the sum is in its place all the same
    assert group.sum(part) is part and torch.equal(part, torch.full((4, 2), 6.0))
    assert group.sum_of_numbers([1e-17, float(rank)]) == [3e-17, 3.0]
    vector = torch.arange(10.0)
    norms = torch.stack([vector[group.share(10).slice].norm(), torch.zeros(())])
    torch.testing.assert_close(group.norms(norms), torch.stack([vector.norm(), torch.zeros(())]))
    own = vector[group.share(10).slice] if rank else vector[:0]  # a rank without any
    mean = group.mean(own.mean(), len(own))
    torch.testing.assert_close(mean, vector[3:].mean())
    for dtype in (torch.int8, torch.float16, torch.bfloat16, torch.float32):
        for total in (2, 10):  # of two there are none for one of the ranks
            whole = torch.arange(3 * total).view(total, 3).to(dtype)
            assert torch.equal(group.gather_share(whole[group.share(total).slice], total), whole)
        rows = torch.full((rank, 2), rank, dtype=dtype)
        assert group.gather_rows(rows)[:, 0].tolist() == [1, 2, 2]
    for source in (0, 2):
        assert torch.equal(group.broadcast(torch.full((2,), rank), source), torch.full((2,), source))
    assert group.gather({"rank": rank})[2] == {"rank": 2}
    assert group.from_first(lambda: rank + 5) == 5
    assert group.any(rank == 2) and not group.any(False)
    group.require_equal({"torch": "2.13", "weights": 1})
    with pytest.raises(
        UsageError, match=r"^rank 1 has another torch than rank 0 \(2\.11, and 2\.13\): give every rank"
    ):
        group.require_equal({"torch": "2.11" if rank == 1 else "2.13", "weights": rank})
    print("done")


def test_several_have_it_together(tmp_path: Path) -> None:
    for ended in Several(3, tmp_path, work).wait():
        assert (ended.code, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_sums_are_the_same_every_time(tmp_path: Path) -> None:
    """And of all ranks: what is decided from them must be."""

    def keep(group: Group) -> None:
        values = torch.randn(1000, 257, generator=torch.Generator().manual_seed(group.rank)) * 10.0 ** (3 * group.rank)
        torch.save(group.sum(values), tmp_path / f"{name}-{group.rank}")

    for name in ("first", "second"):
        assert [ended.code for ended in Several(3, tmp_path / name[0], keep).wait()] == [0, 0, 0]
    found = [torch.load(path) for path in tmp_path.glob("*-?")]
    assert len(found) == 6 and all(torch.equal(found[0], other) for other in found)
