"""What each group size and transform would cost in accuracy, measured in one float pass over the decoder layers.

For a linear y = x W^T, a group size and a transform, in the transformed basis, over probe rows x of the calibration text:

    relative error e = ( E||(Q(x) - x) W^T||^2 + E||x (Q(W) - W)^T||^2 ) / E||x W^T||^2

The second term is tr(dW H dW^T) with H = E[x x^T] over the same rows. Codes are rounded to nearest: weight scales by
the search of weight_quantizer.py, activations at the best of a few clip ratios for all linears of the input.

A learned transform is one that LEARNING_STEPS steps find, on rows of its own: the errors are those of others, so that a
transform which fits its rows too well gains nothing by it. The run learns longer, so that its gain is predicted too small
(by a third on demo), but inputs rank as they do with the whole gain (docs/log.md). Kernels have learned transforms with
groups of 128 only, and so does the choice.

The loss of an input group is the mean of e over its linears, that of a plan the sum over its groups: every input counts
the same. It is a proxy that ranks plans, not a perplexity. Weighing by what a block adds to the residual stream was
tried and ranks worse (docs/log.md): it makes the first layer, which writes most of the stream, look all-important.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .collecting import CollectedGroup, Collector
from .kernels.torch_backend import quantize_activation
from .layer_runner import LayerRunner
from .layouts import get_layout
from .learned_transform import learn_transform
from .number_format import BLOCK, CHANNEL, LEARNED, SHARED, GroupSize, round_up
from .plan import PlannedLinear
from .progress import Progress
from .quant_config import LinearFormat
from .run_state import Streams
from .source import ModelSource
from .transforms import pad_input_features, transform_input, transform_weight
from .weight_quantizer import require_quantizable, round_to_codes, search_scales

LADDER: tuple[GroupSize, ...] = (128, 256, 512, CHANNEL)
ROWS = 1024  # probe rows per input: errors are sums over rows and outputs, and need no more to be ranked
CLIP_RATIOS = (1.0, 0.92, 0.84, 0.76)
LEARNING_STEPS = 25  # of the 400 that the default recipe takes


class Choice(NamedTuple):
    """How the linears of one input are quantized."""

    group_size: GroupSize
    transform: str

    @property
    def label(self) -> str:
        """Short, and unique among the choices of one plan: a learned transform has one group size."""
        return self.transform if self.transform in LEARNED else str(self.group_size)


@dataclass(frozen=True)
class GroupSensitivity:
    """One input group of one layer. `errors`: by choice the relative error of each linear, transforms one after the other,
    finest groups first.

    `losses`: by choice, the group's part of the loss. `outputs` are the N of the linears, `writes`: it holds the
    last residual writer of its layer (down_proj), which the mode `mixed` takes first.
    """

    layer: int
    position: int
    linears: tuple[str, ...]
    outputs: tuple[int, ...]
    in_features: int
    writes: bool
    errors: dict[Choice, tuple[float, ...]]
    losses: dict[Choice, float]


def choices_of(in_features: int, transforms: Sequence[str]) -> list[Choice]:
    """What an input of K features may get, in the order of GroupSensitivity.errors."""
    return [
        Choice(size, transform)
        for transform in transforms
        for size in ((BLOCK,) if transform in LEARNED else ladder_of(in_features))
    ]


def ladder_of(in_features: int) -> tuple[GroupSize, ...]:
    """The group sizes worth considering, finest first: one that covers all of K is the same as "channel".

    512 stays in the ladder of K = 768: it pads, and the cost model charges for that.
    """
    padded = round_up(in_features, BLOCK)
    return tuple(
        size for size in LADDER if size == BLOCK or (padded > BLOCK if size == CHANNEL else int(size) < padded)
    )


def relative_errors(
    rows: torch.Tensor, weights: list[torch.Tensor], format: LinearFormat, matrix: torch.Tensor | None = None
) -> tuple[float, ...]:
    """Predicted relative error energy of each of `weights` [N_i, K] at `format`'s group size; rows [T, K].

    `matrix` [padded K / 128, 128, 128] is the learned transform, where `format` has one.
    """
    x = transform_input(rows, format, matrix)
    bases = [transform_weight(weight, format, matrix) for weight in weights]
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
    transforms: Sequence[str],
    progress: Progress,
) -> list[GroupSensitivity]:
    """One pass of samples int64 [S, L] through the float layers, one layer in memory at a time.

    `planned` says which linears there are, `transforms` under which the errors are predicted. Raises Apex4Error, naming the linear, for weights or
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
                found.append(_measure_group(group, stored, transforms, runner.device, samples.numel()))
                advance(sum(n * found[-1].in_features for n in found[-1].outputs))
            hidden = runner.run_layer(layer, hidden)
            runner.drop_layer(layer)
    return found


def _measure_group(
    group: CollectedGroup,
    stored: dict[str, torch.Tensor],
    transforms: Sequence[str],
    device: torch.device,
    tokens: int,
) -> GroupSensitivity:
    rows, others = split_rows(group.statistics.inputs())
    planned = [linear for part in group.parts for linear in part.planned]
    weights = [stored[f"{linear.name}.weight"].to(device).float() for linear in planned]
    for linear, weight in zip(planned, weights, strict=True):
        require_quantizable(linear.name, weight)
    first = planned[0]
    errors: dict[Choice, tuple[float, ...]] = {}
    for choice in choices_of(first.format.in_features, transforms):
        format = replace(first.format, **choice._asdict(), layout=get_layout("rowmajor"))
        errors[choice] = relative_errors(rows, weights, format, _quickly_learned(others, weights, format))
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
        {choice: share * loss for choice, loss in losses_of(errors).items()},
    )


def split_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, K] of an input -> at most ROWS evenly spaced ones to measure with, and the others, to learn from."""
    stride = max(2, len(rows) // ROWS)
    measured = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    measured[::stride][:ROWS] = True
    return rows[measured], rows[~measured] if len(rows) > 1 else rows


def _quickly_learned(rows: torch.Tensor, weights: list[torch.Tensor], format: LinearFormat) -> torch.Tensor | None:
    if format.transform not in LEARNED:
        return None
    padded = (pad_input_features(weight, format) for weight in weights)
    return learn_transform(pad_input_features(rows, format), padded, LEARNING_STEPS, format.transform == SHARED)


def losses_of(errors: dict[Choice, tuple[float, ...]]) -> dict[Choice, float]:
    """Relative errors of an input group's linears by choice, finest first -> its loss by choice.

    Under one transform a coarser size never counts as better than a finer one: where it measures so, that is the sample's
    noise.
    """
    losses: dict[Choice, float] = {}
    worst: dict[str, float] = {}
    for choice, of_linears in errors.items():
        worst[choice.transform] = max(worst.get(choice.transform, 0.0), sum(of_linears) / len(of_linears))
        losses[choice] = worst[choice.transform]
    return losses
