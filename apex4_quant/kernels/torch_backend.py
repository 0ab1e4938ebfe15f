"""The format's arithmetic in vectorised PyTorch: what runs on a CPU, and on any GPU that has no kernel of ours.

Exact where the format says exact. Codes are integers of magnitude <= 7, so a product sum over a group of g inputs is
at most 49 g: below 2^24, a float32 matrix product of codes holds it exactly, in any order of summation. (K beyond
342,000 in one group would not; no model has it.) The dequantization costs one multiply by s_w, exact for g = 128 (13
bits times the 11 of a float16), and one multiply-add by s_a.
"""

from __future__ import annotations

import torch

from ..number_format import ACTIVATION_SCALE_MIN, CODE_MAX
from .block_matrix import apply_block_matrix
from .hadamard import apply_block_hadamard

ROWS_AT_ONCE = 2048  # tokens per pass: bounds the float32 partial sums, [rows, N]


def quantize_activation(
    x: torch.Tensor, group: int, clip: float = 1.0, hadamard: bool = True, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] of any float dtype, K a multiple of `group` -> codes float32 [M, G, g] (integers), scales float32 [M, G].

    `matrix` [K / 128, 128, 128] is multiplied to the blocks of x in float32, in the place of the Hadamard matrix.

    NaN in an input group gives NaN scales, hence NaN outputs of that token: damage upstream stays visible.
    """
    x = x.float()
    if matrix is not None:
        x = apply_block_matrix(x, matrix.float())
    elif hadamard:
        x = apply_block_hadamard(x)
    grouped = x.unflatten(-1, (-1, group))
    scale = (grouped.abs().amax(-1) * (clip / CODE_MAX)).clamp_min(ACTIVATION_SCALE_MIN)
    codes = torch.round(grouped / scale[..., None]).clamp_(-CODE_MAX, CODE_MAX)
    return codes, scale


def linear(
    x: torch.Tensor,
    codes_w: torch.Tensor,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None = None,
    clip: float = 1.0,
    hadamard: bool = True,
    matrix: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] in x's dtype: quantize x [..., K], multiply by int8 codes_w [N, K_padded], dequantize per group.

    scale_w is float16 [N, G], matrix None or [K_padded / 128, 128, 128]; K is padded with zeros to K_padded; bias [N] is added in float32.
    """
    # Under autocast the products of codes would be rounded to 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        return _linear(x, codes_w, scale_w, bias, clip, hadamard, matrix)


def _linear(
    x: torch.Tensor,
    codes_w: torch.Tensor,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None,
    clip: float,
    hadamard: bool,
    matrix: torch.Tensor | None,
) -> torch.Tensor:
    out_features, padded_k = codes_w.shape
    groups = scale_w.shape[1]
    rows = x.reshape(-1, x.shape[-1])
    weight, scale_w = grouped_weight(codes_w, scale_w)
    y = torch.empty(len(rows), out_features, dtype=x.dtype, device=x.device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        part = torch.nn.functional.pad(part, (0, padded_k - part.shape[1]))
        codes, scale_a = quantize_activation(part, padded_k // groups, clip, hadamard, matrix)
        y[start : start + ROWS_AT_ONCE] = multiply(codes, scale_a, weight, scale_w, bias).to(x.dtype)
    return y.reshape(*x.shape[:-1], out_features)


def grouped_weight(codes_w: torch.Tensor, scale_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] and float16 scales [N, G] as `multiply` wants them: int8 [G, N, g] and float32 [G, N]."""
    weight = codes_w.unflatten(1, (scale_w.shape[1], -1)).transpose(0, 1)
    return weight, scale_w.float().t().contiguous()


def multiply(
    codes: torch.Tensor, scale_a: torch.Tensor, weight: torch.Tensor, scale_w: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """float32 [M, N] from codes float32 [M, G, g] and scale_a float32 [M, G], and what `grouped_weight` returns."""
    total = torch.zeros(len(codes), weight.shape[1], dtype=torch.float32, device=codes.device)
    for g in range(len(weight)):
        partial = codes[:, g] @ weight[g].float().t()  # exact integers
        total.addcmul_(partial.mul_(scale_w[g]), scale_a[:, g, None])
    if bias is not None:
        total += bias.float()
    return total
