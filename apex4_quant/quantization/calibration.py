"""The calibration text as token windows, and how many of them a run needs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ..calib.errors import CalibrationError
from ..calib.probes import PROBE_ROWS
from ..calib.samples import draw_samples
from ..calib.text import load_text
from ..distributed.group import Group
from ..errors import UsageError
from ..models.source import ModelSource
from ..models.tokenizers import beginning_of, conversation_renderer, encode_text, load_tokenizer, require_known
from ..progress import Progress
from .plan import Plan
from .settings import ResolvedSettings

FEW_TOKENS = 64  # of a vocabulary: fewer are no language, but one phrase again and again


class Calibration(NamedTuple):
    """Token windows int64 [S, L], and whether each begins with BOS."""

    windows: torch.Tensor
    bos: bool


def windows_needed(plan: Plan, settings: ResolvedSettings) -> int:
    """How many calibration windows a run uses: all that are asked for, if anything is learned from them.

    Else they only serve to measure the errors in the report, for which as many tokens do as an input's probe keeps.
    """
    if plan.learns_from_text:
        return settings.samples
    return min(settings.samples, -(-PROBE_ROWS // settings.seq_len))


def draw_calibration(
    source: ModelSource, settings: ResolvedSettings, asked_seq_len: int, progress: Progress
) -> Calibration:
    """The windows of a run. `asked_seq_len`: their length before it was cut to the model's context, which is reported.

    Raises UsageError for text that is absent or too short, Apex4Error for a tokenizer that is not the model's.
    """
    tokenizer = load_tokenizer(source.folder)
    beginning = beginning_of(tokenizer, settings.bos)
    try:
        text = load_text(settings.calib, conversation_renderer(tokenizer))
        what = f"calibration text {settings.calib!r}"
        encode = partial(encode_text, tokenizer)
        samples = draw_samples(encode, text, settings.samples, settings.seq_len, settings.seed, what, beginning)
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    if settings.seq_len < asked_seq_len:
        progress.line(f"calibration windows are {settings.seq_len} tokens, the model's context ({asked_seq_len} asked)")
    if beginning:
        progress.line(f"calibration windows begin with BOS, token {beginning[0]}")
    if len(samples) < settings.samples:
        progress.line(
            f"calibration text has {len(samples)} windows of {settings.seq_len} tokens ({settings.samples} asked)"
        )
    require_known(int(samples.max()), source.config, source.name)
    different = samples.unique().numel()
    if different < FEW_TOKENS:
        progress.line(
            f"calibration text has {different} different tokens only: what is learned suits no other text, give a varied one"
        )
    return Calibration(samples, bool(beginning))


def require_a_window_each(group: Group, windows: int) -> None:
    """Raise UsageError where the processes of `group` cannot share so many windows."""
    if windows < group.size:
        raise UsageError(
            f"{group.size} ranks have {windows} calibration windows to share: start fewer, or give more --samples"
        )
