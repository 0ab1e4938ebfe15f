"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that spreads each column's error over the columns to come.

With H = E[x x^T] and H^-1 = U^T U, U upper triangular, columns are rounded in order; the error of column i, divided by
U_ii, times row i of U is taken from the columns after it. Which columns wait for which is only a matter of when the
products are done: here a range of columns is split in halves, the left half rounded, its errors applied to the right half in one
matrix product, then the right half, and so on down to single columns, or on a GPU with kernels to 128 of them, which are one
kernel (column_sweeps.py). All work but the rounding is in matrix products.

The factor comes from one Cholesky decomposition: with J the reversal of rows, J H J = L L^T gives H = R R^T with
R = J L J upper triangular, hence U = R^-1.

GPTAQ (Li et al., arXiv 2504.02692) has the linear approach what the original model computes, W x~, and not what it makes
of the input x that comes through the quantized layers before it. Expanding the square,

    E|| W^ x - W (x + alpha (x~ - x)) ||^2  =  tr (W^ - W') H (W^ - W')^T + what W^ does not change,
    W' = W + alpha W C H^-1,    C = E[(x~ - x) x^T]

so it is GPTQ, of W' in W's place, with the damped H as everywhere. alpha = 1 is the objective as written; a
part of the way measured better (docs/log.md). The paper lets only the columns after k make up for column k's drift:
triu(C U^T, 1) U in the place of C H^-1, times the weights as they are corrected at that moment.

With 8-bit activations codes are worth their folded weights (folded_grid.py), which depend on the scales of all groups of a row.
Columns are then rounded twice: first as ever, which finds the scales, and again with these to the folded weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..calib.finite import all_finite
from ..distributed.group import Group
from ..errors import Apex4Error
from ..format.number_format import BLOCK, CODE_MAX, round_up
from ..format.quant_config import LinearFormat
from ..hardware.threads import few_threads
from ..kernels.sweeps import column_sweeps
from ..transforms.block_transforms import transform_weight
from .coordinate_descent import refine_codes
from .folded_grid import FoldedGrid, GroupGrid
from .nearest import WEIGHT_CLIP_RATIOS, require_quantizable, search_scales

DAMPING = 0.01  # of the mean of H's diagonal: the value of the paper's code
DAMPING_STEP, DAMPING_MAX = 10.0, 10.0


def inverse_factor(
    name: str,
    hessian: torch.Tensor,
    damping: float = DAMPING,
    warn: Callable[[str], None] = lambda text: None,
    group: Group | None = None,
) -> torch.Tensor:
    """H float32 [K, K] -> U float32 [K, K], upper triangular, (H + damping)^-1 = U^T U.

    A column whose input was always zero gets the mean diagonal: it is rounded to nearest, on its own. If the
    decomposition fails, damping grows tenfold and `warn` is told; Apex4Error if that does not help either.
    Of the inverse each process of `group`, which have the same arguments, makes a share of the rows.
    """
    group = group or Group()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        mean = torch.ones_like(mean)
    dead = diagonal == 0
    while damping <= DAMPING_MAX:
        added = torch.full_like(diagonal, float(mean) * damping)
        added[dead] = mean
        # At most two K x K matrices besides the Hessian at any moment: K is 28672 in the largest models.
        lower = hessian.flip(0, 1).mT  # symmetric; column by column in memory, as the decomposition wants it in place
        lower.diagonal().add_(added.flip(0))
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            upper = lower.flip(0, 1)
            del lower
            factor = _inverse_of(upper, group)
            del upper
            if all_finite(factor):
                return factor
        damping *= DAMPING_STEP
        warn(f"{name}: the Hessian is not positive definite, damping is now {damping:g}")
    raise Apex4Error(f"{name}: the Hessian cannot be decomposed: use more calibration text or --recipe rtn")


def _inverse_of(upper: torch.Tensor, group: Group) -> torch.Tensor:
    """R [K, K], upper triangular -> R^-1. Rows of it do not depend on each other."""
    share = group.share(len(upper))
    if share.is_whole:
        inverse = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
        return inverse
    rows = upper.new_zeros(share.size, len(upper))
    rows[:, share.slice].fill_diagonal_(1.0)
    torch.linalg.solve_triangular(upper, rows, upper=True, left=False, out=rows)
    return group.gather_share(rows, share.total)


def drift_correction(name: str, drift: torch.Tensor, factor: torch.Tensor, alpha: float) -> torch.Tensor:
    """C = E[(x~ - x) x^T] and U, both float32 [K, K] -> P = alpha C U^T U: GPTQ then rounds W + W P. `drift` is used up.

    Raises Apex4Error, naming the input, if P is not finite.
    """
    correction = torch.mm(torch.mm(drift, factor.t()), factor, out=drift).mul_(alpha)
    if not all_finite(correction):
        raise Apex4Error(f"{name}: the original model's inputs lead to targets that are not finite: use --recipe apex4")
    return correction


