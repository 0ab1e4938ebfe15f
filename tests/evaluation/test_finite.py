"""A float16 model that overflows: the advice works when it is followed, nothing prints NaN, and JSON is JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apex4_quant.checkpoint.load import load_model
from apex4_quant.evaluation.finite import first_not_finite
from apex4_quant.format.storage import json_text, read_json, write_json
from apex4_quant.hardware.dtype_names import DTYPE_NAMES, wider_than

Call = Callable[..., Any]  # the fixtures of conftest.py
FAILED = 1
OVERFLOWING = "model.layers.1.mlp.act_fn"


@pytest.fixture
def overflowing(tiny_model: Call) -> Path:
    """In float16 the gate's output in layer 1 is infinite: it is a sum of 128 products of up to 60 000."""
    folder = tiny_model()
    file = folder / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    for part in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return folder


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_advice_works_when_it_is_followed(
    overflowing: Path, invoke: Call, calib: Path, tmp_path: Path, one_sentence: Call
) -> None:
    small = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--device", "cpu", "--json")
    failed, out = tmp_path / "failed", tmp_path / "out"
    recipe = ("--recipe", "gptq")
    result = invoke("quantize", overflowing, "-o", failed, *recipe, *small)
    one_sentence(result, FAILED, "layers.1.mlp.down_proj", "float16", "--dtype bfloat16", "another output folder")
    assert invoke("quantize", overflowing, "-o", out, *recipe, *small, "--dtype", "bfloat16").exit_code == 0
    # What is written loads in bfloat16 by itself, and is checked and evaluated so.
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert invoke("check", out, "--json").exit_code == 0
    short = ("--limit", 1, "--seq-len", 64, "--device", "cpu", "--json")
    sentence = one_sentence(
        invoke("eval", out, "--baseline", overflowing, *short), FAILED, "float16", "--dtype bfloat16"
    )
    assert "layers.1.mlp" in sentence
    found = strict(invoke("eval", out, "--baseline", overflowing, *short, "--dtype", "bfloat16").stdout)
    assert math.isfinite(found["perplexity"]) and math.isfinite(found["divergence"])


def test_eval_names_the_first_module(overflowing: Path, invoke: Call, one_sentence: Call) -> None:
    result = invoke("eval", overflowing, "--limit", 1, "--seq-len", 64, "--json")
    one_sentence(result, FAILED, "model.layers.1.mlp", "not finite", "float16", "--dtype bfloat16")
    model = load_model(overflowing, "cpu", torch.float16)
    assert (first_not_finite(model, torch.arange(32)) or "").startswith("model.layers.1.mlp.")
    assert first_not_finite(load_model(overflowing, "cpu", torch.bfloat16), torch.arange(32)) is None


def test_a_perplexity_beyond_all_numbers(tiny_model: Call, invoke: Call, one_sentence: Call) -> None:
    """A mean log-probability of less than -709 has no perplexity in float64."""
    folder = tiny_model()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    one_sentence(invoke("eval", folder, "--limit", 1, "--seq-len", 64, "--json"), FAILED, "perplexity", "beyond")


def test_json_is_json(tmp_path: Path) -> None:
    """Nothing that is printed is anything but JSON."""
    value = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)], "c": {"d": "NaN"}, "e": "\ud800", "f": 2}
    assert strict(json_text(value)) == {"a": None, "b": [None, 1.5, [None]], "c": {"d": "NaN"}, "e": "\ud800", "f": 2}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == strict(json_text(value))


def test_every_dtype_has_an_advice() -> None:
    assert [wider_than(name).split(",")[0] for name in DTYPE_NAMES] == [
        "give --dtype float32",
        "give --dtype bfloat16",
        "the model's own numbers are too large",
    ]
    assert wider_than(torch.float16) == wider_than("float16")
