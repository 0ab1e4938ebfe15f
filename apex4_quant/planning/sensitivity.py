"""What each group size and transform would cost in accuracy, measured in two passes over the float decoder layers.

The loss is the Kullback-Leibler divergence of the quantized model's predictions from the original's, in nats a token, to
second order in the errors, by gradients g of the predictions (gradients.py). Errors of different inputs, weight rows and
tokens are taken as independent, so those of an input group add up: for linears y_i = x W_i^T that read x,

    KL = 1/2 E w (g_x . (Q(x) - x))^2  +  1/2 sum_i sum_n E w (x . (Q(W_i) - W_i)_n)^2 E (g_i)_n^2

g_x is the gradient by x, g_i that by y_i; means are over all tokens. A token's share w is that of its own gradient,
|g_x|^2 / E |g_x|^2: the first tokens of pretrained models have massive activations, hence large errors, which predictions
hardly see. Everything is in the transformed basis, over probe rows x of the calibration text. Codes are rounded to
nearest: weight scales by the search of nearest.py, activations of 4 bits at the best of a few clip ratios. With
activations of 8 bits W is the folded weight. The loss of a plan is the sum over its input groups. How well it predicts,
and the proxies that do not, are in docs/log.md, 2026-11-25 and 2026-11-29.

A learned transform is one that LEARNING_STEPS steps find, on rows of its own: the errors are those of other rows, so that
a transform which fits its rows too well gains nothing by it. A run learns longer, so its gain is predicted somewhat too
small; which inputs gain most is the same. Kernels have learned transforms with groups of 128 only, and so does the choice.
With error feedback (feedback128, feedback128x16) the same transform is used, and the gradients that errors are weighed by say what makes up
for an error. They are the same gradients: of 2048 tokens the loss comes out 4 % too low, of 512 12 % (demo).

The first pass keeps the hidden states that enter every layer, S L H numbers each, on the CPU. The second goes back from
the last layer to the first, with the gradients of the predictions. Both have one layer in memory.

Several processes share the windows of both passes, and then have the same rows and gradients. Of an input they share the
blocks of a learned transform, the rows of its gradients, and the rows of the weights that read it: the loss is a sum over
those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..calib.probes import PROBE_ROWS
from ..distributed.group import Group
from ..format.feedback import block_clips_of, clip_row, feedback_of
from ..format.layouts import get_layout
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.transform_kind import TransformKind
from ..kernels.folding import fold, fold_codes
from ..kernels.torch_backend import quantize_token, quantize_transformed
from ..models.families import expert_of
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..models.states import in_memory
from ..progress import Progress
from ..quantization.collector import CollectedInput, Collector
from ..quantization.gradients import InputGradients, gradients_through
from ..quantization.plan import PlannedLinear
from ..quantization.predictions import gradients_of_predictions
from ..quantization.run_state import Streams
from ..rounding.activation_clip import BLOCK_CLIP_RATIOS
from ..rounding.nearest import require_quantizable, round_to_codes, search_scales
from ..transforms.block_transforms import pad_input_features, transform_input, transform_weight
from ..transforms.error_feedback import error_feedback
from ..transforms.learned_transform import learn_transform
from .options import Choice, choices_of

ROWS = 1024  # probe rows per input: errors are sums over rows and outputs, and need no more to be ranked
CLIP_RATIOS = (1.0, 0.92, 0.84, 0.76)
LEARNING_STEPS = 25  # of the 200 that the default recipe takes


@dataclass(frozen=True)
class GroupSensitivity:
    """One input group of one layer. `errors`: by choice, transforms one after the other, finest groups first, the relative
    error of each linear.

    `losses`: by choice, the group's part of the loss, in nats a token. `outputs` are the N of the linears, `writes`: it holds the
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


@dataclass
class Metric:
    """What errors of one input's rounding do: `rows` float32 [R, K] with E g g^T = rows^T rows of the gradients by the
    input, and of each linear that reads it E g^2 of those by its outputs, float32 [N_i]. `tokens` float32 [T]: of each of
    the input's rows |g|^2 / E |g|^2, or one for all of them, [1]."""

    rows: torch.Tensor
    outputs: list[torch.Tensor]
    tokens: torch.Tensor = field(default_factory=lambda: torch.ones(1))


