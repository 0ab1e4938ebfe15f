"""Coordinate descent on the codes that GPTQ leaves (the step of QuantEase, Behdin et al., arXiv 2309.01885).

GPTQ rounds every column once and never looks back. With the scales fixed, the output error of a row of weights w that is
stored as v is (w - v) H (w - v)^T, and in one column k, all others kept, its least value on the grid of codes is at

    q_k  =  clamp( round( v_k / s_k + ((w - v) H)_k / (H_kk s_k) ) )

Columns are visited in order, a few times over. No step makes the error larger, so neither do all of them. Within a group
the gradient (w - v) H is kept up to date column by column, outside it by one matrix product a group. On a GPU with kernels
that is every 128 columns, which are one kernel (column_sweeps.py).
"""

from __future__ import annotations

import torch

from ..format.number_format import BLOCK, CODE_MAX
from ..hardware.threads import few_threads
from ..kernels.sweeps import column_sweeps
from .folded_grid import FoldedGrid, GroupGrid


def refine_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    target: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    sweeps: int,
    grid: FoldedGrid | None = None,
) -> torch.Tensor:
    """int8 codes [N, K], float16 scales [N, G], target float32 [N, K], H float32 [K, K] -> int8 codes [N, K].

    `damping` of the mean of H's diagonal is added to it, as in GPTQ. Columns whose input was always zero keep their
    codes. Scales are not changed. With a `grid`, that of the scales, codes are worth its numbers.
    """
    group = codes.shape[1] // scales.shape[1]
    code = codes.t().float().contiguous()  # [K, N]: a column of the weight is a contiguous row, as in gptq.py
    if grid is None:
        step = scales.float().t().contiguous()  # [G, N]
        error = target.t() - code * step.repeat_interleave(group, dim=0)
    else:
        worth = torch.cat([grid.group(g).worth(part) for g, part in enumerate(code.split(group))])
        error = target.t() - worth
    diagonal = hessian.diagonal()
    added = damping * diagonal.mean()
    gradient = (hessian @ error).add_(error, alpha=float(added))  # [K, N]
    del error
    curvature = (diagonal + added).masked_fill(diagonal == 0, torch.inf)
    kernels = column_sweeps.run_on(code.device)
    visit, width = (_visit_in_a_kernel, BLOCK) if kernels else (_visit, group)
    visit_folded = _visit_folded_in_a_kernel if kernels else _visit_folded
    damped = float(added)
    with few_threads(2.0 * group * code.numel()):
        for _ in range(sweeps):
            for start in range(0, len(code), width):
                if grid is not None:
                    visit_folded(
                        code,
                        worth,
                        gradient,
                        hessian,
                        curvature,
                        damped,
                        grid.group(start // group),
                        start,
                        start + width,
                    )
                    continue
                visit(code, gradient, hessian, curvature, damped, step[start // group], start, start + width)
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
    _follow(gradient, hessian, (code[start:stop] - before).mul_(step), start, stop)


def _visit_folded(
    code: torch.Tensor,
    worth: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    added: float,
    grid: GroupGrid,
    start: int,
    stop: int,
) -> None:
    """`_visit` where codes are worth numbers of their own; `worth` [K, N] changes with them."""
    inside = hessian[start:stop, start:stop].clone()
    inside.diagonal().add_(added)
    before, slope = worth[start:stop].clone(), gradient[start:stop]
    for row, coupling in enumerate(inside):
        column = start + row
        best, value = grid.round(worth[column] + slope[row] / curvature[column])
        slope.addr_(coupling, value - worth[column], alpha=-1)
        code[column], worth[column] = best, value
    _follow(gradient, hessian, worth[start:stop] - before, start, stop)


def _visit_in_a_kernel(
    code: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    added: float,
    step: torch.Tensor,
    start: int,
    stop: int,
) -> None:
    here = slice(start, stop)
    change = torch.empty_like(code[here])
    column_sweeps.descend_columns(code[here], change, gradient[here], hessian[here, here], curvature[here], step, added)
    _follow(gradient, hessian, change, start, stop)


def _visit_folded_in_a_kernel(
    code: torch.Tensor,
    worth: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    curvature: torch.Tensor,
    added: float,
    grid: GroupGrid,
    start: int,
    stop: int,
) -> None:
    here = slice(start, stop)
    change = torch.empty_like(code[here])
    column_sweeps.descend_columns_on_grid(
        code[here], worth[here], change, gradient[here], hessian[here, here], curvature[here], grid.levels, added
    )
    _follow(gradient, hessian, change, start, stop)


def _follow(gradient: torch.Tensor, hessian: torch.Tensor, change: torch.Tensor, start: int, stop: int) -> None:
    """What the columns outside the visited ones see of `change`, that of the values stored in these."""
    for others in (slice(0, start), slice(stop, len(gradient))):
        gradient[others].addmm_(hessian[others, start:stop], change, alpha=-1)
