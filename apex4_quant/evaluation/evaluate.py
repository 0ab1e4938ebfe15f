"""`apex4 eval`: perplexity as the quantization papers compute it, and lm-eval tasks, of a model and its original."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from ..calib.errors import CalibrationError
from ..calib.samples import windows
from ..calib.text import load_text
from ..checkpoint.load import load_model, quant_config_of
from ..errors import UsageError
from ..hardware.devices import DTYPES, resolve_device, resolve_dtype
from ..models.source import read_config, resolve_model
from ..models.tokenizers import load_tokenizer
from ..progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True)
class EvalSettings:
    """`text` is a source of calib.text; `limit` bounds the windows of text and the rows of every task."""

    model: str
    baseline: str | None = None
    text: str = "heldout"
    seq_len: int = 2048
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
    names = [settings.model] + ([settings.baseline] if settings.baseline else [])
    # Everything that can be wrong with the arguments is looked at for both models before either is loaded.
    prepared = [_prepare(name, settings, device, progress) for name in names]
    manager = _task_manager(settings) if settings.tasks else None
    results = []
    for item in prepared:
        model = load_model(item.folder, device, DTYPES[item.dtype])
        with progress.stage(f"perplexity of {item.name}", item.ids.numel(), "tok") as advance:
            perplexity = measure_perplexity(model, item.ids, advance)
        tasks = _run_tasks(model, item.tokenizer, settings, manager) if manager else {}
        results.append({"perplexity": perplexity, "tasks": tasks, "item": item})
        del model
    first, item = results[0], results[0]["item"]
    output = {
        "model": settings.model,
        "format": item.format,
        "perplexity": first["perplexity"],
        "baseline": settings.baseline,
        "baseline_perplexity": results[1]["perplexity"] if settings.baseline else None,
        "tasks": first["tasks"],
        "baseline_tasks": results[1]["tasks"] if settings.baseline else None,
        "text": settings.text,
        "seq_len": item.ids.shape[1],
        "tokens": item.ids.numel(),
        "kv_cache_bits": DTYPES[item.dtype].itemsize * 8,
        "device": device,
        "dtype": item.dtype,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return output


@dataclass(frozen=True)
class _Prepared:
    name: str
    folder: Path
    format: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    ids: torch.Tensor


def _prepare(name: str, settings: EvalSettings, device: str, progress: Progress) -> _Prepared:
    folder = resolve_model(name)
    config = read_config(folder)
    quantized = quant_config_of(config)
    dtype = resolve_dtype(settings.dtype, config)
    tokenizer = load_tokenizer(folder)
    context = config.get("max_position_embeddings") or settings.seq_len
    seq_len = min(settings.seq_len, context)
    if seq_len < settings.seq_len:
        progress.line(f"{name}: windows are {seq_len} tokens, the model's context ({settings.seq_len} asked)")
    try:
        ids = windows(tokenizer.encode(load_text(settings.text)), seq_len, f"evaluation text {settings.text!r}")
    except CalibrationError as error:
        raise UsageError(str(error)) from error
    described = dtype if quantized is None else f"W4A4 g{quantized.group_size}, {quantized.recipe}, {dtype}"
    return _Prepared(name, folder, described, dtype, tokenizer, ids[: settings.limit])


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, ids: torch.Tensor, advance: Any = lambda done: None) -> float:
    """exp of the mean negative log-likelihood of tokens 2..L of every window of ids, int64 [windows, L].

    Windows do not overlap and do not see each other: the protocol of GPTQ and of the papers after it.
    """
    total = torch.zeros((), dtype=torch.float64)
    for window in ids:
        inputs = window[None].to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="sum").double().cpu()
        advance(len(window))
    return math.exp(float(total) / (ids.shape[0] * (ids.shape[1] - 1)))


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """For every window of ids int64 [windows, L]: float32 [L - 1, vocabulary], of the tokens after the first."""
    for window in ids:
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1]
        yield torch.log_softmax(logits.float(), -1)


def measure_divergence(
    model: PreTrainedModel, ids: torch.Tensor, original: Iterable[torch.Tensor]
) -> tuple[float, float]:
    """Mean negative log-likelihood of `model` on ids int64 [windows, L], as in `measure_perplexity`, and the mean
    Kullback-Leibler divergence KL(original || model) of its predictions, both in nats per predicted token.

    `original` are the `log_probabilities` of the model to compare with.
    """
    likelihood = divergence = 0.0
    for window, ours, theirs in zip(ids, log_probabilities(model, ids), original, strict=True):
        likelihood -= float(ours.gather(1, window[1:, None].to(ours.device)).double().sum())
        divergence += float((theirs.exp() * (theirs - ours)).double().sum())
    count = ids.shape[0] * (ids.shape[1] - 1)
    return likelihood / count, divergence / count


def _task_manager(settings: EvalSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("--tasks needs lm-eval: pip install lm-eval") from error
    if settings.include_path and not Path(settings.include_path).is_dir():
        raise UsageError(
            f"--include-path {settings.include_path} is not a folder: give the one that holds the task YAMLs"
        )
    include = [str(TASKS_FOLDER)] + ([settings.include_path] if settings.include_path else [])
    manager = TaskManager(include_path=include, include_defaults=False)
    if any(not manager.match_tasks([task]) for task in settings.tasks):
        manager = TaskManager(include_path=include)  # ten seconds: it reads all of lm-eval's tasks
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"task {unknown[0]!r} is not known to lm-eval: see 'lm-eval ls tasks', or give --include-path")
    return manager


def _run_tasks(model: Any, tokenizer: Any, settings: EvalSettings, manager: Any) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}, metrics without their filter suffix, standard errors as `metric_stderr`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        # lm-eval prints to stdout here and there, and git complains on stderr when it asks for a commit of nothing.
        no_commit = mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None, create=True)
        with contextlib.redirect_stdout(sys.stderr), no_commit:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size)
            results = simple_evaluate(
                model=wrapped, tasks=list(settings.tasks), task_manager=manager, limit=settings.limit, log_samples=False
            )
    except (ConnectionError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"a data set of {', '.join(settings.tasks)} cannot be loaded ({reason})") from error
    tasks: dict[str, dict[str, float]] = {}
    for task, metrics in results["results"].items():
        tasks[task] = {
            key.partition(",")[0]: float(value)
            for key, value in metrics.items()
            if "," in key and isinstance(value, int | float)
        }
    return tasks


def evaluation_as_text(result: dict[str, Any]) -> str:
    """The table for people: one row a model, one column a figure, the difference at the end."""
    columns = [("perplexity", result["perplexity"], result["baseline_perplexity"])]
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                other = (result["baseline_tasks"] or {}).get(task, {}).get(metric)
                columns.append((f"{task} {metric}", value, other))
    names = {"original": result["baseline"], "quantized": result["model"]}
    if result["baseline"] is None:
        names = {"quantized": result["model"]}
    lines = [f"{names['quantized']}: {result['format']}, KV cache {result['kv_cache_bits']} bits, {result['device']}"]
    lines.append(
        f"{result['tokens']} tokens of {result['text']} in windows of {result['seq_len']}, {result['seconds']:.1f} s"
    )
    width = max(len(name) for name, _, _ in columns)
    if result["baseline"] is None:
        lines += [f"  {name:{width}}  {value:10.4f}" for name, value, _ in columns]
    else:
        lines.append(f"  {'':{width}}  {'baseline':>10}  {'model':>10}  {'difference':>21}")
        for name, value, other in columns:
            lines.append(
                f"  {name:{width}}  {other:10.4f}  {value:10.4f}  {value - other:+10.4f} ({100 * (value / other - 1):+.2f} %)"
                if other
                else f"  {name:{width}}  {other:10.4f}  {value:10.4f}  {value - other:+10.4f}"
            )
    return "\n".join(lines)
