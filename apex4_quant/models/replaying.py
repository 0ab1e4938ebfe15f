"""What a pass over the calibration text need not compute again: a decoder layer is run once for every stage of its linears.

Two things are remembered of a layer, batch by batch, in the order in which a pass meets them:

* what a *settled* module returned, all of whose linears have their final form (self_attn, once o_proj is quantized);
* what the last linear of such a module was called with when that was collected, as far as there is room: the pass that
  first finds the module settled then runs this linear alone, in the place of q, k, v and attention.

That a module returns what its last linear does is seen in the first batch, by the identity of the tensors; where it is not
so, or nothing was kept, the module is run as a whole. Results are the same either way.

On a GPU nothing is remembered: it computes faster than what was remembered travels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Inputs of a module's last linear are kept up to this many bytes, or the bytes of all hidden states where those are more.
# The amount is fixed, and not what memory is free, so that the same run takes the same way on every machine.
KEPT_BYTES = 2**28


def _of_use(output: Any) -> Any:
    """What a module returned. Of a tuple only the first is kept: the rest are attention weights."""
    return (output[0], *[None] * (len(output) - 1)) if isinstance(output, tuple) else output


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


class Replaying:
    """Of the decoder layer that is loaded. Without `remembering` every pass runs all of the layer."""

    def __init__(self, remembering: bool) -> None:
        self._remembering = remembering
        self._outputs: dict[str, list[Any]] = {}  # by settled module
        self._linear = ""  # the last linear whose inputs are kept
        self._inputs: list[torch.Tensor] = []
        self._room = 0  # bytes

    def forget(self) -> None:
        """Another layer is loaded, or this one is changed."""
        self._outputs.clear()
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        self._linear, self._inputs, self._room = "", [], 0

    def begin_keeping(self, linear: str, room: int) -> None:
        """From now on `keep` is told what `linear` is called with, of which up to `room` bytes are kept."""
        self._linear, self._inputs = linear, []
        self._room = room if self._remembering else 0

    def keep(self, x: torch.Tensor) -> None:
        self._room -= x.nbytes
        if self._room >= 0:
            self._inputs.append(x)

    @contextlib.contextmanager
    def during(self, layer: nn.Module, settled: tuple[str, ...] | None = None) -> Iterator[None]:
        """For one pass over all batches: settled modules of the layer are run once and remembered.

        None: all that are known, and those that end with the linear whose inputs are kept, which will not be asked for again.
        """
        if not self._remembering:
            yield
            return
        parent = self._linear.rpartition(".")[0] if self._inputs else ""
        forwards = {}
        for name in tuple(self._outputs) if settled is None else settled:
            if name in self._outputs:
                forwards[name] = self._replay(name)
            else:
                forwards[name] = self._record(name, self._forward(layer, name, parent))
        if settled is None and parent and parent not in forwards:
            forwards[parent] = self._forward(layer, parent, parent)
        self._forget_inputs()  # what this pass uses of them, its forwards hold
        modules = {name: layer.get_submodule(name) for name in forwards}
        for name, module in modules.items():
            module.forward = forwards[name]
        try:
            yield
        except BaseException:
            for name in forwards:  # a pass that broke off has not seen everything
                self._outputs.pop(name, None)
            raise
        finally:
            for module in modules.values():
                del module.forward

    def _record(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        outputs = self._outputs[name] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs.append(_of_use(output))
            return output

        return record

    def _replay(self, name: str) -> Callable[..., Any]:
        outputs = iter(self._outputs[name])
        return lambda *args, **kwargs: next(outputs)

    def _forward(self, layer: nn.Module, name: str, parent: str) -> Callable[..., Any]:
        """The module's own forward, or its last linear's, where that is the same and its inputs were kept."""
        whole: Callable[..., Any] = layer.get_submodule(name).forward
        if name != parent:
            return whole
        linear, inputs = layer.get_submodule(self._linear), iter(self._inputs)
        found: list[bool] = []
        others: list[tuple[Any, ...]] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = next(inputs, None)
            if x is None or found == [False]:
                return whole(*args, **kwargs)
            if found:
                return (linear(x), *others[0]) if others else linear(x)
            returned: list[Any] = []
            handle = linear.register_forward_hook(lambda *called: returned.append(called[-1]))
            try:
                output = whole(*args, **kwargs)
            finally:
                handle.remove()
            found.append(len(returned) == 1 and returned[0] is _first(output))
            if isinstance(output, tuple):
                others.append((None,) * (len(output) - 1))
            return output

        return forward
