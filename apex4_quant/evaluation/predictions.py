"""What a model predicts on windows of text: its perplexity, and how far its predictions are from another model's.

Perplexity is that of the quantization papers since GPTQ: exp of the mean negative log-likelihood of tokens 2..L of every
window. Windows do not overlap and do not see each other.

The divergence of a model from its original is KL(original || model) = sum over the vocabulary of p (log p - log q), p and
q the two models' probabilities of the next token, in nats, as a mean over the predicted tokens. It asks of every prediction
how it changed, where perplexity sees only the probability of the one token that came: at a few thousand tokens it tells
apart recipes whose perplexities differ by chance.

Both models need not be in memory together. Of the original are kept the final hidden states, L H numbers a window, and
its head: they give its logits again, bit for bit. Logits of one window are there at a time (L V numbers, V the vocabulary).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint.load import entered_on
from ..distributed.group import Group
from ..errors import Apex4Error
from .finite import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

Advance = Callable[[int], object]
_LARGEST_MEAN = math.log(sys.float_info.max)
_ROWS = 256  # tokens whose probabilities are held in float32 at one time


def measure_perplexity(
    model: PreTrainedModel, ids: torch.Tensor, advance: Advance = lambda done: None, group: Group | None = None
) -> float:
    """Of windows `ids`, int64 [windows, L], those of all processes of the `group`. `advance` is told the tokens done.

    Raises Apex4Error if it is no number.
    """
    total = 0.0
    for window in ids:
        logits = logits_of(model, window)
        total += sum(_likelihood(log_p, targets) for _, log_p, targets in _parts(logits, window))
        if not math.isfinite(total):
            raise not_finite(model, window)
        advance(len(window))
    total, count = (group or Group()).sum_of_numbers([total, predicted(ids)])
    return perplexity_of(total, int(count))


@torch.no_grad()
def logits_of(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """window int64 [L] -> [L, V] in the model's dtype, on its device."""
    logits: torch.Tensor = model(input_ids=window[None].to(entered_on(model)), use_cache=False).logits[0]
    return logits


def _parts(logits: torch.Tensor, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some predicted tokens at a time: which rows of `logits` [L, V] predict them, the log-probabilities of all tokens in
    float32 [rows, V], and the tokens that came, int64 [rows, 1]. The last row predicts nothing that is there."""
    targets = window[1:, None].to(logits.device)
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, min(start + _ROWS, len(targets)))
        yield rows, torch.log_softmax(logits[rows].float(), -1), targets[rows]


def _likelihood(log_p: torch.Tensor, targets: torch.Tensor) -> float:
    """The negative log-likelihood of the targets, summed."""
    return -float(log_p.gather(1, targets).double().sum())


def predicted(ids: torch.Tensor) -> int:
    """How many tokens of windows `ids`, int64 [windows, L], are predicted."""
    return ids.shape[0] * (ids.shape[1] - 1)


def perplexity_of(total: float, count: int) -> float:
    """From the negative log-likelihood of all `count` predicted tokens. Raises Apex4Error where that is beyond all numbers."""
    mean = total / count
    if mean > _LARGEST_MEAN:
        raise Apex4Error(
            f"the model gives the text's tokens a mean log-probability of {-mean:.4g}: its perplexity is beyond all "
            "numbers, the model is damaged or not of this text"
        )
    return math.exp(mean)


class RecordedPredictions:
    """A model's predictions on windows `ids`, int64 [windows, L], without its decoder layers.

    The model is used up: its base model is replaced by one that returns the recorded states, so that the layers' memory
    can be freed and the class's own forward does what comes behind them (head, soft capping). `perplexity` is the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: torch.Tensor,
        advance: Advance = lambda done: None,
        group: Group | None = None,
    ) -> None:
        self.ids = ids
        self._replayed = _Replayed()
        recording = model.base_model.register_forward_hook(self._replayed.record)
        try:
            self.perplexity = measure_perplexity(model, ids, advance, group)
        finally:
            recording.remove()
        setattr(model, model.base_model_prefix, self._replayed)
        self._model = model

    def logits(self, index: int) -> torch.Tensor:
        """Of the window `ids[index]`: [L, V] in the model's dtype, on its device."""
        self._replayed.index = index
        return logits_of(self._model, self.ids[index])


class _Replayed(nn.Module):
    """In the place of a base model: what that returned for window `index`, but for anything else than the final states."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0
        self._states: list[torch.Tensor] = []
        self._output: type[ModelOutput] | None = None

    def record(self, module: nn.Module, arguments: object, output: ModelOutput) -> None:
        """A forward hook of the base model."""
        self._output = type(output)
        self._states.append(output["last_hidden_state"].cpu())

    def forward(self, input_ids: torch.Tensor, **_: object) -> ModelOutput:
        assert self._output is not None
        return self._output(last_hidden_state=self._states[self.index].to(input_ids.device))


@dataclass(frozen=True)
class Comparison:
    """A model against its original: its perplexity, KL(original || model) in nats a token, and the share of tokens for
    which both find the same one the most probable."""

    perplexity: float
    divergence: float
    top1_agreement: float


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    original: RecordedPredictions,
    advance: Advance = lambda done: None,
    group: Group | None = None,
) -> Comparison:
    """One pass of `model` over the windows that `original` was recorded on. Both have the same tokens, in one order.

    Each process of the `group` has windows of its own; figures are of all. Raises Apex4Error if the perplexity or the divergence is no number.
    """
    ids = original.ids
    total = divergence = 0.0
    agreeing = 0
    for index, window in enumerate(ids):
        logits = logits_of(model, window)
        others = original.logits(index).to(logits.device)
        for rows, log_q, targets in _parts(logits, window):
            log_p = torch.log_softmax(others[rows].float(), -1)
            total += _likelihood(log_q, targets)
            divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        if not math.isfinite(total + divergence):
            raise not_finite(model, window)
        advance(len(window))
    total, divergence, agrees, count = (group or Group()).sum_of_numbers([total, divergence, agreeing, predicted(ids)])
    return Comparison(perplexity_of(total, int(count)), divergence / count, agrees / count)