class Errors(NamedTuple):
    """`relative`: of each linear, E|dy|^2 / E|y|^2, as if it were alone. `loss`: of the input, in nats a token."""

    relative: tuple[float, ...]
    loss: float


def predict_errors(
    rows: torch.Tensor,
    weights: list[torch.Tensor],
    format: LinearFormat,
    metric: Metric,
    matrix: torch.Tensor | None = None,
    group: Group | None = None,
) -> Errors:
    """What rounding the input rows [T, K] and `weights` [N_i, K] does, at `format`'s group size and transform.

    `matrix` [padded K / 128, 128, 128] is the learned transform, where `format` has one, with error feedback [padded K / 128,
    184, 128], with clip ratios of blocks [padded K / 128, 185, 128]. All processes of `group` have the same arguments, and get the same errors.
    """
    group = group or Group()
    x = transform_input(rows, format, matrix)
    # Like a weight: g . e = (g T^-T) . (e T).
    gradients = transform_weight(metric.rows[group.share(len(metric.rows)).slice], format, matrix)
    feedback = None if matrix is None else feedback_of(matrix.float())
    clips = None if matrix is None else block_clips_of(matrix.float())
    errors = [rounded - x for rounded in _rounded_inputs(x, format, feedback, clips)]
    shares = metric.tokens.sqrt()[:, None]
    energies = group.sum_of_numbers([float((shares * (error @ gradients.t())).square().sum()) for error in errors])
    best = energies.index(min(energies))
    figures = [
        figure
        for weight, importance in zip(weights, metric.outputs, strict=True)
        for figure in _of_weight(weight, importance, metric.tokens, x, errors[best], format, matrix, group)
    ]
    figures = group.sum_of_numbers(figures)
    losses, noises, of_outputs = figures[::3], figures[1::3], figures[2::3]
    relative = [noise / energy if energy else 0.0 for noise, energy in zip(noises, of_outputs, strict=True)]
    return Errors(tuple(relative), sum(losses, energies[best]) / (2 * len(x)))


def _of_weight(
    weight: torch.Tensor,
    importance: torch.Tensor,
    tokens: torch.Tensor,
    x: torch.Tensor,
    difference: torch.Tensor,
    format: LinearFormat,
    matrix: torch.Tensor | None,
    group: Group,
) -> tuple[float, float, float]:
    """Of this process's rows of a weight [N, K], sums over them: what their rounding loses by their `importance` and that of
    the `tokens`, how far their outputs are off with an input off by `difference`, and what their outputs are, squared."""
    share = group.share(len(weight))
    if not share.size:
        return 0.0, 0.0, 0.0
    base = transform_weight(weight[share.slice], format, matrix)
    importance = importance if len(importance) == 1 else importance[share.slice]
    of_weight = (x @ (_rounded_weight(base, format) - base).t()).square()
    noise = float((difference @ base.t()).square().sum() + of_weight.sum())
    return float((tokens[:, None] * of_weight * importance).sum()), noise, float((x @ base.t()).square().sum())


