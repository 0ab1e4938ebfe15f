"""Every option and argument of every command with values of every kind: an exit code of ours and one sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from apex4_quant.cli import cli

VALUES = (
    "", " ", "0", "-1", "-0", "1e9", "99999999999999999999999999", "nan", "inf", "1.5", "true", "None", "auto", "none", "demo",
    "ü\u2028ö", "\U0001f600", "\udcff", "\n", "a" * 5000, "../..", "/", "~", ".", "/dev/null", "/proc/self/mem", "*", "[", "{}",
    "--help", "-o", "%s%n", "$(x)", "a,b,,c", "1,2,3", ",", "x.yaml", "x.jsonl", "org/name", "org/name@", "@", "cpu:1", "cuda:-1",
    "128", "channel", "RTX 3090", "sm_9999",
)  # fmt: skip
LEFT_OUT = {
    "bench",
    "kernels tune",
    "kernels build",
    "doctor",
    "gpus",
    "kernels list",
}  # what they do depends on the GPU or takes minutes


def commands(group: click.Group = cli, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        elif " ".join((*before, name)) not in LEFT_OUT:
            yield (*before, name), command


@pytest.fixture
def base(small_model: Path, small_text: Path, tmp_path: Path) -> dict[str, list[str]]:
    """A command line of each command that ends in a moment, with what the option under test is added to."""
    quick = ["--calib", str(small_text), "--samples", "1", "--seq-len", "16", "--device", "cpu"]
    absent = str(tmp_path / "absent")
    return {
        "quantize": ["quantize", str(small_model), "--dry-run", *quick, "--target", "none"],
        "plan": ["plan", absent, *quick],
        "eval": ["eval", absent],
        "inspect": ["inspect", absent],
        "check": ["check", absent],
        "repack": ["repack", absent, "-o", str(tmp_path / "out"), "--target", "none"],
        "export": ["export", absent, "-o", str(tmp_path / "out"), "--to", "vllm-humming"],
        "card": ["card", absent],
        "report": ["report", absent, "-o", str(tmp_path / "report.html")],
        "publish": ["publish", absent, "org/name"],
    }


def test_every_option(
    base: dict[str, list[str]], moments: Callable[[int], random.Random], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    drawn = moments(600)
    every = [
        (words, command, parameter)
        for words, command in commands()
        for parameter in command.params
        if not (isinstance(parameter, click.Option) and parameter.is_flag)
    ]
    assert {" ".join(words) for words, _ in commands()} == set(base), "a command has no base line"
    wanted = [(choice, value) for choice in every for value in VALUES]
    drawn.shuffle(wanted)
    for (words, _, parameter), value in wanted[: drawn.count]:  # type: ignore[attr-defined]
        line = list(base[" ".join(words)])
        if isinstance(parameter, click.Option):
            line += [max(parameter.opts, key=len), value]
        else:
            line[len(words)] = value
        require_answer(line)


def require_answer(line: list[str]) -> None:
    result = CliRunner().invoke(cli, line)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{str(line)[-300:]}: {str(result.exception)[:300]}") from result.exception
    assert result.exit_code in (0, 1, 2), line
    said = [text for text in result.stderr.split("\n") if text.startswith("apex4: ")]
    assert len(said) == (result.exit_code != 0), f"{str(line)[-300:]}: {result.stderr[:300]!r}"
    assert "Traceback" not in result.stderr


def test_words_in_any_order(
    base: dict[str, list[str]], moments: Callable[[int], random.Random], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of several commands, shuffled, doubled and left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    drawn = moments(200)
    lines: list[Any] = list(base.values())
    for _ in range(drawn.count):  # type: ignore[attr-defined]
        line = list(drawn.choice([line for line in lines if line[0] != "quantize"]))
        at = drawn.randrange(len(line))
        action = drawn.randrange(3)
        if action == 0:
            line.insert(at, drawn.choice(VALUES))
        elif action == 1:
            del line[at]
        else:
            line.insert(at, line[drawn.randrange(len(line))])
        require_answer(line)
