"""What makes up for the rounding of an input: G of the transforms with error feedback, from what errors of the input do.

A block of 128 transformed columns is rounded in steps, and how the columns that are left make up for the errors so far is G. Errors e
[1, 128] cost e M e^T, where M = sum of r^T r over rows r [1, 128] of what amplifies them: the weights that read the input, or the gradients
at it, in the basis of T^-T. Let M = L D L^T with D block-diagonal and L unit block-lower-triangular, in blocks of the 16 columns of a
step. The cost is then the sum over steps j of f_j D_j f_j^T with f = e L, of which f_j depends on step j and on those rounded before it
alone. It is least where a step rounds what the others left of it: if d is the error of that rounding, e L = d, and what has to be added
to the values of a step before it is rounded is d (L^-1 - I) of the steps before. So G = L^-1 - I.

That is GPTQ's rule (arXiv 2210.17323) for a token in the place of a row of weights, or Babai's nearest plane (1986) for the lattice of its
codes. M is damped: errors that the rows seen say nothing of are not free.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..distributed.group import Group
from ..format.feedback import pack_feedback, step_order
from ..format.number_format import BLOCK, FEEDBACK_STEPS, STEP_COLUMNS
from .learned_transform import round_to_halves

DAMPING = 0.1  # of the mean of M's diagonal; a hundredth is worse (docs/log.md, 2026-11-29)
ROWS_AT_ONCE = 256  # in float64
LARGEST = 2.0**14  # of an entry of G, which float16 holds; damping keeps them far below it


def error_feedback(amplifying: Iterable[torch.Tensor], in_features: int, group: Group | None = None) -> torch.Tensor:
    """G as stored, float16 [K / 128, 56, 128], of an input of K = `in_features`, from rows [N_i, K] in the basis that is quantized.

    Blocks that nothing amplifies have zeros. Each process of the `group`, which have the same arguments, works out a share.
    """
    group, count = group or Group(), in_features // BLOCK
    share = group.share(count)
    moments: torch.Tensor | None = None
    for rows in amplifying:
        if moments is None:
            moments = rows.new_zeros(share.size, BLOCK, BLOCK, dtype=torch.float64)
        for some in rows[:, share.first * BLOCK : share.stop * BLOCK].split(ROWS_AT_ONCE):
            blocks = some.double().unflatten(1, (share.size, BLOCK)).transpose(0, 1)
            moments.baddbmm_(blocks.transpose(1, 2), blocks)
    assert moments is not None
    return group.gather_share(pack_feedback(feedback_by_moments(moments)), count)


def feedback_by_moments(moments: torch.Tensor) -> torch.Tensor:
    """M float64 [KB, 128, 128] of columns in their own order -> G float16 [KB, 128, 128] in step order, as it can be stored."""
    order = step_order(moments.device)
    damped = moments[:, order][:, :, order]
    level = damped.diagonal(dim1=1, dim2=2).mean(1)
    damped = damped / level.clamp_min(1e-300)[:, None, None]
    damped.diagonal(dim1=1, dim2=2).add_(DAMPING)
    lower, failed = torch.linalg.cholesky_ex(damped)  # M = C C^T, so L = C diag(C_jj)^-1
    steps = lower.unflatten(1, (FEEDBACK_STEPS, STEP_COLUMNS)).unflatten(3, (FEEDBACK_STEPS, STEP_COLUMNS))
    own = steps.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # C_jj, [KB, 8, 16, 16]
    identity = torch.eye(BLOCK, dtype=moments.dtype, device=moments.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    feedback = (own @ inverse.unflatten(1, (FEEDBACK_STEPS, STEP_COLUMNS))).flatten(1, 2) - identity
    usable = (failed == 0) & (level > 0) & (feedback.abs().amax((1, 2)) < LARGEST)
    feedback = torch.where(usable[:, None, None], feedback, 0.0)
    return round_to_halves(feedback.float())
