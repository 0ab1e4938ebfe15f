"""A run that is killed, stopped or out of space at any moment goes on with --resume to byte-identical files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from apex4_quant.errors import Apex4Error, Stopped, UsageError
from apex4_quant.format.storage import RUN_FOLDER, sha256
from apex4_quant.quantization.run import QuantizeSettings, quantize
from apex4_quant.recipes import named_recipes

from ..conftest import stop_after

FAILED, USAGE, STOPPED = 1, 2, 75
RECIPES = ("apex4", "apex4-gptaq")  # one stream of hidden states, and two
Call = Callable[..., Any]  # the fixtures of conftest.py


class Killed(BaseException):
    """Like SIGKILL to the code under test: nothing there catches it."""


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Job:
    """One quantization of a tiny model, and what it leaves when nothing interrupts it."""

    settings: QuantizeSettings
    folder: Path
    whole: dict[str, str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def model(self) -> Path:
        return Path(self.settings.model)

    def arguments(self, *more: object) -> list[str]:
        s = self.settings
        options = ("--calib", s.calib, "--samples", s.samples, "--seq-len", s.seq_len, "--target", "none")
        options += ("--recipe", s.recipe)
        return [str(value) for value in ("quantize", s.model, "-o", self.out, *options, *more)]

    def stop_after(self, layers: int) -> None:
        """Begin the run in `out` and stop it as a signal would, after `layers` decoder layers."""
        with pytest.raises(Stopped, match="--resume"):
            quantize(self.settings, self.out, should_stop=stop_after(layers, self.out))


@pytest.fixture
def make_job(tiny_model: Call, calib: Path, tmp_path: Path) -> Callable[..., Job]:
    """make_job(layers=2, **settings) quantizes once without interruption, in another folder."""

    def make(layers: int = 2, **changes: Any) -> Job:
        model = tiny_model(num_hidden_layers=layers)
        settings = QuantizeSettings(
            model=str(model), calib=str(calib), samples=3, seq_len=32, target="none", device="auto"
        )
        settings = replace(settings, **changes)
        # What takes long in the named recipe, the learning of a transform, is over sooner: these tests do it often.
        quick = named_recipes()[settings.recipe].as_dict() | {"transform_steps": 10}
        recipe = tmp_path / "quick.yaml"
        recipe.write_text(yaml.safe_dump({key: value for key, value in quick.items() if key != "name"}))
        settings = replace(settings, recipe=str(recipe))
        quantize(settings, tmp_path / "uninterrupted")
        whole = snapshot(tmp_path / "uninterrupted")
        shards = [name for name in whole if name.endswith(".safetensors")]
        assert len(shards) == layers + 2 and "config.json" in whole and RUN_FOLDER not in " ".join(whole)
        return Job(settings, tmp_path, whole)

    return make


# Crash points: the same run is ended before each of its durable steps in turn.


@contextlib.contextmanager
def ends_before_step(out: Path, number: int | None) -> Iterator[list[str]]:
    """Raise Killed in place of durable step `number` (renames and removals below `out`); yields the steps' names.

    A rename that does not happen leaves half of its temporary file.
    """
    steps: list[str] = []

    def step(name: str, path: Path) -> bool:
        if out in path.parents:
            steps.append(f"{name} {path.relative_to(out)}")
        return out in path.parents and len(steps) - 1 == number

    real_replace, real_unlink, real_rmtree = os.replace, Path.unlink, shutil.rmtree

    def replace_(source: Path, target: Path) -> None:
        if step("write", target):
            os.truncate(source, source.stat().st_size // 2)
            raise Killed
        real_replace(source, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists() and step("remove", path):
            raise Killed
        real_unlink(path, missing_ok=missing_ok)

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        if step("remove", path):
            real_unlink(min(path.iterdir()))  # some of it is gone
            raise Killed
        real_rmtree(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_)
        patch.setattr(Path, "unlink", unlink)
        patch.setattr(shutil, "rmtree", rmtree)
        yield steps


def test_every_crash_point(make_job: Callable[..., Job]) -> None:
    job = make_job()
    with ends_before_step(job.out, None) as steps:
        quantize(job.settings, job.out)
    assert snapshot(job.out) == job.whole
    begun, written = steps.index(f"write {RUN_FOLDER}/settings.json"), steps.index("write config.json")
    finished = steps.index(f"remove {RUN_FOLDER}/settings.json")
    assert begun == 0 and begun < written < finished == len(steps) - 2
    assert len(steps) > 15, steps
    for number, step in enumerate(steps):
        shutil.rmtree(job.out)
        with ends_before_step(job.out, number), pytest.raises(Killed):
            quantize(job.settings, job.out)
        assert (job.out / "config.json").exists() == (number > written), step
        if number <= begun:
            quantize(job.settings, job.out, resume=True)  # nothing is there: it is begun
        elif number <= finished:
            with pytest.raises(UsageError, match="--resume"):
                quantize(job.settings, job.out)
            quantize(job.settings, job.out, resume=True)
        else:
            assert quantize(job.settings, job.out, resume=True).was_finished
        assert snapshot(job.out) == job.whole, f"killed before: {step}"
        assert not (job.out / RUN_FOLDER).exists(), step


def test_killed_again_and_again(make_job: Callable[..., Job]) -> None:
    """Each attempt lives one step longer than the one before."""
    job = make_job()
    resume, kills = False, 0
    while True:
        with ends_before_step(job.out, kills), contextlib.suppress(Killed):
            quantize(job.settings, job.out, resume=resume)
            break
        kills += 1
        resume = (job.out / RUN_FOLDER / "settings.json").exists()
        assert kills < 50, "it makes no progress"
    assert kills > 4
    assert snapshot(job.out) == job.whole


@pytest.mark.parametrize("recipe", RECIPES)
def test_stop_after_every_layer(recipe: str, make_job: Callable[..., Job]) -> None:
    job = make_job(layers=3, recipe=recipe)
    for layers in range(3):
        job.stop_after(layers)
        done = [path.name for path in job.out.glob("*.safetensors")]
        assert len(done) == layers + 1 and not (job.out / "config.json").exists()
        quantize(job.settings, job.out, resume=True)
        assert snapshot(job.out) == job.whole
        shutil.rmtree(job.out)


# Real signals to a real process


@pytest.fixture
def start(cli_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(job, *more) -> `apex4 quantize` of the job as a running process."""
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


