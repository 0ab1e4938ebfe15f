"""Programs of others load a checkpoint by `python -m apex4_quant.launch`, as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apex4_quant.evaluation

Call = Callable[..., Any]  # the fixtures of conftest.py
TASKS = Path(apex4_quant.evaluation.__file__).parent / "tasks"
LAUNCH = (sys.executable, "-m", "apex4_quant.launch")


@pytest.fixture
def run(tmp_path: Path, cli_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(*command: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        return subprocess.run(
            words, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, timeout=300, check=False
        )

    return start


def test_lm_eval(demo_checkpoint: Path, run: Call, invoke: Call, tmp_path: Path) -> None:
    """The real command, which refuses the checkpoint by itself, gives the figures of `apex4 eval --tasks`."""
    wanted = ("--tasks", "apex4_choice", "--limit", 4)
    arguments = (
        "--model", "hf", "--model_args", f"pretrained={demo_checkpoint}", *wanted, "--device", "cpu",
        "--include_path", TASKS, "--output_path", tmp_path / "results",
    )  # fmt: skip
    alone = run(sys.executable, "-m", "lm_eval", *arguments)
    assert alone.returncode != 0 and "apex4" in alone.stderr and not (tmp_path / "results").exists()
    done = run(*LAUNCH, "lm_eval", *arguments)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["apex4_choice"]
    ours = json.loads(invoke("eval", demo_checkpoint, *wanted, "--seq-len", 32, "--json").stdout)["tasks"]
    assert theirs["acc,none"] == ours["apex4_choice"]["acc"]


def test_a_script_a_module_and_a_command(demo_checkpoint: Path, run: Call, tmp_path: Path) -> None:
    script = tmp_path / "folder" / "script.py"
    script.parent.mkdir()
    (script.parent / "beside.py").write_text("NAME = 'found'")
    script.write_text(
        "import sys, beside\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(beside.NAME, type(model.model.layers[0].mlp.down_proj).__name__, __name__, sys.argv[0])\n"
        "sys.exit(7)\n"
    )
    done = run(*LAUNCH, script, demo_checkpoint)
    assert (done.returncode, done.stdout) == (7, f"found Apex4Linear __main__ {script}\n"), done.stderr
    done = run(*LAUNCH, "json.tool", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    done = run(*LAUNCH, "transformers", "version")
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_run(run: Call) -> None:
    done = run(*LAUNCH, "no_such_program")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "apex4: 'no_such_program' is no installed command, no file and no module: install it first\n"
    assert run(*LAUNCH).returncode == 2 and "give a program" in run(*LAUNCH).stderr
    assert "lm_eval --model hf" in run(*LAUNCH, "--help").stdout
