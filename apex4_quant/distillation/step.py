"""The gradients of one step: both models over the windows of a batch, the divergence, and back through the student.

A model of 30 layers is ten thousand launches a step, for which a GPU waits when the model is small. So on a GPU a step is
captured into a CUDA graph, once, and replayed: the same kernels in the same order, from one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels.training import ops as training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .student import Student

WARM_UP_STEPS = 2  # before a capture: whatever is loaded or made on first use


class Step:
    """Called with windows int64 [B, L] it leaves in every parameter of `student` the gradient of the mean KL over their tokens.

    `say` is told of what makes it slower than it could be.
    """

    def __init__(
        self,
        original: PreTrainedModel,
        student: Student,
        parameters: Iterable[nn.Parameter],
        say: Callable[[str], object],
    ) -> None:
        self._original, self._student, self._parameters, self._say = original, student, list(parameters), say
        self._on_gpu = original.device.type == "cuda"
        self._stream = torch.cuda.Stream(original.device) if self._on_gpu else None
        self._before = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor) -> None:
        if self._stream is None:
            self._forget_gradients()
            self._gradients(ids)
            return
        if self._graph is not None and self._ids is not None:
            self._ids.copy_(ids)
            self._graph.replay()
            return
        # Everything on the stream of the capture: what autograd keeps for a parameter belongs to one stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._forget_gradients()
            if self._before == 0:
                self._capture(ids)
            if self._graph is None:
                self._gradients(ids)
            else:
                self._graph.replay()
            self._before -= 1
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, ids: torch.Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        self._ids = ids.clone()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._gradients(self._ids)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            self._say(f"distillation launches its steps kernel by kernel, which is slower: no CUDA graph ({reason})")
            self._forget_gradients()
        else:
            self._graph = graph

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _gradients(self, ids: torch.Tensor) -> None:
        with torch.no_grad():
            wanted = self._original(input_ids=ids, use_cache=False).logits
        logits = self._student.logits(ids)
        if training.run_on(logits.device):
            _, gradient = training.divergence(logits, wanted, 1 / ids.numel())
            logits.backward(gradient)
        else:
            total = torch.zeros((), device=logits.device)
            for ours, theirs in zip(logits, wanted, strict=True):  # the vocabulary in float32 for one window at a time
                total = total + checkpoint(divergence, ours, theirs, use_reentrant=False)
            (total / ids.numel()).backward()
        self._student.forget()


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] -> the sum over tokens of KL(theirs || ours), float32."""
    log_q, log_p = torch.log_softmax(ours.float(), -1), torch.log_softmax(theirs.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum()


@torch.no_grad()
def measured(original: PreTrainedModel, student: Student, windows: torch.Tensor, batch: int) -> float:
    """The mean KL over the tokens of `windows`, int64 [S, L]."""
    loss = 0.0
    for ids in windows.split(batch):
        wanted = original(input_ids=ids, use_cache=False).logits
        logits = student.logits(ids)
        if training.run_on(logits.device):
            loss += float(training.divergence(logits, wanted, None)[0].double().sum()) / windows.numel()
            continue
        for ours, theirs in zip(logits, wanted, strict=True):
            loss += float(divergence(ours, theirs)) / windows.numel()
    student.forget()
    return loss
