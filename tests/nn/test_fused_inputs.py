"""Every kind of input of a linear: the tensor that it stands for, and the same results by one operator or by two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels.activation_quantization import ActivationQuantization
from apex4_quant.nn.fused_inputs import Gate, Gated, KernelWeights, LinearInput, Normed, Plain

K, N = 200, 70
Make = Callable[[torch.Tensor, torch.Tensor], LinearInput]


def normed(x: torch.Tensor, up: torch.Tensor) -> LinearInput:
    norm = LlamaRMSNorm(K, eps=1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, K))
    return Normed(norm, x, 1e-5, 0.0)


@pytest.mark.parametrize("make", [lambda x, up: Plain(x), normed, lambda x, up: Gate(x) * up])
@pytest.mark.parametrize("shape", [(2, 3), (5,), (), (0, 3)])
@torch.no_grad()
def test_an_input_is_its_tensor_quantized_and_multiplied(make: Make, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, up = (torch.randn(*shape, K, generator=generator).bfloat16() for _ in range(2))
    read = make(x, up)
    assert (read.shape, read.dtype, read.device) == (x.shape, x.dtype, x.device)
    layout = get_layout("sm80")
    codes = torch.randint(-7, 8, (N, 256), dtype=torch.int8, generator=generator)
    weights = KernelWeights(
        layout.pack(codes), layout.pack_scales(torch.full((N, 2), 0.01).half()), None, torch.ones(N), N
    )
    how = ActivationQuantization(256, 128, 0.9, True, "sm80").arguments(None)
    y = read.linear(weights, how)
    assert y.shape == (*shape, N) and y.dtype == x.dtype
    assert torch.equal(y, read.multiply(read.quantize(how), weights))
    assert torch.equal(y, Plain(read.tensor()).linear(weights, how))


def test_the_tensor_is_what_the_modules_make() -> None:
    x, up = torch.randn(2, K).bfloat16(), torch.randn(2, K).bfloat16()
    assert Plain(x).tensor() is x
    gated = Gate(x) * up
    assert isinstance(gated, Gated) and torch.equal(gated.tensor(), nn.functional.silu(x) * up)


def test_whoever_takes_one_for_a_tensor_is_stopped() -> None:
    x = torch.randn(2, K)
    for wrong in (Normed(nn.Identity(), x, 1e-5, 0.0), Gate(x), Gate(x) * x):
        with pytest.raises(TypeError):
            nn.functional.linear(wrong, torch.zeros(3, K))  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            x + wrong  # type: ignore[operator]
