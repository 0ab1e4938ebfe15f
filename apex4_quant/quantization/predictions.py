"""Gradients of the model's predictions by what leaves each of its decoder layers, before anything is quantized.

Once forwards through the float layers, where the states that enter them are kept, and once back, from the last layer to
the first. Both have one layer in memory. The planner measures on its way back (sensitivity.py). A run that quantizes
takes the gradients of some windows first and keeps them in its folder until it is their layer's turn (`take`, `leaving`):
then they are carried through the linears of that layer, on the states that come from the quantized layers before
(gradients.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import Apex4Error, Stopped
from ..hardware.dtype_names import wider_than
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..progress import Progress
from .gradients import gradients_through
from .run_state import RunState, StateKind

# Gradients are taken of so many tokens of the calibration text, in whole windows: more gain nothing (docs/log.md).
GRADIENT_TOKENS = 16384
GRADIENT_DTYPE = torch.bfloat16  # in which they rest: what is made of them is means over tokens


def gradients_of_predictions(
    source: ModelSource,
    runner: LayerRunner,
    samples: torch.Tensor,
    seed: int,
    keep: Callable[[int, torch.Tensor], None],
    advance: Callable[[int], None],
) -> tuple[torch.Tensor, float]:
    """Token windows int64 [S, L] -> g float32 [S, L, H] on the CPU, by what leaves the last layer, and a factor: g times it
    is the gradient. g has a mean square of 1, since layers may compute in float16, which has no room for small ones.

    `keep` is given the states [S, L, H] that enter each layer, `advance` the layers done. The runner must be prepared for
    L tokens. Raises Apex4Error if a gradient is not finite.
    """
    embedding, head = f"{source.family.embedding}.weight", f"{source.family.head}.weight"
    hidden = runner.embed(samples, source.read([embedding])[embedding])
    for layer in range(source.num_layers):
        keep(layer, hidden)
        runner.load_layer(layer, source.read(source.layer_tensors(layer)))
        hidden = runner.run_layer(layer, hidden)
        runner.drop_layer(layer)
        advance(1)
    # Neither matrix is there while the layers run, and the embedding only where it is the head too.
    outer = source.read(
        [name for name in source.outer_tensors if name != embedding or head not in source.outer_tensors]
    )
    return _normalized(runner.output_gradients(hidden, outer, seed), source.name, runner.dtype)


def _normalized(gradients: torch.Tensor, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """To a mean square of 1, and the factor that was taken out. All-zero ones stay so."""
    factor = float(gradients.square().mean().sqrt())
    if not 0 <= factor < float("inf"):
        kind = str(dtype).removeprefix("torch.")
        raise Apex4Error(f"the gradients of {name}'s predictions are not finite in {kind}: {wider_than(dtype)}")
    return gradients.div_(factor or 1.0), factor


class LeavingGradients:
    """Of one run: taken of GRADIENT_TOKENS tokens of `samples` int64 [S, L], evenly spaced windows, and kept in its folder."""

    def __init__(self, source: ModelSource, runner: LayerRunner, state: RunState, samples: torch.Tensor) -> None:
        self._source, self._runner, self._state = source, runner, state
        count = gradient_windows(*samples.shape)
        self.windows = torch.arange(count) * len(samples) // count
        self._samples = samples[self.windows]

    def take(self, first: int, seed: int, progress: Progress, should_stop: Callable[[], bool]) -> None:
        """Have those of layer `first` and all behind it on disk. Raises Stopped or Apex4Error."""
        layers = self._source.num_layers
        if all(self._state.has(StateKind.LEAVING_GRADIENTS, layer) for layer in range(first, layers)):
            return

        def go_on() -> None:
            if should_stop():
                raise Stopped(
                    "stopped while gradients were taken, which begins again: "
                    f"'apex4 quantize --resume -o {self._state.out}' goes on"
                )

        def keep(layer: int, hidden: torch.Tensor) -> None:
            go_on()
            self._state.save(StateKind.ENTERING, layer, hidden)

        with progress.stage("taking gradients", 2 * layers - first, " layers") as advance:
            gradients, _ = gradients_of_predictions(self._source, self._runner, self._samples, seed, keep, advance)
            for layer in reversed(range(first, layers)):
                go_on()
                self._state.save(StateKind.LEAVING_GRADIENTS, layer, gradients.to(GRADIENT_DTYPE))
                if layer > first:
                    gradients = self._through(layer, gradients)
                advance(1)
        for layer in range(layers):
            self._state.drop(StateKind.ENTERING, layer)

    def _through(self, layer: int, gradients: torch.Tensor) -> torch.Tensor:
        runner, source = self._runner, self._source
        runner.load_layer(layer, source.read(source.layer_tensors(layer)))
        _, entering = gradients_through(runner, layer, (), self._state.load(StateKind.ENTERING, layer), gradients)
        runner.drop_layer(layer)
        return _normalized(entering, source.name, runner.dtype)[0]

    def leaving(self, layer: int) -> torch.Tensor:
        """By what leaves this layer, for its windows, up to a factor: float32 [windows, L, H]. Raises Apex4Error."""
        return self._state.load(StateKind.LEAVING_GRADIENTS, layer).float()


def gradient_bytes_on_disk(source: ModelSource, windows: Sequence[int], dtype: torch.dtype) -> int:
    """What they take in a run's folder at most, for windows [S, L]: the states entering every layer, or the gradients."""
    tokens = gradient_windows(windows[0], windows[1]) * windows[1]
    hidden = int(source.config["hidden_size"])
    return (source.num_layers + 1) * tokens * hidden * max(dtype.itemsize, GRADIENT_DTYPE.itemsize)


def gradient_windows(samples: int, length: int) -> int:
    """How many of so many windows of `length` tokens gradients are taken of."""
    return min(samples, max(1, -(-GRADIENT_TOKENS // length)))
