"""Weights to codes: a clipping search for the scales, rounding to nearest."""

from __future__ import annotations

import torch

from ..errors import Apex4Error
from ..format.number_format import CODE_MAX, WEIGHT_SCALE_MAX, WEIGHT_SCALE_MIN
from ..format.quant_config import LinearFormat
from ..transforms.block_transforms import transform_weight
from .folded_grid import FoldedGrid

WEIGHT_CLIP_RATIOS = tuple(1.0 - 0.02 * step for step in range(26))  # 1.00 ... 0.50 of absmax
ELEMENTS_AT_ONCE = 1 << 20  # float32 working set of the search: a few MB, so that it stays in cache


def round_to_codes(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grouped float32 [..., g], scale float32 [...] -> codes float32, round half to even, clamped to +-7."""
    return (grouped / scale[..., None]).round_().clamp_(-CODE_MAX, CODE_MAX)


def _store_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round to the float16 grid, away from zero and infinity; returned as float32."""
    return scale.clamp(WEIGHT_SCALE_MIN, WEIGHT_SCALE_MAX).half().float()


def search_scales(weight: torch.Tensor, group: int, cost: torch.Tensor | None = None) -> torch.Tensor:
    """Per group, the float16 scale (returned as float32 [N, G]) with the least squared error over `WEIGHT_CLIP_RATIOS`.

    weight is float32 [N, K], K a multiple of `group`; cost [K] weighs the error of each column (1 if None). The error
    is that of the codes made with the rounded scale.
    """
    rows = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    cost = None if cost is None else cost.view(-1, group)
    return torch.cat([_search_rows(part.unflatten(1, (-1, group)), cost) for part in weight.split(rows)])


def _search_rows(grouped: torch.Tensor, cost: torch.Tensor | None) -> torch.Tensor:
    absmax = grouped.abs().amax(-1)
    best_error = torch.full_like(absmax, torch.inf)
    best_scale = torch.empty_like(absmax)
    for ratio in WEIGHT_CLIP_RATIOS:
        scale = _store_scale(absmax * (ratio / CODE_MAX))
        error = round_to_codes(grouped, scale).mul_(scale[..., None]).sub_(grouped).square_()
        error = error.sum(-1) if cost is None else error.mul_(cost).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def require_quantizable(name: str, transformed: torch.Tensor) -> None:
    """Raise Apex4Error, naming the tensor, if a value is not finite or too large for a float16 scale."""
    largest = transformed.abs().max()
    if not torch.isfinite(largest):
        raise Apex4Error(f"{name}.weight holds NaN or infinity: the model is damaged, get it again")
    if float(largest) > WEIGHT_SCALE_MAX * CODE_MAX:
        raise Apex4Error(
            f"{name}.weight holds {float(largest):.3g}, too large for a float16 scale: the model is damaged"
        )


def quantize_weight_rtn(
    name: str, weight: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> int8 codes [N, padded K], float16 scales [N, G]. `matrix`: the dense transform of the input.

    With 8-bit activations codes are rounded to what their folded weights are worth.
    Raises Apex4Error, naming the tensor, if a value is not finite or too large for a float16 scale.
    """
    transformed = transform_weight(weight, format, matrix)
    require_quantizable(name, transformed)
    scale = search_scales(transformed, format.group_length)
    if format.activation_bits == 8:
        stored = scale.half()
        grid, columns = FoldedGrid(stored), transformed.split(format.group_length, 1)
        return torch.cat([grid.group(g).round_columns(part) for g, part in enumerate(columns)], 1), stored
    codes = round_to_codes(transformed.unflatten(1, (-1, format.group_length)), scale).flatten(1)
    return codes.to(torch.int8), scale.half()
