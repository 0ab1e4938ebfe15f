"""Families whose layers differ: published shapes against the real classes, what is left away, what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig
from transformers import GptOssForCausalLM as GptOss

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.checkpoint.check import check
from apex4_quant.models.experts import UnfusedExperts, unfuse_experts
from apex4_quant.models.families import FAMILIES
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource

# As the models' own config.json say, with fewer layers. Qwen3-235B-A22B has 94, all alike.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-235B-A22B": (
        "Qwen3MoeForCausalLM",
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 4096, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "intermediate_size": 12288, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {
            "model_type": "deepseek_v3", "num_hidden_layers": 5, "hidden_size": 7168, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "intermediate_size": 18432,
            "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
        },
    ),
    "DeepSeek-V2-Lite": (
        "DeepseekV2ForCausalLM",
        {
            "model_type": "deepseek_v2", "num_hidden_layers": 3, "hidden_size": 2048, "n_routed_experts": 64,
            "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408, "intermediate_size": 10944,
            "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 512, "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "Qwen3-Next-80B-A3B": (
        "Qwen3NextForCausalLM",
        {
            "model_type": "qwen3_next", "num_hidden_layers": 4, "hidden_size": 2048, "num_experts": 128,
            "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
            "full_attention_interval": 4, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "mlp_only_layers": [],
        },
    ),
    "gpt-oss-20b": (
        "GptOssForCausalLM",
        {
            "model_type": "gpt_oss", "num_hidden_layers": 2, "hidden_size": 2880, "intermediate_size": 2880,
            "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
        },
    ),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_linear_of_the_real_class_is_quantized_or_kept_by_name(name: str) -> None:
    architecture, config = PUBLISHED[name]
    family = FAMILIES[architecture]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    unfuse_experts(model)
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        there = {module for module, found in layer.named_modules() if isinstance(found, nn.Linear)}
        linears, kept = family.linears(config, index), family.kept_linears(config, index)
        assert len(linears) == len(set(linears)) and set(linears) | set(kept) == there
        assert not set(linears) & set(kept)
        for group in family.groups(config, index):
            widths = {layer.get_submodule(linear).in_features for linear in group.linears}
            assert len(widths) == 1
            for other in (group.norm, *group.also_read_by):
                assert other is None or layer.get_submodule(other).weight.shape[-1] in widths
        writers = family.residual_writers(config, index)
        assert all(layer.get_submodule(writer).out_features == config["hidden_size"] for writer in writers)


def deepseek(folder: Path) -> nn.Module:
    """One dense and one sparse layer, and a third that predicts a further token."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES,
            moe_intermediate_size=96, num_experts_per_tok=2, n_routed_experts=4, n_group=2, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=64, kv_lora_rank=48, qk_rope_head_dim=32, qk_nope_head_dim=32,
            v_head_dim=32, num_key_value_heads=2, num_nextn_predict_layers=1,
        )
    ).to(torch.bfloat16)  # fmt: skip
    nn.init.normal_(model.model.layers[1].mlp.gate.e_score_correction_bias, std=0.1)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name.replace(".1.", ".2.", 1): tensor.clone() for name, tensor in tensors.items() if ".layers.1." in name
    }
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(128, 256, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return with_tokenizer(model, folder)


def gpt_oss(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = GptOss(
        GptOssConfig(**SIZES, num_key_value_heads=1, head_dim=64, num_local_experts=3, num_experts_per_tok=2)
    ).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return with_tokenizer(model, folder)


def with_tokenizer(model: nn.Module, folder: Path) -> nn.Module:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder)
    return model


def quantized(folder: Path, out: Path, **changes: Any) -> Path:
    how = {"target": "none", "samples": 2, "seq_len": 32, "recipe": "gptq"} | changes
    quantize(QuantizeSettings(str(folder), **how), out)
    return out


@torch.no_grad()
@pytest.mark.parametrize("make", [deepseek, gpt_oss], ids=["deepseek3", "gptoss"])
def test_checked_loaded_saved_and_loaded_again(make: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    make(tmp_path / "model")
    out = quantized(tmp_path / "model", tmp_path / "out", ignore=("mlp.experts.0.up_proj", "self_attn.o_proj"))
    check(str(out))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(model.model.layers[1].mlp.experts, UnfusedExperts)
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(32)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_predicts_further_tokens_is_left_away_and_said(
    invoke: Callable[..., Result],
    quantize_badly: Callable[..., Result],
    one_sentence: Callable[..., str],
    tmp_path: Path,
) -> None:
    deepseek(tmp_path / "model")
    dry = ("quantize", tmp_path / "model", "-o", tmp_path / "out", "--target", "none", "--samples", 2, "--seq-len", 32)
    plan = json.loads(invoke(*dry, "--dry-run", "--json").stdout)
    assert "model.layers.2.eh_proj.weight" in plan["left_away"] and len(plan["left_away"]) > 10
    assert all(name.startswith("model.layers.2.") for name in plan["left_away"])
    shown = invoke(*dry, "--dry-run").stdout
    assert f"{len(plan['left_away'])} tensors" in shown and "further tokens" in shown
    out = quantized(tmp_path / "model", tmp_path / "out", recipe="rtn")
    assert "model.layers.2." not in (out / "model.safetensors.index.json").read_text()
    # A layer that no setting announces is of another model.
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 0}))
    shutil.rmtree(out)
    one_sentence(quantize_badly(tmp_path / "model"), 1, "layer 2", "2 layers")


