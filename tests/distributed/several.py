"""Several ranks on this host, quickly: forks of the test's process, which has everything imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from apex4_quant.distributed.group import Group
from apex4_quant.distributed.starting import ranks

HERE = "127.0.0.1"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """`code`: the exit code, or the negative number of the signal that ended it."""

    code: int
    stdout: str
    stderr: str


class Several:
    """`work(group)` on `size` ranks. Their store is in a process of its own, as under torchrun it is in the agent: in this one it
    would be a thread, and what is forked while it holds a lock may wait for that lock forever."""

    def __init__(self, size: int, folder: Path, work: Callable[[Group], Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._store, self._port = self._start_store()
        self.pids = [self._start(rank, size, work) for rank in range(size)]

    @staticmethod
    def _start_store() -> tuple[int, int]:
        """Its process and its port. It ends with this process, if not before."""
        read, write = os.pipe()
        if pid := os.fork():
            os.close(write)
            with os.fdopen(read) as pipe:
                return pid, int(pipe.readline())
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
            os.write(write, f"{store.port}\n".encode())
            while True:
                signal.pause()
        finally:
            os._exit(1)

    def _start(self, rank: int, size: int, work: Callable[[Group], Any]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": HERE}
        os.environ |= {"MASTER_PORT": str(self._port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
        self._work(rank, work)

    def _work(self, rank: int, work: Callable[[Group], Any]) -> NoReturn:
        code = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                file = os.open(self.folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            with ranks("cpu") as group:
                work(group)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def wait_for(self, ranks: Sequence[int], seconds: float = 60) -> None:
        """Until these have ended, or so many seconds."""
        until = time.monotonic() + seconds
        for rank in ranks:
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(os.P_PID, self.pids[rank], look) is None and time.monotonic() < until:
                time.sleep(0.02)

    def lose_store(self) -> None:
        if self._store:
            os.kill(self._store, signal.SIGKILL)
            os.waitpid(self._store, 0)
            self._store = 0

    def wait(self, seconds: float = 120) -> list[Ended]:
        """How each ended. Those that have not after so many seconds are killed, and it is a failure."""
        until, codes = time.monotonic() + seconds, dict.fromkeys(self.pids)
        while None in codes.values() and time.monotonic() < until:
            for pid in [pid for pid, code in codes.items() if code is None]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        self.lose_store()
        late = [pid for pid, code in codes.items() if code is None]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        ended = [
            Ended(code or 0, *((self.folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr")))
            for rank, code in enumerate(codes.values())
        ]
        assert not late, f"{len(late)} ranks did not end: {ended}"
        return ended
