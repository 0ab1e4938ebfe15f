"""What each group size would cost in accuracy, measured in one float pass over the decoder layers.

For a linear y = x W^T and a group size, in the transformed basis, over probe rows x of the calibration text:

    relative error e = ( E||(Q(x) - x) W^T||^2 + E||x (Q(W) - W)^T||^2 ) / E||x W^T||^2

The second term is tr(dW H dW^T) with H = E[x x^T] over the same rows. Codes are rounded to nearest: weight scales by
the search of weight_quantizer.py, activations at the best of a few clip ratios for all linears of the input.

The loss of an input group is the mean of e over its linears, that of a plan the sum over its groups: every input counts
the same. It is a proxy that ranks plans, not a perplexity. Weighing by what a block adds to the residual stream was
tried and ranks worse (docs/log.md): it makes the first layer, which writes most of the stream, look all-important.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .collecting import CollectedGroup, Collector
from .kernels.torch_backend import quantize_activation
from .layer_runner import LayerRunner
from .layouts import get_layout
from .number_format import BLOCK, CHANNEL, GroupSize, round_up
from .plan import PlannedLinear
from .progress import Progress
from .quant_config import LinearFormat
from .run_state import Streams
from .source import ModelSource
from .transforms import transform_input, transform_weight
from .weight_quantizer import require_quantizable, round_to_codes, search_scales

LADDER: tuple[GroupSize, ...] = (128, 256, 512, CHANNEL)
ROWS = 1024  # probe rows per input: errors are sums over rows and outputs, and need no more to be ranked
CLIP_RATIOS = (1.0, 0.92, 0.84, 0.76)


@dataclass(frozen=True)
class GroupSensitivity:
    """One input group of one layer. `errors`: by group size, finest first, the relative error of each linear.

    `losses`: by group size, the group's part of the loss. `outputs` are the N of the linears, `writes`: it holds the
    last residual writer of its layer (down_proj), which the mode `mixed` takes first.
    """

    layer: int
    position: int
    linears: tuple[str, ...]
    outputs: tuple[int, ...]
    in_features: int
    writes: bool
    errors: dict[GroupSize, tuple[float, ...]]
    losses: dict[GroupSize, float]


def ladder_of(in_features: int) -> tuple[GroupSize, ...]:
    """The group sizes worth considering, finest first: one that covers all of K is the same as "channel".

    512 stays in the ladder of K = 768: it pads, and the cost model charges for that.
    """
    padded = round_up(in_features, BLOCK)
    return tuple(
        size for size in LADDER if size == BLOCK or (padded > BLOCK if size == CHANNEL else int(size) < padded)
    )


def relative_errors(rows: torch.Tensor, weights: list[torch.Tensor], format: LinearFormat) -> tuple[float, ...]:
    """Predicted relative error energy of each of `weights` [N_i, K] at `format`'s group size; rows [T, K]."""
    x = transform_input(rows, format)
    bases = [transform_weight(weight, format) for weight in weights]
    exact = [float((x @ base.t()).square().sum()) for base in bases]
    by_ratio = []
    for ratio in CLIP_RATIOS:
        codes, scale = quantize_activation(x, format.group_length, clip=ratio, hadamard=False)
        difference = (codes * scale[..., None]).flatten(1) - x
        by_ratio.append([float((difference @ base.t()).square().sum()) for base in bases])
    of_input = min(by_ratio, key=sum)
    result = []
    for base, energy, noise in zip(bases, exact, of_input, strict=True):
        scale = search_scales(base, format.group_length)
        rounded = round_to_codes(base.unflatten(1, (-1, format.group_length)), scale).mul_(scale[..., None]).flatten(1)
        noise += float((x @ (rounded - base).t()).square().sum())
        result.append(noise / energy if energy else 0.0)
    return tuple(result)


def measure_sensitivity(
    source: ModelSource,
    runner: LayerRunner,
    samples: torch.Tensor,
    planned: Sequence[PlannedLinear],
    progress: Progress,
) -> list[GroupSensitivity]:
    """One pass of samples int64 [S, L] through the float layers, one layer in memory at a time.

    `planned` says which linears there are and their transform. Raises Apex4Error, naming the linear, for weights or
    inputs that are not finite.
    """
    runner.prepare(samples.shape[1])
    embedding = f"{source.family.embedding}.weight"
    hidden = runner.embed(samples, source.read([embedding])[embedding])
    collector = Collector(runner, source.family, source.config, hessians=False, say=progress.line)
    found = []
    with progress.stage("measuring", sum(linear.elements for linear in planned), "w") as advance:
        for layer in range(source.num_layers):
            of_layer = [linear for linear in planned if linear.layer == layer]
            stored = source.read(source.layer_tensors(layer))
            module = runner.load_layer(layer, stored)
            for group in collector.groups_of(layer, module, of_layer, Streams(hidden)):
                found.append(_measure_group(group, stored, runner.device, samples.numel()))
                advance(sum(n * found[-1].in_features for n in found[-1].outputs))
            hidden = runner.run_layer(layer, hidden)
            runner.drop_layer(layer)
    return found


def _measure_group(
    group: CollectedGroup, stored: dict[str, torch.Tensor], device: torch.device, tokens: int
) -> GroupSensitivity:
    rows = group.statistics.inputs()
    rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    planned = [linear for part in group.parts for linear in part.planned]
    weights = [stored[f"{linear.name}.weight"].to(device).float() for linear in planned]
    for linear, weight in zip(planned, weights, strict=True):
        require_quantizable(linear.name, weight)
    first = planned[0]
    errors: dict[GroupSize, tuple[float, ...]] = {}
    for size in ladder_of(first.format.in_features):
        format = replace(first.format, group_size=size, layout=get_layout("rowmajor"))
        errors[size] = relative_errors(rows, weights, format)
    writes = first.name.endswith("down_proj")
    # An expert's own input weighs as much as the tokens that reach it.
    seen = group.parts[0].tokens if writes else {}
    share = next(iter(seen.values())) / tokens if seen else 1.0
    return GroupSensitivity(
        first.layer,
        first.input_group,
        tuple(linear.name for linear in planned),
        tuple(weight.shape[0] for weight in weights),
        first.format.in_features,
        writes,
        errors,
        {size: share * loss for size, loss in losses_of(errors).items()},
    )


def losses_of(errors: dict[GroupSize, tuple[float, ...]]) -> dict[GroupSize, float]:
    """Relative errors of an input group's linears by group size, finest first -> its loss by group size.

    A coarser size never counts as better than a finer one: where it measures so, that is the sample's noise.
    """
    losses, worst = {}, 0.0
    for size, of_linears in errors.items():
        worst = max(worst, sum(of_linears) / len(of_linears))
        losses[size] = worst
    return losses
