"""Coordinate descent on the codes that GPTQ leaves (the step of QuantEase, Behdin et al., arXiv 2309.01885).

GPTQ rounds every column once and never looks back. With the scales fixed, the output error of a row of weights w that is
stored as v is (w - v) H (w - v)^T, and in one column k, all others kept, its least value on the grid of codes is at

    q_k  =  clamp( round( v_k / s_k + ((w - v) H)_k / (H_kk s_k) ) )

Columns are visited in order, a few times over. No step makes the error larger, so neither do all of them. Within a group
the gradient (w - v) H is kept up to date column by column, outside it by one matrix product a group.
"""

from __future__ import annotations

import torch

from .number_format import CODE_MAX
from .threads import few_threads


def refine_codes(
    codes: torch.Tensor, scales: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor, damping: float, sweeps: int
) -> torch.Tensor:
    """int8 codes [N, K], float16 scales [N, G], target float32 [N, K], H float32 [K, K] -> int8 codes [N, K].

    `damping` of the mean of H's diagonal is added to it, as in GPTQ. Columns whose input was always zero keep their
    codes. Scales are not changed.
    """
    group = codes.shape[1] // scales.shape[1]
    step = scales.float().t().contiguous()  # [G, N]
    code = codes.t().float().contiguous()  # [K, N]: a column of the weight is a contiguous row, as in gptq.py
    error = target.t() - code * step.repeat_interleave(group, dim=0)
    diagonal = hessian.diagonal()
    added = damping * diagonal.mean()
    gradient = (hessian @ error).add_(error, alpha=float(added))  # [K, N]
    del error
    curvature = (diagonal + added).masked_fill(diagonal == 0, torch.inf)
    with few_threads(2.0 * group * code.numel()):
        for _ in range(sweeps):
            for start in range(0, len(code), group):
                _visit(code, gradient, hessian, curvature, float(added), step[start // group], start, start + group)
    return code.t().contiguous().to(torch.int8)


def _visit(
    code: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    added: float,
    step: torch.Tensor,
    start: int,
    stop: int,
) -> None:
    """The columns of one group; `code` and `gradient` change in place."""
    inside = hessian[start:stop, start:stop].clone()  # a whole H of one group would be changed
    inside.diagonal().add_(added)
    before, slope = code[start:stop].clone(), gradient[start:stop]
    for row, coupling in enumerate(inside):
        column = start + row
        best = (code[column] + slope[row] / (curvature[column] * step)).round_().clamp_(-CODE_MAX, CODE_MAX)
        slope.addr_(coupling, (best - code[column]).mul_(step), alpha=-1)
        code[column] = best
    change = (code[start:stop] - before).mul_(step)
    for others in (slice(0, start), slice(stop, len(code))):
        gradient[others].addmm_(hessian[others, start:stop], change, alpha=-1)
