"""A disk that is full, broken or read-only at any write of a command: one sentence, and no file that is neither old nor new.

Of `quantize` and its --resume: tests/quantization/test_restart.py, tests/fuzz/test_kills.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.evaluation import evaluate as quality
from apex4_quant.planning import planner
from apex4_quant.publishing import pictures, report

from .conftest import write_calibration, write_tiny_model
from .disks import CODES, contents, failing

Call = Callable[..., Any]  # the fixtures of conftest.py
FAILED, USAGE = 1, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and its checkpoint, which can be exported too."""
    folder = tmp_path_factory.mktemp("writes")
    model = write_tiny_model(folder / "model")
    text = write_calibration(folder / "text.txt")
    small = {"samples": 1, "seq_len": 32, "device": "cpu", "calib": str(text)}
    quantize(QuantizeSettings(str(model), recipe="rtn", target="none", **small), folder / "checkpoint")
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written does not depend on what was measured: it is measured and drawn once for all failures."""
    measured: dict[str, Any] = {}

    def once(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if name not in measured:
                measured[name] = function(*arguments, **options)
            return measured[name]

        monkeypatch.setattr(module, name, call)

    once(quality, "evaluate")
    once(planner, "measure_sensitivity")
    once(pictures, "draw")
    once(report, "draw")


TEXT = ("--calib", "text.txt", "--samples", 1, "--seq-len", 32)
COMMANDS: dict[str, tuple[object, ...]] = {
    "record": ("eval", "checkpoint", "--record", "--limit", 1, "--seq-len", 32),
    "card": ("card", "checkpoint", "--pictures", "--license", "mit"),
    "report": ("report", "checkpoint", "-o", "page.html"),
    "plan": ("plan", "model", "-o", "plan.yaml", *TEXT, "--target", "A100"),
    "export": ("export", "checkpoint", "-o", "exported", "--to", "vllm-humming"),
    "repack": ("repack", "checkpoint", "-o", "repacked", "--target", "H200"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_write(
    command: str, source: Path, invoke: Call, one_sentence: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (*COMMANDS[command], "--json")

    def fresh(name: str) -> Path:
        """A folder with the checkpoint, and with what an earlier run of the command left."""
        folder = tmp_path / name
        shutil.copytree(source, folder, copy_function=os.link)
        for old in ("checkpoint/README.md", "checkpoint/apex4_pictures/size.svg", "page.html"):
            (folder / old).parent.mkdir(exist_ok=True)
            (folder / old).write_text("what was there before")
        monkeypatch.chdir(folder)
        return folder

    fresh("first")
    assert invoke(*line).exit_code == 0  # the first of a process also makes caches of libraries
    folder = fresh("whole")
    before = contents(folder)
    with failing(-1, 0, monkeypatch) as calls:
        assert invoke(*line).exit_code == 0
    finished = contents(folder)
    steps = list(calls)
    assert len(steps) >= 3 and finished != before
    whole_folder = command in ("export", "repack")
    # All steps are calls of the same few functions: where there are many, one code each, in turns. tests/fuzz takes all.
    cases = [
        (number, step, code)
        for number, step in enumerate(steps, 1)
        for code in (CODES if len(steps) < 6 else (CODES[number % len(CODES)],))
    ]
    for number, step, code in cases:
        folder = fresh(f"{number}-{code}")
        with failing(number, code, monkeypatch):
            result = invoke(*line)
        by_name = step == "mkdir" and code == errno.EROFS  # another name would do
        if command == "record":  # what was measured is printed all the same
            assert json.loads(result.stdout)["perplexity"] > 0 and result.exit_code == FAILED
            sentence = result.stderr.strip()
            assert sentence.startswith("apex4: ") and "\n" not in sentence
        else:
            sentence = one_sentence(result, USAGE if by_name else FAILED)
        assert "remove" not in sentence, "the user's own files may stand there"
        left = contents(folder)
        case = f"{step}, {number} of {len(steps)}, {errno.errorcode[code]}"
        assert left.items() <= before.items() | finished.items(), f"{case}: a file is neither old nor new"
        assert before.keys() <= left.keys(), case
        if whole_folder:
            assert left == before and not (folder / str(line[3])).exists(), case
        if whole_folder and number % 5 == 0:
            assert invoke(*line).exit_code == 0 and contents(folder) == finished, f"{case}: the same command again"
        shutil.rmtree(folder)
