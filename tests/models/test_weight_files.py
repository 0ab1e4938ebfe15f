"""Which files are the model: what transformers loads, for every combination of files, or a refusal that names both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.models.source import ModelSource
from apex4_quant.models.weight_files import INDEX_NAME, SINGLE_NAME, index_of, read_tensor_infos

Call = Callable[..., Any]  # the fixtures of conftest.py
NORM = "model.norm.weight"
FAILED, USAGE = 1, 2


def mark(file: Path, value: float) -> None:
    """A model is recognised by its final norm."""
    tensors = load_file(file)
    if NORM in tensors:
        tensors[NORM] = torch.full_like(tensors[NORM], value)
        save_file(tensors, file, metadata={"format": "pt"})


def what_transformers_loads(folder: Path) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return float(model.model.norm.weight[0].detach())


def what_is_quantized(folder: Path) -> float:
    return float(ModelSource(str(folder)).read([NORM])[NORM][0])


@pytest.fixture
def mixed(tiny_model: Call) -> Path:
    """Shards and their index (norm 2), and a single file of the same tensors (norm 3)."""
    folder, single = tiny_model(sharded=True), tiny_model("single")
    (single / SINGLE_NAME).rename(folder / SINGLE_NAME)
    for file in folder.glob("*.safetensors"):
        mark(file, 3.0 if file.name == SINGLE_NAME else 2.0)
    return folder


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


CASES: dict[str, tuple[Callable[[Path], object], float]] = {
    "a single file beside shards and an index": (lambda f: None, 3.0),
    "a single file beside an index without shards": (
        lambda f: [shard.unlink() for shard in f.glob("model-*.safetensors")],
        3.0,
    ),
    "a single file beside a damaged index": (lambda f: (f / INDEX_NAME).write_text("{"), 3.0),
    "a single file beside shards without an index": (lambda f: (f / INDEX_NAME).unlink(), 3.0),
    "shards and an index": (lambda f: (f / SINGLE_NAME).unlink(), 2.0),
    "a single file beside PyTorch files": (lambda f: (f / "pytorch_model.bin").write_bytes(b"old"), 3.0),
    "shards beside PyTorch files": (
        lambda f: ((f / SINGLE_NAME).unlink(), (f / "pytorch_model.bin").write_bytes(b"old")),
        2.0,
    ),
    "another name in config.json": (
        lambda f: (
            (f / SINGLE_NAME).rename(f / "my.safetensors"),
            set_config(f, transformers_weights="my.safetensors"),
        ),
        3.0,
    ),
    "an index named in config.json beside a single file": (
        lambda f: set_config(f, transformers_weights=INDEX_NAME),
        2.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_counts_is_what_transformers_loads(case: str, mixed: Path) -> None:
    change, expected = CASES[case]
    change(mixed)
    assert what_is_quantized(mixed) == what_transformers_loads(mixed) == expected


def test_a_baseline_is_the_model_that_was_quantized(mixed: Path, invoke: Call, calib: Path, tmp_path: Path) -> None:
    """And a name of the weights in config.json is not taken over: OUT has files of its own."""
    (mixed / SINGLE_NAME).rename(mixed / "my.safetensors")
    set_config(mixed, transformers_weights="my.safetensors")
    out = tmp_path / "out"
    small = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--recipe", "rtn", "--json")
    assert invoke("quantize", mixed, "-o", out, *small).exit_code == 0
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    assert what_transformers_loads(out) == 3.0
    assert invoke("repack", out, "-o", tmp_path / "again", "--target", "H200", "--json").exit_code == 0
    assert what_transformers_loads(tmp_path / "again") == 3.0


def shards_with(folder: Path, tensor: str) -> list[Path]:
    return [file for file in sorted(folder.glob("model-*.safetensors")) if tensor in load_file(file)]


def test_a_tensor_in_two_shards(tiny_model: Call) -> None:
    folder = tiny_model(sharded=True)
    (owner,) = shards_with(folder, NORM)
    other = next(file for file in sorted(folder.glob("*.safetensors")) if file != owner)
    value, whole = load_file(owner)[NORM], load_file(other)
    save_file(whole | {NORM: value}, other, metadata={"format": "pt"})
    infos = read_tensor_infos(folder)
    assert infos[NORM].file == owner and len(infos) == len(read_tensor_infos(tiny_model("single")))
    for changed in (value + 1, value.float(), value[:64]):
        save_file(whole | {NORM: changed}, other, metadata={"format": "pt"})
        with pytest.raises(Apex4Error, match=f"{owner.name}.*{other.name} disagree on {NORM}") as refused:
            read_tensor_infos(folder)
        assert "remove the file" in str(refused.value)


def test_names_that_leave_the_folder(tiny_model: Call, tmp_path: Path) -> None:
    folder = tiny_model(sharded=True)
    index = json.loads((folder / INDEX_NAME).read_text())
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "config.json", ".."):
        (folder / INDEX_NAME).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {NORM: name}}))
        with pytest.raises(Apex4Error, match="no safetensors file of the folder"):
            read_tensor_infos(folder)
    for name in ("../outside.safetensors", "weights.bin", 3):
        set_config(folder, transformers_weights=name)
        with pytest.raises(Apex4Error, match="transformers_weights"):
            index_of(folder)
    set_config(folder, transformers_weights="absent.safetensors")
    with pytest.raises(UsageError, match=r"names absent\.safetensors as its weights, which is not there"):
        index_of(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "model.gguf is a GGUF file"),
        ("pytorch_model-00001-of-00002.bin", "only PyTorch .bin files"),
        ("model.fp16.safetensors", "transformers does not load model.fp16.safetensors"),
        ("consolidated.safetensors", "transformers does not load consolidated.safetensors"),
    ],
)
def test_other_weights_are_named(
    name: str, said: str, tiny_model: Call, quantize_badly: Call, one_sentence: Call
) -> None:
    folder = tiny_model()
    (folder / SINGLE_NAME).rename(folder / name)
    one_sentence(quantize_badly(folder), USAGE, f"{folder} has no {SINGLE_NAME}", said)


def test_an_adapter_is_refused(
    tiny_model: Call, quantize_badly: Call, invoke: Call, one_sentence: Call, demo_checkpoint: Path, tmp_path: Path
) -> None:
    """transformers adds it to the weights beside it, and without a word it would be left away."""
    folder = tiny_model()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    one_sentence(quantize_badly(folder), USAGE, str(folder), "adapter_config.json", "merge it first")
    one_sentence(invoke("eval", folder, "--json"), USAGE, "adapter_config.json", "merge it first")
    one_sentence(invoke("eval", demo_checkpoint, "--baseline", folder, "--json"), USAGE, "merge it first")
    (folder / "config.json").unlink()
    one_sentence(quantize_badly(folder), USAGE, str(folder), "adapter_config.json", "merge it first")
