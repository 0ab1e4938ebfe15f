"""Every private name of transformers, accelerate, torch and lm-eval that apex4 touches, each behind one function.

A private name may change with any release. So each function says which name it hides and the versions in which it was seen.
Nothing else in apex4 uses such a name. This module imports nothing of apex4, and libraries only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# ---- lm-eval ---------------------------------------------------------------------------------------------------------


@contextmanager
def without_git_commit() -> Iterator[None]:
    """Let lm-eval not ask git for the commit of the working directory: git complains on stderr where there is none.

    `lm_eval.evaluator.get_git_commit_hash`, lm-eval 0.4.9 to 0.4.13. `simple_evaluate` has no option for it.
    """
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


# ---- transformers ----------------------------------------------------------------------------------------------------


def is_weight_converter(conversion: object) -> bool:
    """Whether a conversion of a checkpoint's tensors fuses, splits or computes, and does not only rename.

    `transformers.core_model_loading.WeightConverter`, transformers 5.17 to 5.23. It is in no page of the documentation's
    reference; quantizers are handed its instances and have to tell them from `WeightRenaming`.
    """
    from transformers.core_model_loading import WeightConverter

    return isinstance(conversion, WeightConverter)
