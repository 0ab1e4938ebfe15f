"""Orthogonal matrices of the widths that models have: orthogonal, flat where they can be, decided by the seed."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.kernels.hadamard import apply_block_hadamard
from apex4_quant.transforms.orthogonal import Orthogonal, derived_seed, hadamard_order, orthogonal_matrix


@pytest.mark.parametrize("n", [1, 2, 6, 7, 20, 28, 36, 48, 52, 64, 92, 100, 128, 192, 256, 344, 384, 1536])
def test_matrices_are_orthogonal_and_hadamard_where_one_is_known(n: int) -> None:
    matrix = orthogonal_matrix(n, seed=3)
    assert matrix.dtype == torch.float64 and matrix.shape == (n, n)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    if n in (6, 7, 92):  # there is none of order 6 or 7, and Paley gives none of order 92
        assert hadamard_order(n) is None
    else:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5), rtol=1e-12, atol=0)
    x = torch.randn(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Orthogonal(n, 3).apply(x), x @ matrix)


@pytest.mark.parametrize("n", [3584, 5120, 11008])
def test_wide_matrices_row_by_row(n: int) -> None:
    """11008 = 43 * 256 has one through the field of 7^3 = 343 elements."""
    rows = Orthogonal(n, 0).apply(torch.eye(n, dtype=torch.float64)[:: n // 16])
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, n**-0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-12)


def test_matrices_depend_on_the_seed_alone() -> None:
    for n in (48, 92):
        first, again, other = (orthogonal_matrix(n, seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
    seeds = {derived_seed(0, "stream"), derived_seed(1, "stream"), derived_seed(0, "values", 0, 1)}
    assert len(seeds) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ValueError, match="width 0"):
        Orthogonal(0, 1)


def test_a_block_hadamard_after_a_rotation_does_not_undo_its_mixing() -> None:
    """One strong channel must reach every channel of every group: what the quantizer sees is x Q (I x H_128)."""
    seen = apply_block_hadamard(orthogonal_matrix(512, 0))
    assert float(seen.abs().max()) < 6 * 512**-0.5
    assert float((seen.abs() < 1e-9).double().mean()) < 0.2  # a sum of +-1 that happens to be zero
