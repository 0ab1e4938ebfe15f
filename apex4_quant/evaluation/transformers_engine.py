"""The engine that is always there: the model as transformers loads it, in this process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..checkpoint.load import entered_on, load_model, places_of, release_memory
from ..distributed.group import Group
from ..hardware.devices import DTYPES, DeviceMap, resolve_device
from ..nn.arithmetic import arithmetic_of
from ..private_names import compute_on
from ..progress import Progress
from . import generation_speed
from .engine import Load, Quality, Results, Subject, Tasks
from .lm_eval_tasks import run_tasks
from .predictions import RecordedPredictions, compare, measure_perplexity

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel


class TransformersEngine:
    """Divergence is of all probabilities of all tokens: predictions.py. Each process of `group` loads the models and computes
    a share of the windows. With a `device_map` the models are spread as it says, and `device` is, once one is loaded, all its
    places."""

    def __init__(self, device: str, group: Group | None = None, device_map: DeviceMap | None = None) -> None:
        self._group, self._device_map = group or Group(), device_map
        self.device = resolve_device(device)
        self.version = transformers.__version__

    def quality(
        self, subject: Subject, baseline: Subject | None, ids: torch.Tensor, tasks: Tasks | None, progress: Progress
    ) -> Quality:
        original, baseline_tasks, group = None, None, self._group
        ids = ids[group.share(len(ids)).slice]
        if baseline is not None:
            model = self._load(baseline)
            baseline_tasks = _tasks(model, baseline, tasks)
            with progress.stage(f"perplexity of {baseline.name}", ids.numel(), "tok") as advance:
                original = RecordedPredictions(model, ids, advance, group)
            del model
            release_memory()
        model = self._load(subject)
        with progress.stage(f"perplexity of {subject.name}", ids.numel(), "tok") as advance:
            if original is None:
                return Quality(
                    measure_perplexity(model, ids, advance, group), _tasks(model, subject, tasks), arithmetic_of(model)
                )
            found = compare(model, original, advance, group)
        return Quality(
            perplexity=found.perplexity,
            tasks=_tasks(model, subject, tasks),
            arithmetic=arithmetic_of(model),
            baseline_perplexity=original.perplexity,
            baseline_tasks=baseline_tasks,
            divergence=found.divergence,
            top1_agreement=found.top1_agreement,
        )

    def _load(self, subject: Subject) -> PreTrainedModel:
        model = load_model(subject.folder, self.device, DTYPES[subject.dtype], device_map=self._device_map)
        if self._device_map is not None:
            self.device = ", ".join(places_of(model))
        return model

    def speed(self, folder: Path, dtype: str, load: Load) -> dict[str, Any]:
        model = load_model(folder, self.device, DTYPES[dtype], as_it_is=True)
        measured = generation_speed.measure(model, load)
        del model
        release_memory()
        return measured


def _tasks(model: PreTrainedModel, subject: Subject, tasks: Tasks | None) -> Results:
    return {} if tasks is None else run_tasks(partial(_wrapped, model, subject, tasks.batch_size), tasks)


def _wrapped(model: PreTrainedModel, subject: Subject, batch_size: int) -> LM:
    from lm_eval.models.huggingface import HFLM

    bos = bool(subject.beginning)
    harness = HFLM(pretrained=model, tokenizer=subject.tokenizer, batch_size=batch_size, add_bos_token=bos)
    compute_on(harness, entered_on(model))
    return harness
