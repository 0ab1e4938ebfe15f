"""`apex4 eval`: perplexity, divergence from the original, and lm-eval tasks."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

from ..calib.errors import CalibrationError
from ..calib.samples import windows
from ..calib.text import load_text
from ..checkpoint.load import quant_config_of
from ..distributed.group import Group
from ..errors import UsageError
from ..hardware.devices import DTYPES, resolve_dtype
from ..kernels.dispatch import asked_activations
from ..models.place import require_there
from ..models.source import language_settings, read_config, resolve_model
from ..models.tokenizers import Bos, beginning_of, conversation_renderer, encode_text, load_tokenizer, require_known
from ..progress import Progress
from .engine import EngineName, Subject, Tasks, where
from .engines import open_engine
from .lm_eval_tasks import ROWS, find_tasks

# Rows of the table for people.
DIVERGENCE = "KL divergence, nats/token"
AGREEMENT = "same most probable token"


@dataclass(frozen=True)
class EvalSettings:
    """`text` is a source of calib.text; `limit` bounds the windows of text and the rows of every task."""

    model: str
    baseline: str | None = None
    text: str = "heldout"
    seq_len: int = 2048
    bos: str = Bos.AUTO
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    batch_size: int = 8
    limit: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    engine: str = EngineName.TRANSFORMERS
    device_map: str | None = None


def evaluate(settings: EvalSettings, progress: Progress | None = None, group: Group | None = None) -> dict[str, Any]:
    """Everything `apex4 eval --json` prints. Raises UsageError or Apex4Error. All processes of `group` call this alike."""
    started = time.perf_counter()
    progress, group = progress or Progress(), group or Group()
    if settings.tasks and group.size > 1:
        raise UsageError(f"--tasks is for one process and {group.size} ranks were started: start one, or leave it away")
    for name, value in (("seq-len", settings.seq_len), ("batch-size", settings.batch_size), ("limit", settings.limit)):
        if value is not None and value < (2 if name == "seq-len" else 1):
            raise UsageError(f"--{name} is {value}: give a larger number")
    require_there(settings.model, settings.baseline)
    engine = open_engine(settings.engine, settings.device, group, settings.device_map)
    asked_activations()
    # Everything that can be wrong with the arguments is looked at for both models before either is loaded.
    subject = _prepare(settings.model, settings, progress)
    baseline = None if settings.baseline is None else _prepare(settings.baseline, settings, progress)
    if baseline is not None:
        _require_comparable(subject, baseline)
    seq_len = min(each.seq_len for each in (subject, baseline) if each is not None)
    try:
        text = f"evaluation text {settings.text!r}"
        ids = windows(subject.token_ids, seq_len, text, subject.beginning)[: settings.limit]
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    if len(ids) < group.size:
        raise UsageError(f"{group.size} ranks have {len(ids)} windows of text to share: start fewer, or give more text")
    group.require_equal({"text or model": hashlib.sha256(ids.numpy().tobytes() + subject.format.encode()).hexdigest()})
    tasks = None
    if settings.tasks:
        manager = find_tasks(settings.tasks, settings.include_path)
        tasks = Tasks(settings.tasks, manager, settings.batch_size, settings.limit)
    found = engine.quality(subject, baseline, ids, tasks, progress)
    return {
        "model": settings.model,
        "format": subject.format,
        "perplexity": found.perplexity,
        "baseline": settings.baseline,
        "baseline_perplexity": found.baseline_perplexity,
        "divergence": found.divergence,
        "top1_agreement": found.top1_agreement,
        "tasks": found.tasks,
        "baseline_tasks": found.baseline_tasks,
        "text": settings.text,
        "seq_len": ids.shape[1],
        "bos": bool(subject.beginning),
        "tokens": ids.numel(),
        **found.arithmetic,
        "kv_cache_bits": DTYPES[subject.dtype].itemsize * 8,
        "device": engine.device,
        "dtype": subject.dtype,
        "engine": str(settings.engine),
        "engine_version": engine.version,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _prepare(name: str, settings: EvalSettings, progress: Progress) -> Subject:
    folder = resolve_model(name)
    config = read_config(folder)
    quantized, config = quant_config_of(config), language_settings(folder, config)
    dtype = resolve_dtype(settings.dtype, config)
    tokenizer = load_tokenizer(folder)
    seq_len = min(settings.seq_len, config.get("max_position_embeddings") or settings.seq_len)
    if seq_len < 2:
        raise UsageError(f"{name} has a context of {seq_len} token by its config.json, and predicting one takes two")
    if seq_len < settings.seq_len:
        progress.line(f"{name}: windows are {seq_len} tokens, the model's context ({settings.seq_len} asked)")
    beginning = beginning_of(tokenizer, settings.bos)
    try:
        token_ids = encode_text(tokenizer, load_text(settings.text, conversation_renderer(tokenizer)))
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    # Tasks bring texts of their own: there any token of the tokenizer may come.
    require_known(max(tokenizer.get_vocab().values() if settings.tasks else token_ids, default=0), config, name)
    described = dtype if quantized is None else f"{quantized.name} g{quantized.group_size}, {quantized.recipe}, {dtype}"
    context, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
    return Subject(name, folder, described, dtype, tokenizer, token_ids, beginning, seq_len, context, vocabulary)


def _require_comparable(subject: Subject, baseline: Subject) -> None:
    """Raise UsageError where the two models do not predict the same tokens from the same tokens."""
    if (subject.token_ids, subject.beginning) != (baseline.token_ids, baseline.beginning):
        raise UsageError(
            f"the tokenizers of {subject.name} and {baseline.name} cut the text into different tokens, and only "
            "predictions of the same tokens can be compared: give the original of the model as --baseline"
        )
    if subject.vocab_size != baseline.vocab_size:
        raise UsageError(
            f"{subject.name} predicts {subject.vocab_size} tokens and {baseline.name} {baseline.vocab_size}, and only "
            "predictions of the same tokens can be compared: give the original of the model as --baseline"
        )


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The table for people: one figure a row, one model a column, and the difference."""
    bits = " and ".join(map(str, result["activation_bits"]))
    computed = f", computed with {bits}-bit activations" if bits else ""
    lines = [
        f"{result['model']}: {result['format']}{computed}, KV cache {result['kv_cache_bits']} bits, {where(result)}",
        f"{result['tokens']} tokens of {result['text']} in windows of {result['seq_len']}"
        f"{', each behind BOS' if result['bos'] else ''}, {result['seconds']:.1f} s",
    ]
    rows = [("perplexity", result["perplexity"], result["baseline_perplexity"])]
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr") and metric != ROWS:
                other = (result["baseline_tasks"] or {}).get(task, {}).get(metric)
                rows.append((f"{task} {metric}", value, other))
    if result["baseline"] is None:
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(lines + [f"  {name:{width}}  {value:10.4f}" for name, value, _ in rows])
    width = max(len(name) for name in (DIVERGENCE, AGREEMENT, *(name for name, _, _ in rows)))
    lines.append(f"  {'':{width}}  {'baseline':>10}  {'model':>10}  {'difference':>21}")
    for name, value, other in rows:
        line = f"  {name:{width}}  {other:10.4f}  {value:10.4f}  {value - other:+10.4f}"
        lines.append(f"{line} ({100 * (value / other - 1):+.2f} %)" if other else line)
    divergence = result["divergence"]
    if divergence is not None:
        lines.append(f"  {DIVERGENCE:{width}}  {'':10}  {divergence:10.6f}  {1000 * divergence:10.3f} / 1000")
    lines.append(f"  {AGREEMENT:{width}}  {'':10}  {100 * result['top1_agreement']:8.2f} %")
    if divergence is None:
        lines.append(
            f"  {DIVERGENCE} is not measured in vLLM, which gives no whole distributions: --engine transformers"
        )
    return "\n".join(lines)