def _rounded_inputs(
    x: torch.Tensor, format: LinearFormat, feedback: torch.Tensor | None, clips: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """What the codes of transformed rows x [T, padded K] stand for, for every clip ratio that a run may choose, or for those of blocks,
    `clips`, which are multiplied by each."""
    if format.activation_bits != BITS:
        codes, scale = quantize_token(x, hadamard=False)
        yield (codes * scale[..., None]).flatten(1)
        return
    for ratio in CLIP_RATIOS:
        if clips is None:
            codes, scale = quantize_transformed(x, format.group_length, ratio, feedback)
        else:
            codes, scale = quantize_transformed(x, BLOCK, feedback=feedback, clips=clips * ratio)
        yield (codes * scale[..., None]).flatten(1)


def _rounded_weight(base: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """What the codes of a transformed weight [N, padded K] stand for in the products."""
    scale = search_scales(base, format.group_length)
    codes = round_to_codes(base.unflatten(1, (-1, format.group_length)), scale)
    if format.activation_bits == BITS:
        return codes.mul_(scale[..., None]).flatten(1)
    ratio, unit = fold(scale)
    return fold_codes(codes.flatten(1).to(torch.int8), ratio) * unit[:, None]


def measure_sensitivity(
    source: ModelSource,
    runner: LayerRunner,
    samples: torch.Tensor,
    planned: Sequence[PlannedLinear],
    transforms: Sequence[TransformKind],
    activation_bits: Sequence[int],
    seed: int,
    progress: Progress,
    group: Group | None = None,
) -> list[GroupSensitivity]:
    """Both passes of samples int64 [S, L]. `planned` says which linears there are, `transforms` and `activation_bits` what
    they may have. All processes of `group` have the same arguments, share the work, and get the same.

    Raises Apex4Error, naming linear or layer, for weights, inputs or gradients that are not finite.
    """
    group = group or Group()
    share = group.share(len(samples))
    runner.prepare(samples.shape[1])
    entering: list[torch.Tensor] = []
    with progress.stage("running", source.num_layers, " layers") as advance:
        gradients, size = gradients_of_predictions(
            source,
            runner,
            samples[share.slice],
            seed,
            lambda _, states: entering.append(in_memory(states)),
            advance,
            group,
            share,
        )
    collector = Collector(runner, source.family, source.config, hessians=False, say=progress.line, group=group)
    found: list[GroupSensitivity] = []
    with progress.stage("measuring", sum(linear.elements for linear in planned), "w") as advance:
        for layer in reversed(range(source.num_layers)):
            hidden = entering.pop()
            prefix = source.family.layer_prefix(layer)
            of_layer = [linear for linear in planned if linear.layer == layer]
            stored = source.read(source.layer_tensors(layer))
            module = runner.load_layer(layer, stored)
            readers = [tuple(name.removeprefix(prefix) for name in names) for names in _readers(of_layer).values()]
            known, gradients = gradients_through(runner, layer, readers, hidden, gradients, group, share)
            measured = []
            for collected in collector.inputs_of(layer, module, of_layer, Streams(hidden, share=share)):
                linears = [linear for part in collected.parts for linear in part.planned]
                metric = _metric(linears, {prefix + name: gradient for name, gradient in known.items()}, prefix, size)
                choices = choices_of(linears[0].format.in_features, transforms, activation_bits)
                measured.append(_measure_group(collected, linears, metric, stored, choices, group, runner.device))
                advance(sum(n * measured[-1].in_features for n in measured[-1].outputs))
            found = measured + found
            runner.drop_layer(layer)
    return found


def _readers(linears: Sequence[PlannedLinear]) -> dict[tuple[int, int | None], tuple[str, ...]]:
    """Names of the linears that are called with the same rows, by input group and expert."""
    readers: dict[tuple[int, int | None], tuple[str, ...]] = {}
    for linear in linears:
        key = linear.input_group, expert_of(linear.name)
        readers[key] = (*readers.get(key, ()), linear.name)
    return readers


def _metric(linears: Sequence[PlannedLinear], known: dict[str, InputGradients], prefix: str, size: float) -> Metric:
    """Of one input group. Readers whose gradients are all zero, such as experts that no token reached, do not matter.

    Gradients by an input are kept of the same tokens as the input itself, but not by those of experts."""
    rows, outputs = [], {}
    for names in _readers(linears).values():
        if names[0] in known:
            rows.append(size * known[names[0]].rows)
            outputs.update({name: size**2 * known[names[0]].outputs[name.removeprefix(prefix)] for name in names})
    every = torch.cat(rows) if rows else torch.zeros(1, linears[0].format.in_features)
    step = -(-len(every) // PROBE_ROWS)  # experts have rows of their own, each: evenly spaced ones stand for all
    zero = torch.zeros(1, device=every.device)
    tokens = every.square().sum(1) if len(rows) == 1 and expert_of(linears[0].name) is None else torch.ones(1)
    return Metric(
        every[::step] * step**0.5, [outputs.get(linear.name, zero) for linear in linears], tokens / tokens.mean()
    )


def _measure_group(
    collected: CollectedInput,
    linears: Sequence[PlannedLinear],
    metric: Metric,
    stored: dict[str, torch.Tensor],
    choices: Sequence[Choice],
    group: Group,
    device: torch.device,
) -> GroupSensitivity:
    inputs = collected.statistics.inputs()
    measured = rows_to_measure(len(inputs)).to(inputs.device)
    rows, others = inputs[measured], inputs[~measured] if len(inputs) > 1 else inputs
    weights = [stored[f"{linear.name}.weight"].to(device).float() for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        require_quantizable(linear.name, weight)
    tokens = metric.tokens.to(device)
    metric = Metric(
        _fewer(metric.rows.to(device)),
        [importance.to(device) for importance in metric.outputs],
        tokens if len(tokens) == 1 else tokens[measured.to(device)],
    )
    first = linears[0]
    errors: dict[Choice, Errors] = {}
    learned: torch.Tensor | None = None  # one for all choices: with 8 bits it is that of 4
    for choice in choices:
        format = replace(first.format, **choice._asdict(), layout=get_layout("rowmajor"))
        matrix = None
        if choice.transform.is_learned:
            if learned is None:
                learned = _quickly_learned(others, weights, format, metric, group)
            matrix = _with_feedback(learned, format, metric, group) if choice.transform.has_feedback else learned
        errors[choice] = predict_errors(rows, weights, format, metric, matrix, group)
    return GroupSensitivity(
        first.layer,
        first.input_group,
        tuple(linear.name for linear in linears),
        tuple(weight.shape[0] for weight in weights),
        first.format.in_features,
        first.name.endswith("down_proj"),
        {choice: error.relative for choice, error in errors.items()},
        losses_of({choice: error.loss for choice, error in errors.items()}),
    )


def _fewer(rows: torch.Tensor) -> torch.Tensor:
    """[R, K] -> K rows with the same rows^T rows, where R is far above K."""
    if rows.shape[0] <= 2 * rows.shape[1]:
        return rows
    values, vectors = torch.linalg.eigh(rows.t() @ rows)
    fewer: torch.Tensor = vectors.t() * values.clamp_min(0).sqrt()[:, None]
    return fewer


def rows_to_measure(count: int) -> torch.Tensor:
    """Which of so many rows of an input to measure with, at most ROWS: bool [count]. The others are learned from.

    They are drawn, the same in every run: of every eighth row the first tokens of all windows would be, or none.
    """
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: max(1, min(ROWS, count // 2))]
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, drawn, True)


def _quickly_learned(
    rows: torch.Tensor, weights: list[torch.Tensor], format: LinearFormat, metric: Metric, group: Group
) -> torch.Tensor:
    """T [padded K / 128, 128, 128], one for each block."""
    weighed = (
        pad_input_features(weight, format) * importance.sqrt()[:, None]
        for weight, importance in zip(weights, metric.outputs, strict=True)
    )
    padded, gradients = (pad_input_features(matrix, format) for matrix in (rows, metric.rows))
    return learn_transform(padded, weighed, LEARNING_STEPS, gradients=gradients, group=group)


def _with_feedback(learned: torch.Tensor, format: LinearFormat, metric: Metric, group: Group) -> torch.Tensor:
    """[padded K / 128, 184, 128]: the learned T, and the feedback that errors weighed by `metric` ask for; [padded K / 128, 185, 128]
    with the largest clip ratios that a run tries, where `format` has those of blocks."""
    gradients = transform_weight(metric.rows, format, learned)
    matrix = torch.cat((learned, error_feedback([gradients], format.padded_k, group)), 1)
    if not format.transform.has_block_clips:
        return matrix
    clips = torch.full((len(matrix),), max(BLOCK_CLIP_RATIOS), device=matrix.device, dtype=matrix.dtype)
    return torch.cat((matrix, clip_row(clips)), 1)


def losses_of(losses: dict[Choice, float]) -> dict[Choice, float]:
    """Measured losses by choice, finest groups first -> those to choose by.

    Under one transform, with as many bits, a coarser size never counts as better than a finer one: where it measures so, that is the sample's
    noise.
    """
    worst: dict[tuple[TransformKind, int], float] = {}
    kept: dict[Choice, float] = {}
    for choice, loss in losses.items():
        kind = choice.transform, choice.activation_bits
        kept[choice] = worst[kind] = max(worst.get(kind, 0.0), loss)
    return kept
