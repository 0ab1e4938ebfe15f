"""The checkpoint in transformers: registration, loading in every way, generation, saving, and what must not load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import apex4_quant  # noqa: F401  (registers the quantizer)
from apex4_quant.errors import Apex4Error
from apex4_quant.nn.linear import Apex4Linear

PROMPT = "The module defines a class that"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(64)[None] * 31 % 4096, use_cache=False).logits


@pytest.mark.parametrize("first", ["apex4_quant", "transformers", "transformers.quantizers.auto"])
def test_registration_works_in_any_import_order(first: str, demo_checkpoint: Path) -> None:
    second = "transformers" if first == "apex4_quant" else "apex4_quant"
    code = f"""
import {first}, {second}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(demo_checkpoint)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "Apex4Linear", done.stderr


def test_a_program_that_does_not_know_the_format(demo_checkpoint: Path, tmp_path: Path) -> None:
    """What README, the card and docs/index.md say: transformers fills its linears with random numbers. A name that is not
    registered stands for ours in a program that does not import apex4_quant."""
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "unknown"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "not-registered"
    (folder / "config.json").write_text(json.dumps(config))
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert "model.layers.0.mlp.up_proj.weight" in loading["missing_keys"]


def test_importing_apex4_quant_imports_neither_torch_nor_transformers() -> None:
    code = "import apex4_quant, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_generation_is_fluent_and_repeatable(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    texts = [tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]) for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(PROMPT)
    assert len(set(texts[0].split())) > 8
    # The cache must not change what is computed: the last token's logits with and without it.
    ids = inputs["input_ids"]
    cached = model(ids[:, -1:], past_key_values=model(ids[:, :-1], use_cache=True).past_key_values).logits[:, -1]
    assert torch.allclose(cached.float(), model(ids).logits[:, -1].float(), atol=0.25)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map: object, demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, device_map=device_map)
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(demo_checkpoint)))


def test_offload_to_disk(demo_checkpoint: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(demo_checkpoint)))


def test_save_pretrained_round_trips(demo_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model), logits_of(again))
    first, second = (json.loads((p / "config.json").read_text()) for p in (demo_checkpoint, tmp_path))
    assert first["quantization_config"] == second["quantization_config"]
    stored = {
        name: tensor for path in demo_checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    saved = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert stored.keys() == saved.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name


def test_a_bare_base_model_loads_its_quantized_linears(demo_checkpoint: Path) -> None:
    base = AutoModel.from_pretrained(demo_checkpoint)
    full = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    assert isinstance(base.layers[0].mlp.up_proj, Apex4Linear)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, full.model(ids).last_hidden_state)


def test_scales_stay_float16_whatever_the_model_is_cast_to(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    linear = model.model.layers[0].mlp.up_proj
    before = linear.weight_scale.clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model.to(dtype)
        assert linear.weight_scale.dtype == torch.float16 and torch.equal(linear.weight_scale, before)
        assert linear.weight_packed.dtype == torch.uint8


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def rewrite(folder: Path, change: object) -> None:
    shard = folder / "model-00002-of-00008.safetensors"
    tensors = load_file(shard)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard.name or k in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NAME = "model.layers.0.mlp.up_proj"
DAMAGES = {
    "missing codes": (lambda t: t.pop(f"{NAME}.weight_packed"), f"no tensor {NAME}.weight_packed"),
    "missing scales": (lambda t: t.pop(f"{NAME}.weight_scale"), f"no tensor {NAME}.weight_scale"),
    "forbidden code": (lambda t: t[f"{NAME}.weight_packed"].view(-1)[5:6].fill_(0x18), f"{NAME}.weight_packed"),
    "zero scale": (lambda t: t[f"{NAME}.weight_scale"].view(-1)[7:8].fill_(0), f"{NAME}.weight_scale"),
    "wrong shape": (lambda t: t.update({f"{NAME}.weight_scale": torch.ones(4, 2, 1).half()}), f"{NAME}.weight_scale"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_never_loads(damage: str, demo_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(demo_checkpoint, tmp_path)
    change, message = DAMAGES[damage]
    rewrite(folder, change)
    with pytest.raises(Apex4Error, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_newer_format_is_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(demo_checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Apex4Error, match="version 3"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_quantizing_while_loading_is_refused() -> None:
    from apex4_quant.integrations.transformers.quantizer import Apex4Config
    from apex4_quant.models.place import DEMO_PATH

    with pytest.raises(Apex4Error, match="apex4 quantize"):
        AutoModelForCausalLM.from_pretrained(DEMO_PATH, quantization_config=Apex4Config(format_version=1))


def test_a_class_of_the_module_that_registers_us_can_be_imported_first() -> None:
    code = "import apex4_quant; from transformers import PreTrainedModel; print(PreTrainedModel.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "PreTrainedModel", done.stderr
