"""How many calibration windows a run uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from apex4_quant.format.storage import sha256
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.calibration import windows_needed
from apex4_quant.quantization.plan import plan_of
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.recipes import Recipe, named_recipes

Call = Callable[..., Result]


def needed(settings: QuantizeSettings) -> int:
    source = ModelSource(settings.model)
    resolved = settings.resolve(source)
    return windows_needed(plan_of(source, resolved), resolved)


def test_which_recipes_learn_nothing() -> None:
    assert [name for name, recipe in named_recipes().items() if not recipe.learns_from_text] == ["rtn"]
    for changes in ({"rounding": "gptq"}, {"search_clip": True}, {"diagonal": 0.1}, {"importance": "gradients"}):
        assert Recipe("x", **changes).learns_from_text, changes
    assert not Recipe("x", rotation=True, activation_clip=0.9, transform_steps=5).learns_from_text


@pytest.mark.parametrize(("samples", "seq_len", "windows"), [(128, 128, 32), (128, 100, 41), (3, 64, 3), (128, 512, 8)])
def test_as_many_as_errors_are_measured_with(samples: int, seq_len: int, windows: int) -> None:
    rtn = QuantizeSettings("demo", "rtn", samples=samples, seq_len=seq_len, target="none", device="cpu")
    assert needed(rtn) == windows


def test_a_learned_transform_needs_all_of_them() -> None:
    """Also where it is not the recipe's own: that of --transform, or of one linear in a plan."""
    common = {"samples": 100, "seq_len": 256, "target": "none", "device": "cpu"}
    assert needed(QuantizeSettings("demo", "rtn", transform="dense128", **common)) == 100
    assert needed(QuantizeSettings("demo", "apex4-fast", transform="none", **common)) == 100
    recipe = {"name": "x", "transform": "dense128"}
    assert needed(QuantizeSettings("demo", recipe, **common)) == 100
    assert needed(QuantizeSettings("demo", recipe, transform="none", **common)) == 16


def test_the_codes_are_those_of_all_windows(
    tiny_model: Callable[..., Path], tmp_path: Path, calib: Path, invoke: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and recorded, and only errors in the report are others."""
    calib.write_text(calib.read_text() * 3)
    command = ("quantize", tiny_model(), "--recipe", "rtn", "--target", "none", "--calib", calib, "--seq-len", 64)
    few, all_of_them = tmp_path / "few", tmp_path / "all"
    monkeypatch.setattr("apex4_quant.quantization.calibration.PROBE_ROWS", 128)
    result = invoke(*command, "-o", few, "--samples", 8)
    assert result.exit_code == 0, result.stderr
    assert "nothing is learned from text: 2 of 8 calibration windows are used" in result.stderr
    assert json.loads((few / "apex4_report.json").read_text())["calibration_tokens"] == 2 * 64
    monkeypatch.setattr("apex4_quant.quantization.calibration.PROBE_ROWS", 4096)
    result = invoke(*command, "-o", all_of_them, "--samples", 8)
    assert result.exit_code == 0 and "nothing is learned" not in result.stderr
    reports = [json.loads((out / "apex4_report.json").read_text()) for out in (few, all_of_them)]
    assert reports[0]["files"] == reports[1]["files"] and reports[0]["settings"] == reports[1]["settings"]
    assert reports[0]["quantized"] != reports[1]["quantized"]
    for name in ("config.json", "model-00002-of-00004.safetensors"):
        assert sha256(few / name) == sha256(all_of_them / name)


def test_windows_behind_bos_are_recorded_and_not_mixed(
    tiny_model: Callable[..., Path], tmp_path: Path, calib: Path, invoke: Call, one_sentence: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    command = ("quantize", tiny_model(), "--recipe", "gptq", "--target", "none", "--calib", calib, "--seq-len", 16)
    result = invoke(*command, "-o", out, "--samples", 4, "--bos", "always")
    assert result.exit_code == 0, result.stderr
    assert "calibration windows begin with BOS, token " in result.stderr
    assert "different tokens only" in result.stderr  # one sentence again and again
    report = json.loads((out / "apex4_report.json").read_text())
    assert report["calibration_bos"] is True and report["settings"]["bos"] == "always"
    one_sentence(invoke("quantize", "--resume", "-o", out, "--bos", "never"), 2, "bos = 'always'", "'never'")
    result = invoke("eval", out, "--seq-len", 16, "--limit", 1, "--text", calib, "--bos", "always", "--json")
    assert json.loads(result.stdout)["bos"] is True
