"""`apex4 eval` by several processes: the same figures as by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.distributed.group import Group
from apex4_quant.evaluation.evaluate import EvalSettings, evaluate

from ..distributed.several import Several


def test_figures_are_those_of_one_process(demo_checkpoint: Path, tmp_path: Path) -> None:
    settings = EvalSettings(str(demo_checkpoint), "demo", limit=5, seq_len=64, device="cpu")
    alone = evaluate(settings)

    def work(group: Group) -> None:
        print(json.dumps(evaluate(settings, group=group)))

    for ended in Several(2, tmp_path, work).wait():
        assert ended.code == 0, ended
        found: dict[str, Any] = json.loads(ended.stdout)
        assert set(found) == set(alone) and found["tokens"] == alone["tokens"] == 5 * 64
        for name in ("perplexity", "baseline_perplexity", "divergence", "top1_agreement"):
            assert found[name] == pytest.approx(alone[name], rel=1e-9), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limit": 1}, "2 ranks have 1 windows of text to share"),
        ({"tasks": ("apex4_choice",)}, "--tasks is for one process and 2 ranks were started"),
        ({"engine": "vllm"}, "vLLM has processes of its own"),
    ],
)
def test_what_one_process_does_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    settings = EvalSettings(**{"model": "demo", "seq_len": 64, "limit": 2, "device": "cpu"} | changes)

    def work(group: Group) -> None:
        evaluate(settings, group=group)

    ended = Several(2, tmp_path, work).wait()
    said = "".join(each.stderr for each in ended)
    assert [each.code for each in ended] == [2, 2] and sentence in said and said.count("apex4: ") == 1, ended
