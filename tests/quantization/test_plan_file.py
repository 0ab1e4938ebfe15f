"""The plan file: what is read, what is refused, what is written; with models it is tested in planning/test_planner.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.models.source import ModelSource
from apex4_quant.quantization.plan_file import (
    PlanEntry,
    plan_file_json,
    plan_file_text,
    plan_given,
    read_plan_file,
    require_plan_path,
)

GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
ENTRIES: dict[str, dict[str, Any]] = {
    GATE: {"group_size": 256, "transform": TransformKind.HADAMARD, "shape": [256, 128]},
    UP: {"group_size": "channel", "shape": [256, 128]},
}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    header, groups = (
        {"architecture": "LlamaForCausalLM", "model": "demo: a 'model'"},
        [{n: e} for n, e in ENTRIES.items()],
    )
    if suffix == ".json":
        path.write_text(plan_file_json(header, groups))
    else:
        path.write_text(plan_file_text(header, groups, ["loss 1", "loss 2"], dict.fromkeys(ENTRIES, "error 0.1")))
    plan = read_plan_file(path)
    assert plan.architecture == "LlamaForCausalLM" and plan.names_transforms
    assert plan.linears == {
        GATE: PlanEntry(256, TransformKind.HADAMARD, (256, 128)),
        UP: PlanEntry("channel", None, (256, 128)),
    }
    assert plan.linears[UP].as_dict() == {"group_size": "channel"}


PREDICTED = {"microseconds": 1.5, "loss": 0.25}
FRONT = [[1.0, 0.5], [2, 0.125]]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_what_was_predicted_is_kept_of_the_plan_as_it_was_made(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plan{suffix}"
    header = {"model": "/home/someone/m", "target": "A100", "tokens": 1, "predicted": PREDICTED, "front": FRONT}
    groups = [{n: e} for n, e in ENTRIES.items()]
    notes = dict.fromkeys(ENTRIES, "")
    write = plan_file_json if suffix == ".json" else lambda *given: plan_file_text(*given, ["", ""], notes)
    path.write_text(write(header, groups))
    made = {key: value for key, value in header.items() if key != "model"}
    assert read_plan_file(path).origin == made
    path.write_text(path.read_text().replace("256, 128", "256,128"))  # spaces are no edit
    assert read_plan_file(path).origin == made
    path.write_text(path.read_text().replace("channel", "512"))
    assert read_plan_file(path).origin == {key: value for key, value in made.items() if key != "predicted"}
    path.write_text(json.dumps({"apex4_plan": 1, "linears": ENTRIES}))
    assert read_plan_file(path).origin is None


@pytest.mark.parametrize(
    ("key", "value"), [("predicted", [1]), ("predicted", {"loss": "small"}), ("front", 3), ("front", [[1, "a"]])]
)
def test_predictions_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"apex4_plan": 1, "linears": ENTRIES, key: value}))
    with pytest.raises(UsageError, match=rf"plan .*plan\.json has {key} = .*: remove it"):
        read_plan_file(path)


@pytest.mark.parametrize(
    ("entry", "noun"),
    [
        ({"group_size": 100}, "group size 100"),
        ({"group_size": 128, "transform": "wush"}, "'wush'"),
        ({"group_size": 256, "transform": "dense128"}, "dense128 and group size 256"),
        ({"group_size": 256, "transform": "feedback128"}, "feedback128 and group size 256"),
        (
            {"group_size": 128, "transform": "feedback128", "activation_bits": 8},
            "feedback128 and 8-bit activations .* write transform: dense128",
        ),
        ({"group_size": 128, "shape": [1]}, "out features"),
        ({"group_size": 128, "clip": 1}, "unknown key 'clip'"),
        ({}, "no group_size"),
    ],
)
def test_entries_that_are_refused(entry: dict[str, Any], noun: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"apex4_plan": 1, "linears": {UP: entry}}))
    with pytest.raises(UsageError, match=rf"plan .*plan\.json.*{noun}"):
        read_plan_file(path)
    with pytest.raises(UsageError, match=noun):
        plan_given({UP: entry})


def test_readers_of_one_input_need_one_size_and_one_transform(tiny_model: Callable[..., Path]) -> None:
    source = ModelSource(str(tiny_model()))
    with pytest.raises(UsageError, match=r"group size 256 for .*gate_proj and channel for .*up_proj"):
        plan_given(ENTRIES).for_model(source, TransformKind.NONE)
    same = {GATE: ENTRIES[GATE], UP: {"group_size": 256}}
    assert set(plan_given(same).for_model(source, TransformKind.HADAMARD)) == {GATE, UP}  # the run's is the same
    with pytest.raises(UsageError, match=r"transform hadamard128 for .* and none for"):
        plan_given(same).for_model(source, TransformKind.NONE)


def test_with_8_bits_the_feedback_of_the_run_is_a_dense_transform(tiny_model: Callable[..., Path]) -> None:
    """So a linear without a transform agrees with one that names it."""
    source = ModelSource(str(tiny_model()))
    eight: dict[str, Any] = {"group_size": 128, "activation_bits": 8}
    both = {GATE: eight | {"transform": "dense128"}, UP: eight}
    assert set(plan_given(both).for_model(source, TransformKind.FEEDBACK)) == {GATE, UP}
    with pytest.raises(UsageError, match=r"activation_bits 8 for .*gate_proj and 4 for .*up_proj"):
        plan_given({GATE: eight, UP: {"group_size": 128}}).for_model(source, TransformKind.FEEDBACK)
    with pytest.raises(UsageError, match=r"transform dense128 for .*gate_proj and feedback128 for .*up_proj"):
        both = {GATE: {"group_size": 128, "transform": "dense128"}, UP: {"group_size": 128}}
        plan_given(both).for_model(source, TransformKind.FEEDBACK)


def test_a_plan_file_says_what_may_be_written_into_it() -> None:
    text = plan_file_text({}, [{UP: ENTRIES[UP]}], ["loss 1"], {UP: "error 0.1"})
    assert all(kind in text for kind in TransformKind if kind is not TransformKind.SHARED)
    assert all(len(line) <= 130 for line in text.splitlines())


def test_where_a_plan_may_be_written(tmp_path: Path) -> None:
    require_plan_path(tmp_path / "new.yml")
    (tmp_path / "old.json").write_text("{}")
    for path, noun in (
        ("plan.txt", "must end in"),
        ("old.json", "is there already"),
        ("no/plan.json", "does not exist"),
    ):
        with pytest.raises(UsageError, match=noun):
            require_plan_path(tmp_path / path)
