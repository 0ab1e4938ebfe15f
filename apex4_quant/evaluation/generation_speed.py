"""The speed of a loaded model of transformers: prefill, decoding, and peak memory.

One run is what a batch of requests costs: a prefill of `batch` prompts into a static cache, then one token for each
request at a time, greedily. On a GPU a decoding step is one CUDA graph, replayed, so that what is measured is the GPU and
not Python; on a CPU it is a plain loop. Times are medians of several runs after warm-up. Tokens are random: no figure
here depends on what a model says.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..nn.arithmetic import arithmetic_of
from .engine import RUNS, WARM_UP, Load, figures_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def measure(model: PreTrainedModel, load: Load) -> dict[str, Any]:
    """What `Engine.speed` returns. `peak_memory_bytes` has the weights in it; on a CPU it is that of the process."""
    device = model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (load.batch, load.prompt_len), generator=generator
    ).to(device)
    _reset_peak(device)
    run = _Run(model, ids, load.gen_len)
    for _ in range(WARM_UP):
        run.prefill()
        run.decode()
    prefills, decodes = [], []
    for _ in range(RUNS):
        prefills.append(_seconds(run.prefill, device))
        decodes.append(_seconds(run.decode, device))
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    return {
        **figures_of(load, prefill, decode),
        "peak_memory_bytes": _peak(device),
        "cuda_graph": run.uses_graph,
        **arithmetic_of(model),
    }


class _Run:
    """One batch of requests: its prompts `ids`, a cache for all their tokens, and how a step is made."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, gen_len: int) -> None:
        from transformers import StaticCache

        self._model, self._ids, self._gen_len = model, ids, gen_len
        self._length = ids.shape[1] + gen_len
        self._cache = StaticCache(config=model.config, max_cache_len=self._length)
        self._next = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=ids.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        self._places = torch.arange(self._length, device=ids.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # A sliding window's place is counted on the host, which a graph would not do again.
        self.uses_graph = ids.device.type == "cuda" and not any(
            getattr(layer, "is_sliding", False) for layer in self._cache.layers
        )

    def prefill(self) -> None:
        self._cache.reset()
        output = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next.copy_(output.logits[:, -1:].argmax(-1))
        self._position.fill_(self._ids.shape[1])

    def decode(self) -> None:
        """All tokens after the first. Needs a prefill before it."""
        steps = self._gen_len - 1
        if self.uses_graph and self._graph is None:
            steps -= self._capture()
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _step(self) -> None:
        # The mask is ours, so that no step of the model's own looks at positions from the host.
        mask = (self._places <= self._position).expand(self._ids.shape[0], 1, 1, -1)
        output = self._model(
            input_ids=self._next,
            attention_mask=mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._next.copy_(output.logits[:, -1:].argmax(-1))
        self._position.add_(1)

    def _capture(self) -> int:
        """Make the graph of a step; returns how many steps were made on the way."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()  # recorded, not done
        self._graph = graph
        return 1


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: the process's peak starts anew
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
