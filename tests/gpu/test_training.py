"""What distillation computes with kernels, against operations of PyTorch; a step in a CUDA graph, against one without."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from apex4_quant.distillation import distill
from apex4_quant.distillation.own_text import write_windows
from apex4_quant.distillation.step import Step
from apex4_quant.distillation.student import Student

from ..kernel_cases import training

CASES: dict[str, Callable[[int, pytest.Config], dict[str, Any]]] = {
    "test_activations": lambda *_: _named(training.ACTIVATIONS),
    "test_feedback": lambda *_: _named(training.WITH_FEEDBACK),
    "test_weights": lambda *_: _named(training.WEIGHTS),
    "test_divergence": lambda *_: _named(training.VOCABULARIES),
    "test_a_step_in_a_graph_has_the_same_gradients": lambda *_: {"once": None},
    "test_a_stopped_distillation_goes_on": lambda *_: {"once": None},
}


def _named(cases: tuple[Any, ...]) -> dict[str, Any]:
    return {f"{case} {dtype}": (*case, dtype) for case, dtype in product(cases, training.DTYPES)}


def test_activations(case: Any, gpu: Any) -> None:
    training.check_activation(*case, gpu.device, gpu.seed)


def test_feedback(case: Any, gpu: Any) -> None:
    for sixteen in (False, True):
        training.check_feedback(*case, gpu.device, gpu.seed, sixteen)


def test_weights(case: Any, gpu: Any) -> None:
    training.check_weight(*case, gpu.device, gpu.seed)


def test_divergence(case: Any, gpu: Any) -> None:
    training.check_divergence(*case, gpu.device, gpu.seed)


def _model(gpu: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(gpu.seed)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)
    return LlamaForCausalLM(config).to(gpu.device, torch.bfloat16).eval().requires_grad_(False)


def test_a_step_in_a_graph_has_the_same_gradients(case: None, gpu: Any) -> None:
    original = _model(gpu)
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


def test_a_stopped_distillation_goes_on(case: None, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "STEP_TOKENS", 8 * 64)
    original = _model(gpu)
    own = write_windows(original, torch.arange(40), 64, 1, [3])
    assert own is not None and own.shape == (40, 64) and int(own.max()) < 512
    text = distill.Text.of([torch.randint(512, (40, 64)), own])

    def learned(stop_after: int) -> dict[str, torch.Tensor]:
        asked, saved = iter(range(100)), list[dict[str, torch.Tensor]]()
        student = Student(original, training.packed_linears(original))
        work = distill.Distillation(original, student, text, 12, 1)
        if not work.run(lambda steps: None, lambda: next(asked) >= stop_after, lambda state: saved.append(dict(state))):
            kept = {name: tensor.cpu() for name, tensor in saved[-1].items()}
            student = Student(original, training.packed_linears(original))
            work = distill.Distillation(original, student, text, 12, 1, kept)
            assert work.step == stop_after and work.run(lambda steps: None, lambda: False, lambda state: None)
        result = work.result()
        assert result.after < result.before
        return {name: parameter.detach().float() for name, parameter in student.parameters().items()}

    whole, parts = learned(100), learned(7)
    for name, tensor in whole.items():
        # Attention adds up in any order. A step changes v by 3e-3 at most.
        assert float((parts[name] - tensor).abs().mean()) < 1e-3, name
