"""Quantizing for 8-bit activations: what is written, that it is computed so, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from apex4_quant.errors import UsageError
from apex4_quant.kernels import dispatch, torch_backend
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES
from apex4_quant.models.source import ModelSource
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.quantization.plan import plan_as_text, plan_of
from apex4_quant.quantization.settings import QuantizeSettings

Call = Callable[..., Any]
FAILED, USAGE = 1, 2
ATTENTION, MLP = "model.layers.{}.self_attn.{}_proj", "model.layers.{}.mlp.{}_proj"
SMALL = ("--samples", 2, "--seq-len", 32, "--target", "none")
EIGHT = {ATTENTION.format(layer, part) for layer in range(2) for part in "qkv"} | {MLP.format(1, "down")}


def mixed_plan() -> dict[str, dict[str, Any]]:
    """q, k, v and the last down_proj with 8 bits."""
    names = [ATTENTION.format(layer, part) for layer in range(2) for part in "qkvo"]
    names += [MLP.format(layer, part) for layer in range(2) for part in ("gate", "up", "down")]
    return {name: {"group_size": 128} | ({"activation_bits": 8} if name in EIGHT else {}) for name in names}


@pytest.fixture
def model(tiny_model: Call) -> Path:
    path: Path = tiny_model(intermediate_size=600)
    return path


@pytest.fixture
def quantized(model: Path, calib: Path, tmp_path: Path, invoke: Call) -> Call:
    """quantized(...options) -> the folder."""

    def make(*options: object) -> Path:
        out = tmp_path / f"out {len(list(tmp_path.glob('out *')))}"
        result = invoke("quantize", model, "-o", out, "--calib", calib, *SMALL, *options)
        assert result.exit_code == 0, result.stderr
        return out

    return make


def section_of(folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return section


def plan_file(tmp_path: Path, linears: dict[str, dict[str, Any]]) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"apex4_plan": 1, "linears": linears}))
    return path


def test_all_linears_with_eight_bits(quantized: Call, invoke: Call, tmp_path: Path) -> None:
    out = quantized("--recipe", "quarot-128g", "--activation-bits", 8)
    section = section_of(out)
    assert (section["format_version"], section["activation_bits"], section["activation_clip"]) == (2, 8, 1.0)
    assert all("activation_clip" not in entry for entry in section["modules"].values())
    report = json.loads((out / "apex4_report.json").read_text())
    assert report["settings"]["activation_bits"] == 8
    assert all((entry["activation_bits"], entry["activation_clip"]) == (8, 1.0) for entry in report["quantized"])
    checked = invoke("check", out)
    assert checked.exit_code == 0 and "W4A8, transform" in checked.stdout and "with 8-bit activations" in checked.stdout
    assert "W4A8, group 128" in invoke("inspect", out).stdout
    inspected = json.loads(invoke("inspect", out, "--json").stdout)
    assert {linear["activation_bits"] for linear in inspected["linears"]} == {8} and inspected["format"] == "W4A8"
    packed = tmp_path / "packed"
    assert invoke("repack", out, "-o", packed, "--target", "H200").exit_code == 0
    assert section_of(packed)["format_version"] == 2 and invoke("check", packed).exit_code == 0
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None], use_cache=False).logits
        for folder in (out, packed)
    ]
    assert torch.equal(*logits)


def test_what_has_four_bits_says_nothing_of_eight(quantized: Call) -> None:
    plain, asked = quantized("--recipe", "gptq"), quantized("--recipe", "gptq", "--activation-bits", 4)
    for path in sorted(plain.iterdir()):
        assert path.read_bytes() == (asked / path.name).read_bytes(), path.name
    assert section_of(plain)["format_version"] == 1
    report = json.loads((plain / "apex4_report.json").read_text())
    assert "activation_bits" not in report["settings"] and "activation_bits" not in report["quantized"][0]


@torch.no_grad()
def test_a_plan_decides_bits_and_the_model_computes_so(quantized: Call, invoke: Call, tmp_path: Path) -> None:
    out = quantized("--recipe", "apex4-hadamard", "--plan", plan_file(tmp_path, mixed_plan()))
    section = section_of(out)
    assert (section["format_version"], section["activation_bits"]) == (2, 4)
    assert {name for name, entry in section["modules"].items() if entry.get("activation_bits") == 8} == EIGHT
    assert any(entry.get("activation_clip", 1) < 1 for entry in section["modules"].values())
    assert not any(section["modules"][name].get("activation_clip") for name in EIGHT)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    found = 0
    for name, module in loaded.named_modules():
        if isinstance(module, Apex4Linear):
            bits = 8 if name in EIGHT else 4
            x = torch.randn(3, module.in_features)
            how = {"clip": module.format.activation_clip, "activation_bits": bits}
            expected = torch_backend.linear(x, module.codes(), module.scales(), module.bias, **how)
            assert module.activation_bits == bits and torch.equal(module(x), expected)
            found += 1
    assert found == 14
    assert invoke("check", out).exit_code == 0
    inspected = invoke("inspect", out).stdout
    assert "W4A4 and W4A8, group 128" in inspected and inspected.count(" A8 ") == len(EIGHT)
    result = json.loads(invoke("eval", out, "--seq-len", 32, "--limit", 2, "--json").stdout)
    assert result["activation_bits"] == [4, 8] and result["format"].startswith("W4A4 and W4A8 g128")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_eval_says_with_what_was_computed(quantized: Call, invoke: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    out = quantized("--recipe", "rtn")
    perplexity = {}
    for asked, bits in (("auto", 4), ("4", 4), ("8", 8)):
        monkeypatch.setenv("APEX4_ACTIVATIONS", asked)
        text = invoke("eval", out, "--seq-len", 32, "--limit", 2).stdout
        assert f"W4A4 g128, rtn, bfloat16, computed with {bits}-bit activations" in text
        result = json.loads(invoke("eval", out, "--seq-len", 32, "--limit", 2, "--json").stdout)
        assert (result["activation_bits"], result["kernels"]) == ([bits], ["reference"])
        perplexity[asked] = result["perplexity"]
    assert perplexity["auto"] == perplexity["4"] != perplexity["8"]
    monkeypatch.setenv("APEX4_ACTIVATIONS", "5")
    result = invoke("eval", out, "--limit", 1)
    assert (result.exit_code, result.stderr) == (USAGE, "apex4: APEX4_ACTIVATIONS=5 is not known: give 4, 8 or auto\n")


def test_the_variable_does_not_change_a_run(quantized: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers behind a linear are calibrated with what the checkpoint says."""
    plain = quantized("--recipe", "gptq")
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    again = quantized("--recipe", "gptq")
    assert (plain / "apex4_report.json").read_bytes() == (again / "apex4_report.json").read_bytes()


