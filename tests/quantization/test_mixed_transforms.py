"""A model whose inputs have different transforms: what is stored, computed, checked, resumed and repacked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from apex4_quant.errors import Stopped, UsageError
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels.hadamard import apply_block_hadamard, apply_block_matrix
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization import layer as layer_of_a_run
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings

from ..conftest import stop_after

DENSE, FEEDBACK, HADAMARD = TransformKind.DENSE, TransformKind.FEEDBACK_16, TransformKind.HADAMARD

Call = Callable[..., Any]  # the fixtures of conftest.py
FAILED, USAGE = 1, 2
ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
# By layer and input: q k v, o, gate up, down.
PLAN: dict[str, Any] = {
    name: {"group_size": size, "transform": transform}
    for layer, of_layer in enumerate(
        (
            ((128, DENSE), (128, HADAMARD), (128, HADAMARD), (128, DENSE)),
            ((128, HADAMARD), (128, DENSE), (128, "none"), ("channel", HADAMARD)),
        )
    )
    for names, (size, transform) in zip(
        (
            [ATTENTION.format(layer, part) for part in "qkv"],
            [ATTENTION.format(layer, "o")],
            [MLP.format(layer, part) for part in ("gate", "up")],
            [MLP.format(layer, "down")],
        ),
        of_layer,
        strict=True,
    )
    for name in names
}
OWNERS = {ATTENTION.format(0, "q"), MLP.format(0, "down"), ATTENTION.format(1, "o")}


@pytest.fixture
def model(tiny_model: Call) -> Path:
    return tiny_model(intermediate_size=600)


@pytest.fixture
def settings(model: Path, calib: Path) -> QuantizeSettings:
    return QuantizeSettings(
        str(model), "apex4-fast", plan=PLAN, target="none", calib=str(calib), samples=2, seq_len=32, device="cpu"
    )


@pytest.fixture
def out(settings: QuantizeSettings, tmp_path: Path) -> Path:
    quantize(settings, tmp_path / "out")
    return tmp_path / "out"


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


class FakeQuantized(nn.Module):
    """docs/format.md in float32, from the tensors of the checkpoint: rounded values times rounded weights."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor], section: dict[str, Any], k: int) -> None:
        super().__init__()
        entry = section["modules"].get(name, {})
        self.transform = entry.get("transform", section["transform"])
        self.matrix = tensors.get(f"{entry.get('transform_from', name)}.input_transform")
        self.clip = entry.get("activation_clip", section["activation_clip"])
        size = entry.get("group_size", section["group_size"])
        self.pad = -k % 128
        self.group = k + self.pad if size == "channel" else size
        layout = get_layout("rowmajor")
        codes = layout.unpack(tensors[f"{name}.weight_packed"], len(tensors[f"{name}.weight_packed"]))
        scales = layout.unpack_scales(tensors[f"{name}.weight_scale"], len(codes))
        self.weight = (codes.float().unflatten(1, (-1, self.group)) * scales.float()[..., None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, self.pad))
        if self.transform == DENSE:
            x = apply_block_matrix(x, self.matrix.float())
        elif self.transform == HADAMARD:
            x = apply_block_hadamard(x)
        grouped = x.unflatten(-1, (-1, self.group))
        scale = (self.clip * grouped.abs().amax(-1, keepdim=True) / 7).clamp_min(2.0**-100)
        return ((grouped / scale).round().clamp(-7, 7) * scale).flatten(-2) @ self.weight.t()


def test_a_loaded_model_computes_what_the_format_says(out: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, model))
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = tensors_of(out)
    for name in PLAN:
        linear = reference.get_submodule(name)
        reference.set_submodule(name, FakeQuantized(name, tensors, section, linear.in_features))
        assert loaded.get_submodule(name).format.transform == PLAN[name]["transform"]
    ids = torch.arange(40)[None] * 7
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)


def test_config_names_what_differs_and_only_owners_store_a_transform(out: Path) -> None:
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["transform"] == FEEDBACK and section["format_version"] == 1  # of the recipe
    for name, choice in PLAN.items():
        entry = section["modules"].get(name, {})
        assert entry.get("transform", FEEDBACK) == choice["transform"]
        assert ("transform_from" in entry) == (choice["transform"] == DENSE and name not in OWNERS)
    assert {name.removesuffix(".input_transform") for name in tensors_of(out) if "input_transform" in name} == OWNERS
    report = json.loads((out / "apex4_report.json").read_text())
    assert {entry["name"]: entry["transform"] for entry in report["quantized"]} == {
        name: choice["transform"] for name, choice in PLAN.items()
    }
    assert report["settings"]["plan"] == PLAN


