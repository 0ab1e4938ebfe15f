"""What --resume refuses: other settings, changed inputs, foreign folders, a folder in use; and what it begins or leaves."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from apex4_quant.errors import Stopped, UsageError
from apex4_quant.format.storage import RUN_FOLDER
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.recipes import named_recipes

from ..conftest import stop_after

FAILED, USAGE = 1, 2
Call = Callable[..., Any]  # the fixtures of conftest.py
COMMON = ("--samples", 3, "--seq-len", 32, "--target", "none")


@pytest.fixture
def stopped(tiny_model: Call, calib: Path, tmp_path: Path) -> Path:
    """The folder of a run that stopped after its first layer."""
    settings = QuantizeSettings(model=str(tiny_model()), calib=str(calib), samples=3, seq_len=32, target="none")
    with pytest.raises(Stopped):
        quantize(settings, tmp_path / "out", should_stop=stop_after(1, tmp_path / "out"))
    return tmp_path / "out"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CONFLICTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--seed", "1"): ("seed = 0", "1"),
    ("--samples", "4"): ("samples = 3", "4"),
    ("--seq-len", "64"): ("seq_len = 32", "64"),
    ("--group-size", "256"): ("group_size = 128", "256"),
    ("--calib", "bundled"): ("calib = ", "calibration.txt", "'bundled'"),
    ("--target", "RTX 3090"): ("target = 'none'", "'RTX 3090'"),
    ("--layout", "sm80"): ("layout = 'rowmajor'", "'sm80'"),
    ("--transform", "none"): ("transform = 'feedback128x16'", "'none'"),
    ("--dtype", "float32"): ("dtype = 'bfloat16'", "'float32'"),
    ("--ignore", "*.down_proj"): ("ignore = ()", "down_proj"),
    ("demo",): ("model = ", "tiny", "'demo'"),
    ("demo", "--group-size", "128", "--seed", "1"): ("model = ", "tiny", "'demo'"),  # before all that differs with it
}


@pytest.mark.parametrize("given", CONFLICTS, ids=" ".join)
def test_conflicting_setting(given: tuple[str, ...], stopped: Path, invoke: Call, one_sentence: Call) -> None:
    before = files(stopped)
    result = invoke("quantize", "--resume", "-o", stopped, *given)
    one_sentence(result, USAGE, str(stopped), "was begun with", *CONFLICTS[given], "first run's settings")
    assert files(stopped) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--seq-len", 4096),  # more than the model's context
        ("--target", "rtx3090", "--seq-len", 32),  # another spelling of a GPU
        ("--ignore", "*.o_proj", "--ignore", "*.down_proj", "--group-size", "0256", "--seq-len", 32),
        ("--device", "auto", "--dtype", "auto", "--transform", "none", "--layout", "sm80", "--seq-len", 32),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_the_same_command_line_with_resume_goes_on(
    options: tuple[object, ...], tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call, monkeypatch: Any
) -> None:
    command = ("quantize", tiny_model(), "-o", tmp_path / "out", "--calib", calib, "--samples", 2, *options)
    with monkeypatch.context() as patch:
        patch.setattr("apex4_quant.cli._stop_on_signals", lambda: lambda: True)
        assert invoke(*command).exit_code == 75
    result = invoke(*command, "--resume")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / RUN_FOLDER).exists()


@pytest.fixture
def stopped_with_file(tiny_model: Call, calib: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a run that stopped after its first layer, and the recipe file it was begun with."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("rounding: nearest\nactivation_clip: 0.9\n")
    settings = QuantizeSettings(
        str(tiny_model()), recipe=str(recipe), calib=str(calib), samples=3, seq_len=32, target="none"
    )
    with pytest.raises(Stopped):
        quantize(settings, tmp_path / "out", should_stop=stop_after(1, tmp_path / "out"))
    return tmp_path / "out", recipe


@pytest.mark.parametrize(
    ("now", "nouns"),
    [
        ("rounding: gptq\nactivation_clip: 0.9\n", ("rounding: 'nearest'", "rounding: 'gptq'")),
        ("rounding: nearest\n", ("activation_clip: 0.9", "activation_clip: 1.0")),
        ("transform: none\nactivation_clip: 0.9\n", ("transform: 'hadamard128'", "transform: 'none'")),
        ("summary: another text\nactivation_clip: 0.9\n", ("summary: ''", "summary: 'another text'")),
    ],
    ids=("rounding", "clip", "transform", "summary"),
)
def test_changed_recipe_file(
    now: str, nouns: tuple[str, str], stopped_with_file: tuple[Path, Path], invoke: Call, one_sentence: Call
) -> None:
    out, recipe = stopped_with_file
    before = files(out)
    recipe.write_text(now)
    sentence = one_sentence(
        invoke("quantize", "--resume", "-o", out, "--recipe", recipe, "--json"),
        USAGE,
        f"{out} was begun with recipe = 'mine' of a file with {nouns[0]}",
        f"and now 'mine' of a file with {nouns[1]} is asked for",
        "first run's settings",
    )
    assert sentence.count("'mine'") == 2 and "{" not in sentence
    assert files(out) == before


def test_recipes_other_than_the_file(
    stopped_with_file: tuple[Path, Path], tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    out, recipe = stopped_with_file
    begun = f"{out} was begun with recipe = "
    resume = ("quantize", "--resume", "-o", out, "--recipe")
    one_sentence(invoke(*resume, "rtn"), USAGE, f"{begun}'mine' of a file and now 'rtn' is asked for")
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.read_text())
    one_sentence(invoke(*resume, copy), USAGE, f"{begun}'mine' of a file and now 'copy' of a file is asked for")
    copy.unlink()
    one_sentence(invoke(*resume, copy), USAGE, "copy.yaml' does not exist")


def test_changed_named_recipe(stopped: Path, invoke: Call, one_sentence: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(stopped)
    monkeypatch.setitem(named_recipes(), "apex4", replace(named_recipes()["apex4"], gptaq=0.5))
    one_sentence(invoke("quantize", "--resume", "-o", stopped), USAGE, f"the recipe 'apex4' changed since {stopped}")
    assert files(stopped) == before


def test_a_run_goes_on_with_the_recipe_it_recorded(stopped_with_file: tuple[Path, Path], invoke: Call) -> None:
    """The file is asked for by name, unchanged; or it is not asked for, and then need not even be there."""
    out, recipe = stopped_with_file
    shutil.copytree(out, out.with_name("again"))
    result = invoke("quantize", "--resume", "-o", out, "--recipe", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    recipe.unlink()
    result = invoke("quantize", "--resume", "-o", out.with_name("again"), "--json")
    assert result.exit_code == 0, result.stderr
    assert files(out) == files(out.with_name("again"))
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (section["recipe"], section["activation_clip"]) == ("mine", 0.9)


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 5] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))


def change_text(model: Path) -> None:
    (model.parent / "calibration.txt").write_text("Quite another text, about a dog that jumps over a fox. " * 40)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (change_weights, "weights of"),
    "config.json": (change_config, "config"),
    "calibration text": (change_text, "calib"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_input(what: str, stopped: Path, invoke: Call, one_sentence: Call) -> None:
    change, noun = CHANGES[what]
    change(stopped.parent / "tiny")
    before = files(stopped)
    one_sentence(invoke("quantize", "--resume", "-o", stopped, "--json"), USAGE, noun, "changed", str(stopped))
    assert files(stopped) == before


@pytest.mark.parametrize("damage", ["absent", "other bytes"])
def test_finished_shard_that_is_damaged(damage: str, stopped: Path, invoke: Call, one_sentence: Call) -> None:
    """The folder must not be declared complete with it."""
    shard = stopped / "model-00002-of-00004.safetensors"
    if damage == "absent":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    one_sentence(invoke("quantize", "--resume", "-o", stopped, "--json"), FAILED, shard.name)
    assert not (stopped / "config.json").exists()


def test_lost_hidden_states(stopped: Path, invoke: Call, one_sentence: Call) -> None:
    hidden = stopped / RUN_FOLDER / "hidden-00001.safetensors"
    content = hidden.read_bytes()
    hidden.write_bytes(content[: len(content) // 2])
    one_sentence(invoke("quantize", "--resume", "-o", stopped, "--json"), FAILED, hidden.name)
    hidden.unlink()
    one_sentence(invoke("quantize", "--resume", "-o", stopped, "--json"), FAILED, hidden.name, "missing")
    assert not (stopped / "config.json").exists()


def test_lost_hidden_states_of_the_original_model(
    tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    settings = QuantizeSettings(
        str(tiny_model()), recipe="apex4-gptaq", calib=str(calib), samples=3, seq_len=32, target="none"
    )
    with pytest.raises(Stopped):
        quantize(settings, tmp_path / "out", should_stop=stop_after(1, tmp_path / "out"))
    hidden = tmp_path / "out" / RUN_FOLDER / "hidden-00001.safetensors"
    streams = load_file(hidden)
    assert streams["hidden_states"].shape == streams["original_hidden_states"].shape
    assert not streams["hidden_states"].equal(streams.pop("original_hidden_states"))
    save_file(streams, hidden)
    one_sentence(invoke("quantize", "--resume", "-o", tmp_path / "out", "--json"), FAILED, hidden.name, "damaged")


@pytest.mark.parametrize(
    "spelling", [lambda p: f"{p}/", lambda p: f"{p.parent}/./{p.name}", lambda p: f"{p.parent}/link"]
)
def test_other_spellings_of_the_model_and_of_numbers(
    spelling: Callable[[Path], str], stopped: Path, invoke: Call, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "tiny")
    numbers = ("--group-size", "0128", "--seed", "0", "--samples", "3")
    result = invoke("quantize", spelling(tmp_path / "tiny"), "--resume", "-o", stopped, *numbers)
    assert result.exit_code == 0, result.stderr
    report = json.loads((stopped / "apex4_report.json").read_text())
    assert report["model"] == report["settings"]["model"] == str(tmp_path / "tiny")  # as the run was begun


def test_a_model_that_is_not_there_is_another(stopped: Path, invoke: Call, one_sentence: Call) -> None:
    one_sentence(invoke("quantize", "org/name", "--resume", "-o", stopped), USAGE, "model = ", "'org/name'")


def test_one_line_until_it_ends(tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call, monkeypatch: Any) -> None:
    """The same command line begins the run, goes on with it, and finds that nothing is left to do."""
    out = tmp_path / "runs" / "out"
    command = ("quantize", tiny_model(), "-o", out, "--resume", "--calib", calib, *COMMON)
    with monkeypatch.context() as patch:
        patch.setattr("apex4_quant.cli._stop_on_signals", lambda: stop_after(1, out))
        first = invoke(*command)
    assert first.exit_code == 75 and f"{out} holds no run yet: it is begun" in first.stderr
    second = invoke(*command)
    assert second.exit_code == 0 and "begun" not in second.stderr, second.stderr
    before = files(out)
    third = invoke(*command)
    assert (third.exit_code, third.stderr) == (0, "")
    assert third.stdout == f"{out}: finished before with these settings, nothing is left to do\n"
    summary = json.loads(invoke(*command, "--json").stdout)
    assert summary["linears_quantized"] == 14
    assert files(out) == before
    whole = tmp_path / "whole"
    assert invoke("quantize", tmp_path / "tiny", "-o", whole, "--calib", calib, *COMMON).exit_code == 0
    assert files(whole) == before


def test_finished_folder(demo_checkpoint: Path, invoke: Call, one_sentence: Call) -> None:
    before = files(demo_checkpoint)
    result = invoke("quantize", "--resume", "-o", demo_checkpoint)
    assert (result.exit_code, result.stderr) == (0, "") and "nothing is left to do" in result.stdout
    for other, nouns in ((("--seed", 7), ("seed = 0", "7")), ((demo_checkpoint.parent,), ("model = 'demo'",))):
        result = invoke("quantize", "--resume", "-o", demo_checkpoint, *other)
        one_sentence(result, USAGE, str(demo_checkpoint), "was begun with", *nouns)
    assert files(demo_checkpoint) == before


def test_finished_folder_that_lost_a_file(
    demo_checkpoint: Path, tmp_path: Path, invoke: Call, one_sentence: Call
) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo_checkpoint, out)
    (out / "model-00003-of-00008.safetensors").unlink()
    one_sentence(invoke("quantize", "demo", "--resume", "-o", out), FAILED, str(out), "model-00003", "another folder")


def test_kill_while_finishing(demo_checkpoint: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    """A checkpoint that is complete, with what is left of its run's folder: it is finished, and it checks."""
    out = tmp_path / "out"
    shutil.copytree(demo_checkpoint, out)
    (out / RUN_FOLDER).mkdir()
    (out / RUN_FOLDER / "lock").touch()
    (out / RUN_FOLDER / "shard-00001.json").write_text("{}")
    one_sentence(invoke("quantize", "demo", "-o", out), USAGE, f"{out} is not empty")
    assert invoke("quantize", "--resume", "-o", out).exit_code == 0
    assert files(out) == files(demo_checkpoint)


