"""`apex4 plan`: which group size, transform and activation bits every linear gets, from predicted loss (sensitivity.py) and predicted time
(cost_model.py).

There are two transforms to choose from where the recipe has dense128, feedback128 or feedback128x16; another recipe's transform, or that of
--transform, is the only one (settings.py). What is chosen is said by the mode (options.py) and done in choosing.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..distributed.agreement import settings_here, versions_here
from ..distributed.group import Group
from ..errors import UsageError
from ..format.storage import sha256
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..hardware.gpus import Gpu
from ..models.layer_runner import LayerRunner
from ..models.place import require_there
from ..models.source import ModelSource
from ..progress import Progress
from ..quantization.calibration import draw_calibration, require_a_window_each
from ..quantization.plan import plan_of
from ..quantization.plan_file import require_plan_path
from ..quantization.settings import QuantizeSettings
from .choosing import choose, require_bounds
from .cost_model import OURS, Mainloop, get_gpu, get_mainloop, input_group_seconds
from .options import GroupOptions, Mode, Option
from .outcome import QuantizationPlan
from .sensitivity import GroupSensitivity, measure_sensitivity
from .settings import TOKENS, PlanSettings, transforms_of


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
                gpu,
                tokens,
                outputs,
                in_features,
                choice.group_size,
                mainloop,
                choice.transform,
                choice.activation_bits,
            ),
            loss,
        )
        for choice, loss in sensitivity.losses.items()
    )
    return GroupOptions(tuple(options), sensitivity.writes)


def make_plan(
    settings: PlanSettings, out: Path | None = None, progress: Progress | None = None, group: Group | None = None
) -> QuantizationPlan:
    """Measure, choose, and write the plan file if `out` is given. Raises UsageError before the model is loaded.

    All processes of `group` call this with the same arguments and get the same plan, which the first writes.
    """
    progress, group = progress or Progress(), group or Group()
    require_there(settings.model)
    require_bounds(settings.mode, settings.budget, settings.max_loss)
    if settings.tokens < 1:
        raise UsageError(f"--tokens is {settings.tokens}: give a positive number")
    transforms = transforms_of(settings)
    gpu, mainloop = get_gpu(settings.target), get_mainloop(settings.mainloop)
    if out is not None:
        require_plan_path(out)
    source = ModelSource(settings.model)
    names = ("model", "recipe", "target", "calib", "seq_len", "seed", "bos", "device", "dtype")
    # Under a learned transform as many rows would be collected as a run learns from; these are learned for less.
    run = QuantizeSettings(
        **{name: getattr(settings, name) for name in names},
        samples=1 if settings.samples is None else settings.samples,
        transform=TransformKind.HADAMARD,
    ).resolve(source)
    if settings.samples is None:
        run = replace(run, samples=max(group.size, TOKENS // run.seq_len))
    samples = draw_calibration(source, run, settings.seq_len, progress).windows
    require_a_window_each(group, len(samples))
    runner = LayerRunner(source, run.device, DTYPES[run.dtype])
    if group.size > 1:
        with progress.stage("checking weights", source.total_bytes, "B") as advance:
            group.require_equal(_seen_here(settings, source, samples, runner, advance))
    planned, bits = plan_of(source, run).linears, Mode(settings.mode).activation_bits
    groups = measure_sensitivity(source, runner, samples, planned, transforms, bits, run.seed, progress, group)
    options = [group_options(group, gpu, settings.tokens, mainloop) for group in groups]
    chosen = choose(options, settings.mode, settings.budget, settings.max_loss)
    plan = QuantizationPlan(settings, transforms, source, gpu, mainloop, tuple(groups), tuple(options), tuple(chosen))
    if out is not None and group.is_first:
        plan.write(out)
    return plan


def _seen_here(
    settings: PlanSettings,
    source: ModelSource,
    samples: torch.Tensor,
    runner: LayerRunner,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """What must be the same for all processes, by what a user calls it."""
    return {
        **versions_here(runner.device),
        f"weights of {source.name}": hashlib.sha256(json.dumps(source.verify(advance)).encode()).hexdigest(),
        f"config.json of {source.name}": sha256(source.folder / "config.json"),
        f"calibration text {settings.calib!r}": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
        **settings_here(asdict(settings)),
    }
