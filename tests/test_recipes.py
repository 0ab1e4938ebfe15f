"""Recipes: those of the package, those of a user's file, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from apex4_quant.errors import UsageError
from apex4_quant.recipes import DEFAULT_RECIPE, Recipe, get_recipe, named_recipes


def test_the_named_recipes() -> None:
    assert list(named_recipes()) == [
        "rtn",
        "gptq",
        "quarot-128g",
        "apex4-hadamard",
        "apex4-shared",
        "apex4",
        "apex4-fast",
        "apex4-gptaq",
        "apex4-distill",
    ]
    assert DEFAULT_RECIPE == "apex4"
    rtn = named_recipes()["rtn"]
    assert (rtn.transform, rtn.rounding, rtn.search_clip, rtn.activation_clip) == ("hadamard128", "nearest", False, 1.0)
    quarot = named_recipes()["quarot-128g"]
    assert (quarot.rotation, quarot.activation_clip, quarot.rounding, quarot.diagonal) == (True, 0.9, "gptq", 0.0)
    assert named_recipes()["apex4"].transform == "feedback128x16"
    assert named_recipes()["apex4-hadamard"].diagonal == named_recipes()["apex4-shared"].diagonal == 0.25
    assert named_recipes()["apex4-shared"].transform == "shared128"
    assert [name for name, recipe in named_recipes().items() if recipe.gptaq] == ["apex4-gptaq"]
    assert [name for name, recipe in named_recipes().items() if recipe.importance == "gradients"] == [
        "apex4",
        "apex4-gptaq",
        "apex4-distill",
    ]
    fast = named_recipes()["apex4-fast"]
    assert (fast.transform, fast.rounding, fast.search_clip, fast.refinement) == ("feedback128x16", "gptq", True, 0)
    assert all(recipe.summary for recipe in named_recipes().values())


def test_a_file_is_a_recipe_and_comes_back_from_its_dict(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rounding: gptq\nactivation_clip: 0.95\ndiagonal: 0.5\n")
    recipe = get_recipe(str(path))
    assert recipe == Recipe("mine", rounding="gptq", activation_clip=0.95, diagonal=0.5)
    assert get_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("roundng: gptq", ["unknown key 'roundng'", "rounding"]),
        ("rounding: nearst", ["rounding = 'nearst'", "nearest, gptq"]),
        ("transform: fourier", ["transform = 'fourier'", "dense128"]),
        ("search_clip: 1", ["search_clip = 1", "true or false"]),
        ("activation_clip: true", ["activation_clip = True", "a number"]),
        ("activation_clip: 0", ["activation_clip = 0.0", "(0, 1]"]),
        ("diagonal: -1", ["diagonal = -1.0", "[0, 1]"]),
        ("rounding: gptq\ngptaq: 2", ["gptaq = 2.0", "[0, 1]"]),
        ("rounding: gptq\ngptaq: true", ["gptaq = True", "a number"]),
        ("importance: norms", ["importance = 'norms'", "readers, gradients"]),
        ("importance: true", ["importance = True", "a text"]),
        ("transform_steps: 0", ["transform_steps = 0", "a whole number from 1"]),
        ("transform_steps: 1.5", ["transform_steps = 1.5", "a whole number"]),
        ("transform_steps: true", ["transform_steps = True", "a whole number"]),
        ("rounding: gptq\nrefinement: -1", ["refinement = -1", "from 0"]),
        ("refinement: 2", ["refinement = 2", "rounding = 'nearest'", "rounding: gptq"]),
        ("gptaq: 0.5", ["gptaq = 0.5", "rounding = 'nearest'", "rounding: gptq"]),
        ("- gptq", ["not a mapping"]),
        ("a: [", ["cannot be read", "line 1"]),
        ("name: 2020-13-45", ["cannot be read", "month"]),
        ("rounding: nearest\nrounding: gptq", ["cannot be read", "line 2", "rounding is there twice"]),
        ("rounding: &a gptq\ntransform: *a", ["cannot be read", "line 2", "alias"]),
        (f"diagonal: {'[' * 3000}", ["cannot be read", "nested too deeply"]),
        (f"diagonal: {'9' * 400}", ["diagonal = 999", "not so large"]),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(text: str, nouns: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        get_recipe(str(path))
    for noun in [*nouns, "bad.yaml"]:
        assert noun in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        get_recipe(str(tmp_path / "none.yaml"))


def test_its_content_is_recorded_and_a_changed_file_is_another_recipe(
    invoke: Callable[..., Result],
    one_sentence: Callable[..., str],
    tiny_model: Callable[..., Path],
    calib: Path,
    tmp_path: Path,
) -> None:
    path, out = tmp_path / "mine.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({"transform": "none", "activation_clip": 0.9}))
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--recipe", path)
    result = invoke("quantize", tiny_model(), "-o", out, *options, "--json")
    assert result.exit_code == 0, result.stderr
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (section["recipe"], section["transform"], section["activation_clip"]) == ("mine", "none", 0.9)
    report = json.loads((out / "apex4_report.json").read_text())
    assert report["settings"]["recipe"]["activation_clip"] == 0.9


def test_an_unknown_key_is_refused_before_the_model_is_read(
    invoke: Callable[..., Result], one_sentence: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("speed: high")
    result = invoke("quantize", "demo", "-o", tmp_path / "out", "--recipe", path, "--json")
    one_sentence(result, 2, "bad.yaml", "unknown key 'speed'", "rounding")
    assert not (tmp_path / "out").exists()