# ---- what is refused -------------------------------------------------------------------------------------------------


def change(linears: dict[str, dict[str, Any]], name: str, bits: Any) -> dict[str, dict[str, Any]]:
    return linears | {name: linears[name] | {"activation_bits": bits}}


@pytest.mark.parametrize(
    ("name", "bits", "words"),
    [
        (MLP.format(0, "down"), 5, ("model.layers.0.mlp.down_proj", "activation bits 5", "4, 8")),
        (MLP.format(0, "down"), "8", ("activation bits '8'",)),
        (ATTENTION.format(0, "k"), 4, ("activation_bits 8 for", "4 for model.layers.0.self_attn.k_proj", "same input")),
    ],
)
def test_plans_that_are_refused(
    name: str, bits: Any, words: tuple[str, ...], model: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    plan = plan_file(tmp_path, change(mixed_plan(), name, bits))
    one_sentence(invoke("quantize", model, "--plan", plan, "--dry-run"), USAGE, *words)


def test_options_that_are_refused(model: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    plan = plan_file(tmp_path, mixed_plan())
    command = ("quantize", model, "--dry-run", "--target", "none", "--activation-bits")
    one_sentence(invoke(*command, 5), USAGE, "activation-bits '5'", "4, 8")
    one_sentence(invoke(*command, 8, "--plan", plan), USAGE, "decides activation bits", "leave --activation-bits away")


@pytest.mark.parametrize("gpu", ["A40", "sm_86"])
def test_a_target_without_a_kernel_for_eight_bits(
    gpu: str, model: Path, invoke: Call, one_sentence: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(EIGHT_BIT_FAMILIES, 86, raising=False)
    command = ("quantize", model, "--dry-run", "--activation-bits", 8, "--target")
    one_sentence(invoke(*command, gpu), USAGE, "q_proj is to have 8-bit activations", f"no kernel for them for {gpu}")
    monkeypatch.setitem(EIGHT_BIT_FAMILIES, 86, "gemm_s8")
    assert invoke(*command, gpu).exit_code == 0 and "A8" in invoke(*command, gpu).stdout


def test_more_inputs_than_can_be_summed(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(str(tiny_model()))
    monkeypatch.setattr("apex4_quant.format.quant_config.LARGEST_K_OF_TOKENS", 128)
    settings = QuantizeSettings(source.name, "rtn", target="none", activation_bits=8).resolve(source)
    with pytest.raises(UsageError, match=r"down_proj has 256 input features, more than .* can be summed with 8-bit"):
        plan_of(source, settings)


def test_bits_that_were_changed_in_config_json(quantized: Call, invoke: Call, one_sentence: Call) -> None:
    out = quantized("--recipe", "rtn", "--activation-bits", 8)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["activation_bits"] = 4
    (out / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", out, "--json"), FAILED, "4-bit activations in config.json and 8 in apex4_report.json")


def test_resuming_with_other_bits(model: Path, calib: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    out = tmp_path / "run"
    options = ("--calib", calib, *SMALL, "--recipe", "rtn")
    assert invoke("quantize", model, "-o", out, *options, "--activation-bits", 8).exit_code == 0
    resume = ("quantize", "--resume", "-o", out)
    one_sentence(invoke(*resume, "--activation-bits", 4), USAGE, "activation_bits = 8 and now 4")
    assert invoke(*resume, "--activation-bits", 8).exit_code == 0 and invoke(*resume).exit_code == 0
    other = tmp_path / "other"
    assert invoke("quantize", model, "-o", other, *options).exit_code == 0
    one_sentence(
        invoke("quantize", "--resume", "-o", other, "--activation-bits", 8), USAGE, "activation_bits = 4 and now 8"
    )
    assert invoke("quantize", "--resume", "-o", other, "--activation-bits", 4).exit_code == 0


def test_the_plan_for_people_names_eight_bits(tiny_model: Call) -> None:
    source = ModelSource(str(tiny_model()))
    text = plan_as_text(
        plan_of(source, QuantizeSettings(source.name, plan=mixed_plan(), target="none").resolve(source)),
        source,
        verbose=True,
    )
    assert sum("  A8  " in line for line in text.splitlines()) == len(EIGHT)
    assert dispatch.asked_activations() in ("auto", "4", "8")
