"""The kernels of GPTQ's rounding and of descent on codes: compiled for every architecture, and their own source run on a CPU
(tests/cuda_on_cpu) against what gptq.py and coordinate_descent.py do by operations of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.sweeps import column_sweeps
from apex4_quant.kernels.sweeps.configs import all_configs

from ... import cuda_on_cpu
from ...kernel_cases import sweeps as kernel_cases
from ..conftest import compiled

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


SMALL = [shape for shape in kernel_cases.SHAPES if shape[0] < 1000]


@pytest.mark.parametrize("config", all_configs(80), ids=lambda config: config.name)
@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_they_compile_without_a_word_and_without_spills(sm: int, config: Any) -> None:
    result = compiled(config, sm)
    assert result.warnings == ""
    resources = result.resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0
    assert resources.registers <= 64  # two CTAs of 512 threads on a multiprocessor


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors go through the kernels, as a GPU's do. The sources of those launched."""
    launched: list[str] = []
    monkeypatch.setattr(column_sweeps, "run_on", lambda device: True)
    monkeypatch.setattr(column_sweeps, "_stream", lambda device: 0)
    return launched


def launch_with(launcher_of_cpu: Any, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(source: str, *rest: Any) -> Any:
        sources.append(source)
        return launcher_of_cpu.kernel(source, *rest)

    monkeypatch.setattr(launcher, "kernel", kernel)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_kernels_do_what_operations_of_pytorch_do(
    shape: tuple[int, int, Any], cpu_launcher: Any, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_with(cpu_launcher, sources, monkeypatch)
    kernel_cases.check(*shape, CPU, seed=1)
    blocks = shape[1] // 128
    assert sources == ["sweeps/gptq_sweep.cu"] * 2 * blocks + ["sweeps/descent_sweep.cu"] * 3 * blocks


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_kernels_round_to_a_grid_as_operations_of_pytorch_do(
    shape: tuple[int, int, Any], cpu_launcher: Any, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_with(cpu_launcher, sources, monkeypatch)
    kernel_cases.check(*shape, CPU, seed=1, bits=8)
    blocks = shape[1] // 128
    gptq = ["sweeps/gptq_sweep.cu"] * blocks + ["sweeps/gptq_grid_sweep.cu"] * blocks
    assert sources == gptq * 2 + ["sweeps/descent_grid_sweep.cu"] * 3 * blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_check_of_hessians_passes_on_a_cpu(dtype: torch.dtype) -> None:
    kernel_cases.check_hessian(dtype, CPU, seed=1)


MUTATIONS = {
    "another column's error": ("gptq_sweep.cu", "subtract(w, u, error)", "subtract(w, u, code)"),
    "owner": ("gptq_sweep.cu", "__shfl_sync(ALL_LANES, w[c], owner)", "__shfl_sync(ALL_LANES, w[c], 31 - owner)"),
    "cost": ("gptq_sweep.cu", "__frcp_rn(diagonal * diagonal)", "__frcp_rn(diagonal)"),
    "smallest scale": ("gptq_sweep.cu", "fmaxf(absmax * steps[i], scale_min)", "fmaxf(absmax * steps[i], 0.0f)"),
    "first ratio": ("gptq_sweep.cu", "error < least", "error > least"),
    "damping": ("descent_sweep.cu", "__fmaf_rn(-added, moved, gradient[c])", "gradient[c]"),
    "change": ("descent_sweep.cu", "(code[c] - before[c]) * scale", "(code[c] - before[c])"),
    "grid: another column's error": ("gptq_grid_sweep.cu", "subtract(w, u, error)", "subtract(w, u, value)"),
    "grid: bound": ("column_sweep.cuh", "(grid.level[i + 1] + grid.level[i]) * 0.5f", "grid.level[i]"),
    "grid: sign": ("column_sweep.cuh", "value < 0.0f ? -worth : worth", "worth"),
    "grid: worth": ("descent_grid_sweep.cu", "const float moved = code.worth - now", "const float moved = code.number - now"),
    "grid: damping": ("descent_grid_sweep.cu", "__fmaf_rn(-added, moved, gradient[c])", "gradient[c]"),
    "grid: change": ("descent_grid_sweep.cu", "before[c] = after[c] - before[c]", "before[c] = after[c]"),
    "slope": ("descent_sweep.cu", "subtract(gradient, h, moved)", "subtract(gradient, h, -moved)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_line_is_noticed(name: str, sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    changed = cuda_on_cpu.CpuLauncher([MUTATIONS[name]], optimization="-O0")
    launch_with(changed, sources, monkeypatch)
    monkeypatch.setattr(kernel_cases, "DAMPING", 0.5)  # so much that to forget it changes codes
    with pytest.raises(AssertionError):
        kernel_cases.check(37, 384, 128, CPU, seed=1, bits=8 if name.startswith("grid") else 4)
