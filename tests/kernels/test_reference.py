"""The float64 reference of 8-bit activations, against the format's text written out number by number."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from apex4_quant.kernels import reference
from apex4_quant.kernels.hadamard import hadamard_128


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_to_even(value: Fraction) -> int:
    return round(value)  # Python's rounding of fractions is


def test_tokens_number_by_number() -> None:
    x = torch.randn(3, 256, generator=generator(1)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x[1, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # with a scale of 1: ties
    codes, scales = reference.quantize_token(x, hadamard=False)
    for row in range(3):
        largest = max(abs(Fraction(float(value))) for value in x[row])
        scale = Fraction(float(torch.tensor(float(largest / 127), dtype=torch.float32)))
        assert Fraction(float(scales[row])) == scale
        expected = [min(127, max(-127, half_to_even(Fraction(float(value)) / scale))) for value in x[row]]
        assert codes[row].tolist() == expected
    assert codes[1, :4].tolist() == [127, 0, 2, -2]


def test_tokens_are_transformed_first() -> None:
    x, matrix = torch.randn(4, 256, generator=generator(1)), torch.randn(2, 128, 128, generator=generator(2))
    h = hadamard_128(torch.float64, x.device)
    for how, matrices in (({"hadamard": True}, [h, h]), ({"matrix": matrix}, list(matrix.double()))):
        plain = torch.cat([part.double() @ each for part, each in zip(x.split(128, 1), matrices, strict=True)], 1)
        for found, expected in zip(
            reference.quantize_token(x, **how), reference.quantize_token(plain, hadamard=False), strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_folded_weights_and_their_product_number_by_number(groups: int) -> None:
    n, k = 5, 128 * groups
    codes_w = torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator(1))
    scale_w = (torch.rand(n, groups, generator=generator(2)) + 0.01).half()
    codes_a = torch.randint(-127, 128, (2, k), generator=generator(3))
    scale_a, bias = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.randn(n, generator=generator(4))
    folded, unit = reference.fold(codes_w, scale_w)
    y = reference.folded_linear(codes_a, scale_a, folded, unit, bias)
    for row in range(n):
        scales = [Fraction(float(value)) for value in scale_w[row]]
        ratios = [half_to_even(4608 * scale / max(scales)) for scale in scales]
        worth = [
            (1 if code > 0 else -1) * ((abs(code) * ratios[column // 128] + 128) // 256)
            for column, code in enumerate(codes_w[row].tolist())
        ]
        assert folded[row].tolist() == worth
        assert float(unit[row]) == float(torch.tensor(float(max(scales) / 18), dtype=torch.float32))
        for token in range(2):
            total = sum(a * w for a, w in zip(codes_a[token].tolist(), worth, strict=True))
            expected = total * float(scale_a[token]) * float(unit[row]) + float(bias[row])
            assert abs(float(y[token, row]) - expected) <= 1e-12 * (abs(expected) + 1)


@pytest.mark.parametrize("groups", [1, 3])
def test_weights_that_are_not_folded_number_by_number(groups: int) -> None:
    n, k = 4, 128 * groups
    codes_w = torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator(1))
    scale_w = (torch.rand(n, groups, generator=generator(2)) + 0.01).half()
    codes_a = torch.randint(-127, 128, (2, k), generator=generator(3))
    scale_a, bias = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.randn(n, generator=generator(4))
    y = reference.unfolded_linear(codes_a, scale_a, codes_w, *reference.ratios(scale_w), bias)
    for row in range(n):
        scales = [Fraction(float(value)) for value in scale_w[row]]
        ratios = [half_to_even(4608 * scale / max(scales)) for scale in scales]
        unit = Fraction(float(torch.tensor(float(max(scales) / 18), dtype=torch.float32)))
        for token in range(2):
            products = zip(codes_a[token].tolist(), codes_w[row].tolist(), strict=True)
            total = sum(a * w * ratios[column // 128] for column, (a, w) in enumerate(products))
            expected = Fraction(float(scale_a[token])) * unit / 256 * total + Fraction(float(bias[row]))
            assert abs(float(y[token, row]) - float(expected)) <= 1e-12 * (abs(float(expected)) + 1)


def test_a_reader_that_folds_and_one_that_does_not_stay_within_the_bound() -> None:
    """docs/format.md: 0.52 units a weight from q s_w, for both; and so their outputs."""
    codes_w = torch.randint(-7, 8, (64, 2048), dtype=torch.int8, generator=generator(1))
    scale_w = (0.02 * torch.exp(-6 * torch.rand(64, 16, generator=generator(2)))).half()
    codes_a = torch.randint(-127, 128, (3, 2048), generator=generator(3))
    scale_a = torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)
    ratio, unit = reference.ratios(scale_w)
    folded, unit_of_folded = reference.fold(codes_w, scale_w)
    assert torch.equal(unit, unit_of_folded)
    exact = (codes_w.double().unflatten(1, (16, -1)) * scale_w.double()[..., None]).flatten(1)
    unfolded = (codes_w.double().unflatten(1, (16, -1)) * ratio.double()[..., None]).flatten(1) * unit[:, None] / 256
    off = ((folded * unit[:, None] - exact).abs() / unit[:, None]).max()
    assert 0.45 < off <= 0.52 and ((unfolded - exact).abs() / unit[:, None]).max() <= 7 / 512 + 1e-5
    one = reference.folded_linear(codes_a, scale_a, folded, unit)
    other = reference.unfolded_linear(codes_a, scale_a, codes_w, ratio, unit)
    bound = 0.52 * scale_a[:, None] * unit * codes_a.abs().sum(1, keepdim=True)
    assert ((one - other).abs() <= bound).all() and ((one - other).abs() > 1e-4 * bound).any()
