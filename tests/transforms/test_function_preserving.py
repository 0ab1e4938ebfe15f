"""Rotations and the diagonal change weights and no function: in float32, for every architecture, tensor by tensor."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.checkpoint.check import check
from apex4_quant.errors import Apex4Error, Stopped, UsageError
from apex4_quant.format.storage import sha256
from apex4_quant.models.expert_tensors import published_name
from apex4_quant.models.families import ATTENTION, FAMILIES, GATED_MLP, Family, InputGroup
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.estimates import preview
from apex4_quant.recipes import Recipe, named_recipes
from apex4_quant.transforms.function_preserving import (
    balance,
    balancing_factor,
    merged_by_norm,
    rotate_stream,
    rotate_values,
)
from apex4_quant.transforms.orthogonal import Orthogonal, derived_seed
from apex4_quant.transforms.rewriter import Rewriter, mean_squares

from ..conftest import stop_after


def _zoo() -> ModuleType:
    """The models of test_families.py; under --import-mode=importlib test files do not see each other."""
    spec = importlib.util.spec_from_file_location(
        "apex4_test_zoo", Path(__file__).parents[1] / "models" / "test_families.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ZOO = _zoo()
GEMMAS = ("gemma2", "gemma3")
ROTATABLE = [name for name in ZOO.MODELS if name not in GEMMAS]
ROTATED, BALANCED = Recipe("rotated", "", rotation=True), Recipe("balanced", "", diagonal=0.25)
BOTH = Recipe("both", "", rounding="gptq", rotation=True, diagonal=0.25)

# Float32 rounds at 6e-8, relative to a product's terms; the roundings of a product of width K <= 400 add up at random to
# about sqrt(K) / 2 of one where terms cancel as sqrt(K) do, so 6e-7 relative to the result. The some twenty products that
# a value passes (rotations and two layers) make that 3e-6, also at random; measured 2.6e-6. A tensor that is not
# folded changes outputs by ten percent.
SAME, BROKEN = 1e-5, 5e-2


@pytest.fixture
def float_model(tmp_path: Path) -> Callable[..., ModelSource]:
    """float_model(name, dtype=float32) -> a model of test_families.py in that dtype."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> ModelSource:
        folder = tmp_path / str(dtype)
        ZOO.write_model(folder, name).to(dtype).save_pretrained(folder)
        return ModelSource(str(folder))

    return make


def runner_of(source: ModelSource, seq_len: int = 48) -> LayerRunner:
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(seq_len)
    return runner


def relative_tensors(source: ModelSource, index: int) -> dict[str, torch.Tensor]:
    prefix = source.family.layer_prefix(index)
    tensors = source.read(source.layer_tensors(index))
    return {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}


