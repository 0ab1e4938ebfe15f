"""How the end of one rank becomes the end of all: within a minute, with one sentence, and one exit code.

Every rank tells the store of torch.distributed once a second that it lives, and looks whether the rank behind it does.
A rank that fails writes its sentence and exit code there, prints the sentence and ends; the others read it and end with
the same code, without a word, also if they are inside a collective that will never return. A rank that is killed writes
nothing: whoever misses it says so. Only the first cause counts.

    cause      exit code and sentence of the first that failed
    said       the sentence was printed
    alive/N    a number that rank N makes larger every second
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import torch
from torch.distributed.distributed_c10d import Store

from ..errors import Apex4Error
from .group import RankLost

PERIOD = 1.0  # seconds between two signs of life
MISSING = 30.0  # seconds without one, after which a rank is given up
STARTING = (
    120.0  # seconds for the first: ranks import torch for different times, and one killed meanwhile has never been here
)
_LOOKED = 4.0  # seconds in which a rank that lives has given a sign, when a collective has failed
_FIRST_GOES_FIRST = 0.5  # seconds: what all ranks refuse alike is said by rank 0
GO_ON = "nothing finished is lost, --resume goes on"

CAUSE, SAID = "cause", "said"


class Watch:
    """Of this rank, from `begin` until `end`. `hosted`: the store is in a process of its own, and not in rank 0."""

    def __init__(self, rank: int, size: int, store: Store, hosted: bool) -> None:
        self.rank, self.size, self._store, self._hosted = rank, size, store, hosted
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="apex4 watch")

    def begin(self) -> None:
        self._store.set(f"alive/{self.rank}", "0")
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def _look(self) -> None:
        behind, last, since, signs = (self.rank + 1) % self.size, "", time.monotonic(), 0
        while not self._ending.wait(PERIOD):
            signs += 1
            try:
                self._store.set(f"alive/{self.rank}", str(signs))
                if self._store.check([CAUSE]):
                    self._follow()
                sign = self._sign_of(behind)
            except RuntimeError:  # the store is gone
                self._without_store()
            if sign != last or behind == self.rank:
                last, since = sign, time.monotonic()
            elif not sign and time.monotonic() - since > STARTING:
                self.fail_with(75, f"rank {behind} did not begin within {STARTING:.0f} s of others: {GO_ON}")
            elif sign and time.monotonic() - since > MISSING:
                self.fail_with(75, f"rank {behind} gave no sign of life for {MISSING:.0f} s: {GO_ON}")

    def _sign_of(self, rank: int) -> str:
        name = f"alive/{rank}"
        return self._store.get(name).decode() if self._store.check([name]) else ""

    def fail(self, error: BaseException) -> NoReturn:
        """End this process for what it met, and so all."""
        if isinstance(error, SystemExit) and not error.code:
            _leave(0)
        name = f"rank {self.rank}"
        if isinstance(error, RankLost):
            self._blame(error)
        if isinstance(error, Apex4Error):
            if self.rank:
                self._wait_for(CAUSE, _FIRST_GOES_FIRST)
            self.fail_with(error.exit_code, str(error) if self.rank == 0 else f"{name}: {error}")
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            memory = "of its GPU" if isinstance(error, torch.OutOfMemoryError) else "of the host"
            self.fail_with(75, f"{name} has no memory {memory} left: {GO_ON}, on more ranks or with shorter windows")
        said = traceback.format_exc()
        self.fail_with(1, f"{name} ended by {type(error).__name__}", said)

    def _blame(self, error: RankLost) -> NoReturn:
        """A collective failed: another rank is gone, or has failed and says so itself."""
        try:
            before = [self._sign_of(rank) for rank in range(self.size)]
            if self._wait_for(CAUSE, _LOOKED):
                self._follow()
            still = [self._sign_of(rank) for rank in range(self.size)]
        except RuntimeError:
            self._without_store()
        lost = [rank for rank in range(self.size) if before[rank] == still[rank] and rank != self.rank]
        if not lost:
            self.fail_with(75, f"{error}: {GO_ON}")
        names = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        self.fail_with(75, f"{names} ended without a word, killed or out of memory: {GO_ON}")

    def fail_with(self, code: int, sentence: str, details: str = "") -> NoReturn:
        """Say it, unless another rank has said why all end, and end."""
        mine = json.dumps([code, sentence, self.rank])
        try:
            if self._store.compare_set(CAUSE, "", mine).decode() != mine:
                self._follow()
            _say(details + f"apex4: {sentence}")
            self._store.set(SAID, "1")
        except RuntimeError:
            self._without_store()
        _leave(code)

    def _follow(self) -> NoReturn:
        """End as the rank that failed first."""
        code = 1
        try:
            code = int(json.loads(self._store.get(CAUSE))[0])
            self._wait_for(SAID, 5.0)
        except RuntimeError:
            pass
        _leave(code)

    def _wait_for(self, name: str, seconds: float) -> bool:
        """Whether it is in the store, after so many seconds at most."""
        until = time.monotonic() + seconds
        while not self._store.check([name]):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def _without_store(self) -> NoReturn:
        """The process that holds it is gone: the launcher, or rank 0."""
        if self.rank == (0 if self._hosted else 1):
            whose = "the launcher of the ranks" if self._hosted else "rank 0"
            _say(f"apex4: {whose} ended without a word, killed or out of memory: {GO_ON}")
        _leave(75)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """At once: other threads may be inside a collective, and destructors would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
