"""The float64 reference every backend is tested against. Written to be read, not to be fast.

Quantizer and GEMM are separate oracles: codes are compared with `quantize_activation`, a GEMM is compared with
`linear` on the codes and scales it was given, never with the unquantized operands. With 8-bit activations they are
`quantize_token`, and `fold` with `folded_linear` or `ratios` with `unfolded_linear`.
"""

from __future__ import annotations

import torch

from ..format.feedback import block_clips_of, feedback_of, step_order, transform_of
from ..format.number_format import (
    ACTIVATION_SCALE_MIN,
    BLOCK,
    CODE_MAX,
    SIXTEENTH_CODE,
    STEP_COLUMNS,
    TOKEN_CODE_MAX,
)
from .hadamard import apply_block_hadamard, apply_block_matrix


def quantize_activation(
    x: torch.Tensor,
    group: int,
    clip: float = 1.0,
    hadamard: bool = True,
    matrix: torch.Tensor | None = None,
    error_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], K a multiple of `group` -> integer codes int64 [M, K] and scales float64 [M, K / group].

    Each block of 128 inputs is first multiplied by its `matrix` [K / 128, 128, 128] or, without one, by the Hadamard
    matrix if `hadamard`. With error feedback `matrix` is [K / 128, 184, 128] or, with sixteen levels, [K / 128, 185, 128], and
    `group` 128; `error_dtype` is that of `round_with_feedback`.

    s = max(clip * absmax / 7, floor) is rounded to float32, as stored; q = clamp(round_half_even(x / s), -7, 7). With sixteen levels
    s has the sign that makes the value of largest magnitude negative, and a block's own clip, over 8; q is at least -8.
    """
    grouped: torch.Tensor = _transformed(x, hadamard, matrix).unflatten(-1, (-1, group))
    clips = None if matrix is None else block_clips_of(matrix.double())
    if clips is None:
        lowest, scale = -CODE_MAX, (clip * grouped.abs().amax(-1) / CODE_MAX).clamp_min(ACTIVATION_SCALE_MIN)
    else:
        lowest, (least, most) = SIXTEENTH_CODE, grouped.aminmax(dim=-1)
        largest = torch.where(-least >= most, least, most)
        scale = (clips * largest.abs() / -SIXTEENTH_CODE).clamp_min(ACTIVATION_SCALE_MIN).copysign(-largest)
    scale = scale.float().double()
    units = grouped / scale[..., None]
    feedback = None if matrix is None else feedback_of(matrix.double())
    if feedback is not None:
        codes = round_with_feedback(units, feedback, error_dtype=error_dtype, lowest=lowest)[0]
    else:
        codes = torch.round(units).clamp(-CODE_MAX, CODE_MAX)
    return codes.flatten(-2).long(), scale


def round_with_feedback(
    units: torch.Tensor,
    feedback: torch.Tensor,
    codes: torch.Tensor | None = None,
    error_dtype: torch.dtype | None = None,
    lowest: int = -CODE_MAX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values in units of their scale, float64 [M, KB, 128], and G float64 [KB, 128, 128] in step order -> codes [M, KB, 128], and
    the values that were rounded to them.

    Steps of 16 columns from the last to the first: v = units + sum over later columns c of (q[c] - v[c]) G[c];
    q = clamp(round(v), `lowest`, 7).
    With `codes` given, of a kernel, they are taken as they are: the values then say what that kernel should have rounded.
    `error_dtype`: what errors are rounded to before they are multiplied; None: they are not.
    """
    order = step_order(units.device)
    values = units[..., order].clone()
    rounded = torch.zeros_like(values) if codes is None else codes[..., order].double()
    for start in range(BLOCK - STEP_COLUMNS, -1, -STEP_COLUMNS):
        step = slice(start, start + STEP_COLUMNS)
        if codes is None:
            rounded[..., step] = torch.round(values[..., step]).clamp(lowest, CODE_MAX)
        errors = rounded[..., step] - values[..., step]
        if error_dtype is not None:
            errors = errors.to(error_dtype).double()
        values[..., :start] += torch.einsum("mbi,bij->mbj", errors, feedback[:, step, :start])
    back = torch.argsort(order)
    return rounded[..., back], values[..., back]


def _transformed(x: torch.Tensor, hadamard: bool, matrix: torch.Tensor | None) -> torch.Tensor:
    x = x.double()
    if matrix is not None:
        return apply_block_matrix(x, transform_of(matrix.double()))
    return apply_block_hadamard(x) if hadamard else x


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


# ---- 8-bit activations ---------------------------------------------------------------------------------------------------


def quantize_token(
    x: torch.Tensor, hadamard: bool = True, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], K a multiple of 128 -> integer codes int64 [M, K] and scales float64 [M], one a token.

    s = max(absmax / 127, floor) is rounded to float32, as stored; a = clamp(round_half_even(x / s), -127, 127). The transform
    is `quantize_activation`'s.
    """
    x = _transformed(x, hadamard, matrix)
    scale = (x.abs().amax(-1) / TOKEN_CODE_MAX).clamp_min(ACTIVATION_SCALE_MIN).float().double()
    codes = torch.round(x / scale[..., None]).clamp(-TOKEN_CODE_MAX, TOKEN_CODE_MAX)
    return codes.long(), scale


def fold(codes_w: torch.Tensor, scale_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int codes [N, K] and float16 scales [N, G] -> folded weights int64 [N, K] and units float64 [N]: w8 * u is about q * s_w.

    R = round_half_even(4608 s_w / s_max); w8 = sign(q) floor((|q| R + 128) / 256); u = s_max / 18, rounded to float32.
    """
    ratio, unit = ratios(scale_w)
    grouped: torch.Tensor = codes_w.long().unflatten(1, (ratio.shape[1], -1))
    magnitude = torch.div(grouped.abs() * ratio[..., None] + 128, 256, rounding_mode="floor")
    return (grouped.sign() * magnitude).flatten(1), unit


def ratios(scale_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 scales [N, G] -> ratios int64 [N, G] and units float64 [N]: R u / 256 is about s_w."""
    scale = scale_w.double()
    largest = scale.amax(1)
    return torch.round(4608 * scale / largest[:, None]).long(), (largest / 18).float().double()


def folded_linear(
    codes_a: torch.Tensor,
    scale_a: torch.Tensor,
    folded: torch.Tensor,
    unit: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y float64 [M, N] = s_a[m] u[n] (integer sum of a [M, K] times w8 [N, K]) + bias. scale_a [M], unit [N]."""
    sums = codes_a.long() @ folded.long().t()
    y = sums.double() * scale_a.double()[:, None] * unit.double()
    return y if bias is None else y + bias.double()


def unfolded_linear(
    codes_a: torch.Tensor,
    scale_a: torch.Tensor,
    codes_w: torch.Tensor,
    ratio: torch.Tensor,
    unit: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y float64 [M, N] = s_a[m] u[n] / 256 sum_g R[n, g] (integer sum of a times q over group g) + bias.

    codes_a [M, K], scale_a [M], codes_w [N, K], ratio [N, G], unit [N].
    """
    sums = group_sums(codes_a, codes_w, codes_w.shape[1] // ratio.shape[1])
    y = torch.einsum("mng,ng->mn", sums.double(), ratio.double()) * scale_a.double()[:, None] * (unit.double() / 256)
    return y if bias is None else y + bias.double()
