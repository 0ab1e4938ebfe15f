"""Passes over the calibration text: what is not computed again, and that nobody can tell from the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant.models import layer_runner
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.replaying import Replaying
from apex4_quant.models.source import ModelSource

from .test_families import MODELS, write_model

WINDOWS, LENGTH = 5, 24
# Those whose first layer has no experts: there every stage has one input.
DENSE = [name for name in MODELS if not name.startswith(("mixtral", "qwen3moe", "qwen3next", "gptoss", "olmoe"))]


@pytest.fixture(autouse=True)
def one_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runner, "BATCH_TOKENS", LENGTH)


class Staged:
    """Layer 0 of a model, its linears changed stage by stage as quantizing changes them."""

    def __init__(self, source: ModelSource, remembering: bool) -> None:
        self.source, self.calls = source, Counter[str]()
        self.runner = LayerRunner(source, "cpu", torch.float32)
        self.runner._replaying = Replaying(remembering)
        self.runner.prepare(LENGTH)
        self.layer = self.runner.load_layer(0, source.read(source.layer_tensors(0)))
        self.hidden = torch.randn(
            WINDOWS, LENGTH, source.config["hidden_size"], generator=torch.Generator().manual_seed(0)
        )
        for name in source.family.linears(source.config, 0):
            self.layer.get_submodule(name).register_forward_hook(lambda *_, name=name: self.calls.update([name]))

    def run(self) -> list[torch.Tensor]:
        """The inputs of every stage, and what leaves the layer."""
        stages = self.source.family.stages(self.source.config, 0)
        parents = [{group.linears[0].partition(".")[0] for group in stage} for stage in stages]
        seen = []
        for number, stage in enumerate(stages):
            settled = tuple(sorted(set().union(*parents[:number]) - set().union(*parents[number:])))
            last = not parents[number] & set().union(*parents[number + 1 :])
            (group,) = stage
            calls = self.runner.calls_of(0, group.linears[0], self.hidden, settled, last)
            seen.append(torch.cat([x for (x,) in calls]))
            for name in group.linears:
                with torch.no_grad():
                    self.layer.get_submodule(name).weight.mul_(0.75)
        return [*seen, self.runner.run_layer(0, self.hidden)]


@pytest.fixture(params=DENSE)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelSource]:
    write_model(tmp_path, request.param)
    yield ModelSource(str(tmp_path))


def test_a_linear_is_run_once_and_results_are_the_same(source: ModelSource) -> None:
    plain, remembering = Staged(source, False), Staged(source, True)
    for expected, found in zip(plain.run(), remembering.run(), strict=True):
        assert torch.equal(found, expected)
    parents = [
        {(name.partition(".")[0], name) for group in stage for name in group.linears}
        for stage in source.family.stages(source.config, 0)
    ]
    for number, stage in enumerate(parents):
        for parent, name in stage:
            # Passes for later linears of the same module, which go through it again as far as that linear.
            later = sum(any(parent == other for other, _ in after) for after in parents[number + 1 :])
            # The first window of a pass shows whether a module returns what its last linear does.
            passes, first = divmod(remembering.calls[name], WINDOWS)
            assert (passes, first) == (1, 0) if not later else 1 <= passes <= later and first == 1, name
    assert sum(plain.calls.values()) > 1.5 * sum(remembering.calls.values())


def test_what_has_no_room_is_run_again(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_runner, "KEPT_BYTES", 0)  # then as much as the hidden states
    plain, remembering = Staged(source, False), Staged(source, True)
    for expected, found in zip(plain.run(), remembering.run(), strict=True):
        assert torch.equal(found, expected)
    (gate,) = {name for name in plain.calls if name.endswith(("gate_proj", "gate_up_proj"))}
    assert WINDOWS + 1 < remembering.calls[gate] < plain.calls[gate]


class Parent(nn.Module):
    """A module that does something with what its last linear returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.last(self.inner(x)) * 2, "weights"


def passed(layer: nn.Module, replaying: Replaying, xs: list[torch.Tensor]) -> list[Any]:
    with replaying.during(layer, ("parent",)):
        return [layer.get_submodule("parent")(x) for x in xs]


@torch.no_grad()
def test_a_module_that_does_not_end_with_its_last_linear_is_run_as_a_whole() -> None:
    layer, replaying = nn.ModuleDict({"parent": Parent()}), Replaying(True)
    parent, xs = layer["parent"], [torch.randn(2, 4) for _ in range(3)]
    expected = [parent(x)[0] for x in xs]
    replaying.begin_keeping("parent.last", 1000)
    for x in xs:
        replaying.keep(parent.inner(x))
    for outputs in passed(layer, replaying, xs), passed(layer, replaying, xs):
        assert all(torch.equal(output[0], x) for output, x in zip(outputs, expected, strict=True))
    assert outputs[0][1] is None, "a replayed tuple has nothing but its first"


@torch.no_grad()
def test_a_pass_that_broke_off_is_not_remembered() -> None:
    layer, replaying = nn.ModuleDict({"parent": Parent()}), Replaying(True)
    xs = [torch.randn(2, 4) for _ in range(3)]
    with pytest.raises(ZeroDivisionError), replaying.during(layer, ("parent",)):
        layer["parent"](xs[0])
        raise ZeroDivisionError
    assert "forward" not in vars(layer["parent"])
    assert [output[1] for output in passed(layer, replaying, xs)] == ["weights"] * 3, "run, not replayed"
    replaying.forget()
    assert passed(layer, replaying, xs)[0][1] == "weights"
