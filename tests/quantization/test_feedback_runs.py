"""Quantizing with error feedback: what is written, that it is computed so and kept by all that reads it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apex4_quant.checkpoint.check import check
from apex4_quant.errors import UsageError
from apex4_quant.format.feedback import feedback_of
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import reference
from apex4_quant.models.source import ModelSource
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings, require_same

from ..conftest import write_calibration, write_tiny_model
from .test_mixed_transforms import tensors_of

Call = Callable[..., Any]
FAILED, USAGE = 1, 2
DENSE, FEEDBACK = TransformKind.DENSE, TransformKind.FEEDBACK_16
OWNERS = [f"model.layers.{layer}.{part}_proj" for layer in range(2) for part in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")]  # fmt: skip
Q = OWNERS[0]
SMALL: dict[str, Any] = {"target": "none", "samples": 2, "seq_len": 32, "device": "cpu"}
RECIPE = {"name": "short", "transform": "feedback128x16", "rounding": "gptq", "search_clip": True, "transform_steps": 5}
OF_COMMAND = ("--samples", 2, "--seq-len", 32, "--target", "none", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """out: feedback, dense: the same run without. Read only."""
    folder = tmp_path_factory.mktemp("feedback")
    model = write_tiny_model(folder / "model", intermediate_size=600)
    calib = write_calibration(folder / "calibration.txt")
    for name, recipe in (("out", RECIPE), ("dense", RECIPE | {"transform": "dense128"})):
        quantize(QuantizeSettings(str(model), recipe, calib=str(calib), **SMALL), folder / name)
    return folder


@pytest.fixture
def out(made: Path) -> Path:
    return made / "out"


def section_of(out: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return section


def test_one_linear_of_an_input_stores_it_behind_the_transform(made: Path) -> None:
    out, dense = tensors_of(made / "out"), tensors_of(made / "dense")
    section = section_of(made / "out")
    assert (section["transform"], section["format_version"], section["activation_bits"]) == ("feedback128x16", 1, 4)
    stored = {name.removesuffix(".input_transform"): t for name, t in out.items() if name.endswith("input_transform")}
    assert sorted(stored) == sorted(OWNERS)
    for name, matrix in stored.items():
        assert matrix.shape == (5 if "down" in name else 1, 185, 128) and matrix.dtype == torch.float16
        feedback = feedback_of(matrix)
        assert feedback is not None and bool((feedback.flatten(1) != 0).any(1).all())
    # The weights of the first input know nothing of it, nor does the transform.
    assert torch.equal(out[f"{Q}.input_transform"][:, :128], dense[f"{Q}.input_transform"])
    for part in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{part}_proj.weight_packed"
        assert torch.equal(out[name], dense[name])
    report = json.loads((made / "out" / "apex4_report.json").read_text())
    assert report["settings"]["transform"] == "feedback128x16"
    assert {entry["transform"] for entry in report["quantized"]} == {"feedback128x16"}
    assert report["bits_per_weight"] > json.loads((made / "dense" / "apex4_report.json").read_text())["bits_per_weight"]


def rows_by_the_format(linear: Apex4Linear, x: torch.Tensor) -> torch.Tensor:
    """float64 [T, N] of x [T, K]."""
    x = torch.nn.functional.pad(x, (0, linear.format.padded_k - x.shape[1]))
    matrix = linear.transform_owner.input_transform
    quantized = reference.quantize_activation(x, 128, linear.format.activation_clip, False, matrix)
    return reference.linear(*quantized, linear.codes(), linear.scales(), linear.bias)


@torch.no_grad()
def test_a_loaded_model_computes_what_the_format_says(out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Apex4Linear)}
    assert len(linears) == 14
    for name, linear in linears.items():
        linear.register_forward_hook(
            lambda _, args, y, name=name: seen.update({name: (args[0].flatten(0, -2), y.flatten(0, -2))})
        )
    model(torch.arange(40)[None] * 7)
    for name, (x, y) in seen.items():
        expected = rows_by_the_format(linears[name], x)
        apart = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
        # A value on a tie may fall to either side, and then those of its token that follow.
        assert float((apart < 1e-5).double().mean()) > 0.9, name
    assert seen.keys() == linears.keys()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:apex4. APEX4_ACTIVATIONS=8")
def test_eight_bits_read_the_transform_alone(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    without = Path(shutil.copytree(out, tmp_path / "without"))
    for path in without.glob("*.safetensors"):
        tensors = load_file(path)
        cut = {n: t[:, :128].contiguous() if n.endswith("input_transform") else t for n, t in tensors.items()}
        save_file(cut, path, metadata={"format": "pt"})
    config = json.loads((without / "config.json").read_text())
    config["quantization_config"]["transform"] = "dense128"
    (without / "config.json").write_text(json.dumps(config))
    ids = torch.arange(20)[None] * 7
    logits = []
    for folder in (out, without):
        logits.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits)
    assert torch.equal(*logits)


def test_check_inspect_and_repack(out: Path, tmp_path: Path, invoke: Call) -> None:
    checks = json.loads(invoke("check", out, "--json").stdout)["checks"]
    assert "W4A4, transform feedback128x16 and all activation clips as in the report" in [c["found"] for c in checks]
    linears = json.loads(invoke("inspect", out, "--json").stdout)["linears"]
    assert {linear["transform"] for linear in linears} == {"feedback128x16"}
    by_name = {linear["name"]: linear["bytes"] for linear in linears}
    assert by_name[Q] == 128 * 128 // 2 + 2 * 128 + 2 * 185 * 128
    assert "  group 128 feedback128x16  " in invoke("inspect", out).stdout
    there, back = tmp_path / "there", tmp_path / "back"
    assert invoke("repack", out, "-o", there, "--target", "H200", "--json").exit_code == 0
    check(str(there))
    assert invoke("repack", there, "-o", back, "--target", "none", "--json").exit_code == 0
    before, between = tensors_of(out), tensors_of(there)
    for name in OWNERS:
        assert torch.equal(before[f"{name}.input_transform"], between[f"{name}.input_transform"])
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }


def edited(out: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy without a report, so without checksums, and with other tensors."""
    shutil.copytree(out, folder)
    (folder / "apex4_report.json").unlink()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{Q}.input_transform" in tensors:
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("row", [3, 150])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "NaN or infinity"),
        (float("-inf"), "NaN or infinity"),
        (1 + 2.0**-8, "float16 and bfloat16 do not both hold exactly"),
        (2.0**-15, "float16 and bfloat16 do not both hold exactly"),
    ],
)
def test_a_number_that_may_not_be_stored(
    row: int, value: float, words: str, out: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.input_transform"][0, row, 7] = value

    damaged = edited(out, tmp_path / "damaged", change)
    one_sentence(invoke("check", damaged, "--json"), FAILED, f"{Q}.input_transform", ".safetensors", words)


def test_a_matrix_without_its_feedback(out: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.input_transform"] = tensors[f"{Q}.input_transform"][:, :128].contiguous()

    damaged = edited(out, tmp_path / "damaged", change)
    sentence = one_sentence(invoke("check", damaged, "--json"), FAILED, f"{Q}.input_transform")
    assert "F16 [1, 128, 128] and must be F16 [1, 185, 128]" in sentence


def test_a_config_that_gives_it_eight_bits(out: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    damaged = edited(out, tmp_path / "damaged", lambda tensors: None)
    config = json.loads((damaged / "config.json").read_text())
    section = config["quantization_config"]
    section |= {"activation_bits": 8, "format_version": 2}
    for entry in section["modules"].values():
        entry.pop("activation_clip", None)
    (damaged / "config.json").write_text(json.dumps(config))
    one_sentence(
        invoke("check", damaged, "--json"), FAILED, f"{Q} has the transform feedback128x16", "8-bit", "config.json"
    )
    del section["activation_bits"]
    section |= {"group_size": 256, "activation_bits": 4, "format_version": 1}
    (damaged / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", damaged, "--json"), FAILED, f"{Q} has the transform feedback128x16", "groups of 256")


# ---- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--group-size", 256), ("--group-size", "channel"), ("--activation-bits", 8)])
def test_what_is_asked_for_is_refused_where_it_cannot_be(
    options: tuple[object, ...], made: Path, quantize_badly: Call, one_sentence: Call
) -> None:
    refused = quantize_badly(made / "model", "--transform", "feedback128x16", *options)
    one_sentence(refused, USAGE, "--transform feedback128x16 is for groups of 128", "4-bit", "dense128")


@pytest.mark.parametrize("options", [("--group-size", 256), ("--activation-bits", 8)])
def test_the_recipes_gives_way(
    options: tuple[object, ...], made: Path, calib: Path, tmp_path: Path, invoke: Call
) -> None:
    """The report and config.json agree on it: `check` compares them."""
    recipe = tmp_path / "short.yaml"
    recipe.write_text(yaml.safe_dump({key: value for key, value in RECIPE.items() if key != "name"}))
    command = ("quantize", made / "model", "-o", tmp_path / "out", "--recipe", recipe, "--calib", calib, *OF_COMMAND)
    result = invoke(*command, *options)
    assert result.exit_code == 0, result.stderr
    assert section_of(tmp_path / "out")["transform"] == "dense128"
    report = json.loads((tmp_path / "out" / "apex4_report.json").read_text())
    assert report["settings"]["transform"] == "dense128"
    assert {entry["transform"] for entry in report["quantized"]} == {"dense128"}
    checked = invoke("check", tmp_path / "out", "--json")
    assert checked.exit_code == 0, checked.stderr
    again = invoke("quantize", "--resume", "-o", tmp_path / "out", *options, "--json")
    assert again.exit_code == 0, again.stderr


def plan_of(made: Path, path: Path, **entry: Any) -> Path:
    """All linears of 128 with `entry` in those of layer 0."""
    names = [name.removesuffix(".weight") for name in tensors_of(made / "model") if "_proj.weight" in name]
    linears = {name: {"group_size": 128} | (entry if ".0." in name else {}) for name in names}
    path.write_text(yaml.safe_dump({"apex4_plan": 1, "linears": linears}))
    return path


def test_a_plan_that_asks_for_what_cannot_be(
    made: Path, tmp_path: Path, quantize_badly: Call, one_sentence: Call
) -> None:
    model, name = made / "model", "model.layers.0."
    said = (
        "plan.yaml has transform feedback128x16",
        name,
        "8-bit activations",
        "4 bits only: write transform: dense128",
    )
    plan = plan_of(made, tmp_path / "plan.yaml", transform="feedback128x16", activation_bits=8)
    one_sentence(quantize_badly(model, "--plan", plan), USAGE, *said)
    plan = plan_of(made, tmp_path / "plan.yaml", transform="feedback128x16")
    one_sentence(quantize_badly(model, "--plan", plan, "--activation-bits", 8), USAGE, *said)
    plan = plan_of(made, tmp_path / "plan.yaml", transform="feedback128x16", group_size=256)
    one_sentence(quantize_badly(model, "--plan", plan), USAGE, "transform feedback128x16 and group size 256", name)


def test_a_plan_of_both(made: Path, calib: Path, tmp_path: Path) -> None:
    """Eight bits for layer 0: the recipe's feedback is for layer 1 alone."""
    plan = plan_of(made, tmp_path / "plan.yaml", activation_bits=8)
    settings = QuantizeSettings(str(made / "model"), RECIPE, plan=str(plan), calib=str(calib), **SMALL)
    quantize(settings, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    for name in OWNERS:
        assert tensors[f"{name}.input_transform"].shape[1] == (128 if ".0." in name else 185)
    section = section_of(tmp_path / "out")
    assert (section["transform"], section["format_version"]) == ("feedback128x16", 2)
    assert section["modules"][Q] == {"transform": "dense128", "activation_bits": 8}
    check(str(tmp_path / "out"))
    quantize(settings, tmp_path / "out", resume=True)


def test_what_a_resumed_run_is_asked_for(made: Path) -> None:
    source = ModelSource(str(made / "model"))
    for transform in (None, "feedback128x16"):
        recipe = "rtn" if transform else RECIPE
        first = QuantizeSettings(source.name, recipe, transform=transform, target="none").resolve(source)
        assert first.transform is FEEDBACK
        require_same(Path("out"), first, first.asked())
        for asked, said in (({"activation_bits": 8}, "activation_bits = 4 and now 8"), ({"group_size": 256}, "128 and now 256")):  # fmt: skip
            with pytest.raises(UsageError, match=said):
                require_same(Path("out"), first, asked)
        with pytest.raises(UsageError, match="transform = 'feedback128x16' and now 'dense128'"):
            require_same(Path("out"), first, {"transform": "dense128"})
    eight = QuantizeSettings(source.name, RECIPE, activation_bits=8, target="none").resolve(source)
    assert eight.transform is DENSE
    require_same(Path("out"), eight, eight.asked())
    with pytest.raises(UsageError, match="activation_bits = 8 and now 4"):
        require_same(Path("out"), eight, {"activation_bits": 4})
