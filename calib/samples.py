"""Text to token windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .errors import CalibrationError


def windows(token_ids: Sequence[int], length: int, what: str, beginning: Sequence[int] = ()) -> torch.Tensor:
    """All whole non-overlapping windows of the text, int64 [count, length]. Raises CalibrationError if there is none.

    Each window is the `beginning`, the tokens that the model was trained to see first (a BOS token, or none), and then
    `length` - len(`beginning`) tokens of the text. A beginning that the text has already is not put before it twice.
    """
    beginning = list(beginning)
    if beginning and list(token_ids[: len(beginning)]) == beginning:
        token_ids = token_ids[len(beginning) :]
    of_text = length - len(beginning)
    count = len(token_ids) // of_text if of_text > 0 else 0
    if count == 0:
        raise CalibrationError(
            f"{what} has {len(token_ids)} tokens, fewer than one window of {length}: "
            "give a longer text or a smaller --seq-len"
            if of_text > 0
            else f"windows of {length} tokens have no room for text behind BOS: give a larger --seq-len"
        )
    text = torch.tensor(token_ids[: count * of_text], dtype=torch.int64).view(count, of_text)
    return torch.cat([torch.tensor(beginning, dtype=torch.int64).expand(count, -1), text], 1)


def draw_samples(
    encode: Callable[[str], list[int]],
    text: str,
    count: int,
    length: int,
    seed: int,
    what: str,
    beginning: Sequence[int] = (),
) -> torch.Tensor:
    """`count` windows drawn without replacement, int64 [<= count, length]; all of them where the text has fewer."""
    available = windows(encode(text), length, what, beginning)
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))
    return available[order[:count].sort().values]
