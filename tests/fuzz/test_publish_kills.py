"""kill -9 of a publisher at random moments, then the same command: the right tree, and never a model that is not whole."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ..hub_server.server import HubServer
from ..publishing.conftest import checkpoint, hub, hub_environment, python, same_files  # noqa: F401
from ..publishing.test_faults import PUBLISH, looks_whole
from ..publishing.test_publish import NAME
from .conftest import HANGS


def test_publish_killed(
    hub: HubServer,  # noqa: F811
    checkpoint: Callable[..., Path],  # noqa: F811
    python: Callable[..., subprocess.Popen[str]],  # noqa: F811
    moments: Callable[[int], random.Random],
) -> None:
    """A process is killed after its first request and before the time that an undisturbed one takes after it."""
    folder = checkpoint()
    for pattern in ("repos/create", "preupload", "PUT /lfs/", "POST .*/commit/"):
        hub.inject(pattern, times=10**9, seconds=0.1)  # moments within every step, not only between them

    def start() -> tuple[subprocess.Popen[str], float]:
        asked = len(hub.requests)
        process = python(PUBLISH)
        while len(hub.requests) == asked and process.poll() is None:
            time.sleep(0.002)
        return process, time.monotonic()

    first, started = start()
    assert first.wait(HANGS) == 0
    seconds = time.monotonic() - started
    drawn, kills, early = moments(4), 0, 0
    for _ in range(drawn.count):  # type: ignore[attr-defined]
        shutil.rmtree(hub.store.folder / "repositories")
        for oid in list(hub.store.objects_uploaded()):
            hub.store.object(oid).unlink()
        process, started = start()
        time.sleep(drawn.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        early += not looks_whole(hub)
        assert not looks_whole(hub) or same_files(hub, NAME, folder), "it looks whole and is not"
        output, errors = python(PUBLISH).communicate(timeout=HANGS)
        assert errors == "" and output.strip().isdigit(), errors
        assert same_files(hub, NAME, folder)
        assert hub.store.load(NAME).refs["refs/tags/v1"] == hub.store.load(NAME).refs["refs/heads/main"]
    print(f"{kills} kills, {early} of them before the model was there")
    assert kills, "no run was killed"
