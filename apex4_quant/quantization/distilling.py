"""Distillation as the last part of a run: from its committed shards to the tensors that take the places of theirs.

    distill             learns; the outcome is kept in the run's folder, in one record, which is the commit
    take_distilled      puts it into the shards, one after the other; may be repeated after a kill at any moment

What is learned, and how, is in distillation/distill.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file

from ..distillation.distill import BYTES_A_PARAMETER, MOST_HELD_OUT, Distillation, Text, windows_of_step
from ..distillation.own_text import write_windows
from ..distillation.student import Distilled, PackedLinear, Student
from ..distributed.group import Group
from ..errors import Apex4Error, Stopped, UsageError
from ..format.storage import format_bytes, sha256, write_tensors
from ..format.transform_kind import TransformKind
from ..hardware.devices import DTYPES
from ..models.source import ModelSource
from ..models.tokenizers import beginning_of, load_tokenizer
from ..progress import Progress
from ..recipes import Recipe
from .calibration import draw_calibration
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


def require_windows(plan: Plan, windows: int) -> None:
    """Raise UsageError for so few calibration windows that none can be held out."""
    if plan.recipe.distill_steps and windows < 2:
        raise UsageError(
            "distillation needs two calibration windows, of which one is held out: give a longer text, or more --samples"
        )


def distilling_bytes(plan: Plan) -> int:
    """Of device memory, and without the activations of a step."""
    return BYTES_A_PARAMETER * sum(linear.elements for linear in plan.linears) if plan.recipe.distill_steps else 0


def windows_read(recipe: Recipe, seq_len: int) -> tuple[int, int]:
    """How many windows of the calibration text a distillation learns on at most, and how many the original writes for it."""
    read = recipe.distill_steps * windows_of_step(seq_len)
    own = -(-recipe.distill_own_tokens // seq_len)
    if not own:
        return read + MOST_HELD_OUT, 0
    return (read + 1) // 2 + MOST_HELD_OUT, max(own, 2)


def distill(
    source: ModelSource,
    plan: Plan,
    settings: ResolvedSettings,
    state: RunState,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> None:
    """Learn, and keep the outcome in `state`. Raises Stopped or UsageError."""
    steps = plan.recipe.distill_steps
    original = _original(source, settings)
    if original.device.type == "cuda":
        progress.line(f"distillation has the whole model on the GPU: about {format_bytes(distilling_bytes(plan))}")
    text = _text(source, plan, settings, original, state, progress, should_stop)
    student = Student(original, _packed(plan, state))
    work = Distillation(original, student, text, steps, settings.seed, state.load_distilling(), progress.line)
    before, started = work.step, time.monotonic()
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
        "tokens_of_text": [windows.numel() for windows in text.sources],
        "divergence_before": result.before,
        "divergence_after": result.after,
    }
    minutes = (time.monotonic() - started) / 60
    billions = sum(linear.elements for linear in plan.linears) / 1e9
    progress.line(
        f"distilled: divergence on held-out windows {1000 * result.before:.2f} -> {1000 * result.after:.2f} / 1000; "
        f"{steps - before} steps in {minutes:.1f} minutes, {minutes / billions:.1f} for a billion quantized weights"
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


def _text(
    source: ModelSource,
    plan: Plan,
    settings: ResolvedSettings,
    original: Any,
    state: RunState,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Text:
    """The calibration text's windows, more of them than calibration takes, and the original's own. Kept: it may be resumed."""
    found = state.load_distilling_text()
    if found is None:
        of_text, own = windows_read(plan.recipe, settings.seq_len)
        asked = replace(settings, samples=of_text)
        found = {"calibration text": draw_calibration(source, asked, settings.seq_len, Progress()).windows}
        if own:
            found["own text"] = _own_text(source, settings, own, original, state, progress, should_stop)
        state.save_distilling_text(found)
    for name, windows in found.items():
        progress.line(f"distillation learns on {windows.numel()} tokens of {_NAMED[name]}")
    return Text.of([found[name] for name in _NAMED if name in found])


_NAMED = {"calibration text": "the calibration text", "own text": "text that the original model writes"}


def _own_text(
    source: ModelSource,
    settings: ResolvedSettings,
    count: int,
    original: Any,
    state: RunState,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> torch.Tensor:
    """`count` windows. Each begins as calibration windows do, and then with a token that is drawn from all but the special ones."""
    tokenizer = load_tokenizer(source.folder)
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    drawn = torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(settings.seed % 2**63))
    beginning = beginning_of(tokenizer, settings.bos)
    with progress.stage("writing text", count * settings.seq_len, " tokens") as advance:
        windows = write_windows(
            original, words[drawn], settings.seq_len, settings.seed, beginning, advance, should_stop
        )
    if windows is None:
        raise Stopped(
            f"stopped while text was written to be distilled on, which begins again: 'apex4 quantize --resume -o {state.out}' "
            "goes on"
        )
    return windows


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
