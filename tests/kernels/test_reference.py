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
