"""kill -9 at random moments, and disks that are full, broken or read-only at any write: the same command goes on.

Each run is a fork of this process, in which everything is imported, so that hundreds of them take minutes.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.checkpoint.repack import repack
from apex4_quant.distributed import watch
from apex4_quant.errors import Apex4Error
from apex4_quant.format import storage
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings

from ..conftest import write_tiny_model
from ..disks import CODES, contents, failing
from ..quantization import test_ranks as ranks_of
from ..quantization.test_ranks import write_moe
from .conftest import HANGS

RECIPES = ("gptq", "apex4")
Moments = Callable[[int], random.Random]


def in_a_fork(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Whether `work` ended by itself; else it was killed after so many seconds. Fails the test if it raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + (HANGS if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0, "the run raised"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert kill_after is not None, "it hangs"
    return os.waitstatus_to_exitcode(status) == 0


@pytest.fixture(scope="module")
def settings_of(small_model: Path, small_text: Path) -> Callable[[str], QuantizeSettings]:
    def make(recipe: str) -> QuantizeSettings:
        return QuantizeSettings(
            str(small_model), recipe, target="none", samples=2, seq_len=32, calib=str(small_text), device="cpu"
        )

    return make


@pytest.fixture(scope="module")
def whole(
    settings_of: Callable[[str], QuantizeSettings], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, float]]:
    """By recipe: what an undisturbed run writes, and the seconds it took."""
    made = {}
    for recipe in RECIPES:
        out = tmp_path_factory.mktemp("whole") / recipe
        quantize(settings_of(recipe), out)  # the first of a process is slow
        shutil.rmtree(out)
        started = time.monotonic()
        in_a_fork(lambda recipe=recipe, out=out: quantize(settings_of(recipe), out))  # type: ignore[misc]
        made[recipe] = out, time.monotonic() - started
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantize_killed(
    recipe: str,
    whole: dict[str, tuple[Path, float]],
    settings_of: Callable[[str], QuantizeSettings],
    moments: Moments,
    tmp_path: Path,
) -> None:
    """Every run is killed twice, the second time on its way on, and then ends: the same bytes."""
    expected, seconds = contents(whole[recipe][0]), whole[recipe][1]
    drawn, kills = moments(10), 0
    for number in range(drawn.count // 2):  # type: ignore[attr-defined]
        out = tmp_path / str(number)
        for _ in range(2):
            kills += not in_a_fork(
                lambda out=out: quantize(settings_of(recipe), out, resume=True), drawn.uniform(0, seconds)
            )  # type: ignore[misc]
            if (out / "config.json").exists():
                left = {name: found for name, found in contents(out).items() if not name.startswith(storage.RUN_FOLDER)}
                assert left == expected, "it looks whole and is not"
        assert in_a_fork(lambda out=out: quantize(settings_of(recipe), out, resume=True))  # type: ignore[misc]
        assert contents(out) == expected
        shutil.rmtree(out)
    print(f"{kills} kills")
    assert kills, "no run was killed"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look after each other more often than they do for a user."""
    monkeypatch.setattr(watch, "PERIOD", 0.25)
    monkeypatch.setattr(watch, "_LOOKED", 2.0)
    monkeypatch.setattr(watch, "MISSING", 10.0)
    monkeypatch.setattr(watch, "STARTING", 10.0)


