"""GPTQ and the activation clip search against direct, slow definitions."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.calib import hessian
from apex4_quant.calib.errors import CalibrationError
from apex4_quant.calib.finite import all_finite
from apex4_quant.calib.hessian import HessianAccumulator
from apex4_quant.distributed.group import Group
from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import ROWMAJOR, get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.rounding.gptq import DAMPING, inverse_factor, quantize_weight_gptq
from apex4_quant.rounding.nearest import quantize_weight_rtn, search_scales


def linear_format(n: int, k: int, group: int | str = 128, transform: str = "none") -> LinearFormat:
    return LinearFormat(n, k, group, ROWMAJOR, transform, 1.0)


def correlated_inputs(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    return torch.randn(tokens, k, generator=generator) @ mixing


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator()
    for part in x.split(100):
        accumulator.add(part[None])
    return accumulator.take_matrix()


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * scales.double().repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def test_hessian_is_the_mean_outer_product_and_ignores_batching() -> None:
    x = correlated_inputs(512, 128)
    expected = x.double().t() @ x.double() / len(x)
    assert torch.allclose(hessian_of(x).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_hessian_refuses_nan_and_emptiness() -> None:
    with pytest.raises(CalibrationError, match="no calibration token"):
        HessianAccumulator().take_matrix()
    accumulator = HessianAccumulator()
    accumulator.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(CalibrationError, match="NaN"):
        accumulator.take_matrix()


@pytest.mark.parametrize("width", [1, 200, 256, 257, 700, 2304])
def test_half_of_a_hessian_is_computed_and_all_of_it_returned(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 50, width, generator=torch.Generator().manual_seed(width))
    accumulator, computed = HessianAccumulator(), []
    addmm_ = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *args: (computed.append(self.numel()), addmm_(self, *args))
    )
    for batch in x:
        accumulator.add(batch)
    found = accumulator.take_matrix()
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(found.double(), rows.t() @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:200, 200:], found[200:, :200].t()) or width <= 256
    assert sum(computed) / 3 <= width**2 * (1 if width <= 257 else 0.8 if width < 2000 else 0.57)


@pytest.mark.parametrize("of_two", [False, True])
def test_sixteen_bits_are_multiplied_as_they_are(of_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: pieces of a sum, some tokens at a time, are the same sum."""
    x, y = torch.randn(2, 3, 50, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = HessianAccumulator()
    expected.add(x, y if of_two else None)
    given: list[torch.Tensor] = []

    def add_products(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        given.extend((left, right))
        sums += left.float().t() @ right.float()

    monkeypatch.setattr(hessian, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(hessian, "_on_tensor_cores", lambda *inputs: True)
    monkeypatch.setattr(hessian, "adds_up_sixteen_bits", lambda device, dtype: True)
    monkeypatch.setattr(hessian, "add_products", add_products)
    accumulator = HessianAccumulator()
    for window, of_window in zip(x, y, strict=True):
        accumulator.add(window, of_window if of_two else None)
    torch.testing.assert_close(accumulator.take_matrix(), expected.take_matrix(), rtol=1e-5, atol=1e-6)
    assert {each.dtype for each in given} == {torch.bfloat16}


def test_a_device_without_such_products_is_seen() -> None:
    assert not hessian.adds_up_sixteen_bits(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.full((37, 129), 6e4, dtype=dtype)
    assert all_finite(values) and all_finite(values[:0])
    values[36, 128] = value
    assert not all_finite(values)


def test_factor_squares_to_the_inverse_of_the_damped_hessian() -> None:
    hessian = hessian_of(correlated_inputs(1024, 256))
    factor = inverse_factor("x", hessian).double()
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + torch.eye(256) * DAMPING * hessian.diagonal().mean().double()
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(256).double(), atol=1e-3)


class Member(Group):
    """One of several processes, of which each is asked in its turn; `made` has what they share, in order."""

    def __init__(self, rank: int, size: int, made: list[torch.Tensor]) -> None:
        self.rank, self.size, self._made = rank, size, made

    def gather_share(self, own: torch.Tensor, total: int) -> torch.Tensor:
        self._made.append(own)
        return torch.cat(self._made)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_a_factor(processes: int) -> None:
    hessian = hessian_of(correlated_inputs(1024, 256))
    made: list[torch.Tensor] = []
    for rank in range(processes):
        found = inverse_factor("x", hessian, group=Member(rank, processes, made))
    assert [len(rows) for rows in made] == [Member(rank, processes, []).share(256).size for rank in range(processes)]
    expected = inverse_factor("x", hessian)
    assert torch.equal(found, found.triu()) and torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize("group", [128, 256, "channel"])
def test_codes_are_those_of_gptq_column_by_column_in_float64(group: int | str) -> None:
    n, k = 24, 384 if group != 256 else 512
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05
    factor = inverse_factor("x", hessian_of(correlated_inputs(2048, k)))
    form = linear_format(n, k, group)
    codes, scales = quantize_weight_gptq("x", weight, form, factor)

    pending, upper = weight.double(), factor.double()
    expected = torch.empty(n, k, dtype=torch.float64)
    cost = factor.diagonal().square().reciprocal()
    for i in range(k):
        if i % form.group_length == 0:
            block = slice(i, i + form.group_length)
            scale = search_scales(pending[:, block].float(), form.group_length, cost[block])[:, 0].double()
            assert torch.equal(scale, scales[:, i // form.group_length].double())
        expected[:, i] = torch.round(pending[:, i] / scale).clamp(-7, 7)
        error = (pending[:, i] - expected[:, i] * scale) / upper[i, i]
        pending[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    # float32 against float64: a code at a tie may fall the other way and move the columns after it
    assert (codes.double() == expected).double().mean() > 0.995


def test_an_identity_hessian_leaves_rounding_to_nearest() -> None:
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    form = linear_format(40, 256)
    codes, scales = quantize_weight_gptq("x", weight, form, inverse_factor("x", torch.eye(256)))
    expected_codes, expected_scales = quantize_weight_rtn("x", weight, form)
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("transform", ["none", "hadamard128"])
@pytest.mark.parametrize("k", [256, 328])
def test_output_error_is_well_below_that_of_rounding_to_nearest(transform: str, k: int) -> None:
    from apex4_quant.transforms.block_transforms import transform_input

    weight = torch.randn(64, k, generator=torch.Generator().manual_seed(3)) * 0.02
    form = linear_format(64, k, transform=transform)
    x = transform_input(correlated_inputs(4096, k), form)
    exact = correlated_inputs(4096, k).double() @ weight.double().t()

    def error(codes: torch.Tensor, scales: torch.Tensor) -> float:
        return float((x.double() @ dequantize(codes, scales).t() - exact).norm() / exact.norm())

    gptq = error(*quantize_weight_gptq("x", weight, form, inverse_factor("x", hessian_of(x))))
    assert gptq < 0.75 * error(*quantize_weight_rtn("x", weight, form))


def test_inputs_that_are_always_zero_are_rounded_on_their_own() -> None:
    x = correlated_inputs(1024, 128)
    x[:, 5] = x[:, 77] = 0
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(4))
    codes, scales = quantize_weight_gptq("x", weight, linear_format(16, 128), inverse_factor("x", hessian_of(x)))
    for column in (5, 77):
        assert torch.equal(codes[:, column], torch.round(weight[:, column] / scales[:, 0].float()).clamp(-7, 7).char())


def test_a_hessian_that_cannot_be_decomposed_is_damped_with_a_message() -> None:
    hessian = torch.eye(128)
    hessian[0, 1] = hessian[1, 0] = 1.5  # an eigenvalue of -0.5
    said: list[str] = []
    factor = inverse_factor("layer 3", hessian, warn=said.append)
    assert torch.isfinite(factor).all()
    assert said and all("layer 3" in text and "damping" in text for text in said)
    with pytest.raises(Apex4Error, match="layer 3"):
        inverse_factor("layer 3", -1e3 * torch.ones(128, 128) + torch.eye(128), warn=said.append)


def test_the_models_weight_is_left_as_it_was() -> None:
    """Without a transform and in float32 it is not copied on the way; one row is contiguous either way around."""
    weight = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    before, format = weight.clone(), LinearFormat(1, 256, 128, get_layout("rowmajor"), "none", 1.0)
    quantize_weight_gptq("w", weight, format, inverse_factor("w", torch.eye(256) + 0.5))
    assert torch.equal(weight, before)
