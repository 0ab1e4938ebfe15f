"""`apex4 export --to vllm-humming`: the same weights in another format, and what that format cannot hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.checkpoint.check import stored_formats
from apex4_quant.checkpoint.export import humming_section, pack_words
from apex4_quant.checkpoint.inspect import Checkpoint
from apex4_quant.errors import UsageError
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind

USAGE = 2
Call = Callable[..., Any]  # the fixtures of conftest.py
SMALL = {"samples": 2, "seq_len": 64, "device": "cpu"}
TO = ("--to", "vllm-humming")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dequantized(words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [N, K] as humming 0.1.19 defines it: utils/weight.py, dequantize_weight, of what pack_weight.cuh packs."""
    codes = torch.stack([(words.to(torch.int64) >> (4 * place)) & 15 for place in range(8)], -1).flatten(1) - 8
    return codes.double() * scale.double().repeat_interleave(128, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo for Hopper, whose tiles are filled up with rows (k and v have 128), and two linears of which are kept."""
    out = tmp_path_factory.mktemp("export") / "source"
    kept = ("*.0.mlp.down_proj", "*.1.mlp.gate_proj", "*.1.mlp.up_proj")
    quantize(QuantizeSettings("demo", recipe="rtn", target="H100", ignore=kept, **SMALL), out)
    return out


def test_the_weights_are_the_same(source: Path, tmp_path: Path, invoke: Call) -> None:
    out = tmp_path / "out"
    template = source / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    result = invoke("export", source, "-o", out, *TO, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["linears"] == 39
    before, after = tensors_of(source), tensors_of(out)
    formats = dict(stored_formats(Checkpoint(str(source))))
    for name, format in formats.items():
        words, scale = after.pop(f"{name}.weight"), after.pop(f"{name}.weight_scale")
        assert (words.dtype, words.shape) == (torch.int32, (format.out_features, format.in_features // 8))
        assert (scale.dtype, scale.shape) == (torch.float16, (format.out_features, format.in_features // 128))
        codes = format.layout.unpack(before.pop(f"{name}.weight_packed"), format.out_features)
        scales = format.layout.unpack_scales(before.pop(f"{name}.weight_scale"), format.out_features)
        assert torch.equal(dequantized(words, scale), codes.double() * scales.double().repeat_interleave(128, 1))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    names = {path.name for path in out.iterdir()}
    assert (out / "additional_chat_templates" / template.name).read_text() == template.read_text()
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} <= names
    assert not any(name.startswith(("apex4_", "README")) for name in names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(out))


def test_what_config_json_says(source: Path, tmp_path: Path, invoke: Call) -> None:
    invoke("export", source, "-o", tmp_path / "out", *TO)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    section = after.pop("quantization_config")
    del before["quantization_config"]
    assert before == after
    kept = section.pop("ignored_layers")
    assert section == {
        "quant_method": "humming", "b_dtype": "uint4", "weight_scale_group_size": 128, "hadamard_block_size": 128,
        "a_dtype": "int4", "input_scale_group_size": 128, "allow_fallback": False,
    }  # fmt: skip
    # By the names of vLLM's layers: as its loader matches them.
    skipped = [pattern.removeprefix("re:") for pattern in kept if pattern.startswith("re:")]
    layers = ("0.mlp.down_proj", "1.mlp.gate_up_proj", "1.mlp.down_proj", "10.mlp.down_proj", "0.mlp.gate_up_proj")
    found = [layer for layer in layers if any(re.match(one, f"model.layers.{layer}") for one in skipped)]
    assert found == ["0.mlp.down_proj", "1.mlp.gate_up_proj"] and kept[0] == "lm_head"


def test_words_are_literally_these() -> None:
    codes = torch.tensor([[-7, -6, -1, 0, 1, 2, 6, 7], [7, 7, 7, 7, 7, 7, 7, -7]], dtype=torch.int8)
    assert [int(word) & 0xFFFFFFFF for word in pack_words(codes)[:, 0]] == [0xFEA98721, 0x1FFFFFFF]


def linear(**changes: Any) -> LinearFormat:
    usual = {"out_features": 256, "in_features": 256, "group_size": 128, "layout": get_layout("sm90"),
             "transform": TransformKind.HADAMARD, "activation_clip": 1.0}  # fmt: skip
    return LinearFormat(**usual | changes)


@pytest.mark.parametrize(
    ("formats", "nouns"),
    [
        ({"a.q_proj": linear(transform=TransformKind.DENSE)}, ("a.q_proj", "dense128", "rtn", "gptq")),
        ({"a.q_proj": linear(transform=TransformKind.FEEDBACK)}, ("a.q_proj", "learned", "feedback128", "rtn")),
        ({"a.q_proj": linear(activation_clip=0.9)}, ("a.q_proj", "0.9", "search_clip")),
        ({"a.q_proj": linear(activation_bits=8)}, ("a.q_proj", "8-bit")),
        ({"a.q_proj": linear(group_size=256)}, ("a.q_proj", "256", "--group-size 128")),
        ({"a.q_proj": linear(group_size="channel")}, ("a.q_proj", "channel", "--group-size 128")),
        ({"a.q_proj": linear(in_features=328)}, ("a.q_proj", "328", "plugin")),
        ({"mlp.experts.3.up_proj": linear()}, ("experts.3", "plugin")),
        ({"a.q_proj": linear(), "a.o_proj": linear(transform=TransformKind.NONE)}, ("q_proj", "o_proj", "--transform")),
        ({}, ("nothing to export",)),
    ],
)
def test_what_humming_cannot_compute(formats: dict[str, LinearFormat], nouns: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        humming_section(formats, list(formats))
    assert all(noun in str(error.value) for noun in nouns), error.value


def test_one_of_two_in_a_layer_kept() -> None:
    with pytest.raises(UsageError, match=r"a\.k_proj, which is not quantized, and a\.q_proj, which is, in one layer"):
        humming_section({"a.q_proj": linear()}, ["a.q_proj", "a.k_proj"])


def test_without_a_transform() -> None:
    section = humming_section({"a.q_proj": linear(transform=TransformKind.NONE)}, ["a.q_proj"])
    assert section["hadamard_block_size"] == 0 and section["ignored_layers"] == ["lm_head"]


def test_nothing_is_written_for_what_is_refused(source: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    out = tmp_path / "out"
    one_sentence(invoke("export", "demo", "-o", out, *TO), USAGE, "demo", "not quantized")
    one_sentence(invoke("export", source, "-o", out, "--to", "gguf"), USAGE, "gguf", "vllm-humming")
    one_sentence(invoke("export", source, "-o", source, *TO), USAGE, str(source), "not empty")
    learned = tmp_path / "learned"
    quantize(QuantizeSettings("demo", recipe="rtn", transform="shared128", target="none", **SMALL), learned)
    one_sentence(invoke("export", learned, "-o", out, *TO), USAGE, "shared128", "gptq")
    assert not out.exists()


def test_damage_is_not_exported(source: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "apex4_report.json").unlink()  # with it the checksum says so
    name = "model.layers.2.mlp.down_proj.weight_packed"
    shard = next(path for path in sorted(damaged.glob("*.safetensors")) if name in load_file(path))
    tensors = load_file(shard)
    tensors[name].view(-1)[:4] = torch.tensor(
        [0x80, 0, 0, 0]
    )  # a negative zero: sign and magnitude, as Hopper reads it
    save_file(tensors, shard, metadata={"format": "pt"})
    one_sentence(invoke("export", damaged, "-o", tmp_path / "out", *TO), 1, name, "-8")
    assert not (tmp_path / "out" / "config.json").exists()
