"""Text that a model writes itself: tokens drawn from its own predictions, whatever it was trained on.

A model is distilled on some text, and what it learns there it keeps best on text of that kind. Its own text is of all kinds that
it knows, and is there where no other is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS_AT_ONCE = 1024  # on a GPU, where a step takes about the same time for one


@torch.no_grad()
def write_windows(
    model: PreTrainedModel,
    starts: torch.Tensor,
    length: int,
    seed: int,
    beginning: list[int],
    advance: Callable[[int], object] = lambda windows: None,
) -> torch.Tensor:
    """As many windows as `starts`, int64 [S], has tokens: the `beginning`, the token, and what the model goes on with.

    Returns int64 [S, length] on the CPU. Every next token is drawn from the whole distribution. The seed decides, as far as the
    device computes the same logits again.
    """
    device = model.device
    random = torch.Generator(device).manual_seed(seed % 2**63)
    written: list[torch.Tensor] = []
    done, at_once = 0, WINDOWS_AT_ONCE
    while done < len(starts):
        some = starts[done : done + at_once]
        try:
            written.append(_write(model, some.to(device), length, random, beginning))
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            continue
        done += len(some)
        advance(len(some))
    return torch.cat(written)


def _write(
    model: PreTrainedModel, starts: torch.Tensor, length: int, random: torch.Generator, beginning: list[int]
) -> torch.Tensor:
    before = torch.tensor(beginning, dtype=torch.int64, device=starts.device).expand(len(starts), -1)
    new = torch.cat([before, starts[:, None]], 1)
    windows, past = [new], None
    for _ in range(length - new.shape[1]):
        predicted = model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = predicted.past_key_values
        new = torch.multinomial(predicted.logits[:, -1].float().softmax(-1), 1, generator=random)
        windows.append(new)
    return torch.cat(windows, 1)[:, :length].cpu()
