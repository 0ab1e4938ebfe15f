"""The end of one rank is the end of all: soon, with one sentence, and one exit code."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from apex4_quant.distributed import watch
from apex4_quant.distributed.group import Group
from apex4_quant.environment import TIMEOUT
from apex4_quant.errors import Apex4Error, Stopped, UsageError

from .several import Ended, Several

SIZE = 3


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life four times a second: nobody here waits as long as for a rank on a busy host."""
    monkeypatch.setattr(watch, "PERIOD", 0.25)
    monkeypatch.setattr(watch, "_LOOKED", 2.0)


def sentence_of(ended: list[Ended], code: int, but: int | None = None) -> str:
    """What was said, once; all ranks `but` one have the exit code."""
    assert [each.code for rank, each in enumerate(ended) if rank != but] == [code] * (len(ended) - (but is not None)), (
        ended
    )
    lines = "".join(each.stderr for each in ended).splitlines()
    said = [line for line in lines if line.startswith("apex4: ")]
    assert len(said) == 1, lines
    return said[0].removeprefix("apex4: ")


def raising(error: Callable[[], BaseException], by: int | None) -> Callable[[Group], None]:
    def work(group: Group) -> None:
        group.barrier()
        if by in (None, group.rank):
            raise error()
        group.barrier()

    return work


@pytest.mark.parametrize(
    ("error", "by", "code", "sentence"),
    [
        (lambda: UsageError("no such thing"), 1, 2, "rank 1: no such thing"),
        (lambda: Apex4Error("it is damaged"), 0, 1, "it is damaged"),
        (lambda: Stopped("stopped before layer 3"), None, 75, "stopped before layer 3"),
        (MemoryError, 2, 75, "rank 2 has no memory of the host left: nothing finished is lost"),
        (lambda: ZeroDivisionError("a bug"), 1, 1, "rank 1 ended by ZeroDivisionError"),
    ],
)
def test_an_error_is_said_once_by_who_met_it(
    error: Callable[[], BaseException], by: int | None, code: int, sentence: str, tmp_path: Path
) -> None:
    ended = Several(SIZE, tmp_path, raising(error, by)).wait(30)
    assert sentence_of(ended, code).startswith(sentence)
    assert ("a bug" in "".join(each.stderr for each in ended)) == (sentence.endswith("ZeroDivisionError"))


def test_a_rank_that_is_killed_before_it_begins_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher is here to see it. torch alone would wait for ten minutes."""
    begin = watch.Watch.begin

    def killed(self: watch.Watch) -> None:
        if self.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self)

    monkeypatch.setattr(watch.Watch, "begin", killed)
    monkeypatch.setattr(watch, "STARTING", 2.0)
    ended = Several(SIZE, tmp_path, meeting_forever).wait(30)
    assert "rank 2 did not begin within 2 s of others: nothing finished is lost" in sentence_of(ended, 75, but=2)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named(victim: int, tmp_path: Path) -> None:
    running = Several(SIZE, tmp_path, meeting_forever)
    time.sleep(0.7)
    running.kill(victim)
    ended = running.wait(30)
    assert ended[victim].code == -signal.SIGKILL
    said = sentence_of(ended, 75, but=victim)
    assert said.startswith(f"rank {victim} ended without a word") and said.endswith("--resume goes on")


def meeting_forever(group: Group) -> None:
    while True:
        group.barrier()
        time.sleep(0.01)


def test_a_rank_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MISSING", 3.0)
    running = Several(SIZE, tmp_path, meeting_forever)
    time.sleep(0.7)
    running.kill(1, signal.SIGSTOP)
    running.wait_for([0, 2])
    running.kill(1)  # as the launcher does with those that do not end
    assert sentence_of(running.wait(30), 75, but=1).startswith("rank 1 gave no sign of life for 3 s")


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that lives and never comes, in a call of the system for example."""

    def work(group: Group) -> None:
        group.barrier()
        if group.rank == 1:
            time.sleep(60)
        group.barrier()

    monkeypatch.setenv(TIMEOUT, "1")
    began = time.monotonic()
    ended = Several(2, tmp_path, work).wait(40)
    assert time.monotonic() - began < 30
    assert "does not answer" in sentence_of(ended, 75)


@pytest.mark.parametrize("value", ["", "0", "ten"])
def test_a_timeout_that_is_none_is_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, value)
    said = sentence_of(Several(2, tmp_path, lambda group: None).wait(30), 2)
    assert said == f"{TIMEOUT} is {value!r}: give a whole number of seconds, 1 or more"


def test_without_the_launcher_all_end(tmp_path: Path) -> None:
    running = Several(2, tmp_path, meeting_forever)
    time.sleep(0.7)
    running.lose_store()
    assert sentence_of(running.wait(30), 75).startswith("the launcher of the ranks ended without a word")