def quantize_weight_gptq(
    name: str,
    weight: torch.Tensor,
    format: LinearFormat,
    factor: torch.Tensor,
    matrix: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    hessian: torch.Tensor | None = None,
    sweeps: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] and U [padded K, padded K] -> int8 codes [N, padded K], float16 scales [N, G].

    `matrix` is the dense transform of the input, if it has one; U and the `correction` of `drift_correction` belong to
    moments in the transformed basis.
    The scale of a group is searched when its first column is reached, on the weights as corrected until then, with
    squared errors weighted by 1 / U_kk^2 (what an error of column k costs once the later columns have compensated).
    With `hessian`, that of which U is the factor, the codes are then gone over `sweeps` times (coordinate_descent.py).
    Raises Apex4Error, naming the tensor, for a weight that is not finite or too large.
    """
    transformed = transform_weight(weight, format, matrix)
    require_quantizable(name, transformed)
    if correction is not None:
        transformed = torch.addmm(transformed, transformed, correction)
    # Transposed: a column of the weight is a contiguous row here.
    # A copy in any case: without a transform, and in float32, it is the model's own weight.
    pending = transformed.t().clone(memory_format=torch.contiguous_format)  # [K, N], corrected as the sweep goes on
    if hessian is None and format.activation_bits == 4:
        del transformed
    codes = torch.empty_like(pending, dtype=torch.int8)
    errors = torch.empty_like(pending)
    scales: list[torch.Tensor] = []
    group = format.group_length
    with few_threads(2.0 * group * pending.numel()):
        _round_groups(pending, codes, errors, factor, scales, group)
        stored = torch.stack(scales, dim=1).half()
        grid = FoldedGrid(stored) if format.activation_bits == 8 else None
        if grid is not None:
            pending.copy_(transformed.t())
            _round_to_grid(pending, codes, errors, factor, grid, group)
    del pending, errors
    found = codes.t().contiguous()
    if hessian is not None:
        found = refine_codes(found, stored, transformed, hessian, DAMPING, sweeps, grid)
    return found, stored


def _round_groups(
    pending: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    scales: list[torch.Tensor],
    group: int,
) -> None:
    """The sweep over all columns, group by group; `scales` gets one [N] per group."""
    cost = factor.diagonal().square().reciprocal()
    kernels = column_sweeps.run_on(pending.device)
    for start in range(0, len(pending), group):
        stop = start + group
        if kernels and group == BLOCK:
            here = slice(start, stop)
            scale = torch.empty_like(pending[start])
            column_sweeps.round_columns(
                pending[here], codes[here], errors[here], scale, factor[here, here], WEIGHT_CLIP_RATIOS
            )
        else:
            scale = search_scales(pending[start:stop].t().contiguous(), group, cost[start:stop])[:, 0].contiguous()
            _sweep(pending, codes, errors, factor, scale, start, stop, kernels)
        if stop < len(pending):
            pending[stop:].addmm_(factor[start:stop, stop:].t(), errors[start:stop], alpha=-1)
        scales.append(scale)


def _round_to_grid(
    pending: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    grid: FoldedGrid,
    group: int,
) -> None:
    """`_round_groups` with the scales known, to folded weights."""
    kernels = column_sweeps.run_on(pending.device)
    for g, start in enumerate(range(0, len(pending), group)):
        stop = start + group
        _sweep(pending, codes, errors, factor, grid.group(g), start, stop, kernels)
        if stop < len(pending):
            pending[stop:].addmm_(factor[start:stop, stop:].t(), errors[start:stop], alpha=-1)


def _sweep(
    pending: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | GroupGrid,
    start: int,
    stop: int,
    kernels: bool,
) -> None:
    """Round columns start..stop-1, each corrected by those before it within the range."""
    here = slice(start, stop)
    if kernels and stop - start == BLOCK:
        if isinstance(scale, GroupGrid):
            column_sweeps.round_columns_to_grid(
                pending[here], codes[here], errors[here], scale.levels, factor[here, here]
            )
        else:
            column_sweeps.round_columns(pending[here], codes[here], errors[here], scale, factor[here, here])
        return
    if stop - start == 1:
        if isinstance(scale, GroupGrid):
            code, worth = scale.round(pending[start])
        else:
            code = (pending[start] / scale).round_().clamp_(-CODE_MAX, CODE_MAX)
            worth = code * scale
        codes[start] = code
        errors[start] = (pending[start] - worth) / factor[start, start]
        return
    middle = (start + stop) // 2
    if kernels:
        middle = round_up(middle, BLOCK)
    _sweep(pending, codes, errors, factor, scale, start, middle, kernels)
    pending[middle:stop].addmm_(factor[start:middle, middle:stop].t(), errors[start:middle], alpha=-1)
    _sweep(pending, codes, errors, factor, scale, middle, stop, kernels)