def wait_for_shard(process: subprocess.Popen[str], job: Job, number: int) -> None:
    deadline = time.monotonic() + 120
    while not any(job.out.glob(f"model-{number:05}-*.safetensors")):
        assert process.poll() is None, f"it ended before: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("recipe", RECIPES)
def test_kill_9(recipe: str, make_job: Callable[..., Job], start: Call) -> None:
    """Killed after the first shard, on resume after the third, on resume at a random moment, then left alone."""
    job = make_job(layers=6, samples=8, seq_len=64, recipe=recipe)
    process = start(job.arguments())
    wait_for_shard(process, job, 1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (job.out / "config.json").exists() and (job.out / RUN_FOLDER / "settings.json").exists()

    process = start(["quantize", "--resume", "-o", str(job.out)])
    wait_for_shard(process, job, 3)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.wait()

    if (job.out / RUN_FOLDER / "settings.json").exists():
        process = start(["quantize", "--resume", "-o", str(job.out), "--json"])
        stdout, stderr = process.communicate(timeout=300)
        assert (process.returncode, stderr) == (0, "")
        assert json.loads(stdout)["linears_quantized"] == 42
    else:  # on a machine that quantizes in 0.2 s
        shutil.rmtree(job.out / RUN_FOLDER, ignore_errors=True)
    assert snapshot(job.out) == job.whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_polite_signal(number: signal.Signals, make_job: Callable[..., Job], start: Call, invoke: Call) -> None:
    job = make_job(layers=6, samples=8, seq_len=64)
    process = start(job.arguments("--json"))
    wait_for_shard(process, job, 2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (STOPPED, ""), stderr
    first, last = stderr.splitlines()
    assert first.startswith("apex4: stopping after the layer in flight")
    assert last.startswith("apex4: stopped before layer ") and f"apex4 quantize --resume -o {job.out}'" in last
    assert not (job.out / "config.json").exists()
    assert not list(job.out.rglob("*.tmp"))
    result = invoke("quantize", "--resume", "-o", job.out)
    assert result.exit_code == 0, result.stderr
    assert snapshot(job.out) == job.whole


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


@pytest.mark.parametrize("what", ["the first shard", "hidden states", "the last shard"])
def test_disk_full(what: str, make_job: Callable[..., Job], invoke: Call, one_sentence: Call, calib: Path) -> None:
    if what == "hidden states":  # larger than any shard
        calib.write_text(calib.read_text() * 10)
        job = make_job(samples=20, seq_len=256)
    else:
        job = make_job()
    first = job.folder / "uninterrupted" / "model-00001-of-00004.safetensors"
    with file_size_limit(100_000 if what == "the first shard" else first.stat().st_size):
        result = invoke(*job.arguments("--json"))
    file = {"the first shard": first.name, "hidden states": "hidden-00000", "the last shard": "model-00004"}[what]
    one_sentence(result, FAILED, "no space left", file, f"apex4 quantize --resume -o {job.out}'")
    assert not (job.out / "config.json").exists()
    assert not list(job.out.rglob("*.tmp")), "what could not be written whole still takes space"
    result = invoke("quantize", "--resume", "-o", job.out)
    assert result.exit_code == 0, result.stderr
    assert snapshot(job.out) == job.whole


def test_disk_full_at_every_write(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that finds the disk full at each of its writes, and is resumed after each."""
    job = make_job()
    failed: set[str] = set()
    real = os.replace

    def full_once(source: Path, target: Path) -> None:
        if job.out in target.parents and target.name not in failed:
            failed.add(target.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full_once)
    resume = False
    for _ in range(40):
        try:
            quantize(job.settings, job.out, resume=resume)
            break
        except Apex4Error as error:
            assert "no space left to write" in str(error)
            assert not list(job.out.rglob("*.tmp"))
        resume = (job.out / RUN_FOLDER / "settings.json").exists()
    kept = {f"{kind}-00001.safetensors" for kind in ("hidden", "entering", "gradients")}
    assert {"settings.json", "shard-00002.json", "config.json"} | kept < failed
    assert snapshot(job.out) == job.whole