def output_of(
    runner: LayerRunner, source: ModelSource, index: int, relative: dict[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    prefix = source.family.layer_prefix(index)
    runner.load_layer(index, {prefix + name: tensor.clone() for name, tensor in relative.items()})
    return runner.run_layer(index, hidden)


def random_hidden(source: ModelSource) -> torch.Tensor:
    """[2, 48, hidden]; every channel at a strength of its own, as in real models."""
    generator = torch.Generator().manual_seed(5)
    width = source.config["hidden_size"]
    return torch.randn(2, 48, width, generator=generator) * torch.rand(width, generator=generator).mul(2).exp()


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def groups_of(source: ModelSource, index: int) -> list[InputGroup]:
    return merged_by_norm(source.family.groups(source.config, index))


# Single layers: each change by itself, for every architecture.


@torch.no_grad()
@pytest.mark.parametrize("name", ROTATABLE)
def test_rotated_stream_goes_through_a_layer_as_the_stream_did(
    name: str, float_model: Callable[..., ModelSource]
) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    rotation = Orthogonal(hidden.shape[-1], 1)
    for index in range(source.num_layers):
        tensors = relative_tensors(source, index)
        expected = rotation.apply(output_of(runner, source, index, tensors, hidden))
        writers = source.family.residual_writers(source.config, index)
        rotate_stream(tensors, groups_of(source, index), writers, source.family.norm_offset, rotation)
        for group in groups_of(source, index):
            assert group.norm is None or bool((tensors[f"{group.norm}.weight"] == 1).all())
        assert difference(output_of(runner, source, index, tensors, rotation.apply(hidden)), expected) < SAME


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO.MODELS)
def test_rotated_values_leave_a_layer_as_it_was(name: str, float_model: Callable[..., ModelSource]) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    heads, queries = runner.config.num_key_value_heads, runner.config.num_attention_heads
    for index in range(source.num_layers):
        tensors = relative_tensors(source, index)
        before = {n: t.clone() for n, t in tensors.items()}
        expected = output_of(runner, source, index, tensors, hidden)
        group = next(g for g in groups_of(source, index) if g.producer is not None and g.producer.per_head)
        width = tensors["self_attn.o_proj.weight"].shape[1] // queries
        rotate_values(tensors, group, heads, [Orthogonal(width, head) for head in range(heads)])
        assert difference(output_of(runner, source, index, tensors, hidden), expected) < SAME
        changed = [n for n in tensors if not torch.equal(tensors[n], before[n])]
        assert "self_attn.o_proj.weight" in changed and len(changed) == 2 + ("self_attn.v_proj.bias" in tensors)


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO.MODELS)
def test_balanced_layer_is_the_layer_with_inputs_as_uneven_as_weights(
    name: str, float_model: Callable[..., ModelSource]
) -> None:
    source = float_model(name)
    runner, hidden = runner_of(source), random_hidden(source)
    prefix, heads = source.family.layer_prefix(1), runner.config.num_key_value_heads
    tensors, groups = relative_tensors(source, 1), groups_of(source, 1)
    expected = output_of(runner, source, 1, tensors, hidden)

    def squares() -> dict[InputGroup, torch.Tensor]:
        return mean_squares(runner, 1, {prefix + n: t.clone() for n, t in tensors.items()}, groups, hidden)

    for group, mean_square in squares().items():
        offset = source.family.norm_offset
        assert balance(tensors, group, mean_square, kv_heads=heads, norm_offset=offset, alpha=0.25)
        assert difference(output_of(runner, source, 1, tensors, hidden), expected) < SAME
        a = squares()[group]
        b = sum(tensors[f"{linear}.weight"].double().square().sum(0) for linear in group.linears)
        if group.producer is not None and group.producer.per_head:  # query heads of a key/value head share factors
            width = len(a) // runner.config.num_attention_heads
            a, b = (x.view(heads, -1, width).sum(1) for x in (a, b))
        ratio = a / b
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_factors_have_geometric_mean_one_and_leave_dead_channels_alone() -> None:
    a, b = torch.tensor([0.0, 4.0, 1.0, 1e-30, 1.0]).double(), torch.tensor([1.0, 4.0, 16.0, 1.0, 0.0]).double()
    factor = balancing_factor(a, b, 0.25)
    assert factor[0] == factor[4] == 1
    assert float(factor.log().sum()) == pytest.approx(0, abs=1e-12)
    assert float(factor[2] / factor[1]) == pytest.approx(2)
    assert float(factor[3] / factor[2]) < 100
    assert torch.equal(balancing_factor(torch.zeros(3), b[:3], 0.25), torch.ones(3))


def test_groups_of_one_norm_are_folded_once_and_an_input_without_source_is_refused() -> None:
    groups = [
        InputGroup(("a", "b"), norm="n", also_read_by=("r",)),
        InputGroup(("c",), norm="n", also_read_by=("r", "s")),
        InputGroup(("d",)),
        InputGroup(("e",)),
    ]
    first, *others = merged_by_norm(groups)
    assert (first.linears, first.also_read_by, first.norm) == (("a", "b", "c"), ("r", "s"), "n")
    assert others == groups[2:]
    tensors = {"d.weight": torch.ones(2, 3)}
    assert not balance(tensors, groups[2], torch.ones(3), kv_heads=1, norm_offset=0.0, alpha=0.25)
    assert torch.equal(tensors["d.weight"], torch.ones(2, 3))


# Whole models, as the pipeline changes them.


