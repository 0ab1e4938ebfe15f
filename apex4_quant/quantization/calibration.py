"""The calibration text as token windows, and how many of them a run needs."""

from __future__ import annotations

import torch

from ..calib.errors import CalibrationError
from ..calib.probes import PROBE_ROWS
from ..calib.samples import draw_samples
from ..calib.text import load_text
from ..errors import UsageError
from ..models.source import ModelSource
from ..models.tokenizers import load_tokenizer, require_known
from ..progress import Progress
from .plan import Plan
from .settings import ResolvedSettings


def windows_needed(plan: Plan, settings: ResolvedSettings) -> int:
    """How many calibration windows a run uses: all that are asked for, if anything is learned from them.

    Else they only serve to measure the errors in the report, for which as many tokens do as an input's probe keeps.
    """
    if plan.learns_from_text:
        return settings.samples
    return min(settings.samples, -(-PROBE_ROWS // settings.seq_len))


def draw_calibration(
    source: ModelSource, settings: ResolvedSettings, asked_seq_len: int, progress: Progress
) -> torch.Tensor:
    """Token windows int64 [S, L]. `asked_seq_len`: L before it was cut to the model's context, which is reported.

    Raises UsageError for text that is absent or too short, Apex4Error for a tokenizer that is not the model's.
    """
    tokenizer = load_tokenizer(source.folder)
    try:
        text = load_text(settings.calib)
        what = f"calibration text {settings.calib!r}"
        samples = draw_samples(tokenizer.encode, text, settings.samples, settings.seq_len, settings.seed, what)
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    if settings.seq_len < asked_seq_len:
        progress.line(f"calibration windows are {settings.seq_len} tokens, the model's context ({asked_seq_len} asked)")
    if len(samples) < settings.samples:
        progress.line(
            f"calibration text has {len(samples)} windows of {settings.seq_len} tokens ({settings.samples} asked)"
        )
    require_known(int(samples.max()), source.config, source.name)
    return samples
