"""Whole models as a recipe rewrites them: rotations and the diagonal change weights and no function."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

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
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.estimates import preview
from apex4_quant.recipes import Recipe, named_recipes
from apex4_quant.transforms.orthogonal import Orthogonal, derived_seed
from apex4_quant.transforms.rewriter import Rewriter

from ..conftest import stop_after
from .conftest import (
    BALANCED,
    BOTH,
    BROKEN,
    GEMMAS,
    ROTATABLE,
    ROTATED,
    SAME,
    WITH_VISION,
    ZOO,
    difference,
    random_hidden,
    runner_of,
)


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
    """Under the names that published checkpoints have; of GPT-OSS, as it stores experts."""
    if source.family.experts is not None and source.family.experts.interleaved:
        tensors = fused(tensors, source.config["num_local_experts"])
    there = [pair[0] for pair in source.family.experts.renames] if source.family.experts else []
    renamed = {published_name(name, there, source.family): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def fused(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """[E, H, 2 I] with gate and up in turns, [E, I, H], and biases."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in {name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}:
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            gate, up, down = (
                torch.stack(
                    [
                        tensors[f"{prefix}.{expert}.{part}_proj.{kind}"].mT
                        if kind == "weight"
                        else tensors[f"{prefix}.{expert}.{part}_proj.{kind}"]
                        for expert in range(experts)
                    ]
                )
                for part in ("gate", "up", "down")
            )
            kept[f"{prefix}.gate_up_proj{suffix}"] = torch.stack([gate, up], dim=-1).flatten(-2)
            kept[f"{prefix}.down_proj{suffix}"] = down.contiguous()
    return kept


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        (name, recipe)
        for recipe, names in ((ROTATED, ROTATABLE), (BALANCED, (*ROTATABLE, *GEMMAS)), (BOTH, ROTATABLE))
        for name in names
        if name not in WITH_VISION
    ],
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
    family = Family("GemmaForCausalLM", "gemma", norm_offset=1.0, scaled_embedding=True)
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
    with pytest.raises(Apex4Error, match=r"layers\.0\.self_attn\.o_proj is not finite: the model.s own numbers"):
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


# Through a run.


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
        with pytest.raises(UsageError, match=rf"quarot-128g.*{name.split()[0].title()}For.*use another recipe"):
            run(settings)
    assert not (tmp_path / "out").exists()
