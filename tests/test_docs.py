"""README and docs name only what exists: files, commands, options, Python symbols."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from click import Context, Group

from apex4_quant.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "apex4_quant" / "kernels" / "README.md"]
# Names in prose that look like paths and are none of the repository's.
NOT_OURS = {
    "config.json",
    "org/name",
    "org/name:config:split",
    "model.safetensors.index.json",
    "apex4_report.json",
    "text.jsonl",
    "plan.yaml",
}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_paths_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"\]\(([^)#]+)\)", text)
    for span in spans:
        looks_like_a_path = re.fullmatch(
            r"[\w./-]+\.(py|md|toml|txt|json|yaml|jsonl|cu|cuh)|[\w.-]+(/[\w.-]+)+/?", span
        )
        if not looks_like_a_path or span in NOT_OURS or span.startswith(("http", "OUT", "build/")):
            continue
        assert (ROOT / span).exists() or (page.parent / span).exists(), f"{page.name} names {span}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_commands_and_options_exist(page: Path) -> None:
    for line in re.findall(r"\bapex4 ([a-z]+[^\n`|)]*)", page.read_text("utf-8")):
        words = line.split()
        if words[0] not in cli.commands:
            # prose such as "apex4 checkpoint": only a command has arguments or options behind it
            assert not any(word.startswith("--") for word in words), f"{page.name}: apex4 {line}"
            continue
        command = cli.commands[words[0]]
        if isinstance(command, Group):
            assert len(words) < 2 or words[1] in command.commands, f"{page.name}: apex4 {line}"
            command = command.commands[words[1]] if len(words) > 1 else command
        known = {name for parameter in command.get_params(Context(command)) for name in parameter.opts}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0].rstrip(".,:;") in known, f"{page.name}: apex4 {words[0]} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_symbols_exist(page: Path) -> None:
    for module, name in re.findall(r"`(apex4_quant(?:\.\w+)*)\.(\w+)`", page.read_text("utf-8")):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            assert hasattr(importlib.import_module(module), name), f"{page.name} names {module}.{name}"


def test_every_command_and_option_is_in_the_readme_or_its_own_help() -> None:
    groups = [command for command in cli.commands.values() if isinstance(command, Group)]
    for name, command in [item for group in (cli, *groups) for item in group.commands.items()]:
        assert command.help, name
        for parameter in command.get_params(Context(command)):
            if parameter.param_type_name == "option":
                assert parameter.help or parameter.name == "help", f"{name} {parameter.name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_figure_is_left_open(page: Path) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", page.read_text("utf-8"))
