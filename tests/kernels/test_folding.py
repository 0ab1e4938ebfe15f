"""Folded weights: literal values, the float64 reference, and how far a folded weight is from the one it stands for."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from apex4_quant.kernels import reference
from apex4_quant.kernels.folding import FOLDED_MAX, FOLDING_ERROR, RATIO_MAX, fold, fold_codes


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


def scales_of(kind: str, n: int, groups: int) -> torch.Tensor:
    if kind == "alike":
        return torch.rand(n, groups, generator=generator(1)).mul(0.5).add(0.75).half()
    if kind == "any":  # every positive float16 may be the scale of a group: subnormal ones, too
        return torch.randint(1, 0x7C00, (n, groups), generator=generator(2)).short().view(torch.float16)
    return torch.full((n, groups), 2.0**-24).half()  # of weights that are all zero


def test_golden_folding() -> None:
    scale = torch.tensor([[1.0, 0.5, 0.25, 2.0**-12], [3.0, 1.0, 2.0**-24, 3.0]]).half()
    ratio, unit = fold(scale)
    assert ratio.tolist() == [[4608, 2304, 1152, 1], [4608, 1536, 0, 4608]] and ratio.dtype == torch.int16
    assert unit.tolist() == [float(torch.tensor(1 / 18)), float(torch.tensor(1 / 6))] and unit.dtype == torch.float32
    codes = torch.tensor([[7, -7, 6, 5, 1, -1, 7, 7], [1, 2, 3, 4, 7, -7, 0, -4]], dtype=torch.int8)
    folded = fold_codes(codes, ratio)
    # 126 = (7 * 4608 + 128) >> 8; 54 = (6 * 2304 + 128) >> 8; 5 and -5: 4.5 is rounded away from zero
    assert folded.tolist() == [[126, -126, 54, 45, 5, -5, 0, 0], [18, 36, 18, 24, 0, 0, 0, -72]]
    assert folded.dtype == torch.int8


def test_a_ratio_between_two_integers_goes_to_the_even_one() -> None:
    scale = torch.tensor([[1024.0, 1.0, 3.0, 5.0]]).half()  # 4608 / 1024 = 4.5, then 13.5 and 22.5
    assert fold(scale)[0].tolist() == [[4608, 4, 14, 22]]
    assert [round(Fraction(4608 * s, 1024)) for s in (1, 3, 5)] == [4, 14, 22]


@pytest.mark.parametrize("kind", ["alike", "any", "smallest"])
@pytest.mark.parametrize(("n", "groups", "length"), [(1, 1, 128), (70, 3, 256), (130, 8, 128), (5, 1, 1024)])
def test_folding_is_the_reference_and_errs_by_its_bound_at_most(kind: str, n: int, groups: int, length: int) -> None:
    scale, codes = scales_of(kind, n, groups), random_codes(n, groups * length)
    codes[:, ::length] = 7
    ratio, unit = fold(scale)
    folded = fold_codes(codes, ratio)
    expected, units = reference.fold(codes, scale)
    assert torch.equal(folded.long(), expected) and torch.equal(unit.double(), units)
    assert int(ratio.min()) >= 0 and bool((ratio.amax(1) == RATIO_MAX).all())
    assert int(folded.abs().max()) == FOLDED_MAX and not bool((folded.sign() * codes.sign() < 0).any())
    exact = codes.double() * scale.double().repeat_interleave(length, 1)
    assert float(((folded * units[:, None] - exact).abs() / units[:, None]).max()) <= FOLDING_ERROR


def test_the_eight_magnitudes_of_a_ratio_are_bytes_of_packed_products() -> None:
    """As a kernel makes them: c R + 128 stays below 2^15 in each half of a word, and the magnitude is its high byte."""
    for ratio in range(RATIO_MAX + 1):
        words = [(ratio * (2 * i * 0x00000001 + (2 * i + 1) * 0x00010000) + 0x00800080) for i in range(4)]
        found = [word >> shift & 0xFF for word in words for shift in (8, 24)]
        assert found == [(c * ratio + 128) >> 8 for c in range(8)] and max(words) < 2**31
