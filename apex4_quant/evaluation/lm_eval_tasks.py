"""Tasks of lm-eval on a loaded model: those bundled in tasks/, lm-eval's own, and a user's (--include-path)."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..private_names import without_git_commit

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS_FOLDER = Path(__file__).resolve().parent / "tasks"
Results = dict[str, dict[str, float]]  # {task: {metric: value}}
ROWS = "rows"


def find_tasks(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """The task manager that knows `tasks`. Raises UsageError for an unknown task or a folder that is not there."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError("--tasks needs lm-eval: pip install lm-eval") from error
    if include_path and not Path(include_path).is_dir():
        raise UsageError(f"--include-path {include_path} is not a folder: give the one that holds the task YAMLs")
    include = [str(TASKS_FOLDER)] + ([include_path] if include_path else [])
    manager = TaskManager(include_path=include, include_defaults=False)
    if any(not manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=include)  # ten seconds: it reads all of lm-eval's tasks
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"task {unknown[0]!r} is not known to lm-eval: see 'lm-eval ls tasks', or give --include-path")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: TaskManager,
    batch_size: int,
    limit: int | None,
    bos: bool,
) -> Results:
    """`bos`: every text begins with BOS. Metrics without their filter suffix, standard errors as `metric_stderr`, and how many ROWS were evaluated. Raises UsageError for data that is not there."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        # lm-eval prints to stdout here and there.
        with contextlib.redirect_stdout(sys.stderr), without_git_commit():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos)
            results = simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
    except (ConnectionError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"a data set of {', '.join(tasks)} cannot be loaded ({reason})") from error
    return {
        task: {
            key.partition(",")[0]: float(value)
            for key, value in metrics.items()
            if "," in key and isinstance(value, int | float)
        }
        | ({ROWS: metrics["sample_len"]} if "sample_len" in metrics else {})
        for task, metrics in results["results"].items()
    }
