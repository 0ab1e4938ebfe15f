"""What the planner measures: relative errors, the predicted divergence, gradients through the model, the choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.models.families import expert_of
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.planning.options import Choice
from apex4_quant.planning.sensitivity import (
    CLIP_RATIOS,
    ROWS,
    GroupSensitivity,
    Metric,
    losses_of,
    measure_sensitivity,
    predict_errors,
    rows_to_measure,
)
from apex4_quant.progress import Progress
from apex4_quant.quantization.gradients import gradients_through
from apex4_quant.quantization.run import QuantizeSettings, plan_of, quantize
from apex4_quant.rounding.nearest import quantize_weight_rtn
from apex4_quant.transforms.block_transforms import transform_weight
from apex4_quant.transforms.error_feedback import error_feedback
from apex4_quant.transforms.learned_transform import learn_transform

DENSE, FEEDBACK, HADAMARD = TransformKind.DENSE, TransformKind.FEEDBACK, TransformKind.HADAMARD

Call = Callable[..., Any]  # the fixtures of conftest.py
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MODELS = {
    "qwen3 tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=32, sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    ),
}


@pytest.mark.parametrize(("count", "measured"), [(1, 1), (64, 32), (1500, 750), (4096, 1024), (5000, 1024)])
def test_a_transform_is_not_measured_on_what_it_was_learned_from(count: int, measured: int) -> None:
    rows = rows_to_measure(count)
    assert rows.shape == (count,) and rows.sum() == measured <= ROWS
    assert rows.equal(rows_to_measure(count))


def test_of_the_first_tokens_of_windows_some_are_measured_and_some_are_learned_from() -> None:
    """They are like no others in pretrained models, and stood at multiples of 256 of evenly spaced rows."""
    assert 0 < rows_to_measure(4096)[::256].sum() < 8


def test_losses_never_fall_with_coarser_groups_of_one_transform() -> None:
    measured = {128: 0.2, 256: 0.15, "channel": 0.6}
    losses = {Choice(size, HADAMARD): loss for size, loss in measured.items()} | {Choice(128, DENSE): 0.1}
    losses[Choice(128, HADAMARD, 8)] = 0.05
    assert list(losses_of(losses).values()) == [0.2, 0.2, 0.6, 0.1, 0.05]


@pytest.mark.parametrize("size", [128, 512, "channel"])
def test_predicted_error_is_that_of_the_quantized_linear(size: int | str) -> None:
    """Errors of weight and activation are independent to first order: the sum predicts the real linear's. Where the
    gradients are those of |dy|^2 / 2, the loss is that sum too."""
    torch.manual_seed(0)
    rows, weight = torch.randn(256, 600) * torch.rand(600) * 3, torch.randn(96, 600) / 25
    format = LinearFormat(96, 600, size, get_layout("rowmajor"), HADAMARD, 1.0)
    (predicted,), loss = predict_errors(rows, [weight], format, Metric(weight, [torch.ones(96)]))
    codes, scales = quantize_weight_rtn("w", weight, format)
    exact = rows @ weight.t()

    def real(clip: float) -> float:
        linear = Apex4Linear.from_codes(replace(format, activation_clip=clip), codes, scales, None)
        return float((linear(rows) - exact).square().sum() / exact.square().sum())

    assert predicted == pytest.approx(min(map(real, CLIP_RATIOS)), rel=0.04)
    assert loss == pytest.approx(predicted * float(exact.square().sum()) / len(rows) / 2, rel=1e-4)


@pytest.mark.parametrize("size", [128, "channel"])
def test_predicted_error_with_8_bit_activations_is_that_of_the_folded_linear(size: int | str) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(256, 600) * torch.rand(600) * 3, torch.randn(96, 600) / 25
    weight[:, :200] *= 0.01  # a group of small weights, which folding rounds coarsely
    format = LinearFormat(96, 600, size, get_layout("rowmajor"), HADAMARD, 1.0, activation_bits=8)
    (predicted,), loss = predict_errors(rows, [weight], format, Metric(weight, [torch.ones(96)]))
    linear = Apex4Linear.from_codes(format, *quantize_weight_rtn("w", weight, format), None)
    exact = rows @ weight.t()
    assert predicted == pytest.approx(float((linear(rows) - exact).square().sum() / exact.square().sum()), rel=0.04)
    assert loss == pytest.approx(predicted * float(exact.square().sum()) / len(rows) / 2, rel=1e-4)


def test_predicted_error_with_feedback_is_that_of_the_linear() -> None:
    """Which makes up for its errors; what it cannot make up for is less than without."""
    torch.manual_seed(0)
    rows, weight = torch.randn(256, 640) * torch.rand(640) * 3, torch.randn(64, 640) / 25
    dense = LinearFormat(64, 640, 128, get_layout("rowmajor"), DENSE, 1.0)
    format = replace(dense, transform=FEEDBACK)
    learned = learn_transform(rows, [weight], 5)
    matrix = torch.cat((learned, error_feedback([transform_weight(weight, dense, learned)], 640)), 1)
    metric = Metric(weight, [torch.ones(64)])
    (predicted,), loss = predict_errors(rows, [weight], format, metric, matrix)
    codes, scales = quantize_weight_rtn("w", weight, format, matrix)
    exact = rows @ weight.t()

    def real(clip: float) -> float:
        linear = Apex4Linear.from_codes(replace(format, activation_clip=clip), codes, scales, None, matrix)
        return float((linear(rows) - exact).square().sum() / exact.square().sum())

    assert predicted == pytest.approx(min(map(real, CLIP_RATIOS)), rel=0.04)
    assert loss == pytest.approx(predicted * float(exact.square().sum()) / len(rows) / 2, rel=1e-4)
    without = predict_errors(rows, [weight], dense, metric, learned)
    assert loss < 0.8 * without.loss and predicted < 0.8 * without.relative[0]


def test_only_what_matters_counts() -> None:
    """Outputs without a gradient lose nothing by their weight's errors, an input whose gradient is zero by its own."""
    torch.manual_seed(0)
    rows, weights = torch.randn(64, 128), [torch.randn(8, 128), torch.randn(4, 128)]
    format = LinearFormat(8, 128, 128, get_layout("rowmajor"), HADAMARD, 1.0)

    def loss(of_input: float, of_first: float, of_second: float) -> float:
        outputs = [torch.full((8,), of_first), torch.full((4,), of_second)]
        return predict_errors(rows, weights, format, Metric(of_input * torch.eye(128), outputs)).loss

    assert loss(0, 0, 0) == 0
    assert loss(2, 0, 0) == pytest.approx(4 * loss(1, 0, 0)) and loss(1, 0, 0) > 0
    assert loss(1, 2, 3) == pytest.approx(loss(1, 0, 0) + 2 * loss(0, 1, 0) + 3 * loss(0, 0, 1), rel=1e-5)