@pytest.mark.parametrize(("kind", "size"), [("llama", 2), ("moe", 4)])
def test_a_rank_of_quantize_killed(kind: str, size: int, moments: Moments, soon: None, tmp_path: Path) -> None:
    """Any rank, at any moment: the others say so once, and as many ranks go on to the bytes of a run that nobody killed. Every
    run is killed three times, on its way on too. The mixture has four layers."""
    model = tmp_path / "model"
    write_tiny_model(model) if kind == "llama" else write_moe(model, num_hidden_layers=4)
    settings, whole = ranks_of.settings_of(tmp_path, model, "apex4" if kind == "llama" else "gptq"), tmp_path / "whole"
    started = time.monotonic()
    ranks_of.whole(ranks_of.several(size, settings, whole).wait(HANGS))
    seconds, expected = time.monotonic() - started, contents(whole)
    drawn, kills = moments(3), 0
    while kills < drawn.count:  # type: ignore[attr-defined]
        out = tmp_path / f"after-{kills}"
        for _ in range(3):
            victim = drawn.randrange(size)
            running = ranks_of.several(size, settings, out, resume=True)
            running.wait_for([victim], drawn.uniform(0, seconds))
            running.kill(victim)
            ended = running.wait(HANGS)
            kills += ended[victim].code == -signal.SIGKILL
            others = [each for rank, each in enumerate(ended) if rank != victim]
            if any(each.code for each in others):  # else all was written when it was killed, or it had ended
                said = [line for each in others for line in each.stderr.splitlines() if "holds no run yet" not in line]
                assert {each.code for each in others} <= {0, ranks_of.STOPPED}, ended
                assert len(said) == 1 and said[0].startswith("apex4: ") and "nothing finished is lost" in said[0], ended
            if (out / "config.json").exists():
                left = {name: found for name, found in contents(out).items() if not name.startswith(storage.RUN_FOLDER)}
                assert left == expected, "it looks whole and is not"
        ranks_of.whole(ranks_of.several(size, settings, out, resume=True).wait(HANGS))
        assert contents(out) == expected, f"one of {size} ranks killed, the last at rank {victim}"
        shutil.rmtree(out)
    print(f"{kills} kills of one of {size} ranks")


def test_repack_killed(whole: dict[str, tuple[Path, float]], moments: Moments, tmp_path: Path) -> None:
    source, direct = str(whole["gptq"][0]), tmp_path / "direct"
    started = time.monotonic()
    in_a_fork(lambda: repack(source, direct, "H200"))
    seconds, expected = time.monotonic() - started, contents(direct)
    drawn, kills = moments(8), 0
    for number in range(drawn.count):  # type: ignore[attr-defined]
        out = tmp_path / str(number)
        kills += not in_a_fork(lambda out=out: repack(source, out, "H200"), drawn.uniform(0, seconds))  # type: ignore[misc]
        if (out / "config.json").exists():
            assert contents(out) == expected, "it looks whole and is not"
        shutil.rmtree(out, ignore_errors=True)
    print(f"{kills} kills")
    assert in_a_fork(lambda: repack(source, tmp_path / "again", "H200")) and contents(tmp_path / "again") == expected


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_disks_that_fail(
    whole: dict[str, tuple[Path, float]],
    settings_of: Callable[[str], QuantizeSettings],
    moments: Moments,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """quantize goes on with --resume where the disk is mended; repack begins again; nothing that is not whole looks so."""
    source = str(whole["gptq"][0])
    with failing(-1, 0, monkeypatch) as all_calls:
        repack(source, tmp_path / "repacked", "H200")
    steps = {"repack": len(all_calls)}
    with failing(-1, 0, monkeypatch) as all_calls:
        quantize(settings_of("gptq"), tmp_path / "quantized")
    steps["quantize"] = len(all_calls)
    assert min(steps.values()) > 15
    expected = {"repack": contents(tmp_path / "repacked"), "quantize": contents(tmp_path / "quantized")}
    wanted = [(kind, number, code) for kind, count in steps.items() for number in range(1, count + 1) for code in CODES]
    drawn = moments(60)
    drawn.shuffle(wanted)
    for kind, number, code in wanted[: drawn.count]:  # type: ignore[attr-defined]
        out = tmp_path / f"{kind}-{number}-{code}"

        def run(kind: str = kind, out: Path = out) -> None:
            if kind == "repack":
                repack(source, out, "H200")
            else:
                quantize(settings_of("gptq"), out, resume=True)

        with failing(number, code, monkeypatch) as calls:
            try:
                run()
                done = True
            except Apex4Error as error:
                done = False
                assert "\n" not in str(error)
            except OSError as error:  # said by the command line as one sentence
                done = False
                assert error.errno == code
        if (out / "config.json").exists():
            left = {name: found for name, found in contents(out).items() if not name.startswith(storage.RUN_FOLDER)}
            assert left == expected[kind], f"{calls[-1]} {number} of {kind}: it looks whole and is not"
        if not done:
            if kind == "repack":
                shutil.rmtree(out, ignore_errors=True)
            run()
        assert contents(out) == expected[kind], f"after {number} of {kind}, {errno.errorcode[code]}"
        shutil.rmtree(out)
