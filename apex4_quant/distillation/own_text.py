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

WINDOWS_AT_ONCE = 4096  # at most: a step of a small model takes as long for one
SHARE_OF_MEMORY = 0.3  # for the keys and values of all windows, which are copied when a token is added


@torch.no_grad()
def write_windows(
    model: PreTrainedModel,
    starts: torch.Tensor,
    length: int,
    seed: int,
    beginning: list[int],
    advance: Callable[[int], object] = lambda tokens: None,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """As many windows as `starts`, int64 [S], has tokens: the `beginning`, the token, and what the model goes on with.

    Returns int64 [S, length] on the CPU, or None if `stop`, which is asked before every token, said yes. Every next token is drawn
    from the whole distribution. The seed decides, as far as the device computes the same logits again.
    """
    device = model.device
    random = torch.Generator(device).manual_seed(seed % 2**63)
    written: list[torch.Tensor] = []
    done, at_once = 0, _windows_at_once(model, length)
    while done < len(starts):
        some = starts[done : done + at_once]
        try:
            found = _write(model, some.to(device), length, random, beginning, stop)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            continue
        if found is None:
            return None
        written.append(found)
        done += len(some)
        advance(found.numel())
    return torch.cat(written)


def _windows_at_once(model: PreTrainedModel, length: int) -> int:
    """As many as fit, by the sizes of most architectures; write_windows makes up for the others."""
    if model.device.type != "cuda":
        return 32
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
    window = states + 16 * config.vocab_size  # predictions in float32, three times over
    free = torch.cuda.mem_get_info(model.device)[0]
    return max(1, min(WINDOWS_AT_ONCE, int(SHARE_OF_MEMORY * free / window)))


def _write(
    model: PreTrainedModel,
    starts: torch.Tensor,
    length: int,
    random: torch.Generator,
    beginning: list[int],
    stop: Callable[[], bool],
) -> torch.Tensor | None:
    before = torch.tensor(beginning, dtype=torch.int64, device=starts.device).expand(len(starts), -1)
    new = torch.cat([before, starts[:, None]], 1)
    windows, past = [new], None
    for _ in range(length - new.shape[1]):
        if stop():
            return None
        predicted = model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = predicted.past_key_values
        new = torch.multinomial(predicted.logits[:, -1].float().softmax(-1), 1, generator=random)
        windows.append(new)
    return torch.cat(windows, 1)[:, :length].cpu()
