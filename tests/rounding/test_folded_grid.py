"""What codes are worth with 8-bit activations, and rounding to it: by GPTQ, by descent, and to nearest."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.kernels.folding import fold, fold_codes
from apex4_quant.rounding.coordinate_descent import refine_codes
from apex4_quant.rounding.folded_grid import FoldedGrid
from apex4_quant.rounding.gptq import DAMPING, inverse_factor, quantize_weight_gptq
from apex4_quant.rounding.nearest import quantize_weight_rtn

N, K = 20, 384


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_format(bits: int) -> LinearFormat:
    return LinearFormat(N, K, 128, get_layout("rowmajor"), "none", 1.0, activation_bits=bits)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Groups of very different sizes in a row: the smallest have few numbers to choose from."""
    sizes = torch.tensor([1.0, 0.2, 0.01]).repeat_interleave(128)
    return torch.randn(N, K, generator=generator(1)) * sizes


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    x = torch.randn(2000, K, generator=generator(2)) @ torch.randn(K, K, generator=generator(3)) / K**0.5
    return x.t() @ x / len(x)


def worth(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the format says that codes stand for, float64 [N, K]."""
    ratio, unit = fold(scales)
    return fold_codes(codes, ratio).double() * unit.double()[:, None]


def output_error(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = worth(codes, scales) - weight.double()
    damped = hessian.double() + DAMPING * hessian.diagonal().mean().double() * torch.eye(len(hessian))
    return float(((difference @ damped) * difference).sum())


def test_codes_are_of_nearest_worth(weight: torch.Tensor) -> None:
    codes, scales = quantize_weight_rtn("w", weight, made_format(8))
    all_codes = torch.arange(-7, 8, dtype=torch.int8)
    possible = torch.stack([worth(code.expand(N, K), scales) for code in all_codes])
    least = (possible - weight.double()).abs().amin(0)
    found = (worth(codes, scales) - weight.double()).abs()
    assert float((found - least).max()) <= 1e-6 * float(weight.abs().max())
    plain, same = quantize_weight_rtn("w", weight, made_format(4))
    assert torch.equal(scales, same) and not torch.equal(codes, plain)
    before = (worth(plain, scales) - weight.double()).abs()
    assert bool((found <= before + 1e-7).all()) and float(found.square().sum()) < float(before.square().sum())


def test_a_column_and_a_group_are_rounded_alike(weight: torch.Tensor) -> None:
    codes, scales = quantize_weight_rtn("w", weight, made_format(8))
    exact = worth(codes, scales)
    for g, part in enumerate(weight.split(128, 1)):
        grid = FoldedGrid(scales).group(g)
        together = grid.round_columns(part)
        for column in (0, 77):
            rounded, values = grid.round(part[:, column].contiguous())
            assert torch.equal(rounded.to(torch.int8), together[:, column])
            assert torch.equal(values, grid.worth(together.t())[column])
        here = slice(128 * g, 128 * g + 128)
        assert torch.equal(together, codes[:, here])
        torch.testing.assert_close(grid.worth(together.t()).t().double(), exact[:, here], rtol=1e-6, atol=0)
    zeros = FoldedGrid(scales).group(0).round(torch.zeros(N))
    assert not zeros[0].any() and not zeros[1].any()


def test_gptq_and_descent_round_to_folded_weights(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    factor = inverse_factor("w", hessian)
    plain, scales = quantize_weight_gptq("w", weight, made_format(4), factor)
    codes, same = quantize_weight_gptq("w", weight, made_format(8), factor)
    assert torch.equal(scales, same), "the scales are those that GPTQ finds without folding"
    refined, _ = quantize_weight_gptq("w", weight, made_format(8), factor, None, None, hessian, 4)
    nearest, of_nearest = quantize_weight_rtn("w", weight, made_format(8))
    errors = [output_error(each, scales, weight, hessian) for each in (plain, codes, refined)]
    assert errors[2] < errors[1] < errors[0] and errors[1] < output_error(nearest, of_nearest, weight, hessian)


def test_descent_never_makes_the_error_larger(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    codes, scales = quantize_weight_rtn("w", weight, made_format(8))
    last = output_error(codes, scales, weight, hessian)
    for sweeps in (1, 2, 3):
        refined = refine_codes(codes, scales, weight, hessian, DAMPING, sweeps, FoldedGrid(scales))
        error = output_error(refined, scales, weight, hessian)
        assert error <= last * (1 + 1e-6)
        last = error


def test_the_weights_of_the_caller_are_left_alone(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    before = weight.clone()
    quantize_weight_gptq("w", weight, made_format(8), inverse_factor("w", hessian), None, None, hessian, 1)
    assert torch.equal(weight, before)
