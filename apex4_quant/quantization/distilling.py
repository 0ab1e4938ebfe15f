"""Distillation as the last part of a run: from its committed shards to the tensors that take the places of theirs.

    distill             learns; the outcome is kept in the run's folder, in one record, which is the commit
    take_distilled      puts it into the shards, one after the other; may be repeated after a kill at any moment

What is learned, and how, is in distillation/distill.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from ..distillation.distill import BYTES_A_PARAMETER, Distillation
from ..distillation.student import Distilled, PackedLinear, Student
from ..distributed.group import Group
from ..errors import Apex4Error, Stopped, UsageError
from ..format.storage import format_bytes, sha256, write_tensors
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..models.source import ModelSource
from ..progress import Progress
from .plan import Plan
from .run_state import RunState
from .settings import ResolvedSettings


def require_distillable(source: ModelSource, plan: Plan, group: Group | None = None) -> None:
    """Raise UsageError for a recipe that distills and a model, plan or group of processes that it cannot."""
    if plan.recipe.distill_steps and (group or Group()).size > 1:
        raise UsageError(
            f"recipe {plan.recipe.name!r} distills, which one process does: start one, or give --recipe apex4"
        )
    if plan.recipe.distill_steps and source.family.experts is not None:
        raise UsageError(
            f"recipe {plan.recipe.name!r} distills, which models with experts cannot be: give --recipe apex4"
        )
    if plan.recipe.distill_steps and source.family.beside:
        raise UsageError(
            f"recipe {plan.recipe.name!r} distills, which a language model inside {source.family.architecture} cannot be: "
            "give --recipe apex4"
        )


def distilling_bytes(plan: Plan) -> int:
    """Of device memory, and without the activations of a step."""
    return BYTES_A_PARAMETER * sum(linear.elements for linear in plan.linears) if plan.recipe.distill_steps else 0


def distill(
    source: ModelSource,
    plan: Plan,
    settings: ResolvedSettings,
    samples: torch.Tensor,
    state: RunState,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> None:
    """Learn on the windows `samples`, int64 [S, L], and keep the outcome in `state`. Raises Stopped or UsageError."""
    steps = plan.recipe.distill_steps
    if len(samples) < 2:
        raise UsageError("distillation needs two calibration windows, of which one is held out: give a longer text")
    original = _original(source, settings)
    student = Student(original, _packed(plan, state))
    work = Distillation(original, student, samples, steps, settings.seed, state.load_distilling(), progress.line)
    if original.device.type == "cuda":
        progress.line(f"distillation has the whole model on the GPU: about {format_bytes(distilling_bytes(plan))}")
    with progress.stage("distilling", steps, " steps") as advance:
        advance(work.step)
        if not work.run(advance, should_stop, state.save_distilling):
            raise Stopped(
                f"stopped after {work.step} of {steps} steps of distillation, nothing is lost: "
                f"'apex4 quantize --resume -o {state.out}' goes on"
            )
    result = work.result()
    found = {
        "steps": steps,
        "tokens": steps * work.tokens_a_step,
        "divergence_before": result.before,
        "divergence_after": result.after,
    }
    progress.line(
        f"distilled: divergence on held-out calibration windows {1000 * result.before:.2f} -> {1000 * result.after:.2f} / 1000"
    )
    tensors = _tensors(plan, result)
    records = {str(shard): record for shard, record in state.records().items()}
    for record in records.values():
        for linear in record["linears"]:
            linear["activation_clip"] = result.clips[linear["name"]]
    if lost := sorted(set(tensors) - {name for record in records.values() for name in record["tensors"]}):
        raise Apex4Error(f"{lost[0]} was distilled and no shard of {state.out} holds it: nothing was changed")
    state.save_distilled(tensors, {"records": records, "distillation": found})


def take_distilled(state: RunState) -> None:
    """Put the outcome into the shards and commit them again."""
    tensors, outcome = state.load_distilled()
    for number, record in outcome["records"].items():
        if (state.record(int(number)) or {}).get("distilled"):
            continue
        path = state.out / record["file"]
        stored = load_file(path)
        state.withdraw(int(number))  # the shard is about to differ from its record
        write_tensors(path, {name: tensors.get(name, tensor) for name, tensor in stored.items()})
        state.commit(int(number), record | {"bytes": path.stat().st_size, "sha256": sha256(path), "distilled": True})


def _original(source: ModelSource, settings: ResolvedSettings) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Gradients are too small for float16, and products in 16 bits too slow for a CPU.
    dtype = DTYPES[settings.dtype] if settings.dtype != "float16" else torch.bfloat16
    if settings.device == "cpu":
        dtype = torch.float32
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, device_map={"": settings.device}, local_files_only=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def _packed(plan: Plan, state: RunState) -> Iterator[PackedLinear]:
    for record in state.records().values():
        clips = {linear["name"]: linear["activation_clip"] for linear in record["linears"]}
        if not clips:
            continue
        stored = load_file(state.out / record["file"])
        for planned in plan.linears:
            if planned.name not in clips:
                continue
            format = replace(planned.format, activation_clip=clips[planned.name])
            yield PackedLinear(
                planned.name,
                (planned.layer, planned.input_group),
                format,
                format.layout.unpack(stored[f"{planned.name}.weight_packed"], format.out_features),
                format.layout.unpack_scales(stored[f"{planned.name}.weight_scale"], format.out_features),
                stored.get(f"{planned.name}.input_transform"),
            )


def _tensors(plan: Plan, result: Distilled) -> dict[str, torch.Tensor]:
    """By full name, as the checkpoint stores them."""
    tensors: dict[str, torch.Tensor] = {name: tensor.cpu() for name, tensor in result.others.items()}
    for planned in plan.linears:
        name, layout = planned.name, planned.format.layout
        tensors[f"{name}.weight_packed"] = layout.pack(result.codes[name].cpu())
        tensors[f"{name}.weight_scale"] = layout.pack_scales(result.scales[name].cpu())
        matrix = result.matrices.get(name)
        if matrix is not None:
            of_all = planned.format.transform is TransformKind.SHARED
            tensors[f"{name}.input_transform"] = (matrix[:1] if of_all else matrix).cpu()
    return tensors
