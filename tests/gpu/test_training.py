"""What distillation computes with kernels, against operations of PyTorch; a step in a CUDA graph, against one without."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from apex4_quant.distillation.step import Step
from apex4_quant.distillation.student import Student

from ..kernel_cases import training

CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_activations": lambda *_: _named(training.ACTIVATIONS),
    "test_weights": lambda *_: _named(training.WEIGHTS),
    "test_divergence": lambda *_: _named(training.VOCABULARIES),
    "test_a_step_in_a_graph_has_the_same_gradients": lambda *_: {"once": None},
}


def _named(cases: tuple[Any, ...]) -> dict[str, Any]:
    return {f"{case} {dtype}": (*case, dtype) for case, dtype in product(cases, training.DTYPES)}


def test_activations(case: Any, gpu: Any) -> None:
    training.check_activation(*case, gpu.device, gpu.seed)


def test_weights(case: Any, gpu: Any) -> None:
    training.check_weight(*case, gpu.device, gpu.seed)


def test_divergence(case: Any, gpu: Any) -> None:
    training.check_divergence(*case, gpu.device, gpu.seed)


def test_a_step_in_a_graph_has_the_same_gradients(case: None, gpu: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(gpu.seed)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)
    original = LlamaForCausalLM(config).to(gpu.device, torch.bfloat16).eval().requires_grad_(False)
    student = Student(original, training.packed_linears(original))
    parameters = student.parameters()
    said: list[str] = []
    step = Step(original, student, parameters.values(), said.append)
    texts = torch.randint(512, (5, 4, 64), device=gpu.device)
    found = []
    for ids in texts:  # the first two without a graph, and then twice by a replay
        step(ids)
        found.append({name: parameter.grad.float().clone() for name, parameter in parameters.items()})
    step(texts[0])
    assert said == [] and step._graph is not None
    for name, parameter in parameters.items():
        once, again = found[0][name], parameter.grad.float()
        assert torch.nn.functional.cosine_similarity(once.flatten(), again.flatten(), dim=0) > 0.99, name
