"""Kernels run from their own source on a CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apex4_quant.kernels.runtime import launcher

from .. import cuda_on_cpu


@pytest.fixture(scope="module")
def cpu_launcher() -> Any:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    return cuda_on_cpu.CpuLauncher()


@pytest.fixture
def on_cpu(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go through the kernels, as a GPU's do."""
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
