"""The operators on a CPU agree with the PyTorch backend bit for bit."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels import ops, torch_backend
from apex4_quant.kernels.operands import FORMATS


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


@pytest.mark.parametrize("format", FORMATS)
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
        y = ops.gemm(*operands, packed, scale, some, m, n, dtype)
        assert torch.equal(y, torch_backend.linear(x, codes_w, scale_w, some, clip=0.9, **how))


@pytest.mark.parametrize("format", FORMATS)
def test_fused_quantizers_are_the_operations_before_them(format: str) -> None:
    x, up = torch.randn(5, 256, generator=generator(1)), torch.randn(5, 256, generator=generator(2))
    gain = torch.rand(256, generator=generator(3))
    how = (None, 256, 128, 1.0, True, format)
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
    assert ops.gemm(*operands, packed, scale, None, 0, 64, torch.bfloat16).shape == (0, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_a_linear_is_its_quantizer_and_the_gemm(format: str) -> None:
    x, up, gain = (torch.randn(*shape, generator=generator(1)).bfloat16() for shape in ((7, 300), (7, 300), (300,)))
    how = (None, 384, 128, 0.9, True, format)
    layout = get_layout(format)
    weights = layout.pack(random_codes(70, 384)), layout.pack_scales((torch.rand(70, 3) * 0.01).half())
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
