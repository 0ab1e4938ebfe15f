"""Gradients of the model's predictions by what leaves each of its decoder layers, before anything is quantized.

Once forwards through the float layers, where the states that enter them are kept, and once back, from the last layer to
the first. Both have one layer in memory. The planner measures on its way back (sensitivity.py). A run that quantizes
takes the gradients of some windows first and keeps them in its folder until it is their layer's turn (`take`, `leaving`):
then they are carried through the linears of that layer, on the states that come from the quantized layers before
(gradients.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..distributed.group import Group
from ..distributed.shares import Share
from ..errors import Apex4Error, Stopped
from ..hardware.dtype_names import wider_than
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..models.states import States, in_memory
from ..progress import Progress
from .gradients import gradients_through
from .run_state import BackgroundWork, RunState, StateKind

# Gradients are taken of so many tokens of the calibration text, in whole windows: more gain nothing (docs/log.md).
GRADIENT_TOKENS = 16384
GRADIENT_DTYPE = torch.bfloat16  # in which they rest: what is made of them is means over tokens


def gradients_of_predictions(
    source: ModelSource,
    runner: LayerRunner,
    samples: torch.Tensor,
    seed: int,
    keep: Callable[[int, States], None],
    advance: Callable[[int], None],
    group: Group | None = None,
    share: Share | None = None,
) -> tuple[torch.Tensor, float]:
    """Token windows int64 [S, L] -> g float32 [S, L, H] on the CPU, by what leaves the last layer, and a factor: g times it
    is the gradient. g has a mean square of 1, since layers may compute in float16, which has no room for small ones.

    `keep` is given the states [S, L, H] that enter each layer, `advance` the layers done. The runner must be prepared for
    L tokens. Raises Apex4Error if a gradient is not finite. Each process of `group` has the windows of its `share`, which may
    be none.
    """
    group, share = group or Group(), share or Share.whole(len(samples))
    embedding = f"{source.family.embedding}.weight"
    hidden = runner.embed(samples, source.read([embedding])[embedding])
    reader = source.layer_reader(runner.reads_ahead_of)
    for layer in range(source.num_layers):
        keep(layer, hidden)
        runner.load_layer(layer, reader.take(layer, layer + 1))
        hidden = runner.run_layer(layer, hidden)
        runner.drop_layer(layer)
        advance(1)
    # Neither matrix is there while the layers run, and the embedding only where it is the head too.
    behind = source.read(source.head_tensors)
    gradients = runner.output_gradients(in_memory(hidden), behind, seed, share.first * samples.shape[1])
    return _normalized(gradients, source.name, runner.dtype, group)


def _normalized(gradients: torch.Tensor, name: str, dtype: torch.dtype, group: Group) -> tuple[torch.Tensor, float]:
    """To a mean square of 1 over all processes, and the factor that was taken out. All-zero ones stay so."""
    factor = float(group.mean(gradients.square().mean(), gradients.numel()).sqrt())
    if not 0 <= factor < float("inf"):
        kind = str(dtype).removeprefix("torch.")
        raise Apex4Error(f"the gradients of {name}'s predictions are not finite in {kind}: {wider_than(dtype)}")
    return gradients.div_(factor or 1.0), factor


class LeavingGradients:
    """Of one run: taken of GRADIENT_TOKENS tokens of `samples` int64 [S, L], evenly spaced windows, and kept in its folder.

    `windows` are those of them that are among this process's, counted from its first; `share`: which of all of them. It may
    be none.
    """

    def __init__(
        self,
        source: ModelSource,
        runner: LayerRunner,
        state: RunState,
        samples: torch.Tensor,
        group: Group | None = None,
    ) -> None:
        self._source, self._runner, self._state, self._group = source, runner, state, group or Group()
        count, here = gradient_windows(*samples.shape), self._group.share(len(samples))
        windows = torch.arange(count) * len(samples) // count
        first, stop = torch.searchsorted(windows, torch.tensor([here.first, here.stop])).tolist()
        self.share = Share(first, stop, count)
        self._reader = source.layer_reader(runner.reads_ahead_of)
        self._samples = samples[windows[self.share.slice]]
        self.windows = windows[self.share.slice] - here.first

    def take(self, first: int, seed: int, progress: Progress, should_stop: Callable[[], bool]) -> None:
        """Have those of layer `first` and all behind it on disk. Raises Stopped or Apex4Error."""
        layers, group, share = self._source.num_layers, self._group, self.share

        def are_there() -> bool:
            if all(self._state.has(StateKind.LEAVING_GRADIENTS, layer, share.total) for layer in range(first, layers)):
                return True
            for layer in range(layers):  # what a run on fewer or more processes left
                self._state.drop(StateKind.ENTERING, layer)
                self._state.drop(StateKind.LEAVING_GRADIENTS, layer)
            return False

        if group.from_first(are_there):
            return

        def go_on() -> None:
            if group.any(should_stop()):
                raise Stopped(
                    "stopped while gradients were taken, which begins again: "
                    f"'apex4 quantize --resume -o {self._state.out}' goes on"
                )

        def save(kind: StateKind, layer: int, states: torch.Tensor) -> None:
            go_on()
            background.start(partial(self._state.save, kind, layer, states, share))

        def keep(layer: int, hidden: States) -> None:
            save(StateKind.ENTERING, layer, in_memory(hidden))

        # States reach the disk while the next layer is worked on.
        with (
            BackgroundWork() as background,
            progress.stage("taking gradients", 2 * layers - first, " layers") as advance,
        ):
            gradients, _ = gradients_of_predictions(
                self._source, self._runner, self._samples, seed, keep, advance, group, share
            )
            for layer in reversed(range(first, layers)):
                save(StateKind.LEAVING_GRADIENTS, layer, gradients.to(GRADIENT_DTYPE))
                if layer > first:
                    gradients = self._through(layer, gradients, layer - 1 if layer - 1 > first else None)
                advance(1)
            background.finish()
        group.barrier()
        for layer in range(layers) if group.is_first else ():
            self._state.drop(StateKind.ENTERING, layer)

    def _through(self, layer: int, gradients: torch.Tensor, then: int | None) -> torch.Tensor:
        runner, source = self._runner, self._source
        runner.load_layer(layer, self._reader.take(layer, then))
        hidden = self._state.load(StateKind.ENTERING, layer, self.share) if self.share.size else gradients
        _, entering = gradients_through(runner, layer, (), hidden, gradients, self._group, self.share)
        runner.drop_layer(layer)
        return _normalized(entering, source.name, runner.dtype, self._group)[0]

    def leaving(self, layer: int) -> torch.Tensor:
        """By what leaves this layer, for its windows, up to a factor: GRADIENT_DTYPE [windows, L, H]. Raises Apex4Error."""
        if not self.share.size:
            shape = 0, self._samples.shape[1], int(self._source.config["hidden_size"])
            return torch.empty(shape, dtype=GRADIENT_DTYPE)
        return self._state.load(StateKind.LEAVING_GRADIENTS, layer, self.share)


def gradient_bytes_on_disk(source: ModelSource, windows: Sequence[int], dtype: torch.dtype) -> int:
    """What they take in a run's folder at most, for windows [S, L]: the states entering every layer, or the gradients."""
    tokens = gradient_windows(windows[0], windows[1]) * windows[1]
    hidden = int(source.config["hidden_size"])
    return (source.num_layers + 1) * tokens * hidden * max(dtype.itemsize, GRADIENT_DTYPE.itemsize)


def gradient_windows(samples: int, length: int) -> int:
    """How many of so many windows of `length` tokens gradients are taken of."""
    return min(samples, max(1, -(-GRADIENT_TOKENS // length)))