def test_what_transformers_keeps_in_float32_is_calibrated_in_float32(tmp_path: Path) -> None:
    deepseek(tmp_path)
    source = ModelSource(str(tmp_path))
    runner = LayerRunner(source, "cpu", torch.bfloat16)
    router = runner.load_layer(1, source.read(source.layer_tensors(1))).mlp.gate
    assert router.e_score_correction_bias.dtype == torch.float32 and router.weight.dtype == torch.bfloat16


def test_routers_norms_and_sinks_are_kept_with_their_reasons(invoke: Callable[..., Result], tmp_path: Path) -> None:
    gpt_oss(tmp_path / "model")
    dry = ("quantize", tmp_path / "model", "-o", tmp_path / "out", "--target", "none", "--dry-run", "--json")
    kept = {entry["name"]: entry["reason"] for entry in json.loads(invoke(*dry).stdout)["kept"]}
    layer = "model.layers.1"
    assert kept[f"{layer}.mlp.router.weight"] == kept[f"{layer}.mlp.router.bias"] == "a router"
    assert kept[f"{layer}.self_attn.sinks"] == kept[f"{layer}.mlp.experts.2.up_proj.bias"] == "not a linear weight"


@pytest.mark.parametrize(
    ("method", "advice"), [("mxfp4", "Mxfp4Config(dequantize=True)"), ("fp8", "FineGrainedFP8Config(dequantize=True)")]
)
def test_originals_published_in_few_bits_are_refused_with_the_way_to_16(
    method: str, advice: str, quantize_badly: Callable[..., Result], one_sentence: Callable[..., str], tmp_path: Path
) -> None:
    gpt_oss(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    section = {"quantization_config": {"quant_method": method}}
    config.write_text(json.dumps(json.loads(config.read_text()) | section))
    one_sentence(quantize_badly(tmp_path / "model"), 2, f"already quantized ({method})", advice)


def test_a_language_model_beside_others_is_refused_with_what_to_do(
    quantize_badly: Callable[..., Result], one_sentence: Callable[..., str], tmp_path: Path
) -> None:
    gpt_oss(tmp_path / "model")
    wrapper = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrapper | {"text_config": {"model_type": "mistral"}}))
    one_sentence(
        quantize_badly(tmp_path / "model"), 2, "LlavaForConditionalGeneration", "(mistral)", "folder of its own"
    )
    llama4 = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(llama4))
    one_sentence(quantize_badly(tmp_path / "model"), 2, "Llama4ForCausalLM", "give another model")


@pytest.mark.parametrize(
    ("field", "value"), [("first_k_dense_replace", "3"), ("n_routed_experts", None), ("num_nextn_predict_layers", -1)]
)
def test_damaged_settings_of_layers_are_refused(
    field: str, value: object, quantize_badly: Callable[..., Result], one_sentence: Callable[..., str], tmp_path: Path
) -> None:
    deepseek(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    one_sentence(quantize_badly(tmp_path / "model"), 1, "config.json")
