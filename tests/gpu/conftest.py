"""The checks of kernels on a GPU: every kernel of this GPU against its reference. `scripts/gpu_check` runs them all.

Random, extreme and ragged operands, poisoned outputs, integer sums bit for bit, determinism, CUDA-graph replay, many
streams. Nothing is timed. On Hopper the kernels of sm_80, sm_86 and sm_89 are checked too: their 4-bit mma is emulated
there, so their times would mean nothing. The reference is float64; of the kernels that quantize weights, what operations of
PyTorch do on the same GPU. The options are in tests/selection.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

NO_GPU = "needs a CUDA GPU"


@dataclass(frozen=True)
class Gpu:
    device: torch.device
    sm: int
    sm_count: int
    generator: torch.Generator
    seed: int


def sm_of(config: pytest.Config) -> int | None:
    """90 for an H100, None without a GPU. --gpu-as says it where the tests are only listed."""
    given: int | None = config.getoption("--gpu-as")
    if given is not None or not torch.cuda.is_available():
        return given
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `case` gets those that `CASES[its name]` of its module lists for this GPU, with their ids."""
    if "case" not in metafunc.fixturenames:
        return
    sm = sm_of(metafunc.config)
    if sm is None:
        metafunc.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=NO_GPU), id="no GPU")])
        return
    list_cases: Callable[[int, pytest.Config], dict[str, Any]] = metafunc.module.CASES[metafunc.function.__name__]
    cases = list_cases(sm, metafunc.config)
    metafunc.parametrize("case", list(cases.values()), ids=list(cases))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if "/tests/gpu/" in item.path.as_posix()]
    left_out = [item for item in here if _left_out(config, item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def _left_out(config: pytest.Config, nodeid: str) -> bool:
    only: Sequence[str] = config.getoption("--gpu-only") or ()
    emulated = "emulated" in nodeid and config.getoption("--gpu-no-emulated")
    return bool(emulated or not all(text in nodeid for text in only))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """What a kernel does wrong after its launch counts as the failure of the test that launched it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """This GPU, and random numbers that depend on --gpu-seed and on the test's id alone."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    seed: int = request.config.getoption("--gpu-seed")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    generator = torch.Generator("cuda").manual_seed(seed + zlib.crc32(request.node.name.encode()))
    sm = 10 * properties.major + properties.minor
    return Gpu(device, sm, properties.multi_processor_count, generator, seed)
