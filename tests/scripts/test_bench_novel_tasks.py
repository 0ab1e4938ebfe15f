"""The tasks that scripts/bench/real_models makes of a novel (scripts/bench/novel_tasks.py), and that lm-eval finds them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.calib.text import load_text
from apex4_quant.evaluation.lm_eval_tasks import find_tasks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import novel_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("novel") / "tasks"
    novel_tasks.write_tasks(load_text("heldout")[:400_000], out)
    return out


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_the_last_word_stands_before(folder: Path) -> None:
    found = rows(folder, "novel_lastword")
    assert 20 < len(found) <= novel_tasks.ROWS
    for row in found:
        assert row["word"] in re.findall(r"\w+", row["context"])
        assert len(row["context"].split()) >= novel_tasks.PASSAGE


def test_a_cloze_differs_in_one_word(folder: Path) -> None:
    found = rows(folder, "novel_cloze")
    assert len(found) > 20
    for row in found:
        assert len({choice.partition(" ")[2] for choice in row["choices"]}) == 1
        words = [choice.partition(" ")[0] for choice in row["choices"]]
        assert len(set(words)) == 4 and all(novel_tasks.LETTERS.fullmatch(word) for word in words)
        wrong = [word for place, word in enumerate(words) if place != row["answer"]]
        assert all(word in row["context"] for word in wrong)


def test_right_answers_are_everywhere_and_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    for name in ("novel_cloze", "novel_choice"):
        assert {row["answer"] for row in rows(folder, name)} == {0, 1, 2, 3}
    novel_tasks.write_tasks(load_text("heldout")[:400_000], tmp_path)
    assert rows(tmp_path, "novel_choice") == rows(folder, "novel_choice")


def test_lm_eval_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file that is there, offline: the `json` builder is part of `datasets`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (task,) = find_tasks(novel_tasks.NAMES, str(folder)).load(["novel_cloze"])["tasks"].values()
    (document, *_) = documents = list(task.test_docs())
    assert documents == rows(folder, "novel_cloze")
    assert task.doc_to_choice(document) == document["choices"] and task.doc_to_target(document) == document["answer"]
