"""What an evaluation asks of the program that computes the model: transformers in this process, or vLLM as it serves.

An engine is given models that are known to exist and to fit together, and returns numbers. Which text, which windows, which
table: evaluate.py and throughput.py, the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from ..nn.arithmetic import Arithmetic
    from ..progress import Progress

RUNS, WARM_UP = 5, 2  # of a measurement of speed, whose figures are medians

Results = dict[str, dict[str, float]]  # of tasks: {task: {metric: value}}


class EngineName(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


@dataclass(frozen=True)
class Subject:
    """A model that can be evaluated, before it is loaded. `token_ids` are those of the whole text, `beginning` those that
    every window begins with (BOS, or none), `seq_len` and `context` tokens: of a window, and the model's longest sequence
    (None where its config.json names none)."""

    name: str
    folder: Path
    format: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    token_ids: list[int]
    beginning: list[int]
    seq_len: int
    context: int | None
    vocab_size: int | None


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval that `manager` knows; `limit` bounds the rows of each."""

    names: tuple[str, ...]
    manager: TaskManager
    batch_size: int
    limit: int | None


@dataclass(frozen=True)
class Quality:
    """Of a model and, where there is one, of its baseline. None: not asked for, or (`divergence`) not offered."""

    perplexity: float
    tasks: Results
    arithmetic: Arithmetic
    baseline_perplexity: float | None = None
    baseline_tasks: Results | None = None
    divergence: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Load:
    """`batch` requests of `prompt_len` tokens, each answered by `gen_len`."""

    batch: int
    prompt_len: int
    gen_len: int


class Engine(Protocol):
    """`device` computes, "cpu", "cuda" or "cuda:N"; `version` is the program's, for the reader of a table."""

    device: str
    version: str

    def quality(
        self, subject: Subject, baseline: Subject | None, ids: torch.Tensor, tasks: Tasks | None, progress: Progress
    ) -> Quality:
        """On windows `ids`, int64 [windows, L]. Raises Apex4Error for a model that does not load."""

    def speed(self, folder: Path, dtype: str, load: Load) -> dict[str, Any]:
        """Figures of one model: `figures` of the whole, and of its "prefill" and "decode"; "peak_memory_bytes" or None,
        "cuda_graph", and what `Arithmetic` has."""


def figures(requests: int, tokens: int, seconds: float) -> dict[str, Any]:
    """With the keys of `vllm bench throughput`."""
    return {
        "elapsed_time": seconds,
        "num_requests": requests,
        "total_num_tokens": tokens,
        "requests_per_second": requests / seconds,
        "tokens_per_second": tokens / seconds,
    }


def figures_of(load: Load, prefill: float, decode: float) -> dict[str, Any]:
    """Of the whole and of its parts, which took so many seconds. The first token of an answer is the prefill's."""
    return {
        **figures(load.batch, load.batch * (load.prompt_len + load.gen_len), prefill + decode),
        "prefill": figures(load.batch, load.batch * load.prompt_len, prefill),
        "decode": figures(load.batch, load.batch * (load.gen_len - 1), decode),
    }


def where(result: dict[str, Any]) -> str:
    """What computed a `result` of `apex4 eval`, for people."""
    engine = result.get("engine", EngineName.TRANSFORMERS)
    return (
        result["device"]
        if engine == EngineName.TRANSFORMERS
        else f"{result['device']}, vLLM {result['engine_version']}"
    )
