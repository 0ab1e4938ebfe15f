"""A linear of few tokens and 8-bit activations as one kernel, against float64.

The reference quantizes in float64. A kernel adds in float32 and may put a code that lies on a tie to either side: outputs may differ
by what those codes weigh, and by the roundings of float32. Of SiLU(gate) up it may also round an input of a block to the other side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apex4_quant.format.layouts import S8
from apex4_quant.format.number_format import BLOCK, CODE_MAX, round_up
from apex4_quant.kernels import ops, reference
from apex4_quant.kernels.gemm import fused_linear
from apex4_quant.kernels.hadamard import apply_block_hadamard
from apex4_quant.kernels.operands import fold_scales
from apex4_quant.kernels.quantize.configs import NORMS

PLANS = ("sm90_s8_m8n64s10/1", "sm90_s8_m8n64s10/2")
EPS = 1e-5
TIE = 2e-3  # of a code: how far from a tie no kernel may be wrong


@contextmanager
def forced(plan: str) -> Iterator[None]:
    before = os.environ.get("APEX4_GEMM")
    os.environ["APEX4_GEMM"] = plan
    try:
        yield
    finally:
        os.environ.pop("APEX4_GEMM")
        if before is not None:
            os.environ["APEX4_GEMM"] = before


def inputs_of(
    m: int, k: int, input: str, dtype: torch.dtype, generator: torch.Generator, padding: int
) -> tuple[torch.Tensor, ...]:
    def normal() -> torch.Tensor:
        wide = torch.randn(m, k + padding, generator=generator, device=generator.device).to(dtype)
        return wide[:, padding // 2 : padding // 2 + k]

    if input in NORMS:
        gain = 1 + 0.3 * torch.randn(k, generator=generator, device=generator.device)
        return (normal(), *([normal()] if input == "add_rms_norm" else []), gain.to(dtype))
    return (normal(), normal()) if input == "silu_mul" else (normal(),)


def input_of_linear(inputs: tuple[torch.Tensor, ...], input: str) -> torch.Tensor:
    """As the unfused modules round it."""
    if input == "silu_mul":
        return torch.nn.functional.silu(inputs[0]) * inputs[1]
    if input not in NORMS:
        return inputs[0]
    x = inputs[0] + inputs[1] if input == "add_rms_norm" else inputs[0]
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * inputs[-1]


def bounds(
    x: torch.Tensor, codes_w: torch.Tensor, scale_w: torch.Tensor, bias: torch.Tensor | None, flips: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest y float64 [M, N] for the linear's input x [M, K padded], of which `flips` of a block may be rounded otherwise."""
    codes, scale = reference.quantize_token(x)
    quotient = apply_block_hadamard(x.double()) / scale[:, None]
    tied = ((quotient - quotient.floor() - 0.5).abs() < TIE).double()
    ratio, unit = reference.ratios(scale_w)
    y = reference.unfolded_linear(codes.cpu(), scale.cpu(), codes_w.cpu(), ratio.cpu(), unit.cpu()).to(x.device)
    weight = codes_w.double().unflatten(1, (ratio.shape[1], -1)) * ratio.double()[..., None] * unit[:, None, None] / 256
    weight = weight.flatten(1).abs()
    error = scale[:, None] * (tied @ weight.t() + 2.0**-19 * (codes.double().abs() @ weight.t()))
    flip = (
        flips * 2.0**-8 * BLOCK**-0.5 * x.double().abs().unflatten(1, (-1, BLOCK)).amax(-1)
    )  # in every transformed value
    error += flip @ weight.unflatten(1, (-1, BLOCK)).sum(-1).t()
    if bias is not None:
        y, error = y + bias.double(), error + bias.double().abs() * 2.0**-22
    return y - error, y + error


def check(
    generator: torch.Generator, *, m: int, n: int, k: int, input: str, dtype: torch.dtype, padding: int = 0,
    damage: float | None = None,
) -> None:  # fmt: skip
    """Raises AssertionError if a kernel does not give what it must, or if none is chosen."""
    device, padded = generator.device, round_up(k, BLOCK)
    codes_w = torch.randint(-CODE_MAX, CODE_MAX + 1, (n, padded), generator=generator, device=device, dtype=torch.int8)
    scale_w = (torch.rand(n, padded // BLOCK, generator=generator, device=device) * 0.01 + 1e-4).half()
    weights = S8.pack(codes_w), *fold_scales(scale_w)
    bias = torch.randn(n, generator=generator, device=device) if n % 3 else None
    inputs = inputs_of(m, k, input, dtype, generator, padding)
    if damage is not None:
        inputs[0][m // 2, k // 3] = damage
    how = (None, padded, padded, 1.0, True, "s8")
    linear = getattr(ops, "linear" if input == "plain" else f"{input}_linear")
    of_norm = (EPS, 0.0) if input in NORMS else ()
    x = input_of_linear(inputs, input)
    least, most = bounds(torch.nn.functional.pad(x, (0, padded - k)), codes_w, scale_w, bias, int(input != "plain"))
    for plan in PLANS:
        with forced(plan):
            name = str(dtype).removeprefix("torch.")
            chosen = fused_linear.choose_fused_s8(90, 132, m, n, padded // BLOCK, input, name)
            assert chosen is not None, "the shape is not one kernel's"
            poisoned = torch.full((m, n), float("nan"), dtype=dtype, device=device)
            del poisoned  # what the operator writes to next
            y = linear(*inputs, *of_norm, *weights, bias, n, *how)
        if input == "add_rms_norm":
            y, total = y
            assert torch.equal(total.nan_to_num(7), (inputs[0] + inputs[1]).nan_to_num(7)), "another sum"
        if damage is not None:
            rest = torch.arange(m, device=device) != m // 2
            assert y[m // 2].isnan().all() and y[rest].isfinite().all(), "damage reaches its own token, and all of it"
            continue
        wrong = ~((least.to(dtype) <= y) & (y <= most.to(dtype)))
        assert not wrong.any(), f"{plan}: {int(wrong.sum())} of {y.numel()} outputs are wrong"
