"""How much an error in an input or an output of a linear matters: what it does to the model's predictions.

With y drawn from the model's own prediction p of the next token and g the gradient of -log p(y) by some tensor, errors e
that are added to the tensor change the predictions, to second order in e, by the divergence

    KL  =  E (g . e)^2 / 2            (E g g^T is the Fisher information)

so E[g g^T] is the metric in which errors of a token's row are to be measured: that of the input, K x K, for the rounding
of activations, whoever reads them; the diagonal of that of an output for the rounding of a weight's rows, whose errors
are independent. This counts what a norm of W does not know: that an error of q or k passes a softmax, one of v a mean
over tokens, one of gate and up the other's factor, and that the last layers decide more than others.

Gradients by what leaves a decoder layer (predictions.py) are carried through it here, window by window. Attention is
computed by plain products: other implementations add gradients up in any order, and a resumed run has to write the same
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..calib.finite import all_finite
from ..calib.probes import InputProbe
from ..distributed.group import Group
from ..distributed.shares import Share
from ..errors import Apex4Error
from ..hardware.dtype_names import wider_than
from ..models.layer_runner import LayerRunner


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
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def gradients_through(
    runner: LayerRunner,
    layer: int,
    readers: Iterable[tuple[str, ...]],
    hidden: torch.Tensor,
    leaving: torch.Tensor,
    group: Group | None = None,
    share: Share | None = None,
    keep_entering: bool = True,
) -> tuple[dict[str, InputGradients], torch.Tensor]:
    """Of every tensor that linears read, by the name of the first of its `readers` (names relative to the layer); and the
    gradients by what enters the layer, float32 [S, L, H] on the CPU.

    hidden [S, L, H] are the states that enter the layer, which must hold float weights, and `leaving` [S, L, H] the
    gradients by what leaves it. A tensor is left away if one of its readers is not called, as experts may be, or a gradient
    is not finite or all zero: then nothing is known of it. Raises Apex4Error if those by what enters are not finite.

    Each process of `group` has the windows of its `share`, which may be none, and gets what is known from all of them; the
    gradients by what enters are those of its own, or none without `keep_entering`.
    """
    readers, group, share = list(readers), group or Group(), share or Share.whole(len(hidden))
    tokens = share.total * hidden.shape[1]
    seen = {names[0]: _Seen(InputProbe(tokens, before=share.first * hidden.shape[1])) for names in readers}
    entering, finite = [], True
    with runner.widened(layer) as module:
        for window, states in enumerate(hidden.split(1) if len(hidden) else ()):
            inputs: dict[str, torch.Tensor] = {}
            outputs: dict[str, torch.Tensor] = {}
            handles = [
                module.get_submodule(name).register_forward_hook(_keeper(name, name == names[0], inputs, outputs))
                for names in readers
                for name in names
            ]
            try:
                batch, result = runner.run_with_graph(layer, states)
            finally:
                for handle in handles:
                    handle.remove()
            result.backward(leaving[window : window + 1].to(result.device, result.dtype))
            assert batch.grad is not None
            finite = finite and all_finite(batch.grad)
            if keep_entering:
                entering.append(batch.grad.float().cpu())
            for first, x in inputs.items():
                if x.grad is not None:
                    seen[first].probe.add(x.grad)
                    seen[first].tokens += x.grad.numel() // x.grad.shape[-1]
            for names in readers:
                for name in names:
                    gradient = outputs[name].grad if name in outputs else None
                    if gradient is not None:
                        squares = gradient.float().flatten(0, -2).square().sum(0)
                        seen[names[0]].squares[name] = seen[names[0]].squares.get(name, 0) + squares
        for names in readers:
            _combine(seen[names[0]], {name: module.get_submodule(name) for name in names}, group, runner)
    found: dict[str, InputGradients] = {}
    for names in readers:
        means = {name: square / tokens for name, square in seen[names[0]].squares.items()}
        if len(means) == len(names) and all(_usable(mean) for mean in means.values()):
            rows = seen[names[0]].rows.float()
            rows /= (len(rows) * (tokens / seen[names[0]].tokens)) ** 0.5
            if _usable(rows):
                found[names[0]] = InputGradients(rows, means)
    if not finite:
        dtype = str(runner.dtype).removeprefix("torch.")
        raise Apex4Error(f"the gradients of decoder layer {layer} are not finite in {dtype}: {wider_than(dtype)}")
    return found, torch.cat(entering) if entering else torch.empty(hidden.shape if keep_entering else 0)


def _combine(seen: _Seen, linears: dict[str, nn.Module], group: Group, runner: LayerRunner) -> None:
    """Let what was `seen` of one tensor be that of all processes."""
    here = seen.tokens
    (seen.tokens,) = group.sum(torch.tensor([here])).tolist()
    calls = group.sum(torch.tensor([name in seen.squares for name in linears], dtype=torch.int32)).tolist()
    for (name, linear), called in zip(linears.items(), calls, strict=True):
        assert isinstance(linear, nn.Linear)
        if called:
            none = torch.zeros(linear.out_features, device=runner.device)
            seen.squares[name] = group.sum(seen.squares.get(name, none))
        width, dtype = linear.in_features, linear.weight.dtype
    none = torch.empty(0, width, device=runner.device, dtype=dtype)
    seen.rows = group.gather_rows(seen.probe.rows() if here else none)


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
    return all_finite(values) and bool((values != 0).any())