def test_transforms_are_learned_only_where_the_plan_has_them(
    settings: QuantizeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []
    learn = layer_of_a_run.learn_transform

    def counting(inputs: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        learned.append(inputs.shape[1])
        return learn(inputs, *arguments, **options)

    monkeypatch.setattr(layer_of_a_run, "learn_transform", counting)
    quantize(settings, tmp_path / "out")
    assert learned == [128, 640, 128]  # q k v and down of layer 0, o of layer 1


def test_check_and_inspect_know_the_transforms(out: Path, invoke: Call, one_sentence: Call) -> None:
    checks = json.loads(invoke("check", out, "--json").stdout)["checks"]
    assert {"check": "config and report", "found": "W4A4, transform dense128 and hadamard128 and none and all activation clips "
            "as in the report"} in checks  # fmt: skip
    linears = {entry["name"]: entry for entry in json.loads(invoke("inspect", out, "--json").stdout)["linears"]}
    assert {name: linears[name]["transform"] for name in PLAN} == {name: PLAN[name]["transform"] for name in PLAN}
    text = invoke("inspect", out).stdout.splitlines()
    assert "group channel hadamard128" in next(line for line in text if MLP.format(1, "down") in line)

    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["modules"][MLP.format(1, "up")]["transform"]
    (out / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", out, "--json"), FAILED, MLP.format(1, "up"), FEEDBACK, "none", "config.json")


def test_a_transform_of_another_kind_cannot_be_taken_over(out: Path, invoke: Call, one_sentence: Call) -> None:
    config = json.loads((out / "config.json").read_text())
    name = ATTENTION.format(0, "v")
    config["quantization_config"]["modules"][name]["transform"] = "shared128"
    (out / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", out, "--json"), FAILED, name, ATTENTION.format(0, "q"), "none of its kind")


def test_a_resumed_run_writes_the_same_bytes(settings: QuantizeSettings, out: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with pytest.raises(Stopped):
        quantize(settings, again, should_stop=stop_after(1, again))
    quantize(settings, again, resume=True)
    assert files_of(again) == files_of(out)


def test_repacking_keeps_the_transforms(settings: QuantizeSettings, out: Path, tmp_path: Path, invoke: Call) -> None:
    """There and back it is what it was, byte for byte; `check` reads every linear of what is between."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert invoke("repack", out, "-o", there, "--target", "A100", "--json").exit_code == 0
    assert invoke("check", there, "--json").exit_code == 0
    assert invoke("repack", there, "-o", back, "--target", "none", "--json").exit_code == 0
    assert files_of(back) == files_of(out)


def test_transform_beside_a_plan(
    settings: QuantizeSettings, model: Path, calib: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    """A plan that names transforms decides them; one that does not leaves them to --transform."""
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    plan.write_text(json.dumps({"apex4_plan": 1, "linears": PLAN}))
    command = (
        "quantize",
        model,
        "-o",
        out,
        "--plan",
        plan,
        "--calib",
        calib,
        "--samples",
        2,
        "--seq-len",
        32,
        "--json",
    )
    for transform in (DENSE, HADAMARD):
        one_sentence(
            invoke(*command, "--transform", transform), USAGE, "plan.json", "decides transforms", "--transform away"
        )
    with pytest.raises(UsageError, match="decides transforms"):
        QuantizeSettings(str(model), plan=PLAN, transform=HADAMARD).resolve(ModelSource(str(model)))
    sizes = {name: {"group_size": choice["group_size"]} for name, choice in PLAN.items()}
    plan.write_text(json.dumps({"apex4_plan": 1, "linears": sizes}))
    planned = json.loads(invoke(*command, "--transform", "none", "--dry-run").stdout)["quantized"]
    assert {entry["transform"] for entry in planned} == {"none"}
    planned = json.loads(invoke(*command, "--dry-run").stdout)["quantized"]
    # Also with a group per channel: PyTorch computes that. Feedback is for groups of 128.
    assert {(entry["group_size"], entry["transform"]) for entry in planned} == {(128, FEEDBACK), ("channel", DENSE)}


def test_resume_with_the_same_plan_file(
    model: Path, calib: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    plan.write_text(json.dumps({"apex4_plan": 1, "linears": PLAN}))
    settings = QuantizeSettings(
        str(model), "apex4-fast", plan=str(plan), calib=str(calib), samples=2, seq_len=32, target="none"
    )
    with pytest.raises(Stopped):
        quantize(settings, out, should_stop=stop_after(1, out))
    shutil.copytree(out, tmp_path / "copy")
    other = tmp_path / "other.json"
    other.write_text(plan.read_text().replace('"none"', '"hadamard128"'))
    one_sentence(invoke("quantize", "--resume", "-o", out, "--plan", other, "--json"), USAGE, "was begun with plan")
    assert invoke("quantize", "--resume", "-o", out, "--plan", plan, "--json").exit_code == 0
    assert invoke("quantize", "--resume", "-o", tmp_path / "copy", "--json").exit_code == 0
    assert files_of(out) == files_of(tmp_path / "copy")
