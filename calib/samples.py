"""Text to token windows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import CalibrationError


def windows(token_ids: list[int], length: int, what: str) -> torch.Tensor:
    """All whole non-overlapping windows, int64 [count, length]. Raises CalibrationError if there is none."""
    count = len(token_ids) // length
    if count == 0:
        raise CalibrationError(
            f"{what} has {len(token_ids)} tokens, fewer than one window of {length}: "
            "give a longer text or a smaller --seq-len"
        )
    return torch.tensor(token_ids[: count * length], dtype=torch.int64).view(count, length)


def draw_samples(
    encode: Callable[[str], list[int]], text: str, count: int, length: int, seed: int, what: str
) -> torch.Tensor:
    """`count` windows drawn without replacement, int64 [<= count, length]; all of them where the text has fewer."""
    available = windows(encode(text), length, what)
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))
    return available[order[:count].sort().values]
