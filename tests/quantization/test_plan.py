"""What a run will do: every linear's format, every tensor that is kept and why, and config.json's section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.plan import KeepReason, plan_as_dict, plan_as_text, plan_of
from apex4_quant.quantization.settings import QuantizeSettings

MLP, ATTENTION = "model.layers.{}.mlp.{}_proj", "model.layers.{}.self_attn.{}_proj"


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> ModelSource:
    return ModelSource(str(tiny_model(intermediate_size=600)))


def test_every_tensor_is_quantized_or_kept_for_a_reason(source: ModelSource) -> None:
    plan = plan_of(source, QuantizeSettings(source.name, "gptq", target="A100", ignore=("*.o_proj",)).resolve(source))
    names = {linear.name + ".weight" for linear in plan.linears} | {kept.name for kept in plan.kept}
    assert names == set(source.infos) and len(plan.linears) == 12
    reasons = {kept.name: kept.reason for kept in plan.kept}
    assert reasons[ATTENTION.format(0, "o") + ".weight"] is KeepReason.IGNORED
    assert reasons["model.embed_tokens.weight"] is KeepReason.OUTSIDE_LAYERS
    assert reasons["model.layers.1.input_layernorm.weight"] is KeepReason.NOT_LINEAR
    section = plan.config.to_dict()
    assert section["layout"] == "sm80" and section["target"] == {"gpu": "A100", "arch": "sm_80"}
    assert section["modules_to_not_convert"] == ["lm_head", *(ATTENTION.format(layer, "o") for layer in range(2))]
    assert section["modules"][MLP.format(0, "down")] == {"shape": [128, 600]}
    assert plan_as_dict(plan, source)["bytes_after"] == plan.bytes_after < source.total_bytes
    text = plan_as_text(plan, source)
    assert "kept, --ignore: 2 tensors" in text and "(padded)" in text


def test_a_plans_entries_decide_linear_by_linear(source: ModelSource) -> None:
    names = [MLP.format(layer, part) for layer in range(2) for part in ("gate", "up", "down")]
    entries = {name: {"group_size": 256} for name in names}
    entries |= {
        ATTENTION.format(layer, p): {"group_size": 128, "transform": "none"} for layer in range(2) for p in "qkvo"
    }
    entries[MLP.format(0, "down")] = {"group_size": 128, "transform": "dense128"}
    settings = QuantizeSettings(source.name, "gptq", plan=entries, target="none").resolve(source)
    plan = plan_of(source, settings)
    formats = {linear.name: linear.format for linear in plan.linears}
    assert formats[MLP.format(1, "up")].group_size == 256
    assert formats[MLP.format(1, "up")].transform is TransformKind.HADAMARD  # the recipe's
    assert formats[ATTENTION.format(0, "q")].transform is TransformKind.NONE
    assert formats[MLP.format(0, "down")].transform is TransformKind.DENSE and plan.learns_from_text
    del entries[MLP.format(0, "down")]
    with pytest.raises(UsageError, match=r"says nothing of model\.layers\.0\.mlp\.down_proj"):
        plan_of(source, QuantizeSettings(source.name, plan=entries, target="none").resolve(source))


def test_readers_of_one_input_share_one_transform(source: ModelSource) -> None:
    plan = plan_of(source, QuantizeSettings(source.name, "apex4-fast", target="none").resolve(source))
    owners = {linear.name: linear.format.transform_from for linear in plan.linears if linear.layer == 0}
    assert owners[ATTENTION.format(0, "q")] is None and owners[MLP.format(0, "down")] is None
    assert owners[ATTENTION.format(0, "k")] == owners[ATTENTION.format(0, "v")] == ATTENTION.format(0, "q")
    assert owners[MLP.format(0, "up")] == MLP.format(0, "gate")
