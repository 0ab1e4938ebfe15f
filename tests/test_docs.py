"""README, docs and scripts name only what exists: files, links, commands, options, Python symbols."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from click import Command, Context, Group

from apex4_quant.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
KERNEL_PAGES = {"kernels.md", "kernel_measurements.md"}  # their paths are relative to apex4_quant/kernels
# Names in prose that look like paths and are none of the repository's.
NOT_OURS = {
    "config.json", "org/name", "ORG/NAME", "org/name:config:split", "model.safetensors.index.json", "apex4_report.json", "plan.yaml",
    "apex4_evaluation.json",
    "scripts/hatch_build.py",  # of 2026-11-23, in the log
}  # fmt: skip
MAX_LINES, MAX_COLUMNS = 150, 110


def scripts() -> list[Path]:
    return sorted(
        path
        for path in (ROOT / "scripts").rglob("*")
        if path.is_file() and path.suffix in ("", ".py") and "__pycache__" not in path.parts
    )


def is_python(script: Path) -> bool:
    return script.suffix == ".py" or "python" in script.read_text("utf-8").partition("\n")[0]


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- paths, links and symbols -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_paths_exist(page: Path) -> None:
    folders = [ROOT, page.parent]
    if page.name in KERNEL_PAGES:
        folders.append(ROOT / "apex4_quant" / "kernels")
    for span in re.findall(r"`([^`\n]+)`", page.read_text("utf-8")):
        looks_like_a_path = re.fullmatch(
            r"[\w./-]+\.(py|md|toml|txt|json|yaml|jsonl|cu|cuh|svg)|[\w.-]+(/[\w.-]+)+/?", span
        )
        if not looks_like_a_path or span in NOT_OURS or span.startswith(("http", "OUT", "build/")):
            continue
        assert any((folder / span).exists() for folder in folders), f"{page.name} names {span}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_symbols_exist(page: Path) -> None:
    for module, name in re.findall(r"`(apex4_quant(?:\.\w+)*)\.(\w+)`", page.read_text("utf-8")):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            assert hasattr(importlib.import_module(module), name), f"{page.name} names {module}.{name}"


def test_every_package_is_in_the_architecture() -> None:
    """A reader finds any file in two hops: README, architecture, file."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = page.partition("## Packages")[2].partition("\n## ")[0]
    packages = [path.parent.name for path in (ROOT / "apex4_quant").glob("*/__init__.py")]
    missing = [name for name in packages if f"`apex4_quant/{name}/`" not in table and f"`{name}/`" not in table]
    assert missing == [], "give each a row in the table of docs/architecture.md"


# --- commands and options of apex4 ------------------------------------------------------------------------------------


def options_of(command: Command) -> set[str]:
    return {name for parameter in command.get_params(Context(command)) for name in parameter.opts}


def commands() -> Iterator[tuple[str, Command]]:
    for name, command in cli.commands.items():
        if isinstance(command, Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


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
        for word in words[1:]:
            if word.startswith("--"):
                name = word.split("=")[0].rstrip(".,:;")
                assert name in options_of(command), f"{page.name}: apex4 {words[0]} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_named_alone_exist(page: Path) -> None:
    """`--option` in a page is one of apex4's commands or of a script's, even where the sentence names neither."""
    known = {name for _, command in commands() for name in options_of(command)}
    for script in scripts():
        known |= flags_of(script)
    for span in re.findall(r"`(--[^`\n]*)`", page.read_text("utf-8")):
        for name in re.findall(r"--[a-z][\w-]*", span):
            assert name in known, f"{page.name} names {name}"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text("utf-8")
    assert [name for name, _ in commands() if f"`apex4 {name}" not in text] == []


def test_every_option_has_help() -> None:
    for name, command in commands():
        assert command.help, name
        for parameter in command.get_params(Context(command)):
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None) or parameter.name == "help", f"{name} {parameter.name}"


# --- scripts ----------------------------------------------------------------------------------------------------------


def flags_of(script: Path) -> set[str]:
    """The options a script takes: those of its argparse, or every one that a shell script's lines name."""
    text = script.read_text("utf-8")
    if not is_python(script):
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
    found = {"--help"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            constants = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found |= {each for each in constants if isinstance(each, str) and each.startswith("--")}
    return found


def usages(text: str) -> Iterator[tuple[str, set[str]]]:
    """(script, options) of every line that calls a script, to the end of the sentence; and over lines of further options."""
    for name, rest in re.findall(
        r"\b(scripts/[\w/.]*\w)((?:[^\n`|#(.]|\.(?=\S)|(?<=[\].])\.)*(?:\n +\[--[^\n]*)*)", text
    ):
        yield name, set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))


@pytest.mark.parametrize("page", [*PAGES, *scripts()], ids=page_id)
def test_scripts_are_called_with_options_they_have(page: Path) -> None:
    text = page.read_text("utf-8")
    if page in scripts():
        text = (
            ast.get_docstring(ast.parse(text)) or "" if is_python(page) else "\n".join(re.findall(r"^#.*", text, re.M))
        )
    for name, options in usages(text):
        script = ROOT / name
        if name in NOT_OURS or script.is_dir():
            continue
        assert script.is_file(), f"{page_id(page)} calls {name}"
        missing = options - flags_of(script)
        assert not missing, f"{page_id(page)}: {name} has no {', '.join(sorted(missing))}"


@pytest.mark.parametrize("script", [script for script in scripts() if is_python(script)], ids=page_id)
def test_scripts_import_what_exists(script: Path) -> None:
    """Most need a GPU or minutes to run, so that a name that moved would not be missed elsewhere."""
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "apex4_quant":
            module: ModuleType = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_the_root_of_scripts_has_only_what_a_user_runs() -> None:
    files = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file()}
    assert files <= {"_env.sh", "demo", "docs", "gpu_check", "test", "test-transformers", "test-vllm"}


# --- the pages --------------------------------------------------------------------------------------------------------


def test_the_readme_is_one_page() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []


def test_every_page_is_in_the_site() -> None:
    """mkdocs build --strict says so too; here it is said without MkDocs."""
    navigation = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(navigation) == sorted(page.name for page in PAGES if page != README)


def test_the_picture_shows_the_table() -> None:
    """docs/accuracy.svg is drawn from the table of docs/benchmarks.md: scripts/pictures/accuracy."""
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    table = page.partition("| recipe | perplexity | quantizing | peak memory |\n")[2].partition("\n\n")[0]
    picture = (ROOT / "docs" / "accuracy.svg").read_text("utf-8")
    rows = [[cell.strip(" *`") for cell in line.split("|")[1:3]] for line in table.splitlines()[1:]]
    assert len(rows) > 10
    for recipe, perplexity in rows:
        label, loss = recipe.replace("`", ""), float(perplexity) - 34.80
        assert f">{label}</text>" in picture and f">+{loss:.2f}, " in picture, f"{label}: run scripts/pictures/accuracy"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_figure_is_left_open(page: Path) -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", page.read_text("utf-8"))


def test_nothing_cites_what_is_not_here() -> None:
    """Sources once cited sections of a design page that is not in the repository."""
    folders = ("apex4_quant", "calib", "tests", "scripts", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".cu", ".cuh", ".h", ".md", ".yaml", "", ".sh")]
    citing = [page_id(path) for path in files if re.search(r"DESIGN(\.md)?( |'s | §)", path.read_text("utf-8"))]
    assert [path for path in citing if path != "tests/test_docs.py"] == []
