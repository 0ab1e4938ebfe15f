"""The kernels of distillation: compiled for every architecture, and their own source run on a CPU (tests/cuda_on_cpu) against
operations of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apex4_quant.kernels.runtime import launcher
from apex4_quant.kernels.training import ops
from apex4_quant.kernels.training.configs import all_configs

from ... import cuda_on_cpu
from ...kernel_cases import training as kernel_cases
from ..conftest import compiled

CPU = torch.device("cpu")
SMALL_ACTIVATIONS = [case for case in kernel_cases.ACTIVATIONS if case[0] < 100]
SMALL_FEEDBACK = [case for case in kernel_cases.WITH_FEEDBACK if case[0] < 100]
SMALL_WEIGHTS = [case for case in kernel_cases.WEIGHTS if case[0] < 100]
SMALL_VOCABULARIES = [case for case in kernel_cases.VOCABULARIES if case[1] < 2000]


@pytest.mark.parametrize("config", all_configs(80), ids=lambda config: config.name)
@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_they_compile_without_a_word_and_without_spills(sm: int, config: Any) -> None:
    result = compiled(config, sm)
    assert result.warnings == ""
    resources = result.resources
    assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0


def run_kernels(monkeypatch: pytest.MonkeyPatch, edits: Any = ()) -> None:
    """CPU tensors go through the kernels, as a GPU's do."""
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernels' source with")
    of_cpu = cuda_on_cpu.CpuLauncher(edits, optimization="-O0")
    monkeypatch.setattr(ops, "run_on", lambda device: True)
    monkeypatch.setattr(ops, "_stream", lambda device: 0)
    monkeypatch.setattr(launcher, "kernel", lambda source, entry, *rest: of_cpu.kernel(source, entry, *rest))
    for kept in (ops._rounding, ops._feedback, ops._divergence):
        kept.cache_clear()


@pytest.fixture(autouse=True)
def forget_kernels() -> Any:
    yield
    for kept in (ops._rounding, ops._feedback, ops._divergence):
        kept.cache_clear()


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_ACTIVATIONS, ids=str)
def test_activations(case: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels(monkeypatch)
    kernel_cases.check_activation(*case, dtype, CPU, seed=1)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_FEEDBACK, ids=str)
@pytest.mark.parametrize("sixteen", [False, True])
def test_feedback(case: Any, sixteen: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels(monkeypatch)
    kernel_cases.check_feedback(*case, dtype, CPU, seed=1, sixteen=sixteen)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_WEIGHTS, ids=str)
def test_weights(case: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels(monkeypatch)
    kernel_cases.check_weight(*case, dtype, CPU, seed=1)


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_VOCABULARIES, ids=str)
def test_divergence(case: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels(monkeypatch)
    kernel_cases.check_divergence(*case, dtype, CPU, seed=1)


MUTATIONS = {
    "inside": ("round_activation.cu", "ratio <= highest + 0.5f", "ratio <= highest"),
    "first of equals": ("round_activation.cu", "other_place < place", "other_place > place"),
    "clip": ("round_activation.cu", "by_clip[group] = by_scale * scale", "by_clip[group] = by_scale"),
    "sign of the largest": ("round_activation.cu", "largest < 0.0f ? -1.0f : 0.0f", "largest < 0.0f ? 1.0f : 0.0f"),
    "codes with feedback": ("round_activation.cu", "__fdiv_rn(made[i], scale) : ratio", "ratio : ratio"),
    "the step": ("round_feedback.cu", "feedback_fragment_byte(step, pair, lane)", "feedback_fragment_byte(step, 0, lane)"),
    "the scale": ("round_feedback.cu", "expf(log_clip[APEX4_FEEDBACK == 2 ? block : 0]) / code_max", "1.0f / code_max"),
    "sixteen: clips of blocks": ("round_feedback.cu", "APEX4_FEEDBACK == 2 ? block : 0", "0"),
    "sixteen: clips of blocks, back": ("round_activation.cu", "blocks ? static_cast<unsigned>(group) % blocks : 0", "0"),
    "sixteen: sign of a scale": ("round_activation.cu", "copysignf(magnitude, -largest)", "copysignf(magnitude, largest)"),
    "sixteen: gradient of the largest": ("round_activation.cu", "blocks ? -1.0f :", "blocks ? 1.0f :"),
    "sixteen: the negative one": ("round_activation.cu", "x[i] == -fabsf(largest) && largest > 0.0f", "false"),
    "sixteen: below": ("round_activation.cu", "blocks ? -SIXTEEN_LEVELS_MOST : -code_max", "-code_max"),
    "gradient of scales": ("round_weight.cu", "sum = fmaf(g[i], code_of(x[i], code_max), sum)", "sum += g[i]"),
    "rounding of folded weights": ("round_weight.cu", "folding, 128.0f) / 256.0f", "folding, 0.0f) / 256.0f"),
    "shrinking": ("divergence.cu", "exponentials *= shrink, differences *= shrink", "exponentials *= shrink"),
    "gradient": ("divergence.cu", "expf(y[i] - log_p)", "expf(y[i] - log_q)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_line_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels(monkeypatch, [MUTATIONS[name]])
    monkeypatch.setattr(kernel_cases, "DIFFERENT", 0)
    with pytest.raises(AssertionError):
        sixteen = name.startswith("sixteen")
        if name == "codes with feedback" or sixteen or MUTATIONS[name][0] == "round_feedback.cu":
            kernel_cases.check_feedback(*SMALL_FEEDBACK[1], torch.float32, CPU, seed=1, sixteen=sixteen)
        elif MUTATIONS[name][0] == "round_activation.cu":
            kernel_cases.check_activation(*SMALL_ACTIVATIONS[1], torch.float32, CPU, seed=1)
        elif MUTATIONS[name][0] == "round_weight.cu":
            kernel_cases.check_weight(*SMALL_WEIGHTS[1], torch.float32, CPU, seed=1)
        else:
            kernel_cases.check_divergence(*SMALL_VOCABULARIES[0], torch.float32, CPU, seed=1)
