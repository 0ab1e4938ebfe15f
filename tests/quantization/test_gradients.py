"""What errors of inputs and outputs do behind a layer: against float64, and what a recipe makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apex4_quant.calib.samples import windows
from apex4_quant.calib.text import load_text
from apex4_quant.errors import Apex4Error
from apex4_quant.format.storage import REPORT_NAME
from apex4_quant.models import layer_runner
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.models.tokenizers import load_tokenizer
from apex4_quant.quantization.gradients import InputGradients, gradients_through
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.recipes import get_recipe
from apex4_quant.transforms.learned_transform import BlockStatistics, learn_transform
from apex4_quant.transforms.rewriter import Rewriter

Call = Callable[..., Any]  # the fixtures of conftest.py
GROUPS = [
    tuple(f"self_attn.{name}_proj" for name in "qkv"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


def runner_of(model: Path, dtype: torch.dtype = torch.float32) -> tuple[LayerRunner, torch.Tensor]:
    """Layer 0 loaded, and hidden states entering it, [24, 32, hidden]."""
    source = ModelSource(str(model))
    runner = LayerRunner(source, "cpu", dtype)
    runner.prepare(32)
    runner.load_layer(0, source.read(source.layer_tensors(0)))
    ids = torch.arange(24 * 32).reshape(24, 32) * 31 % 4096
    return runner, runner.embed(ids, source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"])


def by_signs(runner: LayerRunner, hidden: torch.Tensor, seed: int = 0) -> dict[str, InputGradients]:
    """With a random sign for every entry of the layer's output as what leaves it, E r r^T = I: then E (g . e)^2 is what
    errors do to the output's square."""
    signs = torch.randint(0, 2, hidden.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return gradients_through(runner, 0, GROUPS, hidden, signs)[0]


@pytest.fixture
def loaded(tiny_model: Call) -> tuple[LayerRunner, torch.Tensor]:
    return runner_of(tiny_model())


def test_an_inputs_gradients_are_the_exact_metric_of_a_residual_writer(
    loaded: tuple[LayerRunner, torch.Tensor],
) -> None:
    """down_proj adds to the layer's output: E[g g^T] = W^T W, and every row of it matters as much as every other."""
    runner, hidden = loaded
    found = by_signs(runner, hidden)["mlp.down_proj"]
    weight = runner.layer(0).get_submodule("mlp.down_proj").weight.double()
    torch.testing.assert_close(found.outputs["mlp.down_proj"], torch.ones(len(weight)), rtol=1e-5, atol=0)
    exact, seen = weight.t() @ weight, found.rows.double().t() @ found.rows.double()
    assert float((seen - exact).norm() / exact.norm()) < 3 * (len(exact) / len(found.rows)) ** 0.5
    torch.testing.assert_close(seen.trace(), exact.trace(), rtol=0.03, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_they_predict_what_errors_do_to_the_layers_output(name: str, loaded: tuple[LayerRunner, torch.Tensor]) -> None:
    """Small random errors added to a linear's outputs change the layer's output by what E[g^2] says, in the mean."""
    runner, hidden = loaded
    group = next(group for group in GROUPS if name in group)
    squares = by_signs(runner, hidden)[group[0]].outputs[name]
    layer = runner.layer(0).double()
    calls = {
        key: tuple(t.double() for t in value) if isinstance(value, tuple) else value
        for key, value in runner.arguments(0).items()
    }
    torch.manual_seed(0)
    sizes = 1e-4 * torch.rand(len(squares)).double()

    def run() -> torch.Tensor:
        result = layer(hidden.double(), **calls)
        return result[0] if isinstance(result, tuple) else result

    exact = run()
    handle = layer.get_submodule(name).register_forward_hook(lambda _, args, y: y + sizes * torch.randn_like(y))
    energy = sum(float((run() - exact).square().sum()) for _ in range(20)) / 20 / hidden[..., 0].numel()
    handle.remove()
    assert energy == pytest.approx(float((squares * sizes.square()).sum()), rel=0.1)


def test_the_same_twice_and_nothing_is_left_behind(loaded: tuple[LayerRunner, torch.Tensor]) -> None:
    runner, hidden = loaded
    before = hidden.clone()
    first, again = (by_signs(runner, hidden, 3) for _ in range(2))
    for name, found in first.items():
        assert torch.equal(found.rows, again[name].rows) and found.rows.dtype == torch.float32
        assert all(torch.equal(square, again[name].outputs[linear]) for linear, square in found.outputs.items())
    assert not torch.equal(first["mlp.gate_proj"].rows, by_signs(runner, hidden, 4)["mlp.gate_proj"].rows)
    assert torch.equal(hidden, before) and not hidden.requires_grad
    layer = runner.layer(0)
    assert all(p.grad is None for p in layer.parameters()) and not layer.mlp.down_proj._forward_hooks


def test_gradients_that_say_nothing_are_left_away(loaded: tuple[LayerRunner, torch.Tensor]) -> None:
    runner, hidden = loaded
    layer = runner.layer(0)
    layer.get_submodule("mlp.down_proj").weight.zero_()  # nothing of gate and up reaches the output
    found = by_signs(runner, hidden)
    assert "mlp.gate_proj" not in found and "self_attn.q_proj" in found
    layer.get_submodule("self_attn.o_proj").weight.fill_(torch.inf)
    with pytest.raises(Apex4Error, match="gradients of decoder layer 0 are not finite in float32"):
        by_signs(runner, hidden)


def test_a_transform_is_learned_by_them() -> None:
    """Gradients W^T W of the weights themselves are no news; others lead to another matrix."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 256), torch.randn(96, 256)
    plain, told = BlockStatistics.of(x, [w]), BlockStatistics.of(x, [w], w)
    assert torch.equal(plain.b, told.b) and torch.equal(plain.w, told.w)
    assert torch.equal(learn_transform(x, [w], 5), learn_transform(x, [w], 5, gradients=w))
    assert not torch.equal(learn_transform(x, [w], 5), learn_transform(x, [w], 5, gradients=torch.randn(99, 256)))


def test_predictions_are_closer_with_them(tmp_path: Path) -> None:
    """demo, all else equal: the divergence from the original, on other text."""
    divergence = {}
    encode = load_tokenizer(ModelSource("demo").folder).encode
    ids = windows(encode(load_text("heldout"))[: 16 * 256], 256, "held-out text")
    for importance in ("readers", "gradients"):
        recipe = {
            "name": importance, "transform": "dense128", "rounding": "gptq", "search_clip": True, "transform_steps": 60,
            "importance": importance,
        }  # fmt: skip
        out = tmp_path / importance
        quantize(QuantizeSettings("demo", recipe, samples=12, seq_len=256, target="none", device="cpu"), out)
        report = json.loads((out / REPORT_NAME).read_text())
        assert report["settings"]["recipe"]["importance"] == importance
        exact, ours = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits.detach().log_softmax(-1)
            for path in (ModelSource("demo").folder, out)
        )
        divergence[importance] = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert divergence["gradients"] < 0.95 * divergence["readers"], divergence


def test_in_a_rotated_stream_they_are_rotated(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    recipe = {"name": "x", "rotation": True, "importance": "gradients", "transform": "dense128", "rounding": "gptq"}
    source = ModelSource(str(tiny_model()))
    runner = LayerRunner(source, "cpu", torch.float32)
    rewriter = Rewriter(source, runner, get_recipe(recipe), 0, print)
    width = int(source.config["hidden_size"])
    gradients, errors = torch.randn(2, 5, width), torch.randn(5, width)
    embedding = rewriter.embedding({"model.embed_tokens.weight": errors.clone()})["model.embed_tokens.weight"]
    rotated = rewriter.stream_gradients(gradients)
    assert not torch.allclose(rotated, gradients)
    torch.testing.assert_close((rotated * embedding).sum(-1), (gradients * errors).sum(-1), rtol=1e-4, atol=1e-4)
    settings = QuantizeSettings(str(tiny_model()), recipe, calib=str(calib), samples=3, seq_len=32, target="none")
    result = quantize(settings, tmp_path / "out")
    assert max(record["error"] for record in result.records) < 0.3


def test_experts_keep_their_readers_and_attention_has_gradients(tmp_path: Path) -> None:
    from ..rounding.test_gptaq import moe

    settings = QuantizeSettings(
        str(moe(tmp_path / "moe")), recipe="apex4", samples=4, seq_len=64, target="none", device="cpu"
    )
    result = quantize(settings, tmp_path / "out")
    assert len(result.records) == 4 + 3 * 6 and max(record["error"] for record in result.records) < 0.5


def test_codes_and_scales_stay_in_the_format(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(str(tiny_model()), calib=str(calib), samples=3, seq_len=32, target="none")
    quantize(settings, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith("weight_scale"):
                assert tensor.dtype == torch.float16 and bool((torch.isfinite(tensor) & (tensor > 0)).all())


def test_a_cpu_without_bfloat16_takes_gradients_in_float32(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the layer as it was: the same parameters, in bfloat16 again, also after an error."""
    runner, hidden = runner_of(tiny_model(), torch.bfloat16)
    layer = runner.layer(0)
    before = {name: (parameter, parameter.data) for name, parameter in layer.named_parameters()}
    monkeypatch.setattr(layer_runner, "multiplies_fast", lambda device, dtype: True)
    narrow = by_signs(runner, hidden)["mlp.down_proj"]
    monkeypatch.setattr(layer_runner, "multiplies_fast", lambda device, dtype: False)
    with pytest.raises(KeyError), runner.widened(0) as module:
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        raise KeyError
    wide = by_signs(runner, hidden)["mlp.down_proj"]
    for name, parameter in layer.named_parameters():
        same, data = before[name]
        assert parameter is same and parameter.dtype == torch.bfloat16 and parameter.data_ptr() == data.data_ptr()
    assert not torch.equal(wide.rows, narrow.rows)
    assert float((wide.rows - narrow.rows).norm() / wide.rows.norm()) < 0.02
