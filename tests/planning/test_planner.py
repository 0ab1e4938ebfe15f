"""The planner from the command line: what it writes and refuses, plan files, their use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from apex4_quant.errors import Stopped, UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.hardware.gpus import GPUS
from apex4_quant.models.source import ModelSource
from apex4_quant.planning.cost_model import OURS, activation_seconds
from apex4_quant.planning.options import Choice, GroupOptions, Option, choices_of
from apex4_quant.planning.outcome import QuantizationPlan
from apex4_quant.planning.planner import group_options, make_plan
from apex4_quant.planning.sensitivity import GroupSensitivity
from apex4_quant.planning.settings import PlanSettings
from apex4_quant.quantization.plan_file import read_plan_file
from apex4_quant.quantization.run import QuantizeSettings, quantize
from apex4_quant.recipes import DEFAULT_RECIPE, get_recipe

from ..conftest import stop_after

DENSE, FEEDBACK, HADAMARD = TransformKind.DENSE, TransformKind.FEEDBACK, TransformKind.HADAMARD

FAILED, USAGE = 1, 2
Call = Callable[..., Any]  # the fixtures of conftest.py
SMALL = ("--samples", 2, "--seq-len", 32)


# Options and their times


@pytest.mark.parametrize("learned", [DENSE, FEEDBACK])
def test_a_learned_transform_costs_its_time_once_an_input(learned: TransformKind) -> None:
    """q, k and v read one input: its transform is computed once, whatever it is that reads it."""
    gpu = GPUS["RTX 3090"]
    losses = {choice: 0.1 for choice in choices_of(4096, (HADAMARD, learned))}
    of_input = GroupSensitivity(0, 0, ("q", "k", "v"), (4096, 1024, 1024), 4096, False, {}, losses)
    seconds = {each.choice: each.seconds for each in group_options(of_input, gpu, 8192).options}
    more = activation_seconds(gpu, 8192, 4096, 128, learned) - activation_seconds(gpu, 8192, 4096, 128)
    assert seconds[Choice(128, learned)] - seconds[Choice(128, HADAMARD)] == pytest.approx(more) and more > 0


# From the command line


@pytest.fixture
def model(tiny_model: Call) -> Path:
    """K is 128 for q, k, v, o, gate, up and 600 for down: ladders of one and of four sizes."""
    return tiny_model(intermediate_size=600)


@pytest.fixture
def plan_of(model: Path, calib: Path, tmp_path: Path, invoke: Call) -> Call:
    """plan_of(*options) -> the path of a plan of `model` with 4 bits, for the A100 with the naive mainloop."""

    def make(*options: object, name: str = "plan.yaml") -> Path:
        path = tmp_path / name
        naive = ("--target", "A100", "--mode", "w4a4", "--mainloop", "naive", "--device", "cpu")
        result = invoke("plan", model, "-o", path, "--calib", calib, *SMALL, *naive, *options)
        assert result.exit_code == 0, result.stderr
        return path

    return make


@pytest.fixture
def recipe_with(tmp_path: Path) -> Callable[[str], Path]:
    """recipe_with(transform) -> a recipe that has it, and rounds to nearest."""

    def write(transform: str) -> Path:
        path = tmp_path / f"{transform}.recipe.yaml"
        path.write_text(f"transform: {transform}\n")
        return path

    return write


DOWN = "model.layers.{}.mlp.down_proj"


def column(path: Path, key: str) -> dict[str, int | str]:
    return {name: entry[key] for name, entry in yaml.safe_load(path.read_text())["linears"].items()}


def sizes(path: Path) -> dict[str, int | str]:
    return column(path, "group_size")


def test_plan_json_and_file_agree(model: Path, calib: Path, tmp_path: Path, invoke: Call) -> None:
    options = ("--target", "RTX 3090", "--calib", calib, *SMALL, "--json", "--tokens", 4096, "--mode", "mixed")
    result = json.loads(invoke("plan", model, *options, "-o", tmp_path / "plan.json").stdout)
    assert list(result["linears"][6]["predicted_error"]) == [
        "128",
        "256",
        "512",
        "channel",
    ]  # mixed: no other transform
    errors = list(result["linears"][6]["predicted_error"].values())
    assert errors == sorted(errors) and 0 < errors[0] < errors[-1] < 0.2
    losses = [linear["predicted_loss"] for linear in result["linears"]]
    assert losses[0] == losses[1] == losses[2] != losses[3]  # q, k and v read one input
    assert result["predicted"]["loss"] == pytest.approx(sum(losses[i]["128"] for i in (0, 3, 4, 6, 7, 10, 11, 13)))
    assert result["linears"][0]["shape"] == [128, 128]
    total = sum(linear["predicted_microseconds"] for linear in result["linears"])
    assert total == pytest.approx(result["predicted"]["microseconds"], rel=1e-3)
    assert result["predicted"]["of_fastest"] >= 1 and result["predicted"]["of_least_loss"] == 1
    read = read_plan_file(tmp_path / "plan.json").for_model(ModelSource(str(model)), DENSE)
    written = {name: entry.as_dict() for name, entry in read.items()}
    keys = ("group_size", "transform")
    assert written == {linear["name"]: {key: linear[key] for key in keys} for linear in result["linears"]}
    assert all(entry == {"group_size": 128, "transform": HADAMARD} for entry in written.values())


def test_modes_and_bounds_from_the_command_line(plan_of: Call, tmp_path: Path) -> None:
    g128 = sizes(plan_of("--mode", "g128", name="a.yaml"))
    assert set(g128.values()) == {128} and len(g128) == 14
    hadamard = ("--transform", HADAMARD)
    fast = sizes(plan_of(*hadamard, "--budget", 1, name="b.yaml"))
    assert {name for name, size in fast.items() if size != 128} == {DOWN.format(0), DOWN.format(1)}
    loss = yaml.safe_load((tmp_path / "b.yaml").read_text())["predicted"]["of_least_loss"]
    between = sizes(plan_of(*hadamard, "--max-loss", (1 + loss) / 2, "--tokens", 4096, name="c.yml"))
    assert between not in (g128, fast)


def test_transforms_from_the_command_line(plan_of: Call, recipe_with: Call, tmp_path: Path) -> None:
    """The planner chooses unless told otherwise, and a recipe without a learned transform leaves it nothing to choose."""

    def transforms(*options: object, name: str) -> set[int | str]:
        return set(column(plan_of(*options, name=name), "transform").values())

    # Of few tokens a transform is learned that is no better on others.
    dense = ("--recipe", recipe_with(DENSE))
    assert transforms("--mode", "g128", "--budget", 9, "--samples", 16, *dense, name="a.yaml") == {DENSE}
    assert transforms("--budget", 1, name="b.yaml") == {HADAMARD}
    assert transforms("--transform", HADAMARD, name="c.yaml") == {HADAMARD}
    assert transforms("--transform", "none", name="d.yaml") == {"none"}
    assert transforms("--recipe", "gptq", "--budget", 9, name="e.yaml") == {HADAMARD}
    assert transforms("--mode", "mixed", "--budget", 9, name="f.yaml") == {HADAMARD}
    assert transforms("--transform", DENSE, "--recipe", "rtn", name="g.yaml") == {DENSE}
    assert transforms("--transform", FEEDBACK, "--recipe", "rtn", name="h.yaml") == {FEEDBACK}
    assert transforms("--transform", DENSE, "--recipe", recipe_with(FEEDBACK), name="i.yaml") == {DENSE}
    assert set(sizes(tmp_path / "h.yaml").values()) == {128}
    assert set(sizes(tmp_path / "g.yaml").values()) == {128}
    lines = (tmp_path / "a.yaml").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if DOWN.format(0) in line)
    for label in ("128", "256", "512", "channel", DENSE):
        assert f"{label}: 0." in lines[place].partition("# error")[2] and f"{label}: " in lines[place - 1]
    assert "# loss" in lines[place - 1] and lines[place - 2] == ""
    content = yaml.safe_load((tmp_path / "e.yaml").read_text())
    assert content["recipe"] == "gptq" and content["predicted"]["of_least_loss"] == 1


def test_table_for_people(model: Path, calib: Path, invoke: Call) -> None:
    result = invoke("plan", model, "--target", "A100", "--calib", calib, *SMALL)
    assert result.exit_code == 0
    assert "predicted" in result.stdout and "A100" in result.stdout
    assert all(len(line) <= 150 for line in result.stdout.splitlines() if "proj" in line)
    assert sum("_proj" in line for line in result.stdout.splitlines()) == 14
    assert "@dense128 a8" in result.stdout and "  A100: 8-bit activations " in result.stdout
    pure = invoke("plan", model, "--target", "A100", "--calib", calib, *SMALL, "--mode", "w4a4").stdout
    assert "a8" not in pure and "8-bit" not in pure
    assert "measuring" in result.stderr


def test_plan_of_the_same_text_is_the_same(model: Path, calib: Path, recipe_with: Call) -> None:
    settings = PlanSettings(str(model), target="H200", calib=str(calib), samples=16, seq_len=32, device="cpu", budget=9)
    settings = replace(settings, mode="w4a4", recipe=str(recipe_with(DENSE)))
    first, second = make_plan(settings), make_plan(settings)
    assert first.as_dict() == second.as_dict()
    assert {each.choice for each in first.chosen} == {(128, DENSE, 4)}
    assert first.predicted()["of_least_loss"] == 1


def test_what_plan_refuses_before_it_works(model: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    (tmp_path / "there.yaml").write_text("edited")
    for options, nouns in (
        (("--target", "sm_86"), ("'sm_86'", "RTX 3090")),
        (("--target", "A100", "--mainloop", "best"), ("'best'", "two-ffma, naive")),
        (("--target", "A100", "--mode", "best"), ("'best'", "mixed")),
        (("--target", "A100", "--budget", "0.5"), ("--budget is 0.5",)),
        (("--target", "A100", "--tokens", "0"), ("--tokens is 0",)),
        (("--target", "A100", "-o", tmp_path / "there.yaml"), ("there.yaml", "already")),
        (("--target", "A100", "-o", tmp_path / "plan.txt"), ("plan.txt", ".yaml")),
        (("--target", "A100", "-o", tmp_path / "no" / "plan.yaml"), ("no/plan.yaml", "folder")),
        (("--target", "A100", "--samples", "0"), ("--samples is 0",)),
        (("--target", "A100", "--transform", "wush"), ("'wush'", HADAMARD, DENSE)),
        (("--target", "A100", "--transform", "shared128"), ("'shared128'", "not known", HADAMARD)),
        (("--target", "A100", "--recipe", "apex4-shared"), ("transform 'shared128' has", "--transform")),
        (("--target", "A100", "--recipe", "best"), ("'best'",)),
        (("--target", "A100", "--mode", "mixed", "--transform", DENSE), ("--mode mixed", DENSE, "128")),
        (("--target", "A100", "--mode", "mixed", "--transform", FEEDBACK), ("--mode mixed", FEEDBACK, "128")),
        (
            ("--target", "A100", "--mode", "w4a4", "--transform", DENSE, "--budget", "2"),
            (DENSE, "nothing to choose", "--budget"),
        ),
        (("--target", "A100", "--mode", "g128", "--recipe", "rtn", "--max-loss", "2"), (HADAMARD, "--max-loss")),
        (("--target", "A100", "--mode", "g128", "--transform", "none", "--budget", "2"), ("none", "--budget")),
    ):
        one_sentence(invoke("plan", model, *options), USAGE, *nouns)
    assert (tmp_path / "there.yaml").read_text() == "edited"


# Plan files that quantize refuses


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))  # enums as what they say
    return path


UP = "model.layers.1.mlp.up_proj"
LEARNED = get_recipe(DEFAULT_RECIPE).transform
BAD_PLANS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "unknown module": (lambda p: p["linears"].update({"lm_head": {"group_size": 128}}), ("lm_head", "no linear")),
    "illegal size": (lambda p: p["linears"][UP].update(group_size=100), (UP, "100", "multiple of 128")),
    "size that is a list": (lambda p: p["linears"][UP].update(group_size=[128]), (UP, "[128]")),
    "unknown key": (lambda p: p.update(groupsize=1), ("unknown key 'groupsize'",)),
    "unknown key of a linear": (lambda p: p["linears"][UP].update(bits=8), (UP, "unknown key 'bits'")),
    "unknown transform": (lambda p: p["linears"][UP].update(transform="wush"), (UP, "'wush'", HADAMARD, DENSE)),
    "transform that is a list": (lambda p: p["linears"][UP].update(transform=[DENSE]), (UP, "['dense128']")),
    "dense transform of large groups": (
        lambda p: p["linears"][DOWN.format(1)].update(transform=DENSE, group_size=256),
        (DOWN.format(1), DENSE, "256", "groups of 128 only"),
    ),
    "feedback of large groups": (
        lambda p: p["linears"][DOWN.format(1)].update(transform=FEEDBACK, group_size=256),
        (DOWN.format(1), FEEDBACK, "256", "groups of 128 only"),
    ),
    "feedback of 8 bits": (
        lambda p: p["linears"][DOWN.format(1)].update(transform=FEEDBACK, activation_bits=8),
        (DOWN.format(1), FEEDBACK, "8-bit", DENSE),
    ),
    "transforms that disagree": (
        lambda p: p["linears"][UP].update(transform="none"),
        ("model.layers.1.mlp.gate_proj", UP, "transform hadamard128", "and none", "read the same input"),
    ),
    "a transform for one of two": (  # the other has the run's
        lambda p: p["linears"][UP].pop("transform"),
        ("model.layers.1.mlp.gate_proj", UP, "transform hadamard128", f"and {LEARNED}", "read the same input"),
    ),
    "no size": (lambda p: p["linears"][UP].pop("group_size"), (UP, "no group_size")),
    "bare size": (lambda p: p["linears"].update({UP: 128}), (UP, "{group_size: 128}")),
    "another shape": (
        lambda p: p["linears"][UP].update(shape=[600, 256]),
        (UP, "600 x 256", "600 x 128", "another model"),
    ),
    "a shape that is none": (lambda p: p["linears"][UP].update(shape="600x128"), (UP, "'600x128'")),
    "another architecture": (lambda p: p.update(architecture="MistralForCausalLM"), ("Mistral", "LlamaForCausalLM")),
    "sizes that disagree": (
        lambda p: p["linears"][UP].update(group_size="channel"),
        ("model.layers.1.mlp.gate_proj", UP, "read the same input"),
    ),
    "a linear missing": (lambda p: p["linears"].pop(UP), (UP, "says nothing")),
    "another version": (lambda p: p.update(apex4_plan=2), ("apex4_plan = 2", "reads 1")),
    "no linears": (lambda p: p.pop("linears"), ("no mapping 'linears'",)),
}


@pytest.mark.parametrize("what", BAD_PLANS)
def test_bad_plan(
    what: str, model: Path, plan_of: Call, quantize_badly: Call, one_sentence: Call, monkeypatch: Any
) -> None:
    change, nouns = BAD_PLANS[what]
    path = edited(plan_of("--transform", HADAMARD, "--mode", "g128"), change)
    monkeypatch.setattr("apex4_quant.quantization.run.LayerRunner", None)  # the model is not loaded for this
    one_sentence(quantize_badly(model, "--plan", path), USAGE, "plan", *nouns)


def test_plan_that_is_no_yaml(
    model: Path, plan_of: Call, tmp_path: Path, quantize_badly: Call, one_sentence: Call
) -> None:
    path = plan_of()
    text = path.read_text()
    line = next(line for line in text.splitlines() if UP in line)
    path.write_text(text + line + "\n")
    one_sentence(quantize_badly(model, "--plan", path), USAGE, "not valid YAML", UP, "twice")
    path.write_text("linears: {")
    one_sentence(quantize_badly(model, "--plan", path), USAGE, "not valid YAML", "line 1")
    path.write_bytes(b"\xff\xfe\x00")
    one_sentence(quantize_badly(model, "--plan", path), USAGE, "not valid YAML")
    one_sentence(quantize_badly(model, "--plan", tmp_path / "none.yaml"), USAGE, "none.yaml", "does not exist")


def test_plan_and_group_size_exclude_each_other(
    model: Path, plan_of: Call, quantize_badly: Call, one_sentence: Call
) -> None:
    path = plan_of()
    for size in (128, 256):
        one_sentence(quantize_badly(model, "--plan", path, "--group-size", size), USAGE, "--plan", "--group-size")
    with pytest.raises(UsageError, match="--group-size"):
        QuantizeSettings(str(model), plan=str(path), group_size="channel").resolve(ModelSource(str(model)))


def test_bad_plan_from_python(model: Path) -> None:
    source = ModelSource(str(model))
    for plan, noun in (
        ({UP: 64}, "64"),
        ({"lm_head": 128}, "lm_head.*no linear"),
        ({UP: 128, UP[:-7] + "gate_proj": 256}, "same input"),
        ({UP: {"group_size": 128, "transform": "wush"}}, "'wush'"),
        ({UP: {"transform": DENSE}}, "no group_size"),
    ):
        with pytest.raises(UsageError, match=noun):
            QuantizeSettings(str(model), plan=plan).resolve(source)


# Plan files that quantize follows


def test_quantize_with_mixed_sizes_loads_and_computes(
    model: Path, calib: Path, plan_of: Call, tmp_path: Path, invoke: Call
) -> None:
    from transformers import AutoModelForCausalLM

    def change(plan: dict[str, Any]) -> None:
        plan["linears"][DOWN.format(0)]["group_size"] = "512"
        plan["linears"][DOWN.format(1)]["group_size"] = "channel"
        for part in ("gate_proj", "up_proj"):
            plan["linears"][f"model.layers.0.mlp.{part}"]["group_size"] = 256

    path, out = edited(plan_of("--mode", "g128", "--recipe", "gptq"), change), tmp_path / "out"
    command = ("quantize", model, "-o", out, "--plan", path, "--calib", calib, *SMALL, "--target", "none", "--json")
    command += ("--recipe", "gptq")
    dry = json.loads(invoke(*command, "--dry-run").stdout)
    assert {linear["name"]: linear["group_size"] for linear in dry["quantized"]}[DOWN.format(0)] == 512
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert modules[DOWN.format(0)] == {"group_size": 512, "shape": [128, 600]}
    assert modules[DOWN.format(1)] == {"group_size": "channel", "shape": [128, 600]}
    assert modules["model.layers.0.mlp.up_proj"] == {"group_size": 256, "shape": [600, 128]}
    assert "model.layers.1.mlp.up_proj" not in modules
    settings = json.loads((out / "apex4_report.json").read_text())["settings"]
    assert settings["plan"][DOWN.format(0)] == {"group_size": 512, "transform": HADAMARD}
    assert settings["plan_origin"]["front"] and "predicted" not in settings["plan_origin"], "it was edited"
    assert invoke("check", out, "--json").exit_code == 0
    loaded, original = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (out, model))
    down = loaded.get_submodule(DOWN.format(0))
    assert (down.format.group_length, down.format.padded_k) == (512, 1024)
    assert loaded.get_submodule(DOWN.format(1)).format.group_length == 640
    ids = torch.arange(24)[None] * 7
    with torch.no_grad():
        logits, exact = loaded(ids).logits, original(ids).logits
    assert 0 < float((logits - exact).norm() / exact.norm()) < 0.5


def test_ignored_linears_need_no_entry(model: Path, calib: Path, plan_of: Call, tmp_path: Path, invoke: Call) -> None:
    path = edited(plan_of(), lambda plan: plan["linears"].pop(DOWN.format(0)))
    command = ("quantize", model, "-o", tmp_path / "out", "--plan", path, "--calib", calib, *SMALL, "--dry-run")
    assert invoke(*command, "--ignore", "layers.0.mlp.down_proj").exit_code == 0


def test_resume_refuses_another_plan(
    model: Path, calib: Path, plan_of: Call, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    first, out = plan_of("--budget", 1, name="first.yaml"), tmp_path / "out"
    other = plan_of("--mode", "g128", name="other.yaml")
    settings = QuantizeSettings(str(model), plan=str(first), calib=str(calib), samples=2, seq_len=32, target="none")
    with pytest.raises(Stopped):
        quantize(settings, out, should_stop=stop_after(1, out))
    resume = ("quantize", "--resume", "-o", out, "--json")
    one_sentence(invoke(*resume, "--plan", other), USAGE, "was begun with plan", "other.yaml", "first run's settings")
    one_sentence(invoke(*resume, "--group-size", 256), USAGE, "--plan", "--group-size")
    with pytest.raises(UsageError, match="was begun with plan"):
        quantize(QuantizeSettings(str(model), calib=str(calib), samples=2, seq_len=32, target="none"), out, resume=True)
    # The file is not needed any more; the same file is the same plan.
    copy = tmp_path / "copy.yaml"
    first.rename(copy)
    assert invoke(*resume, "--plan", copy).exit_code == 0
    origin = json.loads((out / "apex4_report.json").read_text())["settings"]["plan_origin"]
    planned = yaml.safe_load(copy.read_text())
    assert origin["target"] == "A100" and "model" not in origin
    assert (origin["predicted"], origin["front"]) == (planned["predicted"], planned["front"])
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert modules[DOWN.format(1)]["group_size"] == "channel"


# Activations of 8 bits


def eight_or_four(seconds_of_eight: float, loss_of_eight: float, count: int) -> QuantizationPlan:
    """A plan of two inputs, of which `count` get 8 bits; 4 bits take 10 us and lose 0.4 each."""
    four, eight = (
        Option(Choice(128, HADAMARD), 1e-5, 0.4),
        Option(Choice(128, HADAMARD, 8), seconds_of_eight, loss_of_eight),
    )
    losses = {four.choice: four.loss, eight.choice: eight.loss}
    group = GroupSensitivity(0, 0, ("q",), (128,), 128, False, {choice: (0.1,) for choice in losses}, losses)
    options = (GroupOptions((four, eight)),) * 2
    settings, source = PlanSettings("demo", target="A100"), ModelSource("demo")
    chosen = (eight,) * count + (four,) * (2 - count)
    return QuantizationPlan(settings, (HADAMARD,), source, GPUS["A100"], OURS, (group,) * 2, options, chosen)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (eight_or_four(2e-5, 0.1, 2), "A100: 8-bit activations everywhere: they take 2.00x the time of 4 bits here and lose 4.0 times less"),
        (eight_or_four(2e-5, 0.1, 0), "A100: 8-bit activations nowhere; everywhere they would take 2.00x the time of 4 bits here and lose 4.0 times less"),
        (eight_or_four(2e-5, 0.8, 0), "A100: 8-bit activations nowhere; everywhere they would take 2.00x the time of 4 bits here and lose more"),
        (eight_or_four(1.2e-5, 0.1, 1), "A100: 8-bit activations for 1 of 2 inputs, which saves 38 % of the loss of 4 bits for 10 % of their time; "
         "everywhere they would take 1.20x the time of 4 bits here and lose 4.0 times less"),
        (eight_or_four(0.8e-5, 0.1, 1), "A100: 8-bit activations for 1 of 2 inputs, which saves 38 % of the loss of 4 bits and 10 % of their time; "
         "everywhere they would take 0.80x the time of 4 bits here and lose 4.0 times less"),
    ],
)  # fmt: skip
def test_a_plan_says_what_it_decided_about_bits_and_why(plan: QuantizationPlan, sentence: str) -> None:
    assert plan.reasons() == [sentence]
    assert sentence in plan.as_text()


def test_bits_go_into_the_plan_file_and_from_there_into_the_checkpoint(
    model: Path, calib: Path, tmp_path: Path, invoke: Call
) -> None:
    """auto without a limit of time takes 8 bits everywhere: they lose least."""
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    common = ("--calib", calib, *SMALL, "--device", "cpu")
    assert invoke("plan", model, "-o", plan, "--target", "A100", "--budget", 9, *common).exit_code == 0
    assert set(column(plan, "activation_bits").values()) == {8}
    command = ("quantize", model, "-o", out, "--plan", plan, *common, "--target", "none", "--recipe", "rtn")
    assert invoke(*command).exit_code == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    bits = {config["modules"].get(DOWN.format(i), {}).get("activation_bits", config["activation_bits"]) for i in (0, 1)}
    assert bits == {8}


# Activations that make up for their own rounding


def test_feedback_from_the_planner_into_the_checkpoint(
    model: Path, calib: Path, plan_of: Call, recipe_with: Call, tmp_path: Path, invoke: Call
) -> None:
    """A recipe with it plans it for 4 bits; it is predicted to lose less than the transform alone, and a run stores it."""
    common = ("--mode", "w4a4", "--budget", 9, "--samples", 16)
    dense, feedback = (
        plan_of(*common, "--recipe", recipe_with(kind), name=f"{kind}.yaml") for kind in (DENSE, FEEDBACK)
    )
    assert set(column(dense, "transform").values()) == {DENSE}
    assert set(column(feedback, "transform").values()) == {FEEDBACK}
    least, with_feedback = (yaml.safe_load(path.read_text())["predicted"]["loss"] for path in (dense, feedback))
    assert 0 < with_feedback < 0.95 * least
    first, out = DOWN.format(0), tmp_path / "out"
    edited(feedback, lambda plan: plan["linears"][first].update(transform=DENSE, activation_bits=8))
    command = ("quantize", model, "-o", out, "--plan", feedback, "--calib", calib, *SMALL, "--target", "none")
    result = invoke(*command, "--recipe", "rtn", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert {name: entry["transform"] for name, entry in modules.items() if name != first} == dict.fromkeys(
        (name for name in column(feedback, "transform") if name != first), FEEDBACK
    )
    assert (modules[first]["transform"], modules[first]["activation_bits"]) == (DENSE, 8)
    assert invoke("check", out, "--json").exit_code == 0


def test_with_8_bits_a_recipe_with_feedback_plans_dense_transforms(
    model: Path, calib: Path, recipe_with: Call, tmp_path: Path, invoke: Call
) -> None:
    path = tmp_path / "plan.yaml"
    command = ("plan", model, "-o", path, "--target", "A100", "--calib", calib, "--recipe", recipe_with(FEEDBACK))
    command += ("--samples", 16, "--seq-len", 32, "--device", "cpu")
    result = json.loads(invoke(*command, "--budget", 9, "--json").stdout)
    assert list(result["linears"][0]["predicted_loss"]) == ["128", FEEDBACK, "128 a8", "dense128 a8"]
    assert {entry["activation_bits"] for entry in result["linears"]} == {8}
    assert {entry["transform"] for entry in result["linears"]} <= {HADAMARD, DENSE}
    assert DENSE in column(path, "transform").values()
    path.unlink()
    text = invoke(*command).stdout
    assert "  feedback128: groups of 128, a transform learned for the input, and errors of rounding" in text
    assert "  dense128: groups of 128, a transform learned for the input\n" in text
    assert "@feedback128" in text and "@dense128 a8" in text and "feedback128 a8" not in text
    assert all(len(line) <= 150 for line in text.splitlines() if "proj" in line)
