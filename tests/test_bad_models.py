"""Every damaged model gets one sentence that names the file, field or tensor, before any work is put into it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apex4_quant.models.place import DEMO_PATH

FAILED, USAGE = 1, 2
Call = Callable[..., Any]  # the fixtures of conftest.py
Change = Callable[[Path], object]


def edit_config(**changes: Any) -> Change:
    """Set fields of config.json; `...` removes one."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def edit_quantization(**changes: Any) -> Change:
    """Set fields of the quantization_config inside config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def flip_bit(path: Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x04
    path.write_bytes(data)


# config.json: what it says, and how it can be damaged. Each pair: the change, and what the sentence must name.
CONFIGS: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "truncated": (
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text()[:100]),
        FAILED,
        ("config.json", "not valid JSON", "damaged"),
    ),
    "binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), FAILED, ("config.json", "not valid JSON")),
    "a list": (lambda f: (f / "config.json").write_text("[]"), FAILED, ("config.json", "not a JSON object")),
    "other architecture": (
        edit_config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        USAGE,
        ("GPT2LMHeadModel", "not supported", "LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"),
    ),
    "no architecture and another model type": (
        edit_config(architectures=..., model_type="gpt2"),
        USAGE,
        ("model_type 'gpt2'", "not supported"),
    ),
    "architectures is a name": (edit_config(architectures="LlamaForCausalLM"), FAILED, ("architectures", "no list")),
    "architecture of another model type": (
        edit_config(model_type="mistral"),
        FAILED,
        ("LlamaForCausalLM", "'mistral'", "MistralForCausalLM"),
    ),
    "quantized by others": (edit_config(quantization_config={"quant_method": "gptq"}), USAGE, ("already", "gptq")),
    "quantization_config is text": (edit_config(quantization_config="awq"), FAILED, ("quantization_config",)),
    "more layers than tensors": (
        edit_config(num_hidden_layers=3),
        FAILED,
        ("no tensor model.layers.2.self_attn.q_proj.weight", "incomplete"),
    ),
    "fewer layers than tensors": (edit_config(num_hidden_layers=1), FAILED, ("layer 1", "config")),
    "smaller vocabulary": (edit_config(vocab_size=64), FAILED, ("tokenizer", "64", "do not belong together")),
    "other intermediate size": (edit_config(intermediate_size=384), FAILED, ("mlp.gate_proj.weight", "[384, 128]")),
    "other hidden size": (edit_config(hidden_size=256), FAILED, (".weight", "shape", "256")),
    "no layer count": (edit_config(num_hidden_layers=...), FAILED, ("config.json", "num_hidden_layers")),
    "no hidden size": (edit_config(hidden_size=...), FAILED, ("config.json", "hidden_size")),
    "no vocabulary size": (edit_config(vocab_size=...), FAILED, ("config.json", "vocab_size")),
    "architectures is a number": (edit_config(architectures=3), FAILED, ("architectures", "no list")),
    "no model type": (edit_config(model_type=...), FAILED, ("config.json", "model_type")),
    "unknown model type": (edit_config(model_type="nonsense"), FAILED, ("config.json", "nonsense")),
    "heads that do not divide": (edit_config(num_attention_heads=3), FAILED, ("config.json", "attention heads")),
    "no heads": (edit_config(num_attention_heads=0), FAILED, ("config.json", "does not describe a model")),
    "unknown activation": (edit_config(hidden_act="wild"), FAILED, ("config.json", "KeyError: 'wild'", "get it again")),
    "float64": (edit_config(dtype="float64"), USAGE, ("float64", "bfloat16")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(one_sentence: Call, case: str, quantize_badly: Call, tiny_model: Call) -> None:
    change, exit_code, nouns = CONFIGS[case]
    model = tiny_model()
    change(model)
    one_sentence(quantize_badly(model), exit_code, *nouns)


def test_not_quantized_or_quantized_by_others(one_sentence: Call, invoke: Call, tiny_model: Call) -> None:
    model = tiny_model()
    for command in ("inspect", "check"):
        one_sentence(invoke(command, model), USAGE, "is not quantized", "apex4 quantize")
    edit_config(quantization_config={"quant_method": "awq", "bits": 4})(model)
    for command in ("inspect", "check", "eval"):
        one_sentence(invoke(command, model), USAGE, "'awq'", "not by apex4")


CHECKPOINTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "report without files": (lambda f: (f / "apex4_report.json").write_text("{}"), ("apex4_report.json",)),
    "report is a list": (lambda f: (f / "apex4_report.json").write_text("[]"), ("apex4_report.json",)),
    "report is cut off": (lambda f: (f / "apex4_report.json").write_text('{"files"'), ("apex4_report.json", "JSON")),
    "quantization_config is text": (edit_config(quantization_config="apex4"), ("quantization_config",)),
    "quantization_config is an empty list": (edit_config(quantization_config=[]), ("quantization_config",)),
    "newer format": (edit_quantization(format_version=3), ("format version 3", "versions 1 and 2")),
    "8 bits in a file of version 1": (edit_quantization(activation_bits=8), ("activation_bits", "8", "version 1")),
    "5-bit activations": (edit_quantization(activation_bits=5), ("activation_bits", "5", "4 or 8")),
    "unknown field": (edit_quantization(rotation="x"), ("unknown fields rotation",)),
    "5 bits": (edit_quantization(bits=5), ("bits = 5", "4")),
    "modules is a list": (edit_quantization(modules=[]), ("modules",)),
    "activation_clip is text": (edit_quantization(activation_clip="much"), ("activation_clip", "'much'")),
    "modules_to_not_convert is null": (edit_quantization(modules_to_not_convert=None), ("modules_to_not_convert",)),
    "other group size": (
        edit_quantization(group_size=256),
        ("model.layers.0.self_attn.q_proj", "feedback128x16 with groups of 256", "config.json"),
    ),
    "other layout": (edit_quantization(layout="sm80"), ("model.layers.0.self_attn.q_proj.weight_packed",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint(case: str, one_sentence: Call, invoke: Call, demo_checkpoint: Path, tmp_path: Path) -> None:
    change, nouns = CHECKPOINTS[case]
    folder = tmp_path / "damaged"
    shutil.copytree(demo_checkpoint, folder)
    change(folder)
    for command in ("check", "eval"):
        one_sentence(invoke(command, folder, "--json"), FAILED, *nouns)


# Weights

LAYER_1_Q = "model.layers.1.self_attn.q_proj.weight"


def damage_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    data[8 + length // 2 : 8 + length // 2 + 8] = b"\xff" * 8
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])


WEIGHTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "truncated": (truncate, ("model.safetensors", "truncated")),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "truncated")),
    "damaged header": (damage_header, ("model.safetensors", "damaged")),
    "NaN": (edit_tensors(lambda t: t[LAYER_1_Q].view(-1)[7].fill_(torch.nan)), (LAYER_1_Q, "NaN")),
    "infinity outside the layers": (
        edit_tensors(lambda t: t["model.norm.weight"][3].fill_(torch.inf)),
        ("model.norm.weight", "infinity", "model.safetensors"),
    ),
    "no linear": (edit_tensors(lambda t: t.pop(LAYER_1_Q)), (LAYER_1_Q, "incomplete")),
    "names of another class": (
        edit_tensors(
            lambda t: [t.update({f"language_model.{name}": t.pop(name)}) for name in list(t) if "layers" in name]
        ),
        (
            LAYER_1_Q.replace("1", "0"),
            f"language_model.{LAYER_1_Q.replace('1', '0')}",
            "LlamaForCausalLM",
            "save it again",
        ),
    ),
    "no embedding": (edit_tensors(lambda t: t.pop("model.embed_tokens.weight")), ("model.embed_tokens.weight",)),
    "no final norm": (edit_tensors(lambda t: t.pop("model.norm.weight")), ("model.norm.weight",)),
    "no head": (edit_tensors(lambda t: t.pop("lm_head.weight")), ("lm_head.weight",)),
    "no layer norm": (
        edit_tensors(lambda t: t.pop("model.layers.1.input_layernorm.weight")),
        ("model.layers.1.input_layernorm.weight", "missing"),
    ),
    "unknown tensor in a layer": (
        edit_tensors(lambda t: t.update({"model.layers.1.self_attn.sinks": torch.ones(2)})),
        ("model.layers.1.self_attn.sinks",),
    ),
    "linear of one dimension": (edit_tensors(lambda t: t.update({LAYER_1_Q: torch.ones(128)})), (LAYER_1_Q, "[128]")),
    "linear of another shape": (
        edit_tensors(lambda t: t.update({LAYER_1_Q: torch.ones(256, 128)})),
        (LAYER_1_Q, "[256, 128]", "[128, 128]"),
    ),
    "embedding of another shape": (
        edit_tensors(lambda t: t.update({"model.embed_tokens.weight": torch.ones(4096, 256)})),
        ("model.embed_tokens.weight", "[4096, 256]"),
    ),
    "too few embeddings": (
        edit_tensors(lambda t: t.update({"model.embed_tokens.weight": torch.ones(99, 128)})),
        ("model.embed_tokens.weight", "[99, 128]"),
    ),
    "final norm of another shape": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        ("model.norm.weight", "[7]"),
    ),
    "8-bit floats": (
        edit_tensors(lambda t: t.update({LAYER_1_Q: torch.ones(128, 128).to(torch.float8_e4m3fn)})),
        (LAYER_1_Q, "F8_E4M3"),
    ),
    "too large for a scale": (
        edit_tensors(lambda t: t.update({LAYER_1_Q: torch.full((128, 128), 1e30)})),
        (LAYER_1_Q, "too large"),
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(one_sentence: Call, case: str, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    change, nouns = WEIGHTS[case]
    model = tiny_model()
    change(model)
    one_sentence(quantize_badly(model), FAILED, *nouns)
    if case != "too large for a scale":  # what only the scale search can know
        assert not (tmp_path / "out").exists(), "it was found only after the run had begun"


INDEX = "model.safetensors.index.json"


def test_index_and_shards(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    model = tiny_model(sharded=True)
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 1
    whole = (model / INDEX).read_text()

    def with_weight_map(**changes: str) -> str:
        index = json.loads(whole)
        return json.dumps(index | {"weight_map": index["weight_map"] | changes})

    (model / INDEX).write_text(with_weight_map(lm_head="model-00009-of-00009.safetensors"))
    one_sentence(quantize_badly(model), FAILED, INDEX, "model-00009-of-00009.safetensors", "not there")
    (model / INDEX).write_text(with_weight_map(**{"model.extra.weight": shards[0].name}))
    one_sentence(quantize_badly(model), FAILED, INDEX, "model.extra.weight", "no shard holds")
    (model / INDEX).write_text(with_weight_map(**{"model.norm.weight": shards[0].name}))
    one_sentence(quantize_badly(model), FAILED, INDEX, "disagree on model.norm.weight")
    for damaged, noun in (("{}", "no weight_map"), ("[]", "damaged"), (whole[:300], "not valid JSON")):
        (model / INDEX).write_text(damaged)
        one_sentence(quantize_badly(model), FAILED, INDEX, noun)
    (model / INDEX).write_text(whole)
    shards[1].unlink()
    one_sentence(quantize_badly(model), FAILED, INDEX, shards[1].name, "not there")
    assert not (tmp_path / "out").exists()


def test_bit_flip_in_a_model_with_checksums(one_sentence: Call, quantize_badly: Call, tmp_path: Path) -> None:
    model = tmp_path / "demo-copy"
    shutil.copytree(DEMO_PATH, model)
    flip_bit(model / "model.safetensors")
    one_sentence(quantize_badly(model), FAILED, str(model / "model.safetensors"), "checksum")
    assert not (tmp_path / "out").exists()


def test_a_context_in_which_nothing_is_predicted(one_sentence: Call, invoke: Call, tiny_model: Call) -> None:
    model = tiny_model()
    edit_config(max_position_embeddings=1)(model)
    one_sentence(invoke("eval", model, "--json"), USAGE, str(model), "a context of 1 token")


def test_eval_compares_the_checksums_published_with_an_original(
    one_sentence: Call, invoke: Call, demo_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "demo-copy"
    shutil.copytree(DEMO_PATH, model)
    few = ("--limit", 1, "--json")
    assert invoke("eval", model, *few).exit_code == 0
    flip_bit(model / "model.safetensors")
    one_sentence(invoke("eval", model, *few), FAILED, str(model / "model.safetensors"), "checksum")
    one_sentence(
        invoke("eval", demo_checkpoint, "--baseline", model, *few), FAILED, str(model / "model.safetensors"), "checksum"
    )
    for text in ('["model.safetensors"]', '{"model.safetensors": 3}', "{"):
        (model / "checksums.json").write_text(text)
        one_sentence(invoke("eval", model, *few), FAILED, str(model / "checksums.json"), "damaged, get it again")
    (model / "checksums.json").write_text('{"another.safetensors": "00"}')
    assert invoke("eval", model, *few).exit_code == 0


def test_bit_flip_in_a_checkpoint(one_sentence: Call, invoke: Call, demo_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(demo_checkpoint, copy)
    shard = sorted(copy.glob("*.safetensors"))[3]
    flip_bit(shard, 0.7)
    one_sentence(invoke("eval", copy, "--limit", 1, "--json"), FAILED, str(shard), "checksum")
    one_sentence(invoke("check", copy, "--json"), FAILED, str(shard), "checksum")
    shard.write_bytes(shard.read_bytes()[:-100])
    one_sentence(invoke("eval", copy, "--json"), FAILED, str(shard), "truncated")
    shard.unlink()
    for command in ("eval", "check", "inspect"):
        one_sentence(invoke(command, copy, "--json"), FAILED, shard.name, "not there")
