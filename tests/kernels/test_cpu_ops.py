"""The operators on a CPU agree with the PyTorch backend bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apex4_quant.format.layouts import S8, get_layout
from apex4_quant.kernels import ops, reference, torch_backend
from apex4_quant.kernels.operands import FORMATS, GROUPED_FORMATS, TOKEN_FORMAT, fold_scales, unpack_activations


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


@pytest.mark.parametrize("format", GROUPED_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k", "group"), [(5, 70, 300, 128), (1, 64, 512, 256), (17, 130, 384, 384)])
@pytest.mark.parametrize("transform", ["hadamard", "matrix", "none"])
def test_quantize_then_gemm_is_the_backend_bit_for_bit(
    format: str, dtype: torch.dtype, m: int, n: int, k: int, group: int, transform: str
) -> None:
    padded = -(-k // group) * group
    x = torch.randn(m, k, generator=generator(1)).to(dtype)
    codes_w, bias = random_codes(n, padded), torch.randn(n, generator=generator(2))
    scale_w = (torch.rand(n, padded // group, generator=generator(3)) * 0.01 + 1e-4).half()
    matrix = torch.randn(padded // 128, 128, 128, generator=generator(4)).half() if transform == "matrix" else None
    how = {"hadamard": transform == "hadamard", "matrix": matrix}
    layout = get_layout(format)
    operands = ops.quantize(x, matrix, padded, group, 0.9, how["hadamard"], format)
    packed, scale = layout.pack(codes_w), layout.pack_scales(scale_w)
    for some in (bias, None):
        y = ops.gemm(*operands, packed, scale, None, some, m, n, dtype)
        assert torch.equal(y, torch_backend.linear(x, codes_w, scale_w, some, clip=0.9, **how))


@pytest.mark.parametrize("format", FORMATS)
def test_fused_quantizers_are_the_operations_before_them(format: str) -> None:
    x, up = torch.randn(5, 256, generator=generator(1)), torch.randn(5, 256, generator=generator(2))
    gain = torch.rand(256, generator=generator(3))
    how = (None, 256, 256 if format == TOKEN_FORMAT else 128, 1.0, True, format)
    expected = ops.quantize(torch.nn.functional.silu(x) * up, *how)
    assert all(map(torch.equal, ops.silu_mul_quantize(x, up, *how), expected))
    normed = torch.nn.functional.rms_norm(x, (256,), gain + 1, 1e-5)
    codes, scales = ops.rms_norm_quantize(x, gain, 1e-5, 1.0, *how)
    expected = ops.quantize(normed, *how)
    torch.testing.assert_close(scales, expected[1])
    assert float((codes != expected[0]).float().mean()) < 0.01


def test_rows_of_a_wider_tensor_can_be_quantized() -> None:
    wide = torch.randn(6, 512, generator=generator(1)).bfloat16()
    how = (None, 256, 128, 1.0, True, "sm90")
    strided, plain = ops.quantize(wide[:, 128:384], *how), ops.quantize(wide[:, 128:384].contiguous(), *how)
    assert all(map(torch.equal, strided, plain))


def test_nothing_to_compute() -> None:
    operands = ops.quantize(torch.zeros(0, 128).bfloat16(), None, 128, 128, 1.0, True, "sm80")
    layout = get_layout("sm80")
    packed, scale = layout.pack(random_codes(64, 128)), layout.pack_scales(torch.ones(64, 1).half())
    assert ops.gemm(*operands, packed, scale, None, None, 0, 64, torch.bfloat16).shape == (0, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_is_its_quantizer_and_the_gemm(format: str) -> None:
    x, up, gain = (torch.randn(*shape, generator=generator(1)).bfloat16() for shape in ((7, 300), (7, 300), (300,)))
    how: tuple[Any, ...] = (None, 384, 128, 0.9, True, format)
    scale_w = (torch.rand(70, 3, generator=generator(3)) * 0.01 + 1e-4).half()
    weights: tuple[Any, ...]
    if format == TOKEN_FORMAT:
        how = (None, 384, 384, 1.0, True, format)
        weights = S8.pack(random_codes(70, 384)), *fold_scales(scale_w)
    else:
        layout = get_layout(format)
        weights = layout.pack(random_codes(70, 384)), layout.pack_scales(scale_w), None
    bias = torch.randn(70, generator=generator(2))
    for quantize, linear, inputs in (
        (ops.quantize, ops.linear, (x,)),
        (ops.rms_norm_quantize, ops.rms_norm_linear, (x, gain, 1e-5, 1.0)),
        (ops.silu_mul_quantize, ops.silu_mul_linear, (x, up)),
    ):
        expected = ops.gemm(*quantize(*inputs, *how), *weights, bias, 7, 70, torch.bfloat16)
        assert torch.equal(linear(*inputs, *weights, bias, 70, *how), expected)
    y, total = ops.add_rms_norm_linear(x, up, gain, 1e-5, 1.0, *weights, bias, 70, *how)
    assert torch.equal(total, x + up)
    assert torch.equal(y, ops.rms_norm_linear(x + up, gain, 1e-5, 1.0, *weights, bias, 70, *how))


# ---- 8-bit activations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "n", "k", "group"), [(5, 70, 300, 128), (1, 64, 512, 256), (17, 130, 384, 384), (3, 65, 2500, 128)]
)
@pytest.mark.parametrize("transform", ["hadamard", "matrix", "none"])
def test_eight_bits_are_the_backend_bit_for_bit(
    dtype: torch.dtype, m: int, n: int, k: int, group: int, transform: str
) -> None:
    padded = -(-k // group) * group
    x = torch.randn(m, k, generator=generator(1)).to(dtype)
    codes_w, bias = random_codes(n, padded), torch.randn(n, generator=generator(2))
    scale_w = (torch.rand(n, padded // group, generator=generator(3)) * 0.01 + 1e-4).half()
    matrix = torch.randn(padded // 128, 128, 128, generator=generator(4)).half() if transform == "matrix" else None
    operands = ops.quantize(x, matrix, padded, padded, 1.0, transform == "hadamard", TOKEN_FORMAT)
    weights = S8.pack(codes_w), *fold_scales(scale_w)
    for some in (bias, None):
        y = ops.gemm(*operands, *weights, some, m, n, dtype)
        how = {"clip": 0.5, "hadamard": transform == "hadamard", "matrix": matrix, "activation_bits": 8}
        assert torch.equal(y, torch_backend.linear(x, codes_w, scale_w, some, **how)), "a clip is of 4-bit activations"


@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(3, 70, 128, 1), (17, 64, 1024, 4), (5, 130, 2304, 18), (2, 9, 14336, 1)]
)
def test_eight_bit_products_are_exact(m: int, n: int, k: int, groups: int) -> None:
    """Integer sums as the reference has them; then three roundings of float32, the last one with the bias."""
    x, codes_w = torch.randn(m, k, generator=generator(1)), random_codes(n, k)
    scale_w = (torch.rand(n, groups, generator=generator(2)) * 0.01 + 1e-4).half()
    bias = torch.randn(n, generator=generator(3))
    codes, scales = ops.quantize(x, None, k, k, 1.0, False, TOKEN_FORMAT)
    codes[0] = torch.where(codes[0] < 128, 127, 129).to(torch.uint8)  # as large as they come
    codes_a, scale_a = unpack_activations(codes, scales, m, TOKEN_FORMAT)
    y = ops.gemm(codes, scales, S8.pack(codes_w), *fold_scales(scale_w), bias, m, n, torch.float32)
    folded, unit = reference.fold(codes_w, scale_w)
    plain = reference.folded_linear(codes_a, scale_a[:, 0], folded, unit)
    allowed = 2**-24 * (3 * plain.abs() + (plain + bias.double()).abs()) * 1.01
    assert bool(((y.double() - plain - bias.double()).abs() <= allowed).all())


@pytest.mark.parametrize("transform", ["hadamard", "matrix", "none"])
def test_tokens_are_quantized_as_the_reference_says(transform: str) -> None:
    x = torch.randn(40, 640, generator=generator(1)) * torch.logspace(-30, 30, 40)[:, None]
    x[3], x[4, 7] = 0, -1e20
    matrix = torch.randn(5, 128, 128, generator=generator(4)).half() if transform == "matrix" else None
    operands = ops.quantize(x, matrix, 640, 640, 1.0, transform == "hadamard", TOKEN_FORMAT)
    codes, scales = unpack_activations(*operands, 40, TOKEN_FORMAT)
    expected, expected_scale = reference.quantize_token(x, transform == "hadamard", matrix)
    torch.testing.assert_close(scales[:, 0].double(), expected_scale, rtol=1e-6, atol=0)
    difference = (codes - expected).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).double().mean()) < 2e-3  # ties within rounding
    assert int(codes.min()) >= -127 and bool((codes.abs().amax(1)[scales[:, 0] > 2.0**-100] == 127).all())
    assert not codes[3].any() and scales[3, 0] == 2.0**-100


def test_nan_in_a_token_is_nan_in_all_of_its_outputs_and_no_others() -> None:
    x = torch.randn(4, 2048, generator=generator(1))
    x[2, 1500] = float("nan")
    weights = S8.pack(random_codes(65, 2048)), *fold_scales(torch.ones(65, 16).half())
    y = ops.linear(x, *weights, None, 65, None, 2048, 2048, 1.0, True, TOKEN_FORMAT)
    assert torch.equal(y.isnan(), torch.arange(4)[:, None].expand(4, 65) == 2)
