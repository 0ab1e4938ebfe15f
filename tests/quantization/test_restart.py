"""A run that is killed, stopped or out of space at any moment goes on with --resume to byte-identical files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.errors import Apex4Error, Stopped, UsageError
from apex4_quant.format.storage import RUN_FOLDER, sha256
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.states import States
from apex4_quant.quantization import run as run_module
from apex4_quant.quantization.layer import LayerQuantizer
from apex4_quant.quantization.run_state import BackgroundWork, RunState
from apex4_quant.recipes import named_recipes

from ..conftest import stop_after, write_calibration, write_tiny_model

FAILED, STOPPED = 1, 75
RECIPES = ("apex4", "apex4-gptaq")  # one stream of hidden states, and two
Call = Callable[..., Any]  # the fixtures of conftest.py


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Job:
    """One quantization of a tiny model, and what it leaves when nothing interrupts it."""

    settings: QuantizeSettings
    whole: dict[str, str]

    def arguments(self, out: Path, *more: object) -> list[str]:
        s = self.settings
        options = ("--calib", s.calib, "--samples", s.samples, "--seq-len", s.seq_len, "--target", "none")
        options += ("--recipe", s.recipe)
        return [str(value) for value in ("quantize", s.model, "-o", out, *options, *more)]


def make_job(folder: Path, *, layers: int = 2, recipe: str = "apex4", text: int = 1, **changes: Any) -> Job:
    """Quantizes once without interruption, into folder/uninterrupted."""
    calib = write_calibration(folder / "calibration.txt")
    calib.write_text(calib.read_text() * text)
    # What takes long in the named recipe, the learning of a transform, is over sooner: these tests do it often.
    quick = named_recipes()[recipe].as_dict() | {"transform_steps": 10}
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in quick.items() if key != "name"}))
    model = write_tiny_model(folder / "tiny", num_hidden_layers=layers)
    settings = QuantizeSettings(
        model=str(model), calib=str(calib), recipe=str(path), samples=3, seq_len=32, target="none", device="auto"
    )
    settings = replace(settings, **changes)
    quantize(settings, folder / "uninterrupted")
    whole = contents(folder / "uninterrupted")
    shards = [name for name in whole if name.endswith(".safetensors")]
    assert len(shards) == layers + 2 and "config.json" in whole and RUN_FOLDER not in " ".join(whole)
    return Job(settings, whole)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def long_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """So long that a signal arrives before its end."""
    return make_job(tmp_path_factory.mktemp("long"), layers=5, samples=8, seq_len=64)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Crash points: what lies on the disk before each durable step of one run.


@contextlib.contextmanager
def before_each_step(out: Path, happens: Callable[[int, str, Path], None]) -> Iterator[None]:
    """Calls `happens(number, step, unfinished)` in front of every rename and removal below `out`.

    A rename that never happens leaves half of its temporary file, a removal of a folder some of its files: `unfinished`
    is the file to cut in half, or the one that is already gone.
    """
    real_replace, real_unlink, real_rmtree = os.replace, Path.unlink, shutil.rmtree
    count = 0

    def step(name: str, path: Path, unfinished: Path) -> None:
        nonlocal count
        if out in path.parents:
            count += 1
            happens(count - 1, f"{name} {path.relative_to(out)}", unfinished)

    def replace_(source: Path, target: Path) -> None:
        step("write", Path(target), Path(source))
        real_replace(source, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            step("remove", path, path)
        real_unlink(path, missing_ok=missing_ok)

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if out in Path(path).parents:
            step("remove", Path(path), min(Path(path).iterdir()))
        real_rmtree(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_)
        patch.setattr(Path, "unlink", unlink)
        patch.setattr(shutil, "rmtree", rmtree)
        yield


@pytest.fixture(scope="module")
def crash_points(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For every durable step of one run: what SIGKILL just before it would leave, as a copy of the output folder."""
    folder = tmp_path_factory.mktemp("crash-points")
    out, found = folder / "out", {}

    def keep(number: int, step: str, unfinished: Path) -> None:
        found[step] = shutil.copytree(out, folder / f"{number:02}")
        copied = found[step] / unfinished.relative_to(out)
        if step.startswith("write"):
            os.truncate(copied, copied.stat().st_size // 2)
        elif (out / step.removeprefix("remove ")).is_dir():
            os.unlink(copied)

    with before_each_step(out, keep):
        quantize(job.settings, out)
    assert contents(out) == job.whole
    return found


def goes_on(job: Job, crash_points: dict[str, Path], step: str, out: Path) -> None:
    """A run that was killed just before `step` says what it holds, and goes on to the very files."""
    steps = list(crash_points)
    number = steps.index(step)
    written, finished = steps.index("write config.json"), steps.index(f"remove {RUN_FOLDER}/settings.json")
    shutil.copytree(crash_points[step], out)
    assert (out / "config.json").exists() == (number > written), step
    if 0 < number <= finished:
        (out / ".tmpaB3xyZ").write_bytes(b"of a kill within save_file of safetensors")
        with pytest.raises(UsageError, match="--resume"):
            quantize(job.settings, out)
    result = quantize(job.settings, out, resume=True)  # before the first step: it is begun
    assert result.was_finished == (number > finished)
    assert contents(out) == job.whole, f"killed before: {step}"
    assert not (out / RUN_FOLDER).exists(), step
    shutil.rmtree(out)


def test_steps_come_in_an_order_that_can_be_resumed(crash_points: dict[str, Path]) -> None:
    steps = list(crash_points)
    assert len(steps) > 25 and steps[0] == f"write {RUN_FOLDER}/settings.json"
    assert steps[-3:] == ["write config.json", f"remove {RUN_FOLDER}/settings.json", f"remove {RUN_FOLDER}"]


# One step of each kind. The others are the same files of other layers.
TELLING = (
    f"write {RUN_FOLDER}/settings.json",
    "write model-00001-of-00004.safetensors",
    f"write {RUN_FOLDER}/hidden-00000.safetensors",
    f"write {RUN_FOLDER}/entering-00001.safetensors",
    f"write {RUN_FOLDER}/gradients-00000.safetensors",
    f"remove {RUN_FOLDER}/entering-00001.safetensors",
    "write model-00003-of-00004.safetensors",
    f"write {RUN_FOLDER}/hidden-00001.safetensors",
    f"write {RUN_FOLDER}/shard-00003.json",
    f"remove {RUN_FOLDER}/hidden-00001.safetensors",
    "write model-00004-of-00004.safetensors",
    "write tokenizer.json",
    "write config.json",
    f"remove {RUN_FOLDER}/settings.json",
    f"remove {RUN_FOLDER}",
)


@pytest.mark.parametrize("step", TELLING)
def test_killed_before(step: str, job: Job, crash_points: dict[str, Path], out: Path) -> None:
    goes_on(job, crash_points, step, out)


def test_killed_before_every_other_step(job: Job, crash_points: dict[str, Path], out: Path) -> None:
    others = [step for step in crash_points if step not in TELLING]
    assert len(others) == len(crash_points) - len(TELLING)
    for step in others:
        goes_on(job, crash_points, step, out)


class Killed(BaseException):
    """Like SIGKILL to the code under test: nothing there catches it."""


def test_killed_again_and_again(job: Job, out: Path) -> None:
    """Each attempt lives one step longer than the one before."""
    kills = 0

    def kill(number: int, step: str, unfinished: Path) -> None:
        if number == kills:
            raise Killed

    while True:
        with before_each_step(out, kill), contextlib.suppress(Killed):
            quantize(job.settings, out, resume=(out / RUN_FOLDER / "settings.json").exists())
            break
        kills += 1
        assert kills < 50, "it makes no progress"
    assert kills > 4
    assert contents(out) == job.whole


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_after_every_layer(recipe: str, tmp_path: Path, out: Path) -> None:
    """As a signal stops it, and each time it goes on to the next layer."""
    job = make_job(tmp_path, layers=3, recipe=recipe)
    for layers in range(3):
        with pytest.raises(Stopped, match="--resume"):
            quantize(job.settings, out, resume=layers > 0, should_stop=stop_after(layers, out))
        done = [path.name for path in out.glob("*.safetensors")]
        assert len(done) == layers + 1 and not (out / "config.json").exists()
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


# Real signals


@pytest.fixture
def start(cli_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(arguments) -> `apex4 ARGUMENTS` as a running process."""
    started = []

    def begin(arguments: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "apex4_quant.cli", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=tmp_path, env=cli_environment, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for_shard(process: subprocess.Popen[str], out: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not any(out.glob(f"model-{number:05}-*.safetensors")):
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9(long_job: Job, start: Call, out: Path) -> None:
    """Killed after the first shard and, on resume, after the third, then left alone."""
    process = start(long_job.arguments(out))
    wait_for_shard(process, out, 1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "config.json").exists() and (out / RUN_FOLDER / "settings.json").exists()

    process = start(["quantize", "--resume", "-o", str(out)])
    wait_for_shard(process, out, 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "config.json").exists()

    process = start(["quantize", "--resume", "-o", str(out), "--json"])
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["linears_quantized"] == 5 * 7
    assert contents(out) == long_job.whole


def is_stopped_politely(stdout: str, stderr: str, out: Path) -> None:
    assert stdout == "", stderr
    first, last = stderr.splitlines()
    assert first.startswith("apex4: stopping after the layer in flight")
    assert last.startswith("apex4: stopped before layer ") and f"apex4 quantize --resume -o {out}'" in last
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.tmp"))


def test_sigterm_to_a_process(long_job: Job, start: Call, invoke: Call, out: Path) -> None:
    process = start(long_job.arguments(out, "--json"))
    wait_for_shard(process, out, 2)
    process.terminate()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == STOPPED
    is_stopped_politely(stdout, stderr, out)
    result = invoke("quantize", "--resume", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert contents(out) == long_job.whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signals_stop_after_the_layer(number: signal.Signals, job: Job, invoke: Call, out: Path) -> None:
    def ask(count: int, step: str, unfinished: Path) -> None:
        if step.startswith("write model-00002"):
            signal.raise_signal(number)

    with before_each_step(out, ask):
        result = invoke(*job.arguments(out, "--json"))
    assert result.exit_code == STOPPED
    is_stopped_politely(result.stdout, result.stderr, out)
    assert not list(out.glob("model-00003-*")), "the layer behind it was begun"
    result = invoke("quantize", "--resume", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert contents(out) == job.whole


# No space


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(job: Job, out: Path, invoke: Call, one_sentence: Call) -> None:
    """At the first shard, and on resume at the last one, which has lm_head."""
    first, last = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"
    with file_size_limit(100_000):
        result = invoke(*job.arguments(out, "--json"))
    _is_full(one_sentence(result, FAILED, "no space left", first), out)
    with file_size_limit((Path(job.settings.calib).parent / "uninterrupted" / first).stat().st_size):
        result = invoke("quantize", "--resume", "-o", out, "--json")
    _is_full(one_sentence(result, FAILED, "no space left", last), out)
    result = invoke("quantize", "--resume", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert contents(out) == job.whole


def test_disk_full_at_the_hidden_states(tmp_path: Path, out: Path, invoke: Call, one_sentence: Call) -> None:
    job = make_job(tmp_path, text=10, samples=20, seq_len=256)  # larger than any shard
    first = tmp_path / "uninterrupted" / "model-00001-of-00004.safetensors"
    with file_size_limit(first.stat().st_size):
        result = invoke(*job.arguments(out, "--json"))
    _is_full(one_sentence(result, FAILED, "no space left", "hidden-00000"), out)
    result = invoke("quantize", "--resume", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert contents(out) == job.whole


def _is_full(sentence: str, out: Path) -> None:
    assert f"apex4 quantize --resume -o {out}'" in sentence
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.tmp")), "what could not be written whole still takes space"


def test_disk_full_at_every_write(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that finds the disk full at each of its writes, and is resumed after each."""
    failed: set[str] = set()
    real = os.replace

    def full_once(source: Path, target: Path) -> None:
        if out in target.parents and target.name not in failed:
            failed.add(target.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full_once)
    resume = False
    for _ in range(40):
        try:
            quantize(job.settings, out, resume=resume)
            break
        except Apex4Error as error:
            assert "no space left to write" in str(error)
            assert not list(out.rglob("*.tmp"))
        resume = (out / RUN_FOLDER / "settings.json").exists()
    kept = {f"{kind}-00001.safetensors" for kind in ("hidden", "entering", "gradients")}
    assert {"settings.json", "shard-00002.json", "config.json"} | kept < failed
    assert contents(out) == job.whole


# ---- what is kept while the next layer is worked on ------------------------------------------------------------------


def test_a_layer_is_kept_while_the_next_one_is_worked_on(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on layer 1 begins before the states that leave layer 0 are on the disk."""
    begun, saved, order = threading.Event(), RunState.save_hidden, []
    work = LayerQuantizer.quantize

    def save(self: RunState, layer: int, streams: Any) -> None:
        if layer == 1:
            assert begun.wait(30)
        order.append(f"keeps {layer} on {threading.current_thread().name[:6]}")
        saved(self, layer, streams)

    def quantize_layer(self: LayerQuantizer, layer: int, *rest: Any) -> Any:
        order.append(f"layer {layer}")
        if layer == 1:
            begun.set()
        return work(self, layer, *rest)

    monkeypatch.setattr(RunState, "save_hidden", save)
    monkeypatch.setattr(LayerQuantizer, "quantize", quantize_layer)
    quantize(job.settings, out)
    assert order == ["keeps 0 on MainTh", "layer 0", "layer 1", "keeps 1 on apex4-"]
    assert contents(out) == job.whole


def test_a_layer_that_is_done_is_committed_though_the_next_one_fails(
    job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = LayerQuantizer.quantize

    def fail(self: LayerQuantizer, layer: int, *rest: Any) -> Any:
        if layer == 1:
            raise Apex4Error("the second layer")
        return work(self, layer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "quantize", fail)
        with pytest.raises(Apex4Error, match="the second layer"):
            quantize(job.settings, out)
    records = {path.name for path in (out / RUN_FOLDER).glob("shard-*.json")}
    assert len(records) == 2, records  # the embedding and the first layer
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


def test_what_fails_behind_a_layer_ends_the_run(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = RunState.save_hidden

    def full(self: RunState, layer: int, streams: Any) -> None:
        if layer == 1:
            raise Apex4Error("no room for the states")
        saved(self, layer, streams)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save_hidden", full)
        with pytest.raises(Apex4Error, match="no room for the states"):
            quantize(job.settings, out)
    assert not (out / "config.json").exists()
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


def test_a_shard_that_cannot_be_written_ends_the_run(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written while its layer computes what leaves it; what that makes is not kept without it."""
    write, shard, threads = run_module.write_tensors, "model-00002-of-00004.safetensors", list[str]()
    computed, work, run_layer = threading.Event(), LayerQuantizer.quantize, LayerRunner.run_layer

    def full(path: Path, tensors: Any) -> None:
        if path.name == shard:
            assert computed.wait(30)
            threads.append(threading.current_thread().name[:6])
            raise Apex4Error("no room for the shard")
        write(path, tensors)

    def quantize_layer(self: LayerQuantizer, *rest: Any) -> Any:
        found = work(self, *rest)
        computed.clear()
        return found

    def run(self: LayerRunner, layer: int, states: States) -> States:
        found = run_layer(self, layer, states)
        computed.set()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_tensors", full)
        patch.setattr(LayerQuantizer, "quantize", quantize_layer)
        patch.setattr(LayerRunner, "run_layer", run)
        with pytest.raises(Apex4Error, match="no room for the shard"):
            quantize(job.settings, out)
    assert threads == ["apex4-"]
    assert not (out / shard).exists() and not list(out.rglob("*.tmp"))
    assert [path.name for path in (out / RUN_FOLDER).glob("shard-*.json")] == ["shard-00001.json"]
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


def test_one_thing_at_a_time() -> None:
    done: list[str] = []
    with BackgroundWork() as background:
        background.start(lambda: (time.sleep(0.2), done.append("first"))[-1])
        background.start(lambda: done.append("second"))
        assert done[0] == "first"
        background.finish()
        assert done == ["first", "second"]
        background.start(lambda: int("x") and None)
        with pytest.raises(ValueError):
            background.finish()
        background.finish()  # it was said
        background.start(lambda: (time.sleep(0.2), done.append("last"))[-1])
    assert done[-1] == "last"
