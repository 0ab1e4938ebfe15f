"""Kernels compiled for a GPU, or run from their own source on a CPU (tests/cuda_on_cpu)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.runtime.compiler import arch_of, compile_kernel

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


def compiled(config: Any, sm: int) -> Any:
    """What NVRTC makes of a configuration. Skips the test where that is not installed."""
    try:
        return compile_kernel(config.source, config.defines, arch_of(sm))
    except Apex4Error as error:
        if "is not installed" in str(error) or "is needed" in str(error):
            pytest.skip(str(error))
        raise
