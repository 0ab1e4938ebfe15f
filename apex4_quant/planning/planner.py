"""`apex4 plan`: which group size and transform every linear gets, from predicted loss (sensitivity.py) and time
(cost_model.py).

The unit of choice is the input group: its linears share one activation quantization, hence one group size and transform.

auto    the least loss within --budget, or the least time within --max-loss, from {128, 256, 512, channel} under
        hadamard128, and 128 under dense128, which kernels have with groups of 128 only
g128    the same, from 128 under hadamard128 and 128 under dense128
mixed   the paper's, under hadamard128: sensitive inputs at 128, the others per channel. Sensitive are the inputs of the
        last residual writers (down_proj); with --budget or --max-loss the list of candidates is those, most loss first,
        then all others by loss saved per second, and as many are taken as the bound allows or needs

There are two transforms to choose from where the recipe has dense128; another recipe's transform, or that of --transform,
is the only one. A budget is a multiple of the predicted time of the fastest plan the mode has, a maximal loss a multiple
of the least loss it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..format.number_format import BLOCK
from ..format.storage import write_bytes
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..hardware.gpus import Gpu
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..progress import Progress
from ..quantization.calibration import draw_calibration
from ..quantization.plan import plan_of
from ..quantization.plan_file import plan_file_json, plan_file_text, require_plan_path
from ..quantization.settings import QuantizeSettings
from ..recipes import DEFAULT_RECIPE, get_recipe
from .cost_model import (
    DEFAULT_BUDGET,
    DEFAULT_TOKENS,
    OURS,
    Mainloop,
    fp16_seconds,
    gemm_seconds,
    get_gpu,
    get_mainloop,
    input_group_seconds,
)
from .selection import pareto_front
from .sensitivity import LADDER, Choice, GroupSensitivity, measure_sensitivity

MODES = ("auto", "mixed", "g128")
PLANNED_TRANSFORMS = (
    TransformKind.HADAMARD,
    TransformKind.DENSE,
    TransformKind.NONE,
)  # those whose errors are predicted
TOKENS = 8192  # of calibration text, unless told otherwise: the hidden states entering every layer are kept
_SLACK = 1 + 1e-9  # bounds are met up to rounding


@dataclass(frozen=True)
class Option:
    """One choice for one input group: predicted seconds of its linears, predicted loss."""

    choice: Choice
    seconds: float
    loss: float


@dataclass(frozen=True)
class GroupOptions:
    """What an input group may get, finest first, learned transforms last. `writes`: see GroupSensitivity."""

    options: tuple[Option, ...]
    writes: bool = False

    @property
    def least(self) -> Option:
        """The least loss, and among equals the finest groups and the cheaper transform."""
        return min(self.options, key=lambda option: option.loss)

    def offered(self, mode: str) -> GroupOptions:
        """What `mode` chooses from."""
        if mode == "g128":
            return replace(self, options=tuple(o for o in self.options if o.choice.group_size == BLOCK))
        if mode == "mixed":
            return replace(self, options=tuple(o for o in self.options if not o.choice.transform.is_learned))
        return self


def choose(
    groups: Sequence[GroupOptions], mode: str = "auto", budget: float | None = None, max_loss: float | None = None
) -> list[Option]:
    """One option for every group. Without a bound, auto and g128 have the budget DEFAULT_BUDGET.

    Raises UsageError for an unknown mode, for bounds below 1, or two bounds.
    """
    require_bounds(mode, budget, max_loss)
    groups = [group.offered(mode) for group in groups]
    least = [group.least for group in groups]
    if budget is None and max_loss is None and mode != "mixed":
        budget = DEFAULT_BUDGET
    fastest = sum(min(option.seconds for option in group.options) for group in groups)
    time_bound = math.inf if budget is None else fastest * budget * _SLACK
    loss_bound = math.inf if max_loss is None else sum(option.loss for option in least) * max_loss * _SLACK
    if mode == "mixed":
        return _mixed(groups, time_bound, loss_bound)
    if max_loss is None and sum(option.seconds for option in least) <= time_bound:
        return least
    front = pareto_front([[(option.seconds, option.loss) for option in group.options] for group in groups])
    if max_loss is None:
        best = [selection for selection in front if selection.seconds <= time_bound][-1]
    else:
        best = next(selection for selection in front if selection.loss <= loss_bound)
    return [group.options[pick] for group, pick in zip(groups, best.picks, strict=True)]


def require_bounds(mode: str, budget: float | None, max_loss: float | None) -> None:
    """Raise UsageError for what `choose` cannot do."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is not known: give one of {', '.join(MODES)}")
    for name, value in (("budget", budget), ("max-loss", max_loss)):
        if value is not None and not 1 <= value < math.inf:
            raise UsageError(f"--{name} is {value:g} and counts in multiples of the best there is: give 1 or more")
    if budget is not None and max_loss is not None:
        raise UsageError("--budget and --max-loss bound each other's goal: give one of them")


