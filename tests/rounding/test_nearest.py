"""Weights to codes: the clipping search against brute force, legality of what is stored, damaged and extreme weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.number_format import GroupSize
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.kernels import reference
from apex4_quant.kernels.hadamard import apply_block_hadamard
from apex4_quant.rounding import nearest as weight_quantizer
from apex4_quant.rounding.nearest import quantize_weight_rtn, search_scales, transform_weight

NAME = "model.layers.3.mlp.down_proj"
RATIOS = [percent / 100 for percent in range(100, 49, -2)]  # 1.00, 0.98 ... 0.50, written out anew
LARGEST = 65504.0 * 7  # the largest weight a float16 scale can hold


def make_format(
    out_features: int, in_features: int, group_size: GroupSize = 128, transform: str = "none"
) -> LinearFormat:
    return LinearFormat(out_features, in_features, group_size, get_layout("rowmajor"), transform, 1.0)


def hard_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size and shape: normal, heavy tailed, one outlier, uniform, two-valued, nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight[1::6] = weight[1::6] ** 3
    weight[2::6, 5] = 9.0
    weight[3::6] = torch.rand(weight[3::6].shape, generator=generator) - 0.5
    weight[4::6] = torch.where(weight[4::6] > 1.5, 1.0, 0.35)
    weight[5::6] *= 1e-6
    return weight * torch.logspace(-3, 1, n)[:, None]


def errors_of(grouped: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64 squared error [N, G] of rounding grouped [N, G, g] to nearest with scale [N, G]."""
    codes = np.clip(np.rint(grouped / scale[..., None]), -7, 7)
    return ((codes * scale[..., None] - grouped) ** 2).sum(-1)


def brute_force(grouped: np.ndarray) -> np.ndarray:
    """The least float64 error [N, G] over float16 scales ratio * absmax / 7."""
    absmax = np.abs(grouped).max(-1)
    scales = [np.clip(absmax * ratio / 7, 2.0**-24, 65504).astype(np.float16).astype(np.float64) for ratio in RATIOS]
    return np.min([errors_of(grouped, scale) for scale in scales], axis=0)


def grouped64(weight: torch.Tensor, group: int) -> np.ndarray:
    return weight.double().unflatten(1, (-1, group)).numpy()


