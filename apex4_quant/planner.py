"""`apex4 plan`: which group size every linear gets, from predicted loss (sensitivity.py) and time (cost_model.py).

The unit of choice is the input group: its linears share one activation quantization, hence one group size.

g128    128 everywhere
mixed   the paper's: sensitive inputs at 128, the others per channel. Sensitive are the inputs of the last residual
        writers (down_proj); with --budget or --max-loss the list of candidates is those, most loss first, then all
        others by loss saved per second, and as many are taken as the bound allows or needs
auto    the least loss within --budget, or the least time within --max-loss, from {128, 256, 512, channel}

A budget is a multiple of the fastest plan's predicted time, a maximal loss a multiple of the loss of 128 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from .devices import DTYPES
from .errors import UsageError
from .gpus import Gpu
from .knapsack import pareto_front
from .layer_runner import LayerRunner
from .number_format import LEARNED, GroupSize
from .pipeline import QuantizeSettings, draw_calibration, plan_of
from .plan_file import plan_file_json, plan_file_text, require_plan_path
from .progress import Progress
from .sensitivity import LADDER, GroupSensitivity, measure_sensitivity
from .source import ModelSource
from .storage import write_bytes

MODES = ("auto", "mixed", "g128")
_SLACK = 1 + 1e-9  # bounds are met up to rounding


@dataclass(frozen=True)
class Option:
    """One group size for one input group: predicted seconds of its linears, predicted loss."""

    group_size: GroupSize
    seconds: float
    loss: float


@dataclass(frozen=True)
class GroupOptions:
    """What an input group may get, finest first. `writes`: see GroupSensitivity."""

    options: tuple[Option, ...]
    writes: bool = False


def choose(
    groups: Sequence[GroupOptions], mode: str = "auto", budget: float | None = None, max_loss: float | None = None
) -> list[Option]:
    """One option for every group. Without a bound, auto has the budget DEFAULT_BUDGET.

    Raises UsageError for an unknown mode, for bounds below 1, two bounds, or a bound on g128.
    """
    require_bounds(mode, budget, max_loss)
    finest = [group.options[0] for group in groups]
    if mode == "g128":
        return finest
    if budget is None and max_loss is None and mode == "auto":
        budget = DEFAULT_BUDGET
    fastest = sum(min(option.seconds for option in group.options) for group in groups)
    time_bound = math.inf if budget is None else fastest * budget * _SLACK
    loss_bound = math.inf if max_loss is None else sum(option.loss for option in finest) * max_loss * _SLACK
    if mode == "mixed":
        return _mixed(groups, time_bound, loss_bound)
    if max_loss is None and sum(option.seconds for option in finest) <= time_bound:
        return finest
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
        if value is not None and mode == "g128":
            raise UsageError(f"--mode g128 leaves nothing to choose: leave --{name} away, or give --mode auto")
    if budget is not None and max_loss is not None:
        raise UsageError("--budget and --max-loss bound each other's goal: give one of them")


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
    options = tuple(
        Option(
            size,
            input_group_seconds(gpu, tokens, sensitivity.outputs, sensitivity.in_features, size, mainloop),
            sensitivity.losses[size],
        )
        for size in sensitivity.losses
    )
    return GroupOptions(options, sensitivity.writes)


@dataclass(frozen=True)
class PlanSettings:
    """What `apex4 plan` is asked for; `budget` and `max_loss` are multiples, see above."""

    model: str
    target: str = "auto"
    mode: str = "auto"
    budget: float | None = None
    max_loss: float | None = None
    tokens: int = DEFAULT_TOKENS
    mainloop: str = OURS.name
    transform: str | None = None
    calib: str = "bundled"
    samples: int = 16
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class GranularityPlan:
    """The outcome: for every input group its measured sensitivity and the option taken."""

    settings: PlanSettings
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
        loss, least = (
            sum(option.loss for option in side) for side in (self.chosen, [g.options[0] for g in self.options])
        )
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
        """One entry per linear; its time includes an equal share of quantizing the input."""
        entries = []
        tokens = self.settings.tokens
        for group, option in zip(self.groups, self.chosen, strict=True):
            gemms = [
                gemm_seconds(self.gpu, tokens, n, group.in_features, option.group_size, self.mainloop)
                for n in group.outputs
            ]
            shared = (option.seconds - sum(gemms)) / len(gemms)
            for index, name in enumerate(group.linears):
                entries.append(
                    {
                        "name": name,
                        "shape": [group.outputs[index], group.in_features],
                        "group_size": option.group_size,
                        "predicted_error": {str(size): errors[index] for size, errors in group.errors.items()},
                        "predicted_microseconds": round(1e6 * (gemms[index] + shared), 3),
                    }
                )
        return entries

    def header(self) -> dict[str, Any]:
        settings = self.settings
        header: dict[str, Any] = {
            "model": self.source.name,
            "architecture": self.source.family.architecture,
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
            {name: {key: entries[name][key] for key in ("group_size", "shape")} for name in group.linears}
            for group in self.groups
        ]
        notes = {
            name: "predicted error "
            + ", ".join(f"{size}: {error:.4f}" for size, error in entry["predicted_error"].items())
            for name, entry in entries.items()
        }
        header = self.header() | {"predicted": self.predicted()}
        text = plan_file_json(header, groups) if path.suffix == ".json" else plan_file_text(header, groups, notes)
        write_bytes(path, text.encode())

    def as_text(self) -> str:
        """The table for people."""
        entries = self.linears()
        width = max(len(entry["name"]) for entry in entries)
        sizes = [str(size) for size in LADDER]
        lines = [
            f"{self.source.describe()} on {self.gpu.name}, {self.settings.tokens} tokens, mode {self.settings.mode}, "
            f"mainloop {self.mainloop.name}: errors and times are predicted",
            f"  {'linear':{width}}  {'shape':>15}  {'group':>7}  "
            + "".join(f"{' err@' + size:>12}" for size in sizes)
            + f"  {'us':>9}",
        ]
        for entry in entries:
            errors = (entry["predicted_error"].get(size) for size in sizes)
            lines.append(
                f"  {entry['name']:{width}}  {' x '.join(map(str, entry['shape'])):>15}  {entry['group_size']:>7}  "
                + "".join(f"{'-' if error is None else f'{error:.5f}':>12}" for error in errors)
                + f"  {entry['predicted_microseconds']:9.2f}"
            )
        total = self.predicted()
        lines.append(
            f"  all linears: {total['microseconds']:.1f} us predicted, {total['of_fastest']:.2f}x the fastest plan, "
            f"{total['speedup_over_fp16']:.2f}x as fast as FP16 ({total['fp16_microseconds']:.1f} us)"
        )
        lines.append(f"  predicted loss {total['loss']:.5f}, {total['of_least_loss']:.2f}x that of 128 everywhere")
        return "\n".join(lines)


def make_plan(settings: PlanSettings, out: Path | None = None, progress: Progress | None = None) -> GranularityPlan:
    """Measure, choose, and write the plan file if `out` is given. Raises UsageError before the model is loaded."""
    progress = progress or Progress()
    require_bounds(settings.mode, settings.budget, settings.max_loss)
    if settings.tokens < 1:
        raise UsageError(f"--tokens is {settings.tokens}: give a positive number")
    gpu, mainloop = get_gpu(settings.target), get_mainloop(settings.mainloop)
    if out is not None:
        require_plan_path(out)
    source = ModelSource(settings.model)
    names = ("model", "target", "transform", "calib", "samples", "seq_len", "seed", "device", "dtype")
    run = QuantizeSettings(**{name: getattr(settings, name) for name in names}).resolve(source)
    if (
        run.transform in LEARNED
    ):  # learnt for one group size; sizes are compared, more cheaply, under the Hadamard matrix
        run = replace(run, transform="hadamard128")
    samples = draw_calibration(source, run, settings.seq_len, progress)
    runner = LayerRunner(source, run.device, DTYPES[run.dtype])
    groups = measure_sensitivity(source, runner, samples, plan_of(source, run).linears, progress)
    options = [group_options(group, gpu, settings.tokens, mainloop) for group in groups]
    chosen = choose(options, settings.mode, settings.budget, settings.max_loss)
    plan = GranularityPlan(settings, source, gpu, mainloop, tuple(groups), tuple(options), tuple(chosen))
    if out is not None:
        plan.write(out)
    return plan
