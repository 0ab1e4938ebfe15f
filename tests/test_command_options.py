"""What the options of the command line say of themselves, and where their values come from."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import apex4_quant
from apex4_quant import command_options, environment
from apex4_quant.cli import cli
from apex4_quant.format.layouts import LAYOUTS
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.hardware.devices import DTYPES
from apex4_quant.recipes import named_recipes, recipe_names

Call = Callable[..., Any]  # the fixtures of conftest.py
PACKAGE = Path(apex4_quant.__file__).parent


def option(command: str, name: str) -> click.Option:
    (found,) = (each for each in cli.commands[command].params if name in each.opts)
    assert isinstance(found, click.Option)
    return found


def test_choices_are_what_the_library_knows() -> None:
    chosen = {name: option("quantize", name).type for name in ("--layout", "--transform", "--dtype")}
    names = {name: list(type.choices) for name, type in chosen.items() if isinstance(type, click.Choice)}
    assert names == {
        "--layout": list(LAYOUTS),
        "--transform": [kind.value for kind in TransformKind],
        "--dtype": [*DTYPES, "auto"],
    }


def test_recipes_are_named_without_reading_yaml() -> None:
    assert recipe_names() == list(named_recipes())
    for command in ("quantize", "plan"):
        assert set(named_recipes()) <= set(re.split(r"[ ,]+", option(command, "--recipe").help or ""))


@pytest.mark.parametrize("value", ["128", "0256", "channel"])
def test_a_group_size_is_read_once(value: str) -> None:
    with cli.commands["quantize"].make_context("quantize", ["demo", "--group-size", value]) as context:
        assert context.params["group_size"] == (value if value == "channel" else int(value))


def test_bounds_are_included() -> None:
    whole = command_options.Whole(2, 5)
    assert [whole.convert(value, None, None) for value in ("2", 5)] == [2, 5]
    for value in ("1", "6", "2.5", ""):
        with pytest.raises(command_options.UsageError, match=r"give a whole number, from 2 to 5"):
            whole.convert(value, None, None)


def test_every_variable_of_the_environment_is_explained(invoke: Call) -> None:
    """A name stands in environment.py alone; elsewhere it may be said, but not looked up."""
    names = {value for name, value in vars(environment).items() if name.isupper() and isinstance(value, str)}
    assert names == set(environment.MEANING)
    help = invoke("--help").stdout
    assert all(name in help for name in names)
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE / "calib").glob("*.py")):
        for line in path.read_text().splitlines():
            assert not re.search(r"environ\b.*APEX4_", line), f"{path}: {line.strip()}"


def test_python_m_apex4_quant_is_the_command(tmp_path: Path, cli_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "apex4_quant", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"apex4, version {apex4_quant.__version__}\n"
