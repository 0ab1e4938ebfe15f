"""config.json, headers, the index and bytes of weights, changed in every way: a sentence or a right model."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex4_quant.checkpoint.check import stored_formats
from apex4_quant.checkpoint.inspect import Checkpoint, inspect, inspection_as_text
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.models.weight_files import INDEX_NAME, read_tensor_infos
from apex4_quant.quantization.plan import plan_as_text, plan_of
from apex4_quant.quantization.settings import QuantizeSettings

from .conftest import refused_or_right

Cases = Callable[[int], settings]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, -(2**31), 10**30, 0.5, -1.0, 1e308, float("inf"), float("nan")])
    | st.sampled_from(
        ["", "llama", "mixtral", "gemma2", "float16", "bfloat16", "silu", "\ud800", "ü", "auto", "../x", "0"]
    )
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
# Fields that some supported family reads, whether or not this model has them.
FIELDS = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "dtype",
    "torch_dtype", "quantization_config", "num_local_experts", "num_experts", "num_experts_per_tok", "mlp_only_layers",
    "decoder_sparse_step", "layer_types", "sliding_window", "transformers_weights", "auto_map", "pad_token_id",
    "bos_token_id", "eos_token_id", "use_cache", "attn_implementation", "quantization", "compression_config",
)  # fmt: skip
DROPPED = "this field is dropped"
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES | st.just(DROPPED), min_size=1, max_size=3)
SECTION_FIELDS = (
    "quant_method", "format_version", "bits", "activation_bits", "group_size", "layout", "transform", "activation_clip",
    "target", "modules", "modules_to_not_convert", "recipe", "symmetric",
)  # fmt: skip
SECTION_CHANGES = st.dictionaries(st.sampled_from(SECTION_FIELDS), VALUES | st.just(DROPPED), min_size=1, max_size=2)


def changed(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in (value | changes).items() if not (entry is DROPPED or entry == DROPPED)}


def open_model(folder: Path) -> None:
    """What every run does before it reads weights."""
    source = ModelSource(str(folder))
    settings = QuantizeSettings(str(folder), target="none", samples=1, seq_len=16, device="cpu").resolve(source)
    plan_as_text(plan_of(source, settings), source)
    LayerRunner(source, "cpu", __import__("torch").float32)


def open_checkpoint(folder: Path) -> None:
    inspection_as_text(inspect(str(folder)))
    list(stored_formats(Checkpoint(str(folder))))


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def checkpoint(demo_checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(demo_checkpoint, tmp_path / "checkpoint"))


def test_config(model: Path, cases: Cases) -> None:
    path = model / "config.json"
    whole = json.loads(path.read_text())

    @cases(1200)
    @given(CHANGES)
    def try_it(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps(changed(whole, changes)))
        with refused_or_right(changes):
            open_model(model)

    try_it()


def test_config_of_a_checkpoint(checkpoint: Path, cases: Cases) -> None:
    path = checkpoint / "config.json"
    whole = json.loads(path.read_text())

    @cases(300)
    @given(st.booleans(), CHANGES, SECTION_CHANGES)
    def try_it(in_section: bool, changes: dict[str, Any], section: dict[str, Any]) -> None:
        if in_section:
            value = whole | {"quantization_config": changed(whole["quantization_config"], section)}
        else:
            value = changed(whole, changes)
        path.write_text(json.dumps(value))
        with refused_or_right(section if in_section else changes):
            open_checkpoint(checkpoint)

    try_it()


def test_report_of_a_checkpoint(checkpoint: Path, cases: Cases) -> None:
    path = checkpoint / "apex4_report.json"
    whole = json.loads(path.read_text())
    names = st.sampled_from(sorted(whole))

    @cases(200)
    @given(st.dictionaries(names, VALUES | st.just(DROPPED), min_size=1, max_size=2))
    def try_it(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps(changed(whole, changes)))
        with refused_or_right(changes):
            open_checkpoint(checkpoint)

    try_it()


def test_json_of_any_bytes(model: Path, cases: Cases) -> None:
    whole = {name: (model / name).read_bytes() for name in ("config.json", INDEX_NAME)}

    @cases(500)
    @given(st.sampled_from(sorted(whole)), st.integers(0, 2000), st.binary(max_size=6), st.integers(0, 20))
    def try_it(name: str, at: int, inserted: bytes, removed: int) -> None:
        (model / name).write_bytes(whole[name][:at] + inserted + whole[name][at + removed :])
        with refused_or_right((name, at, inserted, removed)):
            open_model(model)
        (model / name).write_bytes(whole[name])

    try_it()
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '"' + "a" * 10**6, ""):
        (model / "config.json").write_text(text)
        with refused_or_right(text[:20]):
            open_model(model)


def test_index(model: Path, cases: Cases) -> None:
    path = model / INDEX_NAME
    whole = json.loads(path.read_text())
    tensors = sorted(whole["weight_map"])
    shards = sorted(set(whole["weight_map"].values()))
    files = st.sampled_from(
        [*shards, "absent.safetensors", "../x.safetensors", "", "config.json", ".", "\ud800.safetensors"]
    )

    @cases(1500)
    @given(
        st.dictionaries(st.sampled_from(tensors) | st.text(max_size=5), files | VALUES, min_size=1, max_size=3),
        st.booleans(),
    )
    def try_it(changes: dict[str, Any], at_top: bool) -> None:
        value = whole | changes if at_top else whole | {"weight_map": whole["weight_map"] | changes}
        path.write_text(json.dumps(value))
        with refused_or_right(changes):
            # Accepted is what has every tensor once.
            assert set(read_tensor_infos(model)) == set(value["weight_map"])

    try_it()


def test_headers_of_shards(model: Path, cases: Cases) -> None:
    """The header's JSON, changed by fields; its length; and bytes anywhere."""
    path = sorted(model.glob("*.safetensors"))[-1]
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    tensor = next(name for name in header if name != "__metadata__")
    entry = st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "extra"]), VALUES, min_size=1, max_size=2
    )

    @cases(1500)
    @given(entry, st.integers(-9, 9) | st.just(0), st.booleans())
    def fields(changes: dict[str, Any], longer: int, whole_entry: bool) -> None:
        value = header | {tensor: changes if whole_entry else header[tensor] | changes}
        text = json.dumps(value).encode()
        path.write_bytes(struct.pack("<Q", max(0, len(text) + longer)) + text + data)
        with refused_or_right((changes, longer)):
            open_model(model)

    @cases(3000)
    @given(st.integers(0, 8 + length + 64), st.binary(min_size=1, max_size=9), st.integers(0, 9))
    def raw(at: int, inserted: bytes, removed: int) -> None:
        path.write_bytes(whole[:at] + inserted + whole[at + removed :])
        with refused_or_right((at, inserted, removed)):
            read_tensor_infos(model)

    @cases(100)
    @given(st.integers(0, len(whole)))
    def cut(at: int) -> None:
        path.write_bytes(whole[:at])
        with refused_or_right(at):
            assert set(read_tensor_infos(model)) and at == len(whole), "a file that was cut off is read"

    for each in (fields, raw, cut):
        each()
        path.write_bytes(whole)


def test_bytes_of_weights(model: Path, cases: Cases) -> None:
    """A changed value is another model, unless it is no number: that is found before any work."""
    import torch

    path = sorted(model.glob("*.safetensors"))[-1]
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])

    @cases(100)
    @given(st.integers(8 + length, len(whole) - 3), st.binary(min_size=2, max_size=2))
    def try_it(at: int, value: bytes) -> None:
        path.write_bytes(whole[:at] + value + whole[at + 2 :])
        source = ModelSource(str(model))
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in source.read(source.infos).values())
        found = False
        with refused_or_right(at):
            source.verify(lambda done: None)
            found = True
        assert found == finite

    try_it()
