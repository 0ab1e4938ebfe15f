"""How long work reports itself: bars on stderr for people, nothing for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Says nothing. The base of what the command line uses and the default of the library."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A stretch of work of `total` units; yields the function that is told the units done."""
        yield lambda done: None

    def line(self, text: str) -> None:
        """A finding worth a line of its own."""


class TerminalProgress(Progress):
    """tqdm on stderr, and lines that do not break the bar."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
        pause = 0.1 if sys.stderr.isatty() else 15.0  # a log file wants a line now and then, not a moving bar
        with tqdm(
            total=total, desc=name, unit=unit, unit_scale=True, bar_format=form, file=sys.stderr, mininterval=pause
        ) as bar:

            def tell(done: int) -> None:
                bar.update(done)

            yield tell

    def line(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
