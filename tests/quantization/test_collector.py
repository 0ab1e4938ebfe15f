"""What the collector sees of experts in both streams; more of experts is in models/test_experts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apex4_quant.calib.hessian import HessianAccumulator
from apex4_quant.calib.probes import InputProbe
from apex4_quant.format.layouts import ROWMAJOR
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.collector import Collector, Statistics
from apex4_quant.quantization.plan import build_plan
from apex4_quant.quantization.run_state import Streams

from ..rounding.test_gptaq import moe


@torch.no_grad()
def test_experts_see_the_tokens_of_the_quantized_models_router_in_both_streams(tmp_path: Path) -> None:
    source = ModelSource(str(moe(tmp_path / "moe")))
    runner, original = (LayerRunner(source, "cpu", torch.float32) for _ in range(2))
    ids = torch.arange(16 * 64).reshape(16, 64) * 31 % 4096
    tensors = source.read(source.layer_tensors(0))
    for each in (runner, original):
        each.prepare(64)
        each.load_layer(0, {name: tensor.clone() for name, tensor in tensors.items()})
    hidden = runner.embed(ids, source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"])
    streams = Streams(hidden, hidden + 0.3 * torch.randn_like(hidden))
    plan = build_plan(source, recipe="gptq", transform="none", group_size=128, layout="rowmajor", target={}, ignore=())
    collector = Collector(runner, source.family, source.config, True, lambda line: None, original)
    groups = list(collector.inputs_of(0, runner.layer(0), plan.of_layer(0), streams))

    calls = [
        next(iter(each.calls_of(0, "mlp.experts", states)))
        for each, states in ((runner, streams.hidden), (original, streams.original))
    ]
    # One batch of 16 windows of 64 tokens: calls hold all tokens.
    (states, index, _), (before, other_index, _) = calls
    assert not torch.equal(index, other_index), "the routers agree: nothing is tested"
    experts = runner.layer(0).get_submodule("mlp.experts")

    def drift(x: torch.Tensor, x_original: torch.Tensor) -> torch.Tensor:
        pad = (0, 128 - x.shape[1])
        x, x_original = (torch.nn.functional.pad(side, pad) for side in (x, x_original))
        return (x_original - x).t() @ x / len(x)

    parts = [*groups[2].parts, *(group.parts[0] for group in groups[3:])]
    assert len(parts) == 5 + 6
    for part in parts:
        expert = next(iter(part.tokens))
        chosen = torch.ones(len(states), dtype=torch.bool) if part.shared else (index == expert).any(-1)
        rows = states[chosen], before[chosen]
        if "down_proj" in part.planned[0].name:
            rows = tuple(experts[expert].inner(side) for side in rows)
        torch.testing.assert_close(part.statistics.take_drift(None), drift(*rows), rtol=1e-3, atol=1e-5)


def test_moments_are_made_of_what_the_linears_read_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies 16 bits many times as fast as float32, to which they were widened once."""
    given: list[tuple[torch.dtype, ...]] = []
    add = HessianAccumulator.add

    def noted(self: HessianAccumulator, *sides: torch.Tensor) -> None:
        given.append(tuple(side.dtype for side in sides))
        add(self, *sides)

    monkeypatch.setattr(HessianAccumulator, "add", noted)
    x, original = torch.randn(2, 1, 40, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    format = LinearFormat(128, 200, 128, ROWMAJOR, TransformKind.NONE, 1.0)
    statistics = Statistics("x", InputProbe(40), torch.bfloat16, format)
    statistics.add(x, original)
    assert given == [(torch.bfloat16,), (torch.bfloat16, torch.float32)]
    rows, others = (torch.nn.functional.pad(side[0].float(), (0, 56)) for side in (x, original))
    hessian, drift = statistics.take_hessian(None), statistics.take_drift(None)
    assert hessian is not None and drift is not None
    torch.testing.assert_close(hessian, rows.t() @ rows / 40)
    torch.testing.assert_close(drift, (others - rows).t() @ rows / 40)
