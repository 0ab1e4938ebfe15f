"""Every bad folder, option and text gets one clear sentence, the right exit code, and leaves no checkpoint behind."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FAILED, USAGE = 1, 2
Call = Callable[..., Any]  # the fixtures of conftest.py


# The folder


def test_missing_directory_as_a_process(one_sentence: Call, run_cli: Call, tmp_path: Path) -> None:
    result = run_cli("quantize", "no/such/folder", "-o", "out")
    sentence = one_sentence(result, USAGE, "'no/such/folder' does not exist", "local folder", "Hub id")
    assert result.stderr == sentence + "\n"
    assert not (tmp_path / "out").exists()


MODEL, CHECKPOINT = "model folder './absent' does not exist", "checkpoint folder './absent' does not exist"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("quantize ./absent -o full --target nonsense", MODEL),
        ("quantize ./absent --dry-run --recipe nonsense", MODEL),
        ("plan ./absent", MODEL),
        ("plan ./absent --target nonsense --mode mixed --budget 2", MODEL),
        ("eval ./absent --engine vllm", MODEL),
        ("eval demo --baseline ./absent --engine vllm", MODEL),
        ("eval ./absent --throughput --engine vllm", MODEL),
        ("eval ./absent --record", CHECKPOINT),
        ("inspect ./absent", CHECKPOINT),
        ("check ./absent", CHECKPOINT),
        ("repack ./absent -o full --target nonsense", CHECKPOINT),
        ("export ./absent -o full --to vllm-humming", CHECKPOINT),
        ("card ./absent", "absent is no folder: give one that 'apex4 quantize' wrote"),
        ("report ./absent -o report.html", "absent is no folder: give one that 'apex4 quantize' wrote"),
        ("publish ./absent ORG/NAME", "absent is no folder: give one that 'apex4 quantize' wrote"),
    ],
)
def test_a_missing_directory_is_said_before_anything_else(
    words: str, sentence: str, one_sentence: Call, invoke: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a GPU is asked for, a package that is not there, or another folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    one_sentence(invoke(*words.split()), USAGE, sentence)


@pytest.mark.parametrize(
    "command", ["inspect", "check", "export --to vllm-humming -o out", "repack --target A100 -o out"]
)
def test_a_folder_that_is_no_checkpoint(command: str, one_sentence: Call, invoke: Call, tmp_path: Path) -> None:
    name, *others = command.split()
    one_sentence(
        invoke(name, tmp_path, *others), USAGE, "has no config.json: give a folder that 'apex4 quantize' wrote"
    )


def test_model_is_a_file(one_sentence: Call, quantize_badly: Call, calib: Path, tmp_path: Path) -> None:
    one_sentence(quantize_badly(calib), USAGE, str(calib), "is a file", "config.json")
    assert not (tmp_path / "out").exists()


def test_directory_without_config(one_sentence: Call, quantize_badly: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one_sentence(quantize_badly(tmp_path / "empty"), USAGE, "empty has no config.json")
    assert not (tmp_path / "out").exists()


def test_config_without_weights(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    model = tiny_model()
    (model / "model.safetensors").unlink()
    one_sentence(
        quantize_badly(model), USAGE, "no model.safetensors", "no model.safetensors.index.json", "get the weights"
    )
    assert not (tmp_path / "out").exists()


def test_only_bin_weights(one_sentence: Call, quantize_badly: Call, tiny_model: Call) -> None:
    model = tiny_model()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    one_sentence(quantize_badly(model), USAGE, "no model.safetensors", ".bin", "convert them to safetensors")


def test_hub_id_without_network(one_sentence: Call, run_cli: Call, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = run_cli("quantize", "some-org/some-model", "-o", "out", env=offline)
    sentence = one_sentence(result, USAGE, "'some-org/some-model'", "Hub", "network")
    assert result.stderr == sentence + "\n"
    assert not (tmp_path / "out").exists()


def test_already_quantized(one_sentence: Call, quantize_badly: Call, demo_checkpoint: Path, tmp_path: Path) -> None:
    one_sentence(quantize_badly(demo_checkpoint), USAGE, str(demo_checkpoint), "already quantized (apex4)", "16-bit")
    assert not (tmp_path / "out").exists()


# OUT


def test_out_is_not_empty(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    one_sentence(quantize_badly(tiny_model()), USAGE, f"{tmp_path / 'out'} is not empty", "choose another folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_out_is_a_file(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    one_sentence(quantize_badly(tiny_model()), USAGE, f"{tmp_path / 'out'} is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_out_below_a_file(one_sentence: Call, invoke: Call, tiny_model: Call, calib: Path) -> None:
    result = invoke("quantize", tiny_model(), "-o", calib / "out", "--calib", calib, "--seq-len", 32, "--json")
    one_sentence(result, USAGE, str(calib / "out"), "cannot be made")


def test_no_space_left(
    one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 12_345, 12_345))
    one_sentence(quantize_badly(tiny_model()), USAGE, str(tmp_path / "out"), "12.3 KB free", "MB", "free some space")
    assert not (tmp_path / "out").exists()


# Calibration text and tokenizer


def test_calibration_text(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    model, path, lines = tiny_model(), tmp_path / "short.txt", tmp_path / "lines.jsonl"
    path.write_text("Too short by far.")
    one_sentence(quantize_badly(model, "--calib", path), USAGE, str(path), "tokens", "window of 32", "longer text")
    path.write_text("")
    one_sentence(quantize_badly(model, "--calib", path), USAGE, str(path), "nothing in it")
    path.write_bytes(b"caf\xe9 " * 100)
    one_sentence(quantize_badly(model, "--calib", path), USAGE, str(path), "not UTF-8", "byte 3")
    good = json.dumps({"text": "A document that is long enough to be read."})
    for bad in ('{"text": "unfinished', '{"txt": "another field"}', '["text"]', "text", '{"text": 5}', "7", "null"):
        lines.write_text(f"{good}\n{good}\n{bad}\n{good}\n")
        one_sentence(quantize_badly(model, "--calib", lines), USAGE, "line 3", str(lines), "'text' field")
    one_sentence(quantize_badly(model, "--calib", "absent.txt"), USAGE, "'absent.txt'", "not a file")
    one_sentence(quantize_badly(model, "--calib", tmp_path), USAGE, str(tmp_path), "not a file")
    assert not (tmp_path / "out").exists()


def test_tokenizer(one_sentence: Call, quantize_badly: Call, tiny_model: Call, tmp_path: Path) -> None:
    model = tiny_model()
    (model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    one_sentence(quantize_badly(model), USAGE, "tokenizer", str(model), "cannot be loaded")
    (model / "tokenizer.json").unlink()
    one_sentence(quantize_badly(model), USAGE, f"{model} has no tokenizer", "tokenizer.json")
    assert not (tmp_path / "out").exists()


# Options: what is given, and what the sentence must name.
OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--target", "RTX 9999"): ("target 'RTX 9999'", "RTX 3090", "H100", "sm_86"),
    ("--target", "sm_70"): ("'sm_70'", "sm_75"),
    ("--group-size", "100"): ("group size '100'", "multiple of 128", "channel"),
    ("--group-size", "0"): ("group size '0'", "multiple of 128"),
    ("--group-size", "-128"): ("group size '-128'", "multiple of 128"),
    ("--group-size", "block"): ("group size 'block'", "channel"),
    ("--ignore", "*.no_such_proj"): ("'*.no_such_proj'", "matches no linear", "model.layers.0.mlp.down_proj"),
    ("--ignore", "*"): ("--ignore", "nothing to quantize"),
    ("--layout", "diagonal"): ("layout 'diagonal'", "rowmajor", "sm80"),
    ("--transform", "fourier"): ("transform 'fourier'", "hadamard128", "none"),
    ("--recipe", "magic"): ("recipe 'magic'", "rtn"),
    ("--dtype", "int4"): ("dtype 'int4'", "bfloat16"),
    ("--device", "tpu"): ("device 'tpu'", "cpu", "cuda"),
    ("--samples", "0"): ("--samples is 0", "whole number", "from 1"),
    ("--samples", "many"): ("--samples is many", "whole number"),
    ("--seq-len", "0"): ("--seq-len is 0", "whole number", "from 1"),
    ("--seed", "99999999999999999999999"): ("--seed is 99999999999999999999999", "whole number", str(2**64 - 1)),
}


@pytest.mark.parametrize("option", OPTIONS, ids=" ".join)
def test_option(one_sentence: Call, option: tuple[str, ...], quantize_badly: Call, tmp_path: Path) -> None:
    one_sentence(quantize_badly("demo", *option), USAGE, *OPTIONS[option])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_gpu_that_is_not_there(one_sentence: Call, quantize_badly: Call) -> None:
    one_sentence(quantize_badly("demo", "--device", "cuda"), USAGE, "'cuda'", "no CUDA GPU", "--device cpu")


def test_missing_arguments(one_sentence: Call, invoke: Call) -> None:
    one_sentence(invoke("quantize", "-o", "out"), USAGE, "needs a MODEL", "'demo'")
    one_sentence(invoke("quantize", "", "-o", "out"), USAGE, "name is empty", "'demo'")  # a variable that is not set
    one_sentence(invoke("quantize", "demo"), USAGE, "needs an output folder", "-o OUT")
    one_sentence(invoke("quantize", "--resume"), USAGE, "-o OUT")


EVAL_OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--text", "absent.txt"): ("'absent.txt'", "not a file"),
    ("--tasks", "no_such_task"): ("'no_such_task'", "not known", "--include-path"),
    ("--tasks", "apex4_choice", "--include-path", "absent"): ("--include-path absent", "not a folder"),
    ("--baseline", "./absent"): ("'./absent'", "does not exist"),
    ("--limit", "0"): ("--limit is 0",),
    ("--seq-len", "1"): ("--seq-len is 1",),
    ("--batch-size", "0"): ("--batch-size is 0",),
    ("--dtype", "int4"): ("dtype 'int4'", "bfloat16"),
}


@pytest.mark.parametrize("option", EVAL_OPTIONS, ids=" ".join)
def test_option_of_eval(one_sentence: Call, option: tuple[str, ...], invoke: Call) -> None:
    one_sentence(invoke("eval", "demo", "--json", *option), USAGE, *EVAL_OPTIONS[option])


def test_a_device_with_an_index_that_is_not_there(one_sentence: Call, invoke: Call) -> None:
    result = invoke("quantize", "demo", "--dry-run", "--device", "cpu:3")
    one_sentence(result, USAGE, "cpu:3", "is not there")
