"""How much an error in an input or an output of a linear matters: what it does to the output of its decoder layer.

With r a random sign for every entry of a decoder layer's output and g the gradient of sum(r * output), errors e that are
added to a tensor of the layer change its output by J e, and to first order

    || J e ||^2  =  E_r (g . e)^2        (the signs are independent, so E r r^T = I)

so E[g g^T] is the metric in which errors of a token's row are to be measured: that of the input, K x K, for the rounding
of activations, whoever reads them; the diagonal of that of an output for the rounding of a weight's rows, whose errors
are independent. This counts what a norm of W does not know: that an error of q or k passes a softmax, one of v a mean
over tokens, one of gate and up the other's factor. Signs instead of Gaussians have the least variance (Hutchinson, 1989).

`gradients_through` takes the gradients of the model's predictions instead of random signs, layer after layer from the last
to the first: errors are then measured by what they do to these (sensitivity.py).

One backward pass through the layer, before it is quantized, on some windows of the calibration text as they come from the
quantized layers before. Attention is computed by plain products: other implementations add gradients up in any order, and
a resumed run has to write the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from .calib.probes import InputProbe
from .errors import Apex4Error
from .layer_runner import LayerRunner

TOKENS = 8192  # gradients are taken of so many, in whole windows


@dataclass
class InputGradients:
    """Of a tensor that linears read: `rows` float32 [R, K], E[g g^T] = rows^T rows, and by linear E[g^2], float32 [N].

    Means over all tokens: those that do not reach a linear, of an expert, count as zero.
    """

    rows: torch.Tensor
    outputs: dict[str, torch.Tensor]


@dataclass
class _Seen:
    probe: InputProbe
    tokens: int = 0
    squares: dict[str, torch.Tensor] = field(default_factory=dict)


def input_gradients(
    runner: LayerRunner, layer: int, groups: Iterable[tuple[str, ...]], hidden: torch.Tensor, seed: int
) -> dict[str, InputGradients]:
    """Of every group of linears (names relative to the layer) that read one tensor, by the name of the first.

    hidden [S, L, H] are the states that enter the layer, which must hold float weights. A group is left away if no linear
    of it is called, as experts may be, or a gradient is not finite or all zero: then nothing is known of it.
    """
    windows = min(len(hidden), max(1, -(-TOKENS // hidden.shape[1])))
    chosen = hidden[torch.arange(windows) * len(hidden) // windows]
    generator = torch.Generator().manual_seed(seed)

    def signs(_: int, result: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 2, result.shape, generator=generator).mul_(2).sub_(1)

    return _backward(runner, layer, groups, chosen, signs)[0]


def gradients_through(
    runner: LayerRunner, layer: int, groups: Iterable[tuple[str, ...]], hidden: torch.Tensor, leaving: torch.Tensor
) -> tuple[dict[str, InputGradients], torch.Tensor]:
    """The same for `leaving` float32 [S, L, H], the gradients of something behind the layer with respect to what leaves
    it, instead of random signs; and the gradients with respect to what enters it, float32 [S, L, H] on the CPU.

    All windows are run. Raises Apex4Error if those are not finite.
    """
    found, entering = _backward(runner, layer, groups, hidden, lambda window, _: leaving[window : window + 1])
    if not bool(torch.isfinite(entering).all()):
        dtype = str(runner.dtype).removeprefix("torch.")
        raise Apex4Error(f"the gradients of decoder layer {layer} are not finite in {dtype}: try --dtype float32")
    return found, entering


def _backward(
    runner: LayerRunner,
    layer: int,
    groups: Iterable[tuple[str, ...]],
    hidden: torch.Tensor,
    leaving: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[dict[str, InputGradients], torch.Tensor]:
    """Window by window of hidden [S, L, H], from `leaving(window, output)` backwards."""
    groups = list(groups)
    tokens = hidden.shape[0] * hidden.shape[1]
    seen = {group[0]: _Seen(InputProbe(tokens)) for group in groups}
    entering = []
    with runner.widened(layer) as module:
        for window, states in enumerate(hidden.split(1)):
            inputs: dict[str, torch.Tensor] = {}
            outputs: dict[str, torch.Tensor] = {}
            handles = [
                module.get_submodule(name).register_forward_hook(_keeper(name, name == group[0], inputs, outputs))
                for group in groups
                for name in group
            ]
            try:
                batch, result = runner.run_with_graph(layer, states)
            finally:
                for handle in handles:
                    handle.remove()
            result.backward(leaving(window, result).to(result.device, result.dtype))
            entering.append(batch.grad.float().cpu())
            for first, x in inputs.items():
                if x.grad is not None:
                    seen[first].probe.add(x.grad)
                    seen[first].tokens += x.grad.numel() // x.grad.shape[-1]
            for group in groups:
                for name in group:
                    if name in outputs and outputs[name].grad is not None:
                        squares = outputs[name].grad.float().flatten(0, -2).square().sum(0)
                        seen[group[0]].squares[name] = seen[group[0]].squares.get(name, 0) + squares
    found = {}
    for group in groups:
        squares = {name: square / tokens for name, square in seen[group[0]].squares.items()}
        if len(squares) == len(group) and all(_usable(square) for square in squares.values()):
            rows = seen[group[0]].probe.rows().float()
            rows /= (len(rows) * (tokens / seen[group[0]].tokens)) ** 0.5
            if _usable(rows):
                found[group[0]] = InputGradients(rows, squares)
    return found, torch.cat(entering)


def _keeper(
    name: str, keep_input: bool, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output
        if keep_input:
            args[0].retain_grad()
            inputs[name] = args[0]

    return keep


def _usable(values: torch.Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and bool((values != 0).any())
