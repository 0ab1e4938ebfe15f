"""The clip ratios of activation scales: less range for the largest value of a group, finer steps for all others.

With sixteen levels every block has one. A ratio of 1 gives the value of largest magnitude the code -8, and one of 8/7 lets a value as
large on the other side have the code 7. So those that are tried begin above 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..distributed.group import Group
from ..format.number_format import BLOCK
from ..kernels.torch_backend import quantize_transformed

ACTIVATION_CLIP_RATIOS = tuple(1.0 - 0.02 * step for step in range(13))  # 1.00 ... 0.76
BLOCK_CLIP_RATIOS = tuple(1.12 - 0.02 * step for step in range(13))  # 1.12 ... 0.88
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
    up for. Each of the `processes`, which have the same arguments, tries a share of the ratios.
    """
    processes, outputs = processes or Group(), _Outputs(weights)
    errors = rows.new_zeros(len(ACTIVATION_CLIP_RATIOS))
    for number in range(len(errors))[processes.share(len(errors)).slice]:
        codes, scale = quantize_transformed(rows, group, ACTIVATION_CLIP_RATIOS[number], feedback)
        errors[number] = outputs.square_of((codes * scale[..., None]).flatten(1) - rows)
    best_ratio, best_error = 1.0, float("inf")
    numbers = errors.tolist()  # at once: a GPU is waited for
    for ratio, error in zip(ACTIVATION_CLIP_RATIOS, processes.sum_of_numbers(numbers), strict=True):
        if error < best_error:
            best_ratio, best_error = ratio, error
    return round(best_ratio, 2)


def search_block_clips(
    rows: torch.Tensor, weights: Iterable[torch.Tensor], feedback: torch.Tensor, processes: Group | None = None
) -> torch.Tensor:
    """The ratio of every block, float32 [K / 128], with the least of what its own errors do to the outputs; sixteen levels.

    Arguments are those of `search_activation_clip`. Errors of different blocks hardly know of each other, so that each is looked at by
    itself.
    """
    processes, blocks = processes or Group(), rows.shape[1] // BLOCK
    grams = rows.new_zeros(blocks, BLOCK, BLOCK)
    for weight in weights:
        of_blocks = weight.unflatten(1, (blocks, BLOCK)).transpose(0, 1)
        grams.baddbmm_(of_blocks.transpose(1, 2), of_blocks)
    errors = rows.new_zeros(len(BLOCK_CLIP_RATIOS), blocks)
    ratios = rows.new_tensor(BLOCK_CLIP_RATIOS)
    for number in range(len(errors))[processes.share(len(errors)).slice]:
        codes, scale = quantize_transformed(rows, BLOCK, feedback=feedback, clips=ratios[number].expand(blocks))
        difference = (codes * scale[..., None] - rows.unflatten(1, (blocks, BLOCK))).transpose(0, 1)
        errors[number] = ((difference @ grams) * difference).sum((1, 2))
    return ratios[processes.sum(errors).argmin(0)]


class _Outputs:
    """Of linears float32 [N_i, K]: ||d W^T||^2 = d (W^T W) d^T. W^T W is made where they have more rows than columns."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights: list[torch.Tensor] = []
        self._gram: torch.Tensor | None = None
        rows = 0
        for weight in weights:
            rows, width = rows + len(weight), weight.shape[1]
            self._weights.append(weight)
            if rows > width:
                gram = weight.new_zeros(width, width) if self._gram is None else self._gram
                for each in self._weights:
                    gram.addmm_(each.t(), each)
                self._weights, self._gram = [], gram

    def square_of(self, differences: torch.Tensor) -> torch.Tensor:
        """The sum over d [T, K], []."""
        if self._gram is not None:
            return ((differences @ self._gram) * differences).sum()
        return torch.stack([(differences @ weight.t()).square().sum() for weight in self._weights]).sum()
