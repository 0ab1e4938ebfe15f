"""How long work reports itself: bars on stderr for people, nothing for programs. For benchmarks, how long its steps take."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 30  # between two reports of a stage in a log file


class Progress:
    """Says nothing. The base of what the command line uses and the default of the library."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A stretch of work of `total` units; yields the function that is told the units done."""
        yield lambda done: None

    def line(self, text: str) -> None:
        """A finding worth a line of its own."""


class TerminalProgress(Progress):
    """On a terminal bars of tqdm on stderr, and lines that do not break them. Elsewhere, in a log file, lines only: a bar
    would be written over and over, and run into what else is printed there."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if not sys.stderr.isatty():
            yield _Reports(name, total).tell
            return
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        with tqdm(total=total, desc=name, unit=unit, unit_scale=True, bar_format=form, file=sys.stderr) as bar:

            def tell(done: int) -> None:
                bar.update(done)

            yield tell

    def line(self, text: str) -> None:
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


class _Reports:
    """Whole lines on stderr: a stage's name when it begins, and how far it is every LINE_SECONDS."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._started = self._said = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)

    def tell(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS and self._total:
            self._said = now
            percent = 100 * self._done // self._total
            print(f"{self._name}: {percent} % after {now - self._started:.0f} s", file=sys.stderr, flush=True)


class StepTimes:
    """Seconds of the steps of work that name themselves by `step`, while `measuring`; of a step inside another only its own.

    `synchronize` waits for a GPU at every border of a step. What the host and the GPU do beside each other is then one after the other.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._inside: list[str] = []  # the steps that are going on, from the outermost
        self._since = 0.0  # the last border

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Of the thread that asks: others do work that nobody waits for."""
        _measured.times = self
        try:
            yield
        finally:
            del _measured.times

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._border()
        self._inside.append(name)
        try:
            yield
        finally:
            self._border()
            self._inside.pop()

    def _border(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] = self.seconds.get(self._inside[-1], 0.0) + now - self._since
        self._since = now


_measured = threading.local()


@contextmanager
def step(name: str) -> Iterator[None]:
    """A step of work, or as a decorator all of a function. Nothing happens unless a benchmark measures (StepTimes)."""
    times: StepTimes | None = getattr(_measured, "times", None)
    if times is None:
        yield
        return
    with times.step(name):
        yield
