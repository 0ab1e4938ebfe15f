"""What all fuzzers share: how many cases, from which seed, and models that are opened in milliseconds.

Without options every run draws the same cases, as many as fit into four minutes for all of tests/fuzz. `--fuzz N` draws N
times as many, others in every run; what fails prints how to draw it again.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from apex4_quant.errors import Apex4Error

from ..conftest import write_calibration, write_tiny_model


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], settings]:
    """cases(n) -> hypothesis' settings for n cases, times --fuzz."""
    factor = int(request.config.getoption("--fuzz"))

    def make(count: int) -> settings:
        return settings(
            max_examples=count * factor,
            derandomize=factor == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )

    return make


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> Callable[[int], random.Random]:
    """moments(n) -> a generator, and in `.count` how many draws are wanted: n, times --fuzz."""
    factor = int(request.config.getoption("--fuzz"))

    def make(count: int) -> random.Random:
        seed = 0 if factor == 1 else time.time_ns()
        print(f"seed {seed}")
        drawn = random.Random(seed)
        drawn.count = count * factor  # type: ignore[attr-defined]
        return drawn

    return make


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 0.4 M parameters in shards. Read only."""
    return write_tiny_model(tmp_path_factory.mktemp("fuzz") / "small", sharded=True, vocab_size=4096)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("fuzz") / "text.txt")


SLOWEST = 30.0  # seconds of computing that a case may take
HANGS = 600.0  # seconds by the clock: on a busy machine a process may wait for minutes


@contextmanager
def refused_or_right(what: Any) -> Iterator[None]:
    """One sentence of ours, or nothing: not another exception, no hang, no memory beyond that of the input."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, computed = time.monotonic(), time.process_time()
    try:
        yield
    except Apex4Error as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 1500, f"{what!r}: {said!r}"
    seconds, computing = time.monotonic() - started, time.process_time() - computed
    assert computing < SLOWEST and seconds < HANGS, f"{what!r} took {seconds:.0f} s, {computing:.0f} s of computing"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{what!r} took {grown} KB"
