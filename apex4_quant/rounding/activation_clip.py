"""The clip ratio of activation scales: less range for the largest value of a group, finer steps for all others."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..distributed.group import Group
from ..kernels.torch_backend import quantize_transformed

ACTIVATION_CLIP_RATIOS = tuple(1.0 - 0.02 * step for step in range(13))  # 1.00 ... 0.76
CLIP_SEARCH_ROWS = (
    1024  # calibration tokens looked at: the error is a sum over tokens and needs no more to rank the ratios
)


def search_activation_clip(
    rows: torch.Tensor,
    weights: Iterable[torch.Tensor],
    group: int,
    processes: Group | None = None,
    feedback: torch.Tensor | None = None,
) -> float:
    """The ratio with the least output error sum ||(Q(x) - x) W^T||^2 over the linears that read the input.

    rows float32 [T, K] of the input (CLIP_SEARCH_ROWS of them suffice) and weights float32 [N_i, K], all in the basis that
    is quantized; K is a multiple of the group length `group`. `feedback`: G float32 [K / 128, 128, 128] in step order, if errors are made
    up for. Each of the `processes`, which have the same arguments, looks at a share of the rows.
    """
    processes = processes or Group()
    gram = rows.new_zeros(rows.shape[1], rows.shape[1])  # ||d W^T||^2 = d (W^T W) d^T
    for weight in weights:
        gram.addmm_(weight.t(), weight)
    rows = rows[processes.share(len(rows)).slice]
    errors = []
    for ratio in ACTIVATION_CLIP_RATIOS:
        codes, scale = quantize_transformed(rows, group, ratio, feedback)
        difference = (codes * scale[..., None]).flatten(1) - rows
        errors.append(float(((difference @ gram) * difference).sum()))
    best_ratio, best_error = 1.0, float("inf")
    for ratio, error in zip(ACTIVATION_CLIP_RATIOS, processes.sum_of_numbers(errors), strict=True):
        if error < best_error:
            best_ratio, best_error = ratio, error
    return round(best_ratio, 2)
