"""The gradients that are taken before a run: against one backward pass, kept, taken again, on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apex4_quant.errors import Apex4Error, Stopped
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.progress import Progress
from apex4_quant.quantization import predictions
from apex4_quant.quantization.predictions import LeavingGradients, gradient_bytes_on_disk
from apex4_quant.quantization.run_state import RunState, StateKind

Call = Callable[..., Any]  # the fixtures of conftest.py


@pytest.fixture
def taken(tiny_model: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LeavingGradients, RunState, Path]:
    """Of three of the five windows of 24 tokens of a model of two layers."""
    monkeypatch.setattr(predictions, "GRADIENT_TOKENS", 49)
    model = tiny_model()
    source = ModelSource(str(model))
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(24)
    state = RunState.begin(tmp_path / "out", {"model": str(model), "inputs": {}})
    samples = torch.arange(5 * 24).reshape(5, 24) * 31 % 4096
    return LeavingGradients(source, runner, state, samples), state, model


def test_they_are_those_of_the_models_predictions(taken: tuple[LeavingGradients, RunState, Path]) -> None:
    """Against one backward pass through the whole model, in float64 but for what rests in bfloat16; up to a factor."""
    leaving, _, path = taken
    leaving.take(0, 5, Progress(), lambda: False)
    assert leaving.windows.tolist() == [0, 1, 3]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").double()
    model.model.rotary_emb.float()
    left: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        left.append(output)

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    logits = model(torch.arange(5 * 24).reshape(5, 24)[leaving.windows] * 31 % 4096).logits.flatten(0, 1)
    chance = torch.rand(72, 1, generator=torch.Generator().manual_seed(5))
    drawn = (logits.detach().softmax(-1).cumsum(-1) < chance).sum(-1)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for number, output in enumerate(left):
        exact = output.grad / output.grad.square().mean().sqrt()
        error = leaving.leaving(number).double() - exact
        assert float(error.norm() / exact.norm()) < 0.004
        assert float(error.norm() / exact.norm()) > 1e-5  # bfloat16


def test_they_are_taken_again_only_where_they_are_gone(taken: tuple[LeavingGradients, RunState, Path]) -> None:
    leaving, state, _ = taken
    leaving.take(0, 5, Progress(), lambda: False)
    files = {path.name: path.read_bytes() for path in state.folder.glob("*.safetensors")}
    assert set(files) == {"gradients-00000.safetensors", "gradients-00001.safetensors"}
    times = {path: path.stat().st_mtime_ns for path in state.folder.glob("*.safetensors")}
    leaving.take(0, 5, Progress(), lambda: False)
    leaving.take(1, 5, Progress(), lambda: False)
    leaving.take(2, 5, Progress(), lambda: False)  # nothing left to quantize
    assert times == {path: path.stat().st_mtime_ns for path in state.folder.glob("*.safetensors")}
    state.drop(StateKind.LEAVING_GRADIENTS, 0)
    leaving.take(0, 5, Progress(), lambda: False)
    assert files == {path.name: path.read_bytes() for path in state.folder.glob("*.safetensors")}
    state.drop(StateKind.LEAVING_GRADIENTS, 1)  # also one that is not needed first
    leaving.take(0, 5, Progress(), lambda: False)
    assert files == {path.name: path.read_bytes() for path in state.folder.glob("*.safetensors")}
    state.drop(StateKind.LEAVING_GRADIENTS, 0)
    state.drop(StateKind.LEAVING_GRADIENTS, 1)
    leaving.take(1, 5, Progress(), lambda: False)  # of a run whose first layer is finished
    assert [path.name for path in state.folder.glob("*.safetensors")] == ["gradients-00001.safetensors"]
    assert files["gradients-00001.safetensors"] == (state.folder / "gradients-00001.safetensors").read_bytes()


@pytest.mark.parametrize("asked", range(1, 5))
def test_a_stop_between_layers_leaves_nothing_that_looks_done(
    asked: int, taken: tuple[LeavingGradients, RunState, Path]
) -> None:
    leaving, state, _ = taken
    answers = iter([False] * (asked - 1) + [True])
    with pytest.raises(Stopped, match="--resume"):
        leaving.take(0, 5, Progress(), lambda: next(answers))
    assert not state.has(StateKind.LEAVING_GRADIENTS, 0, 3)
    leaving.take(0, 5, Progress(), lambda: False)
    assert state.has(StateKind.LEAVING_GRADIENTS, 0, 3)


def test_damaged_ones_are_a_sentence(taken: tuple[LeavingGradients, RunState, Path]) -> None:
    leaving, state, _ = taken
    leaving.take(0, 5, Progress(), lambda: False)
    path = state.folder / "gradients-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        Apex4Error, match=r"gradients-00001\.safetensors is damaged .*: remove it, 'apex4 quantize --resume"
    ):
        leaving.leaving(1)
    path.unlink()
    leaving.take(0, 5, Progress(), lambda: False)
    assert leaving.leaving(1).shape == (3, 24, 128)


def test_what_they_need_on_disk(taken: tuple[LeavingGradients, RunState, Path]) -> None:
    leaving, state, path = taken
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in state.folder.glob("*.safetensors")))
        return False

    leaving.take(0, 5, Progress(), look)
    needed = gradient_bytes_on_disk(ModelSource(str(path)), (5, 24), torch.float32)
    assert 0.5 * needed < most <= needed + 4096