def transforms_of(settings: PlanSettings) -> tuple[TransformKind, ...]:
    """The transforms that a plan chooses from.

    Raises UsageError for one that no errors are predicted for, one that the mode cannot have, and bounds on nothing.
    """
    recipe, mode = get_recipe(settings.recipe), settings.mode
    transform = settings.transform or recipe.transform
    if transform not in list(PLANNED_TRANSFORMS):
        raise UsageError(
            f"transform {transform!r} has no predicted errors: give --transform {', '.join(PLANNED_TRANSFORMS[:-1])} or {PLANNED_TRANSFORMS[-1]}"
        )
    transform = TransformKind(transform)
    if mode == "mixed":
        if settings.transform is not None and transform.is_learned:
            raise UsageError(
                f"--mode mixed has groups per channel and {transform} needs groups of {BLOCK}: leave --transform away, "
                "or give another mode"
            )
        return (TransformKind.HADAMARD if transform.is_learned else transform,)
    if settings.transform is None and transform is TransformKind.DENSE:
        return (TransformKind.HADAMARD, TransformKind.DENSE)
    if mode == "g128" or transform.is_learned:
        for name, value in (("budget", settings.budget), ("max-loss", settings.max_loss)):
            if value is not None:
                raise UsageError(
                    f"groups of {BLOCK} and the transform {transform} everywhere leave nothing to choose: leave --{name} "
                    "away, or change --mode, --transform or --recipe"
                )
    return (transform,)


def _mixed(groups: Sequence[GroupOptions], time_bound: float, loss_bound: float) -> list[Option]:
    chosen = [group.options[-1] for group in groups]

    def gain(index: int) -> float:
        return groups[index].options[-1].loss - groups[index].options[0].loss

    def gain_per_second(index: int) -> float:
        spent = groups[index].options[0].seconds - groups[index].options[-1].seconds
        return gain(index) / spent if spent > 0 else math.inf

    sensitive = sorted((i for i, group in enumerate(groups) if group.writes), key=gain, reverse=True)
    others = sorted((i for i, group in enumerate(groups) if not group.writes), key=gain_per_second, reverse=True)
    bounded = (time_bound, loss_bound) != (math.inf, math.inf)
    for index in sensitive + (others if bounded else []):
        if loss_bound < math.inf and sum(option.loss for option in chosen) <= loss_bound:
            break
        before, chosen[index] = chosen[index], groups[index].options[0]
        if sum(option.seconds for option in chosen) > time_bound:
            chosen[index] = before
            break
    return chosen


def group_options(sensitivity: GroupSensitivity, gpu: Gpu, tokens: int, mainloop: Mainloop = OURS) -> GroupOptions:
    """The options of an input group with its own shapes, for `tokens` tokens at once."""
    return options_with_times(sensitivity, gpu, tokens, mainloop, sensitivity.outputs, sensitivity.in_features)


def options_with_times(
    sensitivity: GroupSensitivity, gpu: Gpu, tokens: int, mainloop: Mainloop, outputs: Sequence[int], in_features: int
) -> GroupOptions:
    """The same losses with the times of linears [N, K], N in `outputs`, K = `in_features`."""
    options = (
        Option(
            choice,
            input_group_seconds(
                gpu, tokens, outputs, in_features, choice.group_size, mainloop, choice.transform.is_learned
            ),
            loss,
        )
        for choice, loss in sensitivity.losses.items()
    )
    return GroupOptions(tuple(options), sensitivity.writes)


