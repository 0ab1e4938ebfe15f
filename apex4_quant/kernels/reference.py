"""The float64 reference every backend is tested against. Written to be read, not to be fast.

Quantizer and GEMM are separate oracles: codes are compared with `quantize_activation`, a GEMM is compared with
`linear` on the codes and scales it was given, never with the unquantized operands.
"""

from __future__ import annotations

import torch

from ..format.number_format import ACTIVATION_SCALE_MIN, CODE_MAX
from .block_matrix import apply_block_matrix
from .hadamard import apply_block_hadamard


def quantize_activation(
    x: torch.Tensor, group: int, clip: float = 1.0, hadamard: bool = True, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], K a multiple of `group` -> integer codes int64 [M, K] and scales float64 [M, K / group].

    Each block of 128 inputs is first multiplied by its `matrix` [K / 128, 128, 128] or, without one, by the Hadamard
    matrix if `hadamard`.

    s = max(clip * absmax / 7, floor) is rounded to float32, as stored; q = clamp(round_half_even(x / s), -7, 7).
    """
    x = x.double()
    if matrix is not None:
        x = apply_block_matrix(x, matrix.double())
    elif hadamard:
        x = apply_block_hadamard(x)
    grouped: torch.Tensor = x.unflatten(-1, (-1, group))
    scale = (clip * grouped.abs().amax(-1) / CODE_MAX).clamp_min(ACTIVATION_SCALE_MIN).float().double()
    codes = torch.round(grouped / scale[..., None]).clamp(-CODE_MAX, CODE_MAX)
    return codes.flatten(-2).long(), scale


def group_sums(codes_a: torch.Tensor, codes_w: torch.Tensor, group: int) -> torch.Tensor:
    """Exact integer sums int64 [M, N, G] of q_a [M, K] times q_w [N, K] over each group."""
    a: torch.Tensor = codes_a.long().unflatten(-1, (-1, group)).transpose(0, 1)  # [G, M, g]
    w: torch.Tensor = codes_w.long().unflatten(-1, (-1, group)).permute(1, 2, 0)  # [G, g, N]
    return (a @ w).permute(1, 2, 0)


def linear(
    codes_a: torch.Tensor,
    scale_a: torch.Tensor,
    codes_w: torch.Tensor,
    scale_w: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y float64 [M, N] = sum_g s_a[m, g] s_w[n, g] (integer sum) + bias. scale_a [M, G], scale_w [N, G]."""
    group = codes_a.shape[-1] // scale_a.shape[-1]
    y = torch.einsum("mng,mg,ng->mn", group_sums(codes_a, codes_w, group).double(), scale_a.double(), scale_w.double())
    return y if bias is None else y + bias.double()
