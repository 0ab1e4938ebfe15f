"""`apex4 plan`: which group size, transform and activation bits every linear gets, from predicted loss (sensitivity.py) and predicted time
(cost_model.py).

There are two transforms to choose from where the recipe has dense128; another recipe's transform, or that of --transform,
is the only one (settings.py). What is chosen is said by the mode (options.py) and done in choosing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..hardware.gpus import Gpu
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..progress import Progress
from ..quantization.calibration import draw_calibration
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
                choice.transform.is_learned,
                choice.activation_bits,
            ),
            loss,
        )
        for choice, loss in sensitivity.losses.items()
    )
    return GroupOptions(tuple(options), sensitivity.writes)


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
    names = ("model", "recipe", "target", "calib", "seq_len", "seed", "bos", "device", "dtype")
    # Under a learned transform as many rows would be collected as a run learns from; these are learned for less.
    run = QuantizeSettings(
        **{name: getattr(settings, name) for name in names},
        samples=1 if settings.samples is None else settings.samples,
        transform=TransformKind.HADAMARD,
    ).resolve(source)
    if settings.samples is None:
        run = replace(run, samples=max(1, TOKENS // run.seq_len))
    samples = draw_calibration(source, run, settings.seq_len, progress).windows
    runner = LayerRunner(source, run.device, DTYPES[run.dtype])
    planned, bits = plan_of(source, run).linears, Mode(settings.mode).activation_bits
    groups = measure_sensitivity(source, runner, samples, planned, transforms, bits, run.seed, progress)
    options = [group_options(group, gpu, settings.tokens, mainloop) for group in groups]
    chosen = choose(options, settings.mode, settings.budget, settings.max_loss)
    plan = QuantizationPlan(settings, transforms, source, gpu, mainloop, tuple(groups), tuple(options), tuple(chosen))
    if out is not None:
        plan.write(out)
    return plan