def test_kill_while_beginning(tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    """A run's folder without settings is no run: there is nothing to go on with, and it is in no run's way."""
    out = tmp_path / "out"
    (out / RUN_FOLDER).mkdir(parents=True)
    (out / RUN_FOLDER / "lock").touch()
    (out / RUN_FOLDER / "settings.json.tmp").write_text('{"mod')
    one_sentence(invoke("quantize", "--resume", "-o", out), USAGE, f"{out} holds no run", "give a MODEL")
    shutil.copytree(out, tmp_path / "again")
    result = invoke("quantize", tiny_model(), "-o", tmp_path / "again", "--resume", "--calib", calib, *COMMON)
    assert result.exit_code == 0 and "it is begun" in result.stderr
    result = invoke("quantize", tmp_path / "tiny", "-o", out, "--calib", calib, *COMMON)
    assert result.exit_code == 0, result.stderr
    assert (out / "config.json").is_file() and not (out / RUN_FOLDER).exists()


def test_folder_without_a_run(tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    one_sentence(invoke("quantize", "--resume", "-o", tmp_path / "absent"), USAGE, "absent holds no run")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "mine").write_text("mine")
    for model in ((), ("demo",)):
        one_sentence(invoke("quantize", *model, "--resume", "-o", tmp_path), USAGE, "holds no run and is not empty")
        one_sentence(invoke("quantize", *model, "--resume", "-o", tmp_path / "mine"), USAGE, "mine")
    with pytest.raises(UsageError, match="is not empty"):
        quantize(QuantizeSettings("demo"), tmp_path, resume=True)


def test_damaged_settings(stopped: Path, invoke: Call, one_sentence: Call) -> None:
    for text in ('{"model": "de', "[]", "{}"):
        (stopped / RUN_FOLDER / "settings.json").write_text(text)
        one_sentence(invoke("quantize", "--resume", "-o", stopped, "--json"), FAILED, "settings.json")


def test_two_processes(stopped: Path, tiny_model: Call, calib: Path, invoke: Call, one_sentence: Call) -> None:
    before = files(stopped)
    with open(stopped / RUN_FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        one_sentence(
            invoke("quantize", "--resume", "-o", stopped, "--json"), FAILED, "another apex4 process", str(stopped)
        )
        assert files(stopped) == before
    result = invoke("quantize", "--resume", "-o", stopped, "--json")
    assert result.exit_code == 0, result.stderr
    # One that has begun and not yet written its settings.
    begun = stopped.parent / "begun"
    (begun / RUN_FOLDER).mkdir(parents=True)
    with open(begun / RUN_FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = invoke("quantize", stopped.parent / "tiny", "-o", begun, "--calib", calib, *COMMON, "--json")
        one_sentence(result, FAILED, "another apex4 process", str(begun))
    assert list(files(begun)) == [f"{RUN_FOLDER}/lock"]