def rewritten_layers(source: ModelSource, recipe: Recipe, ids: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """The embedding, every layer and the rest of the model after `recipe`, in float32; the last item is the config."""
    runner = runner_of(source, ids.shape[1])
    rewriter = Rewriter(source, runner, recipe, 0, lambda line: None)
    embedding = f"{source.family.embedding}.weight"
    tensors = rewriter.embedding(source.read([embedding]))
    hidden = runner.embed(ids, tensors[embedding])
    yield tensors
    for index in range(source.num_layers):
        layer = rewriter.layer(index, source.read(source.layer_tensors(index)), hidden)
        yield {name: tensor.clone() for name, tensor in layer.items()}
        runner.load_layer(index, layer)
        hidden = runner.run_layer(index, hidden)
    yield rewriter.outer(source.read([name for name in source.outer_tensors if name != embedding]))
    yield rewriter.config_changes()


def write_rewritten(source: ModelSource, recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """The whole rewritten model as a folder; returns its tensors by our names."""
    shutil.copytree(source.folder, folder)
    ids = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(2))
    *parts, changes = rewritten_layers(source, recipe, ids)
    (folder / "config.json").write_text(json.dumps(source.config | changes))
    tensors = {name: tensor.contiguous() for part in parts for name, tensor in part.items()}
    save_tensors(source, tensors, folder)
    return tensors


def save_tensors(source: ModelSource, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Under the names that published checkpoints have."""
    there = [pair[0] for pair in source.family.experts.renames] if source.family.experts else []
    renamed = {published_name(name, there, source.family): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, recipe) for name in ROTATABLE for recipe in (ROTATED, BALANCED, BOTH)] + [(g, BALANCED) for g in GEMMAS],
    ids=lambda value: getattr(value, "name", value),
)
def test_rewritten_models_compute_what_the_originals_do(
    name: str, recipe: Recipe, float_model: Callable[..., ModelSource], tmp_path: Path
) -> None:
    source = float_model(name)
    expected = logits(source.folder)
    write_rewritten(source, recipe, tmp_path / "rewritten")
    assert difference(logits(tmp_path / "rewritten"), expected) < SAME


@pytest.mark.parametrize("recipe", [ROTATED, BALANCED, BOTH], ids=lambda recipe: recipe.name)
def test_norm_offsets_are_rotated_too(
    recipe: Recipe, float_model: Callable[..., ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No supported family has both. The first Gemma does: gains stored less one, and no norm behind a writer."""
    sizes = ZOO.SIZES | {"head_dim": 32}
    monkeypatch.setitem(ZOO.MODELS, "gemma", lambda: GemmaForCausalLM(GemmaConfig(**sizes)))
    family = Family("GemmaForCausalLM", norm_offset=1.0, scaled_embedding=True)
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    source = float_model("gemma")
    tensors = write_rewritten(source, recipe, tmp_path / "rewritten")
    assert difference(logits(tmp_path / "rewritten"), logits(source.folder)) < SAME
    assert bool((tensors["model.norm.weight"] == 0).all()) == recipe.rotation


def test_several_groups_of_one_norm_share_its_gain(
    float_model: Callable[..., ModelSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = tuple(InputGroup((f"self_attn.{part}_proj",), norm="input_layernorm") for part in "qkv")
    family = dataclasses.replace(FAMILIES["LlamaForCausalLM"], attention=(*split, *ATTENTION[1:]))
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    source = float_model("llama biased")
    write_rewritten(source, BOTH, tmp_path / "rewritten")
    assert difference(logits(tmp_path / "rewritten"), logits(source.folder)) < SAME


def test_an_input_that_nothing_can_be_folded_into_is_reported_once(
    float_model: Callable[..., ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = dataclasses.replace(FAMILIES["LlamaForCausalLM"], mlp=(GATED_MLP[0], InputGroup(("mlp.down_proj",))))
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    source, lines = float_model("llama"), []
    rewriter, hidden = Rewriter(source, runner_of(source), BALANCED, 0, lines.append), random_hidden(source)
    for index in range(2):
        before = source.read(source.layer_tensors(index))
        after = rewriter.layer(index, source.read(source.layer_tensors(index)), hidden)
        unchanged = {name.split(".")[-2] for name in after if torch.equal(before[name], after[name])}
        assert unchanged == {"down_proj"}
    assert lines == ["mlp.down_proj: the diagonal can be folded nowhere and is left away"]
    with pytest.raises(Apex4Error, match=r"layers\.0\.self_attn\.o_proj is not finite: try --dtype float32"):
        rewriter.layer(0, source.read(source.layer_tensors(0)), hidden * float("inf"))


@torch.no_grad()
def test_strong_value_channels_are_balanced_before_they_are_rotated(float_model: Callable[..., ModelSource]) -> None:
    """Afterwards they are spread over their head, and no diagonal could tell them apart."""
    source = float_model("llama")
    prefix, width = source.family.layer_prefix(0), 64
    tensors = source.read(source.layer_tensors(0))
    tensors[f"{prefix}self_attn.v_proj.weight"][5] *= 32
    tensors[f"{prefix}self_attn.o_proj.weight"][:, [5, 5 + width]] /= 32  # two query heads read this channel
    runner, hidden = runner_of(source), random_hidden(source)

    def share_of_the_strongest_direction() -> float:
        runner.load_layer(0, tensors)
        seen = torch.cat([x.flatten(0, 1)[:, :width] for (x,) in runner.calls_of(0, "self_attn.o_proj", hidden)])
        moments = torch.linalg.svdvals(seen).square()
        return float(moments[0] / moments.sum())

    assert share_of_the_strongest_direction() > 0.9
    hidden = Orthogonal(hidden.shape[-1], derived_seed(0, "stream")).apply(hidden)
    tensors = Rewriter(source, runner, BOTH, 0, lambda line: None).layer(0, tensors, hidden)
    assert share_of_the_strongest_direction() < 0.4


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3", "phi3 partial rotary", "mixtral"])
def test_every_folded_tensor_matters(name: str, float_model: Callable[..., ModelSource], tmp_path: Path) -> None:
    """With any one of the changed tensors as it was, the exactness test above fails."""
    source = float_model(name)
    tensors = write_rewritten(source, BOTH, tmp_path / "rewritten")
    expected = logits(tmp_path / "rewritten")
    original = source.read(source.infos)
    if "lm_head.weight" not in original:
        original["lm_head.weight"] = original["model.embed_tokens.weight"]
    # Biases of q and k, and norms of q and k, are before what changes and stay.
    unchanged = {n for n in tensors if torch.equal(tensors[n], original[n])}
    assert all(n.endswith(("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")) for n in unchanged)
    for changed in sorted(set(tensors) - unchanged):
        save_tensors(source, tensors | {changed: original[changed].clone()}, tmp_path / "rewritten")
        assert difference(logits(tmp_path / "rewritten"), expected) > BROKEN, changed


def test_tensors_are_rounded_once(float_model: Callable[..., ModelSource]) -> None:
    rough, fine = float_model("qwen2", torch.bfloat16), float_model("qwen2")
    ids = torch.arange(64).view(1, -1)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        layers = [list(rewritten_layers(source, ROTATED, ids))[1] for source in (rough, fine)]
        assert layers[0][name].dtype == torch.bfloat16 and layers[1][name].dtype == torch.float32
        assert torch.equal(layers[0][name], layers[1][name].bfloat16())


# Through the pipeline.


@pytest.fixture
def recipe_both(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setitem(named_recipes(), BOTH.name, BOTH)
    return BOTH


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama tied", "llama ragged", "qwen2", "mixtral tied ragged"])
@pytest.mark.parametrize("recipe", ["quarot-128g", "both"])
def test_quantized_models_load_and_pass_their_check(
    name: str, recipe: str, recipe_both: Recipe, tmp_path: Path
) -> None:
    original = ZOO.write_model(tmp_path / "model", name)
    settings = QuantizeSettings(str(tmp_path / "model"), recipe=recipe, target="none", samples=2, seq_len=64)
    quantize(settings, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    assert config["quantization_config"]["activation_clip"] == (0.9 if recipe == "quarot-128g" else 1.0)
    check(str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding)
    ids = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = original.float()(ids, use_cache=False).logits
    assert 0.05 < difference(model(ids, use_cache=False).logits, expected) < 0.9
    planned = {kept.name: kept.bytes for kept in preview(settings).plan.kept}
    assert planned["lm_head.weight"] == 2 * head.numel()


@pytest.mark.parametrize("layers", [0, 1])
def test_resumed_runs_write_the_same_bytes(layers: int, recipe_both: Recipe, tmp_path: Path) -> None:
    ZOO.write_model(tmp_path / "model", "llama tied")
    settings = QuantizeSettings(str(tmp_path / "model"), recipe="both", target="none", samples=2, seq_len=32)
    quantize(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        quantize(settings, tmp_path / "out", should_stop=stop_after(layers, tmp_path / "out"))
    quantize(settings, tmp_path / "out", resume=True)
    whole, out = ({path.name: sha256(path) for path in (tmp_path / run).iterdir()} for run in ("whole", "out"))
    assert whole == out
    quantize(dataclasses.replace(settings, seed=1), tmp_path / "other seed")
    shard = "model-00001-of-00004.safetensors"
    ours, others = (load_file(tmp_path / run / shard) for run in ("whole", "other seed"))
    assert not torch.equal(ours["model.embed_tokens.weight"], others["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", GEMMAS)
def test_architectures_that_cannot_be_rotated_are_refused_before_any_work(name: str, tmp_path: Path) -> None:
    ZOO.write_model(tmp_path / "model", name)
    settings = QuantizeSettings(str(tmp_path / "model"), recipe="quarot-128g", target="none")
    for run in (preview, lambda settings: quantize(settings, tmp_path / "out")):
        with pytest.raises(UsageError, match=rf"quarot-128g.*{name.title()}ForCausalLM.*use another recipe"):
            run(settings)
    assert not (tmp_path / "out").exists()
