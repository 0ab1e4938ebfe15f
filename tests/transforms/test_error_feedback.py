"""G of a `feedback128` transform: the least cost that is left, step by step; and what it is where there is nothing to go by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apex4_quant.distributed.group import Group
from apex4_quant.format.feedback import feedback_of, step_order
from apex4_quant.kernels.reference import round_with_feedback
from apex4_quant.transforms.error_feedback import DAMPING, error_feedback, feedback_by_moments
from apex4_quant.transforms.learned_transform import round_to_halves


def rows_of(count: int, blocks: int = 1, seed: int = 1) -> torch.Tensor:
    """[count, 128 blocks], correlated, columns of different strength."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 128 * blocks, generator=generator) @ (
        torch.eye(128 * blocks) + 0.1 * torch.randn(128 * blocks, 128 * blocks, generator=generator)
    )
    return mixed * torch.rand(128 * blocks, generator=generator).mul(2).exp()


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """Rows behind a matrix -> G float64 [KB, 128, 128]."""
    feedback = feedback_of(torch.cat((stored.new_zeros(len(stored), 128, 128), stored), 1))
    assert feedback is not None
    return feedback.double()


def damped(rows: torch.Tensor) -> torch.Tensor:
    """What errors cost, columns in step order: M, and a tenth of its mean diagonal for each of them."""
    moments = rows.double().t() @ rows.double()
    moments = moments[step_order()][:, step_order()]
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(128)


@pytest.mark.parametrize("count", [5, 200])
def test_a_step_rounds_the_least_that_the_steps_before_left(count: int) -> None:
    """Brute force: of real errors of the steps left, those of the least cost, given the errors of the steps that are rounded."""
    rows = rows_of(count)
    cost, feedback = damped(rows), feedback_by_moments((rows.double().t() @ rows.double())[None])
    units = 3 * torch.randn(4, 1, 128, generator=torch.Generator().manual_seed(2)).double()
    codes, values = round_with_feedback(units, feedback.double())
    order = step_order()
    u, q, v = units[:, 0, order], codes[:, 0, order], values[:, 0, order]
    assert torch.equal(v[:, 112:], u[:, 112:]) and (v != u)[:, :112].all()
    for step in range(6, -1, -1):
        left, rounded = 16 * step + 16, slice(16 * step + 16, 128)
        errors = (q - u)[:, rounded]
        least = torch.linalg.solve(cost[:left, :left], -(errors @ cost[rounded, :left]).t()).t()
        moved = (v - u)[:, left - 16 : left]
        assert (moved - least[:, -16:]).norm() < 0.01 * least[:, -16:].norm()  # G has 8 bits
    plain = units[:, 0, order].round().clamp(-7, 7) - u

    def total(errors: torch.Tensor) -> float:
        return float(torch.einsum("mi,ij,mj->", errors, cost, errors))

    assert total(q - u) < 0.8 * total(plain)


def test_what_is_stored() -> None:
    rows = rows_of(700, 2)
    stored = error_feedback(iter([rows[:300], rows[300:]]), 256)
    assert stored.shape == (2, 56, 128) and stored.dtype == torch.float16
    assert torch.equal(round_to_halves(stored.float()), stored), "what both 16-bit types hold"
    blocks = rows.double().unflatten(1, (2, 128)).transpose(0, 1)
    whole = feedback_by_moments(blocks.transpose(1, 2) @ blocks).double()
    assert (unpacked(stored) - whole).abs().max() < 0.01 * whole.abs().max()  # sums in another order, and 8 bits
    steps = torch.arange(128) // 16
    assert not whole[:, steps[:, None] <= steps].any()
    scaled = error_feedback(iter([rows * 2.0**60]), 256)
    assert (unpacked(scaled) - whole).abs().max() < 0.01 * whole.abs().max()


def test_blocks_with_nothing_to_go_by_have_none() -> None:
    rows = rows_of(50, 5)
    rows[:, 128:256] = 0
    rows[7, 300] = float("nan")
    rows[7, 400] = float("inf")
    feedback = unpacked(error_feedback(iter([rows]), 640))
    assert not feedback[1:4].any() and feedback[0].any() and feedback[4].any()
    alone = unpacked(error_feedback(iter([rows[:, :128]]), 128))
    assert torch.equal(feedback[:1], alone)
    assert error_feedback(iter([torch.zeros(3, 128)]), 128).any().item() is False


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_damping_bounds_it_where_rows_say_little(rank: int) -> None:
    """||G + I|| is at most the root of 1 + 128 / damping, whatever the rows: errors do not grow without bound."""
    rows = torch.randn(rank, 128, generator=torch.Generator().manual_seed(rank)) * torch.logspace(-6, 6, 128)
    feedback = unpacked(error_feedback(iter([rows]), 128))[0]
    assert feedback.isfinite().all()
    assert torch.linalg.matrix_norm(feedback + torch.eye(128), 2) <= (1 + 128 / DAMPING) ** 0.5 * 1.01


class OneOf(Group):
    """A process of several, of which each makes its share: what it gives to the others is kept."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def gather_share(self, own: torch.Tensor, count: int) -> torch.Tensor:
        return own


def test_processes_make_shares_of_the_blocks() -> None:
    rows: Any = [rows_of(300, 2)]
    whole = error_feedback(iter(rows), 256)
    parts = [error_feedback(iter(rows), 256, OneOf(rank, 3)) for rank in range(3)]
    assert sorted(len(part) for part in parts) == [0, 1, 1] and torch.equal(torch.cat(parts), whole)
