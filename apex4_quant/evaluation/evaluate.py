"""`apex4 eval`: perplexity, divergence from the original, and lm-eval tasks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calib.errors import CalibrationError
from ..calib.samples import windows
from ..calib.text import load_text
from ..checkpoint.load import load_model, quant_config_of, release_memory
from ..errors import UsageError
from ..hardware.devices import DTYPES, resolve_device, resolve_dtype
from ..kernels.dispatch import asked_activations
from ..models.source import read_config, resolve_model
from ..models.tokenizers import Bos, beginning_of, conversation_renderer, encode_text, load_tokenizer
from ..nn.arithmetic import arithmetic_of
from ..progress import Progress
from .lm_eval_tasks import ROWS, Results, find_tasks, run_tasks
from .predictions import Comparison, RecordedPredictions, compare, measure_perplexity

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def evaluate(settings: EvalSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Everything `apex4 eval --json` prints. Raises UsageError or Apex4Error."""
    started = time.perf_counter()
    progress = progress or Progress()
    for name, value in (("seq-len", settings.seq_len), ("batch-size", settings.batch_size), ("limit", settings.limit)):
        if value is not None and value < (2 if name == "seq-len" else 1):
            raise UsageError(f"--{name} is {value}: give a larger number")
    device = resolve_device(settings.device)
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
    manager = find_tasks(settings.tasks, settings.include_path) if settings.tasks else None

    original, baseline_tasks = None, None
    if baseline is not None:
        model = load_model(baseline.folder, device, DTYPES[baseline.dtype])
        baseline_tasks = _tasks(model, baseline, settings, manager)
        with progress.stage(f"perplexity of {baseline.name}", ids.numel(), "tok") as advance:
            original = RecordedPredictions(model, ids, advance)
        del model
        release_memory()
    model = load_model(subject.folder, device, DTYPES[subject.dtype])
    comparison: Comparison | None = None
    with progress.stage(f"perplexity of {subject.name}", ids.numel(), "tok") as advance:
        if original is None:
            perplexity = measure_perplexity(model, ids, advance)
        else:
            comparison = compare(model, original, advance)
            perplexity = comparison.perplexity
    return {
        "model": settings.model,
        "format": subject.format,
        "perplexity": perplexity,
        "baseline": settings.baseline,
        "baseline_perplexity": None if original is None else original.perplexity,
        "divergence": None if comparison is None else comparison.divergence,
        "top1_agreement": None if comparison is None else comparison.top1_agreement,
        "tasks": _tasks(model, subject, settings, manager),
        "baseline_tasks": baseline_tasks,
        "text": settings.text,
        "seq_len": ids.shape[1],
        "bos": bool(subject.beginning),
        "tokens": ids.numel(),
        **arithmetic_of(model),
        "kv_cache_bits": DTYPES[subject.dtype].itemsize * 8,
        "device": device,
        "dtype": subject.dtype,
        "seconds": round(time.perf_counter() - started, 2),
    }


@dataclass(frozen=True)
class _Prepared:
    """A model that can be evaluated, before it is loaded. `token_ids` are those of the whole text, `beginning` those that
    every window begins with."""

    name: str
    folder: Path
    format: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    token_ids: list[int]
    beginning: list[int]
    seq_len: int
    vocab_size: int | None


def _prepare(name: str, settings: EvalSettings, progress: Progress) -> _Prepared:
    folder = resolve_model(name)
    config = read_config(folder)
    quantized = quant_config_of(config)
    dtype = resolve_dtype(settings.dtype, config)
    tokenizer = load_tokenizer(folder)
    seq_len = min(settings.seq_len, config.get("max_position_embeddings") or settings.seq_len)
    if seq_len < settings.seq_len:
        progress.line(f"{name}: windows are {seq_len} tokens, the model's context ({settings.seq_len} asked)")
    beginning = beginning_of(tokenizer, settings.bos)
    try:
        token_ids = encode_text(tokenizer, load_text(settings.text, conversation_renderer(tokenizer)))
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    vocabulary = config.get("vocab_size")
    described = dtype if quantized is None else f"{quantized.name} g{quantized.group_size}, {quantized.recipe}, {dtype}"
    return _Prepared(name, folder, described, dtype, tokenizer, token_ids, beginning, seq_len, vocabulary)


def _require_comparable(subject: _Prepared, baseline: _Prepared) -> None:
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


def _tasks(model: PreTrainedModel, prepared: _Prepared, settings: EvalSettings, manager: TaskManager | None) -> Results:
    if manager is None:
        return {}
    return run_tasks(
        model,
        prepared.tokenizer,
        settings.tasks,
        manager,
        settings.batch_size,
        settings.limit,
        bool(prepared.beginning),
    )


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The table for people: one figure a row, one model a column, and the difference."""
    bits = " and ".join(map(str, result["activation_bits"]))
    computed = f", computed with {bits}-bit activations" if bits else ""
    lines = [
        f"{result['model']}: {result['format']}{computed}, KV cache {result['kv_cache_bits']} bits, {result['device']}",
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
    lines += [
        f"  {DIVERGENCE:{width}}  {'':10}  {divergence:10.6f}  {1000 * divergence:10.3f} / 1000",
        f"  {AGREEMENT:{width}}  {'':10}  {100 * result['top1_agreement']:8.2f} %",
    ]
    return "\n".join(lines)