def assert_codes_are_rounded_with_the_stored_scale(
    transformed: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> None:
    group = transformed.shape[1] // scales.shape[1]
    exact = transformed.double().unflatten(1, (-1, group)) / scales.double()[..., None]
    expected = torch.round(exact).clamp(-7, 7)  # torch.round is half to even
    at_tie = ((exact.abs() % 1) - 0.5).abs() < 1e-6  # where a float32 quotient may fall on the other side
    same = codes.double().unflatten(1, (-1, group)) == expected
    assert bool((same | at_tie).all())
    assert float(at_tie.double().mean()) < 0.01


@pytest.mark.parametrize("group", [128, 256, 768])
def test_search_matches_brute_force_over_the_same_ratios(group: int) -> None:
    weight = hard_weight(60, 768)
    scales = search_scales(weight, group)
    assert scales.shape == (60, 768 // group) and scales.dtype == torch.float32
    assert torch.equal(scales, scales.half().float())
    grouped = grouped64(weight, group)
    found, best = errors_of(grouped, scales.double().numpy()), brute_force(grouped)
    assert (best > 0).all()
    np.testing.assert_allclose(found, best, rtol=1e-5)


def test_search_is_never_worse_than_absmax_scaling_and_often_better() -> None:
    weight = hard_weight(120, 512, seed=1)
    grouped = grouped64(weight, 128)
    absmax = np.abs(grouped).max(-1)
    plain = np.clip(absmax / 7, 2.0**-24, 65504).astype(np.float16).astype(np.float64)
    found = errors_of(grouped, search_scales(weight, 128).double().numpy())
    assert (found <= errors_of(grouped, plain) * (1 + 1e-6)).all()
    assert (found < errors_of(grouped, plain) * 0.99).mean() > 0.3


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_both_ends_of_the_search_are_reached(ratio: float) -> None:
    scale = 7.0 * 2.0**-5
    weight = scale * torch.tensor([[7.0, -5.0, 3.0, 1.0]]).repeat(1, 256)  # on the absmax grid: no error at all
    if ratio == 0.5:  # twice the grid: clipping the outlier costs 7² steps, and rounding the 1023 others costs more
        weight[0, 0] = 14 * scale
    assert float(search_scales(weight, 1024)) == scale


@pytest.mark.parametrize("transform", ["none", "hadamard128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "group_size"), [(384, 128), (300, 128), (300, 256), (300, "channel")])
def test_what_is_stored_is_legal_and_made_with_the_stored_scale(
    transform: str, dtype: torch.dtype, k: int, group_size: GroupSize
) -> None:
    format = make_format(36, k, group_size, transform)
    weight = hard_weight(36, k).to(dtype)
    codes, scales = quantize_weight_rtn(NAME, weight, format)
    assert codes.dtype == torch.int8 and codes.shape == (36, format.padded_k)
    assert scales.dtype == torch.float16 and scales.shape == (36, format.groups)
    assert int(codes.min()) >= -7 and int(codes.max()) <= 7 and int(codes.abs().max()) == 7
    assert bool((torch.isfinite(scales) & (scales > 0)).all())
    padded = torch.nn.functional.pad(weight.float(), (0, format.padded_k - k))
    transformed = apply_block_hadamard(padded) if transform == "hadamard128" else padded
    assert torch.equal(transformed, transform_weight(weight, format))
    assert_codes_are_rounded_with_the_stored_scale(transformed, codes, scales)
    assert torch.equal(scales, search_scales(transformed, format.group_length).half())


def test_ties_go_to_even_and_known_values_to_known_codes() -> None:
    weight = torch.zeros(1, 128)
    weight[0, :10] = torch.tensor([7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 6.0, 3.25, -4.75]) * 0.25
    weight[0, 10:] = torch.tensor([6.0, -5.0, 4.0, 3.0, -2.0, 1.0]).repeat(20)[:118] * 0.25
    codes, scales = quantize_weight_rtn(NAME, weight, make_format(1, 128))
    assert scales.tolist() == [[0.25]]
    assert codes[0, :16].tolist() == [7, -7, 0, 2, 2, 0, -2, 6, 3, -5, 6, -5, 4, 3, -2, 1]


@pytest.mark.parametrize("transform", ["none", "hadamard128"])
def test_all_zero_groups_get_zero_codes_and_the_smallest_scale(transform: str) -> None:
    weight = hard_weight(6, 384)
    weight[:, 128:256] = 0
    weight[2] = 0
    codes, scales = quantize_weight_rtn(NAME, weight, make_format(6, 384, 128, transform))
    assert not codes[:, 128:256].any() and not codes[2].any()
    assert scales[:, 1].tolist() == [2.0**-24] * 6 and scales[2].tolist() == [2.0**-24] * 3
    assert codes[0, :128].any() and codes[0, 256:].any()


def test_weights_below_the_smallest_scale_stay_finite() -> None:
    codes, scales = quantize_weight_rtn(NAME, torch.full((2, 128), 1e-30), make_format(2, 128))
    assert not codes.any() and (scales == 2.0**-24).all()
    codes, scales = quantize_weight_rtn(NAME, torch.full((1, 128), 2.0**-22), make_format(1, 128))  # subnormal scale
    restored = codes.double() * scales.double()
    assert (restored == 2.0**-22).all()


def test_one_outlier_is_kept_and_costs_at_most_half_a_step() -> None:
    weight = hard_weight(1, 128)
    weight[0, 77] = 100.0
    codes, scales = quantize_weight_rtn(NAME, weight, make_format(1, 128))
    assert int(codes[0, 77]) == 7
    assert float(scales) * 7 == pytest.approx(100.0, abs=float(scales) * 0.5 + 0.1)
    spread, spread_scale = quantize_weight_rtn(NAME, weight, make_format(1, 128, 128, "hadamard128"))
    assert float(spread_scale) < float(scales) / 5 and int((spread != 0).sum()) > 100  # what the transform is for


@pytest.mark.parametrize("transform", ["none", "hadamard128"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_damaged_weight_is_refused_by_name(transform: str, bad: float, dtype: torch.dtype) -> None:
    weight = hard_weight(6, 200).to(dtype)
    weight[5, 199] = bad
    with pytest.raises(Apex4Error, match=r"model\.layers\.3\.mlp\.down_proj\.weight .*NaN or infinity") as caught:
        quantize_weight_rtn(NAME, weight, make_format(6, 200, 128, transform))
    assert caught.value.exit_code == 1


def test_weight_too_large_for_float16_is_refused_by_name() -> None:
    weight = hard_weight(6, 128)
    weight[3, 4] = -LARGEST
    codes, scales = quantize_weight_rtn(NAME, weight, make_format(6, 128))
    assert float(scales[3, 0]) == 65504.0 and int(codes[3, 4]) == -7
    weight[3, 4] = -LARGEST * 1.001
    with pytest.raises(Apex4Error, match=r"model\.layers\.3\.mlp\.down_proj\.weight .*too large for a float16"):
        quantize_weight_rtn(NAME, weight, make_format(6, 128))


def test_padded_columns_are_zero_codes_without_a_transform() -> None:
    weight = hard_weight(6, 200)
    codes, scales = quantize_weight_rtn(NAME, weight, make_format(6, 200))
    assert codes.shape == (6, 256) and not codes[:, 200:].any() and codes[:, 199].any()
    padded = torch.nn.functional.pad(weight, (0, 56))
    whole, whole_scales = quantize_weight_rtn(NAME, padded, make_format(6, 256))
    assert torch.equal(codes, whole) and torch.equal(scales, whole_scales)


@pytest.mark.parametrize("group", [128, 512])
def test_result_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    weight = hard_weight(37, 512)
    expected = search_scales(weight, group)
    for elements in (1, 512, 3 * 512 + 5, 1 << 30):
        monkeypatch.setattr(weight_quantizer, "ELEMENTS_AT_ONCE", elements)
        assert torch.equal(search_scales(weight, group), expected)


@pytest.mark.parametrize("transform", ["none", "hadamard128"])
@pytest.mark.parametrize("k", [384, 300])
def test_inverse_transform_of_the_dequantized_weight_is_the_weight(transform: str, k: int) -> None:
    weight = torch.randn(40, k, generator=torch.Generator().manual_seed(3)) * 0.02
    format = make_format(40, k, 128, transform)
    codes, scales = quantize_weight_rtn(NAME, weight, format)
    restored = codes.double() * scales.double().repeat_interleave(128, 1)
    if transform == "hadamard128":
        restored = apply_block_hadamard(restored)  # its own inverse
    error = torch.linalg.vector_norm(restored[:, :k] - weight) / torch.linalg.vector_norm(weight)
    assert 0.05 < float(error) < 0.14  # 4 bits of a normal distribution, groups of 128
    assert float(torch.linalg.vector_norm(restored[:, k:]) / torch.linalg.vector_norm(weight)) < 0.1


def test_quantized_linear_is_near_the_float_one_and_the_transform_helps_with_outliers() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(64, 512, generator=generator) * 0.02, torch.randn(32, 512, generator=generator)
    x[:, [3, 130, 300]] *= 40  # outlier channels
    exact = x.double() @ weight.double().t()
    error = {}
    for transform in ("none", "hadamard128"):
        codes, scales = quantize_weight_rtn(NAME, weight, make_format(64, 512, 128, transform))
        quantized = reference.quantize_activation(x, 128, hadamard=transform == "hadamard128")
        y = reference.linear(*quantized, codes, scales)
        error[transform] = float(torch.linalg.vector_norm(y - exact) / torch.linalg.vector_norm(exact))
    assert error["hadamard128"] < 0.2 and error["hadamard128"] < error["none"]
