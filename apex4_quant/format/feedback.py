"""How error feedback and clip ratios of blocks are stored, behind the matrix of a transform. Normative text: docs/format.md §2.

A block of 128 columns is rounded in eight steps of 16 columns, the last step first. Step j has the columns k with
floor(k / 4) mod 8 = j: those that one lane of a kernel holds side by side (kernels/cuda/quantize/quantize_feedback.cuh). Counted
by steps, and within a step in their own order, the columns stand in *step order*. There G, by which the errors of a step go to the
columns that are left, has values only in rows of a later step than the column's: 16 rows of step j have 16 j of them each.

Matrices of an input are [KB, 128, 128], with feedback [KB, 184, 128], and with clip ratios, of sixteen levels, [KB, 185, 128].
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .number_format import BLOCK, CLIP_ROWS, FEEDBACK_ROWS, FEEDBACK_STEPS, STEP_COLUMNS


@lru_cache(maxsize=8)
def step_order(device: torch.device | None = None) -> torch.Tensor:
    """int64 [128]: the column that stands at each place of the step order."""
    columns = torch.arange(BLOCK, device=device)
    return torch.argsort(columns // 4 % FEEDBACK_STEPS * BLOCK + columns)


@lru_cache(maxsize=8)
def _stored_places(device: torch.device) -> torch.Tensor:
    """int64 [7168]: which element of G, row * 128 + column in step order, is stored where."""
    steps = torch.arange(BLOCK, device=device) // STEP_COLUMNS
    return (steps[:, None] > steps[None, :]).flatten().nonzero().flatten()


def pack_feedback(feedback: torch.Tensor) -> torch.Tensor:
    """G [KB, 128, 128] in step order -> its stored rows [KB, 56, 128]. What is not below the steps is left away."""
    places = _stored_places(feedback.device)
    rows: torch.Tensor = feedback.flatten(1).index_select(1, places).unflatten(1, (FEEDBACK_ROWS, BLOCK))
    return rows


def feedback_of(matrix: torch.Tensor) -> torch.Tensor | None:
    """The matrices of an input -> G [KB, 128, 128] in step order, or None without feedback."""
    if matrix.shape[1] == BLOCK:
        return None
    feedback = matrix.new_zeros(len(matrix), BLOCK, BLOCK)
    rows = matrix[:, BLOCK : BLOCK + FEEDBACK_ROWS]
    feedback.view(len(matrix), -1)[:, _stored_places(matrix.device)] = rows.flatten(1)
    return feedback


def clip_row(clips: torch.Tensor) -> torch.Tensor:
    """The clip ratio of every block [KB] -> their stored rows [KB, 1, 128]."""
    return torch.nn.functional.pad(clips[:, None, None], (0, BLOCK - 1))


def block_clips_of(matrix: torch.Tensor) -> torch.Tensor | None:
    """The matrices of an input -> the clip ratio of every block [KB], or None where blocks have none."""
    return matrix[:, -1, 0] if matrix.shape[1] == BLOCK + FEEDBACK_ROWS + CLIP_ROWS else None


def transform_of(matrix: torch.Tensor) -> torch.Tensor:
    """The matrices of an input -> T [KB, 128, 128] without gaps."""
    return matrix[:, :BLOCK].contiguous()
