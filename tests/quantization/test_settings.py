"""Settings asked for and resolved: what is refused, what is recorded, and when two are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.settings import QuantizeSettings, ResolvedSettings, require_same, same_model

USAGE = 2
HUGE = "99999999999999999999999"
UP = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up")]


@pytest.mark.parametrize(
    ("command", "option", "nouns"),
    [
        ("quantize", "--seed", ("--seed is", "-9223372036854775808 to 18446744073709551615")),
        ("quantize", "--samples", ("--samples is", "2147483647")),
        ("quantize", "--seq-len", ("--seq-len is", "2147483647")),
        ("quantize", "--group-size", ("group size", "multiple of 128")),
        ("plan", "--seed", ("--seed is", "18446744073709551615")),
        ("plan", "--samples", ("--samples is", "2147483647")),
    ],
)
def test_numbers_beyond_all_bounds(
    command: str, option: str, nouns: tuple[str, ...], invoke: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    value = "1" + "28" * 20 if option == "--group-size" else HUGE
    extra = ("--dry-run",) if command == "quantize" else ("--target", "A100")
    one_sentence(invoke(command, "demo", option, value, *extra, "--json"), USAGE, value, *nouns)


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "demo", "--target", "A100", "--tokens"),
        ("eval", "demo", "--seq-len"),
        ("eval", "demo", "--batch-size"),
        ("eval", "demo", "--limit"),
        ("eval", "demo", "--throughput", "--batch"),
        ("eval", "demo", "--throughput", "--prompt-len"),
        ("eval", "demo", "--throughput", "--gen-len"),
        ("kernels", "build", "--arch", "sm_86", "--jobs"),
        ("kernels", "tune", "--repeats"),
    ],
    ids=" ".join,
)
def test_counts_beyond_all_bounds(
    command: tuple[str, ...], invoke: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    one_sentence(invoke(*command, HUGE), USAGE, f"{command[-1]} is {HUGE}", "give a whole number, from ", " to ")


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_every_seed_in_the_bounds_draws_and_rotates(seed: int) -> None:
    from apex4_quant.progress import Progress
    from apex4_quant.quantization.calibration import draw_calibration

    source = ModelSource("demo")
    settings = QuantizeSettings("demo", samples=2, seq_len=32, seed=seed, target="none", device="cpu").resolve(source)
    assert draw_calibration(source, settings, 32, Progress()).windows.shape == (2, 32)


def test_the_record_is_json_and_comes_back(tiny_model: Callable[..., Path]) -> None:
    source = ModelSource(str(tiny_model()))
    plan = {name: {"group_size": 256, "transform": "none"} for name in UP}
    for asked in (
        QuantizeSettings(source.name, target="a100", ignore=("*.o_proj",), seq_len=9999, group_size="0256"),
        QuantizeSettings(source.name, plan=plan, recipe={"name": "mine", "rounding": "gptq"}, target="none"),
    ):
        resolved = asked.resolve(source)
        record = json.loads(json.dumps(resolved.as_dict()))
        assert record == resolved.as_dict()
        again = ResolvedSettings.from_dict(record | {"inputs": {}, "apex4_version": "0"}, Path("settings.json"))
        assert again == resolved and again.transform is resolved.transform
        assert again.resolve(source) is again
        require_same(Path("out"), resolved, asked.asked())
        require_same(Path("out"), resolved, resolved.asked())
    assert resolved.plan is not None and resolved.plan[UP[0]].transform is TransformKind.NONE


@pytest.mark.parametrize("damage", [{"seed": None}, {"transform": "fourier"}, {"plan": {"x": 3}}, {"ignore": 5}])
def test_a_damaged_record(damage: dict[str, Any], tiny_model: Callable[..., Path]) -> None:
    source = ModelSource(str(tiny_model()))
    record = QuantizeSettings(source.name, target="none").resolve(source).as_dict()
    if damage == {"seed": None}:
        del record["seed"]
    else:
        record |= damage
    with pytest.raises(Apex4Error, match=r"settings\.json is damaged"):
        ResolvedSettings.from_dict(record, Path("settings.json"))


def test_what_differs_is_named(tiny_model: Callable[..., Path]) -> None:
    source = ModelSource(str(tiny_model()))
    first = QuantizeSettings(source.name, target="none").resolve(source)
    for asked, nouns in (
        ({"group_size": "256"}, "group_size = 128 and now 256"),
        ({"group_size": "256", "model": "demo"}, "model = .*'demo'"),  # another model: all else may differ with it
        ({"samples": 64, "group_size": "0128"}, "samples = 128 and now 64"),
        ({"plan": {name: 256 for name in UP}}, "plan = None and now a plan of its own"),
    ):
        with pytest.raises(UsageError, match=nouns):
            require_same(Path("out"), first, asked)
    require_same(Path("out"), first, {"group_size": "0128", "target": "auto", "device": "auto", "dtype": "auto"})
    with pytest.raises(UsageError, match="seed = 0 and now 3"):
        require_same(Path("out"), first, replace(first, seed=3).asked())


def test_spellings_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dm").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "dm")
    monkeypatch.chdir(tmp_path)
    for other in ("./dm/", "dm", str(tmp_path / "dm"), "link", "dm/../dm"):
        assert same_model("./dm", other)
    assert same_model("demo", str(DEMO_PATH)) and same_model("org/name", "org/name")
    assert not same_model("org/name", "org/other") and not same_model("dm", str(tmp_path))
