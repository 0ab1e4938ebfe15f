"""`apex4 quantize --gpus G` as a process: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from apex4_quant import command_options
from apex4_quant.distributed.starting import launch
from apex4_quant.format.storage import RUN_FOLDER, read_json

from ..conftest import write_tiny_model
from ..quantization.test_ranks import settings_of


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_more_gpus_than_there_are_is_refused(
    invoke: Callable[..., Result], one_sentence: Callable[..., str], tmp_path: Path
) -> None:
    one_sentence(invoke("quantize", "demo", "-o", tmp_path / "out", "--gpus", 3), 2, "--gpus is 3", "--device cpu")
    one_sentence(invoke("plan", "demo", "--gpus", 3), 2, "--gpus is 3", "--device cpu")
    one_sentence(invoke("plan", "demo", "--gpus", 1024, "--device", "cpu"), 2, "--gpus is 1024", "cores")
    one_sentence(invoke("quantize", "demo", "-o", tmp_path / "out", "--gpus", 0), 2, "--gpus is 0")
    one_sentence(invoke("quantize", "demo", "--dry-run", "--gpus", 2), 2, "--dry-run is for one process")


def test_exit_code_is_the_ranks(signals: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, ["quantize"], "cpu") == 2
    assert capfd.readouterr().err == "apex4: quantize needs a MODEL: give 'demo', a local folder, or a Hub id\n"
    assert launch(2, ["gpus", "--json"], "cpu") == 2
    assert "'apex4 gpus' runs in one process and WORLD_SIZE is 2" in capfd.readouterr().err
    assert launch(1, ["gpus", "--json"], "cpu") == 0


def test_what_all_refuse_is_said_though_the_first_is_late(
    signals: None, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert launch(2, ["quantize"], "cpu") == 2
    assert capfd.readouterr().err == "apex4: quantize needs a MODEL: give 'demo', a local folder, or a Hub id\n"


def test_what_another_rank_alone_refuses_is_said_by_it(
    invoke: Callable[..., Result], one_sentence: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command_options, "_FIRST_REFUSES_WITHIN", 0.0)
    one_sentence(invoke("quantize"), 2, "rank 1: quantize needs a MODEL")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["x", "", "-1", "1.5"])
def test_variables_that_are_no_numbers(
    name: str,
    text: str,
    invoke: Callable[..., Result],
    one_sentence: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for each, value in {"RANK": "0", "WORLD_SIZE": "2", name: text}.items():
        monkeypatch.setenv(each, value)
    monkeypatch.setattr(command_options, "_FIRST_REFUSES_WITHIN", 0.0)
    one_sentence(invoke("quantize", "demo", "--dry-run"), 2, f"{name} is {text!r} in the environment")


def children(pid: int) -> dict[int, int]:
    """The ranks that a launcher has started, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(text.removeprefix(b"RANK=")): int(child) for text in variables if text.startswith(b"RANK=")}
    return found


def test_a_kill_and_a_stop(tmp_path: Path, cli_environment: dict[str, str]) -> None:
    """That the same bytes come of what they leave is shown in tests/quantization/test_ranks.py, without the start of processes."""
    model = write_tiny_model(tmp_path / "tiny", num_hidden_layers=3)
    settings, out = settings_of(tmp_path, model), tmp_path / "out"
    words = ["quantize", str(model), "-o", out, "--recipe", settings.recipe, "--calib", settings.calib, "--samples", 7]
    words += ["--seq-len", 64, "--target", "none", "--device", "cpu", "--gpus", 2, "--json"]
    command = [sys.executable, "-m", "apex4_quant", *map(str, words)]

    def until(condition: Callable[[], bool], running: subprocess.Popen[str]) -> None:
        began = time.monotonic()
        while not condition():
            assert running.poll() is None and time.monotonic() - began < 120
            time.sleep(0.05)

    def shards() -> int:
        return len(list((out / RUN_FOLDER).glob("shard-*.json")))

    def start(*more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*command, *more], stdout=pipe, stderr=pipe, text=True, env=cli_environment)

    killed = start()
    until(lambda: shards() > 0, killed)
    os.kill(children(killed.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    stdout, stderr = killed.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert (killed.returncode, stdout) == (75, "") and stderr.count("apex4: ") == 1, stderr
    assert "rank 1 ended without a word" in stderr and "Traceback" not in stderr

    before = shards()
    stopped = start("--resume")
    until(lambda: shards() > before, stopped)
    stopped.send_signal(signal.SIGINT)
    stdout, stderr = stopped.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if line.startswith("apex4: ")]
    assert (stopped.returncode, stdout) == (75, "") and len(lines) == 2, stderr
    assert lines[0].startswith("apex4: stopping after the layer in flight") and "nothing is lost" in lines[1]
    assert read_json(out / RUN_FOLDER / "settings.json")["device"] == "cpu"