@dataclass(frozen=True)
class PlanSettings:
    """What `apex4 plan` is asked for; `budget` and `max_loss` are multiples, see above."""

    model: str
    recipe: str = DEFAULT_RECIPE
    target: str = "auto"
    mode: str = "auto"
    budget: float | None = None
    max_loss: float | None = None
    tokens: int = DEFAULT_TOKENS
    mainloop: str = OURS.name
    transform: str | None = None
    calib: str = "bundled"
    samples: int | None = None  # None: as many as TOKENS tokens are
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class QuantizationPlan:
    """The outcome: for every input group its measured sensitivity and the option taken of those under `transforms`."""

    settings: PlanSettings
    transforms: tuple[TransformKind, ...]
    source: ModelSource
    gpu: Gpu
    mainloop: Mainloop
    groups: tuple[GroupSensitivity, ...]
    options: tuple[GroupOptions, ...]
    chosen: tuple[Option, ...]

    def predicted(self) -> dict[str, float]:
        """Sums over the model's quantized linears, for one step of `tokens` tokens."""
        seconds = sum(option.seconds for option in self.chosen)
        fastest = sum(min(option.seconds for option in group.options) for group in self.options)
        loss, least = (sum(option.loss for option in side) for side in (self.chosen, [g.least for g in self.options]))
        fp16 = sum(
            fp16_seconds(self.gpu, self.settings.tokens, n, group.in_features)
            for group in self.groups
            for n in group.outputs
        )
        return {
            "microseconds": round(1e6 * seconds, 2),
            "of_fastest": round(seconds / fastest, 4),
            "fp16_microseconds": round(1e6 * fp16, 2),
            "speedup_over_fp16": round(fp16 / seconds, 3),
            "loss": loss,
            "of_least_loss": round(loss / least, 4) if least else 1.0,
        }

    def linears(self) -> list[dict[str, Any]]:
        """One entry per linear: its relative errors, the losses of its whole input, and its time, which includes an equal
        share of transforming and quantizing the input."""
        entries = []
        tokens = self.settings.tokens
        for group, option in zip(self.groups, self.chosen, strict=True):
            gemms = [
                gemm_seconds(self.gpu, tokens, n, group.in_features, option.choice.group_size, self.mainloop)
                for n in group.outputs
            ]
            shared = (option.seconds - sum(gemms)) / len(gemms)
            for index, name in enumerate(group.linears):
                entries.append(
                    {
                        "name": name,
                        "shape": [group.outputs[index], group.in_features],
                        **option.choice._asdict(),
                        "predicted_error": {choice.label: errors[index] for choice, errors in group.errors.items()},
                        "predicted_loss": {choice.label: loss for choice, loss in group.losses.items()},
                        "predicted_microseconds": round(1e6 * (gemms[index] + shared), 3),
                    }
                )
        return entries

    def header(self) -> dict[str, Any]:
        settings = self.settings
        header: dict[str, Any] = {
            "model": self.source.name,
            "architecture": self.source.family.architecture,
            "recipe": settings.recipe,
            "target": self.gpu.name,
            "mode": settings.mode,
            "mainloop": self.mainloop.name,
            "tokens": settings.tokens,
        }
        bounds = {"budget": settings.budget, "max_loss": settings.max_loss}
        return header | {name: value for name, value in bounds.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        return self.header() | {"predicted": self.predicted(), "linears": self.linears()}

    def write(self, path: Path) -> None:
        """YAML or, if the name ends in .json, JSON."""
        entries = {entry["name"]: entry for entry in self.linears()}
        groups = [
            {name: {key: entries[name][key] for key in ("group_size", "transform", "shape")} for name in group.linears}
            for group in self.groups
        ]
        notes = {
            name: "error " + ", ".join(f"{label}: {error:.4f}" for label, error in entry["predicted_error"].items())
            for name, entry in entries.items()
        }
        losses = [
            "loss " + ", ".join(f"{choice.label}: {1000 * loss:.3f}" for choice, loss in group.losses.items())
            for group in self.groups
        ]
        header = self.header() | {"predicted": self.predicted()}
        text = (
            plan_file_json(header, groups) if path.suffix == ".json" else plan_file_text(header, groups, losses, notes)
        )
        write_bytes(path, text.encode())

    def as_text(self) -> str:
        """The table for people."""
        entries = self.linears()
        width = max(len(entry["name"]) for entry in entries)
        exact = [transform for transform in self.transforms if not transform.is_learned]
        labels = [*map(str, LADDER if exact else ()), *(set(self.transforms) - set(exact))]
        lines = [
            f"{self.source.describe()} on {self.gpu.name}, {self.settings.tokens} tokens, mode {self.settings.mode}, "
            f"mainloop {self.mainloop.name}: losses and times are predicted",
            f"  {'linear':{width}}  {'shape':>13}  {'group':>8} "
            + "".join(f"{'@' + label:>10}" for label in labels)
            + f"  {'us':>9}",
        ]
        choices = {
            name: (option.choice, name == group.linears[0])
            for group, option in zip(self.groups, self.chosen, strict=True)
            for name in group.linears
        }
        for entry in entries:
            choice, first = choices[entry["name"]]
            losses = (entry["predicted_loss"].get(label) if first else None for label in labels)
            lines.append(
                f"  {entry['name']:{width}}  {' x '.join(map(str, entry['shape'])):>13}  {choice.label:>8} "
                + "".join(f"{'' if loss is None else f'{1000 * loss:.3f}':>10}" for loss in losses)
                + f"  {entry['predicted_microseconds']:9.2f}"
            )
        lines.append(
            "  @: predicted loss of all linears that read the input, divergence from the original in 1/1000 nat a token"
        )
        if exact:
            lines.append(f"  128, 256, 512, channel: group sizes, transform {exact[0]}")
        if len(exact) < len(self.transforms):
            lines.append(f"  {TransformKind.DENSE}: groups of {BLOCK}, a transform learned for the input")
        total = self.predicted()
        lines.append(
            f"  all linears: {total['microseconds']:.1f} us predicted, {total['of_fastest']:.2f}x the fastest plan, "
            f"{total['speedup_over_fp16']:.2f}x as fast as FP16 ({total['fp16_microseconds']:.1f} us)"
        )
        lines.append(f"  predicted loss {1000 * total['loss']:.3f}, {total['of_least_loss']:.2f}x the least there is")
        return "\n".join(lines)


def make_plan(settings: PlanSettings, out: Path | None = None, progress: Progress | None = None) -> QuantizationPlan:
    """Measure, choose, and write the plan file if `out` is given. Raises UsageError before the model is loaded."""
    progress = progress or Progress()
    require_bounds(settings.mode, settings.budget, settings.max_loss)
    if settings.tokens < 1:
        raise UsageError(f"--tokens is {settings.tokens}: give a positive number")
    transforms = transforms_of(settings)
    gpu, mainloop = get_gpu(settings.target), get_mainloop(settings.mainloop)
    if out is not None:
        require_plan_path(out)
    source = ModelSource(settings.model)
    names = ("model", "recipe", "target", "calib", "seq_len", "seed", "device", "dtype")
    # Under a learned transform as many rows would be collected as a run learns from; these are learned for less.
    run = QuantizeSettings(
        **{name: getattr(settings, name) for name in names},
        samples=1 if settings.samples is None else settings.samples,
        transform=TransformKind.HADAMARD,
    ).resolve(source)
    if settings.samples is None:
        run = replace(run, samples=max(1, TOKENS // run.seq_len))
    samples = draw_calibration(source, run, settings.seq_len, progress)
    runner = LayerRunner(source, run.device, DTYPES[run.dtype])
    groups = measure_sensitivity(source, runner, samples, plan_of(source, run).linears, transforms, run.seed, progress)
    options = [group_options(group, gpu, settings.tokens, mainloop) for group in groups]
    chosen = choose(options, settings.mode, settings.budget, settings.max_loss)
    plan = QuantizationPlan(settings, transforms, source, gpu, mainloop, tuple(groups), tuple(options), tuple(chosen))
    if out is not None:
        plan.write(out)
    return plan
