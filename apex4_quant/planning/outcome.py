"""What planning comes to: the option of every input group, as a table for people, as JSON, and as a plan file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.number_format import ACTIVATION_BITS, BITS, BLOCK
from ..format.storage import write_bytes
from ..format.transform_kind import TransformKind
from ..hardware.gpus import Gpu
from ..models.source import ModelSource
from ..quantization.plan_file import plan_file_json, plan_file_text
from .choosing import front
from .cost_model import Mainloop, fp16_seconds, gemm_seconds
from .options import LADDER, Choice, GroupOptions, Option
from .sensitivity import GroupSensitivity
from .settings import PlanSettings

PLANNED_KEYS = (
    "group_size",
    "transform",
    "activation_bits",
    "shape",
)  # of a linear in the file; 4 bits go without saying

_MADE_UP_FOR = ", and errors of rounding are made up for by what is rounded after them"
_BESIDE = {
    TransformKind.FEEDBACK: _MADE_UP_FOR,
    TransformKind.FEEDBACK_16: f"{_MADE_UP_FOR}, with sixteen levels",
}


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
                gemm_seconds(
                    self.gpu,
                    tokens,
                    n,
                    group.in_features,
                    option.choice.group_size,
                    self.mainloop,
                    option.choice.activation_bits,
                )
                for n in group.outputs
            ]
            shared = (option.seconds - sum(gemms)) / len(gemms)
            for index, name in enumerate(group.linears):
                entries.append(
                    {
                        "name": name,
                        "shape": [group.outputs[index], group.in_features],
                        "group_size": option.choice.group_size,
                        "transform": option.choice.transform.value,
                        "activation_bits": option.choice.activation_bits,
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
            "mode": str(settings.mode),
            "mainloop": self.mainloop.name,
            "tokens": settings.tokens,
            "bos": str(settings.bos),
        }
        bounds = {"budget": settings.budget, "max_loss": settings.max_loss}
        return header | {name: value for name, value in bounds.items() if value is not None}

    def front(self) -> list[list[float]]:
        """[microseconds, loss] of the plans there are between the fastest and that of least loss, in the units of `predicted`."""
        points = front(self.options, self.settings.mode)
        return [[float(f"{value:.6g}") for value in (1e6 * seconds, loss)] for seconds, loss in points]

    def as_dict(self) -> dict[str, Any]:
        return self.header() | {"predicted": self.predicted(), "front": self.front(), "linears": self.linears()}

    def write(self, path: Path) -> None:
        """YAML or, if the name ends in .json, JSON."""
        entries = {entry["name"]: entry for entry in self.linears()}
        groups = [
            {
                name: {key: entries[name][key] for key in PLANNED_KEYS if entries[name][key] != BITS}
                for name in group.linears
            }
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
        header = self.header() | {"predicted": self.predicted(), "front": self.front()}
        text = (
            plan_file_json(header, groups) if path.suffix == ".json" else plan_file_text(header, groups, losses, notes)
        )
        write_bytes(path, text.encode())

    def as_text(self) -> str:
        """The table for people."""
        entries = self.linears()
        width = max(len(entry["name"]) for entry in entries)
        offered = list(dict.fromkeys(choice for group in self.groups for choice in group.losses))
        columns = [(choice.label, max(9, len(choice.label) + 2)) for choice in sorted(offered, key=_column)]
        lines = [
            f"{self.source.describe()} on {self.gpu.name}, {self.settings.tokens} tokens, mode {self.settings.mode}, "
            f"mainloop {self.mainloop.name}: losses and times are predicted",
            f"  {'linear':{width}}  {'shape':>13}  {'choice':>11} "
            + "".join(f"{'@' + label:>{room}}" for label, room in columns)
            + f"  {'us':>9}",
        ]
        choices = {
            name: (option.choice, name == group.linears[0])
            for group, option in zip(self.groups, self.chosen, strict=True)
            for name in group.linears
        }
        for entry in entries:
            choice, first = choices[entry["name"]]
            losses = ((entry["predicted_loss"].get(label) if first else None, room) for label, room in columns)
            lines.append(
                f"  {entry['name']:{width}}  {' x '.join(map(str, entry['shape'])):>13}  {choice.label:>11} "
                + "".join(f"{'' if loss is None else f'{1000 * loss:.3f}':>{room}}" for loss, room in losses)
                + f"  {entry['predicted_microseconds']:9.2f}"
            )
        lines.append(
            "  @: predicted loss of all linears that read the input, divergence from the original in 1/1000 nat a token"
        )
        exact = [transform for transform in self.transforms if not transform.is_learned]
        if exact:
            lines.append(f"  128, 256, 512, channel: group sizes, transform {exact[0]}")
        lines += [
            f"  {transform}: groups of {BLOCK}, a transform learned for the input{_BESIDE.get(transform, '')}"
            for transform in dict.fromkeys(choice.transform for choice in offered)
            if transform.is_learned
        ]
        if any(choice.activation_bits != BITS for choice in offered):
            lines.append(f"  a8: groups of {BLOCK}, activations in 8 bits with one scale a token")
        total = self.predicted()
        lines += [
            *(f"  {sentence}" for sentence in self.reasons()),
            f"  all linears: {total['microseconds']:.1f} us predicted, {total['of_fastest']:.2f}x the fastest plan, "
            f"{total['speedup_over_fp16']:.2f}x as fast as FP16 ({total['fp16_microseconds']:.1f} us)",
            f"  predicted loss {1000 * total['loss']:.3f}, {total['of_least_loss']:.2f}x the least there is",
        ]
        return "\n".join(lines)

    def reasons(self) -> list[str]:
        """What was decided about the bits of activations on this GPU, and why, in sentences; none where nothing was offered."""
        if all(choice.activation_bits == BITS for group in self.groups for choice in group.losses):
            return []
        eight = [index for index, option in enumerate(self.chosen) if option.choice.activation_bits != BITS]
        pairs = [_best_by_bits(group) for group in self.options]
        seconds = {bits: sum(pair[bits].seconds for pair in pairs) for bits in ACTIVATION_BITS}
        losses = {bits: sum(pair[bits].loss for pair in pairs) for bits in ACTIVATION_BITS}
        more, ratio = seconds[8] / seconds[4], losses[4] / losses[8] if losses[8] else math.inf
        compared = (
            f"everywhere they would take {more:.2f}x the time of 4 bits here and lose {ratio:.1f} times less"
            if ratio >= 1
            else f"everywhere they would take {more:.2f}x the time of 4 bits here and lose more"
        )
        if not eight:
            return [f"{self.gpu.name}: 8-bit activations nowhere; {compared}"]
        if len(eight) == len(self.chosen):
            return [f"{self.gpu.name}: 8-bit activations everywhere: they take {more:.2f}x the time of 4 bits here and "
                    f"lose {ratio:.1f} times less"]  # fmt: skip
        saved = sum(pairs[index][4].loss - self.chosen[index].loss for index in eight) / losses[4]
        spent = sum(self.chosen[index].seconds - pairs[index][4].seconds for index in eight) / seconds[4]
        price = f"for {100 * spent:.0f} % of their time" if spent >= 0 else f"and {-100 * spent:.0f} % of their time"
        return [
            f"{self.gpu.name}: 8-bit activations for {len(eight)} of {len(self.chosen)} inputs, which saves {100 * saved:.0f} % "
            f"of the loss of 4 bits {price}; {compared}"
        ]


def _column(choice: Choice) -> tuple[bool, bool, int]:
    """Where a choice stands in the table: 4 bits first, learned transforms last, finest groups first."""
    return choice.activation_bits != BITS, choice.transform.is_learned, LADDER.index(choice.group_size)


def _best_by_bits(group: GroupOptions) -> dict[int, Option]:
    """Of an input, the option of least loss for each number of bits."""
    return {
        bits: min((o for o in group.options if o.choice.activation_bits == bits), key=lambda option: option.loss)
        for bits in ACTIVATION_BITS
    }