def test_tokens_without_gradients_lose_nothing() -> None:
    """However large they are: massive activations of first tokens."""
    torch.manual_seed(0)
    rows, weight = torch.randn(64, 128), torch.randn(8, 128)
    massive = torch.cat([1000 * torch.randn(2, 128), rows])
    format = LinearFormat(8, 128, 128, get_layout("rowmajor"), HADAMARD, 1.0)
    gradients, outputs, tokens = torch.randn(16, 128), [torch.rand(8)], torch.rand(64)

    def loss(rows: torch.Tensor, tokens: torch.Tensor) -> float:
        return len(rows) * predict_errors(rows, [weight], format, Metric(gradients, outputs, tokens)).loss

    seen = loss(rows, tokens)
    assert loss(massive, torch.cat([torch.zeros(2), tokens])) == pytest.approx(seen, rel=1e-5)
    assert loss(massive, torch.cat([torch.ones(2), tokens])) > 1000 * seen
    assert loss(rows, 2 * tokens) == pytest.approx(2 * seen, rel=1e-5)


def test_dead_input_has_no_error() -> None:
    format = LinearFormat(8, 128, 128, get_layout("rowmajor"), "none", 1.0)
    metric = Metric(torch.ones(2, 128), [torch.ones(8)])
    assert predict_errors(torch.zeros(4, 128), [torch.randn(8, 128)], format, metric) == ((0.0,), 0.0)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "model")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "model" / file).write_bytes((DEMO_PATH / file).read_bytes())
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_the_layers_are_those_of_the_model(name: str, saved: Callable[[str], Path]) -> None:
    """Layer by layer, from the head to what enters layer 0, and by every linear's output, against one backward pass."""
    path = saved(name)
    source, ids = ModelSource(str(path)), torch.arange(48).reshape(2, 24) * 37 % 4096
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(24)
    outer = source.read(source.outer_tensors)
    hidden = [runner.embed(ids, outer["model.embed_tokens.weight"])]
    for layer in range(2):
        runner.load_layer(layer, source.read(source.layer_tensors(layer)))
        hidden.append(runner.run_layer(layer, hidden[-1]))
    gradients = runner.output_gradients(hidden.pop(), outer, 5)
    squares: dict[str, torch.Tensor] = {}
    for layer in (1, 0):
        prefix = source.family.layer_prefix(layer)
        groups = [
            g.linears for g in source.family.groups(source.config, layer) if expert_of(prefix + g.linears[0]) is None
        ]
        found, gradients = gradients_through(runner, layer, groups, hidden.pop(), gradients)
        squares |= {prefix + linear: square for each in found.values() for linear, square in each.outputs.items()}

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    entering: list[torch.Tensor] = []
    outputs: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].retain_grad()
        entering.append(args[0])

    def keeper(linear: str) -> Callable[..., None]:
        def keep_output(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[linear] = output

        return keep_output

    model.model.layers[0].register_forward_pre_hook(keep)
    for linear in squares:
        model.get_submodule(linear).register_forward_hook(keeper(linear))
    logits = model(ids).logits.flatten(0, 1)
    chance = torch.rand(48, 1, generator=torch.Generator().manual_seed(5))
    drawn = (logits.detach().softmax(-1).cumsum(-1) < chance).sum(-1)
    nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    torch.testing.assert_close(gradients, entering[0].grad, rtol=1e-3, atol=1e-5)
    assert "model.layers.0.self_attn.v_proj" in squares
    for linear, square in squares.items():
        expected = outputs[linear].grad.flatten(0, -2).square().mean(0)
        torch.testing.assert_close(square, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def measured(path: Path, ids: torch.Tensor) -> list[GroupSensitivity]:
    source = ModelSource(str(path))
    run = QuantizeSettings(str(path), "rtn", target="none", device="cpu").resolve(source)
    runner = LayerRunner(source, "cpu", torch.float32)
    return measure_sensitivity(
        source, runner, ids, plan_of(source, run).linears, (HADAMARD, DENSE, FEEDBACK), (4, 8), 0, Progress()
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_divergence_of_the_quantized_model(
    name: str, saved: Callable[[str], Path], tmp_path: Path, calib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not token 0, of padding: its embedding is zero, where the derivative of a norm has no bound.
    path, ids = saved(name), torch.arange(1, 513).reshape(16, 32) * 37 % 4096
    settings = QuantizeSettings(str(path), "rtn", target="none", calib=str(calib), samples=2, seq_len=8, device="cpu")
    quantize(settings, tmp_path / "out")
    learned = []

    def learn(*given: Any, **how: Any) -> torch.Tensor:
        learned.append(given)
        return learn_transform(*given, **how)

    monkeypatch.setattr("apex4_quant.planning.sensitivity.learn_transform", learn)
    groups = measured(path, ids)
    assert len(learned) == len(groups), "of one input more than one transform was learned"
    assert all(Choice(128, FEEDBACK, 8) not in group.losses for group in groups)
    assert [group.layer for group in groups] == sorted(group.layer for group in groups)
    predicted = sum(group.losses[Choice(128, HADAMARD)] for group in groups)

    def logits_of(folder: Path) -> torch.Tensor:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.log_softmax(-1).detach()

    exact = logits_of(path)

    def divergence_of(folder: Path) -> float:
        return float((exact.exp() * (exact - logits_of(folder))).sum(-1).mean())

    assert 0.7 < predicted / divergence_of(tmp_path / "out") < 1.4
    dense, feedback = (sum(group.losses[Choice(128, kind)] for group in groups) for kind in (DENSE, FEEDBACK))
    assert feedback < 0.95 * dense and dense < predicted
    eight = sum(group.losses[Choice(128, HADAMARD, 8)] for group in groups)
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    assert 0.7 < eight / divergence_of(tmp_path / "out") < 1.4
    assert eight < predicted / 2


def test_an_expert_that_no_token_reaches_has_no_loss(saved: Callable[[str], Path]) -> None:
    groups = measured(saved("mixtral"), torch.full((1, 2), 3))  # two tokens, two experts each, of four
    losses = [group.losses[Choice(128, HADAMARD)] for group in groups if "experts" in group.linears[0]]
    assert min(losses) == 0 < max(losses)


def test_gradients_that_are_not_finite_are_refused(tiny_model: Call) -> None:
    source = ModelSource(str(tiny_model()))
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(8)
    runner.load_layer(1, source.read(source.layer_tensors(1)))
    states = torch.randn(1, 8, 128)
    with pytest.raises(Apex4Error, match="gradients of decoder layer 1 are not finite in float32"):
        gradients_through(runner, 1, [], states, torch.full_like(states, torch.inf))
