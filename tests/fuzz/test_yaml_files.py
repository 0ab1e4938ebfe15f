"""Recipes, plans and heads of cards with lines changed in every way: read, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex4_quant.errors import Apex4Error
from apex4_quant.models.source import ModelSource
from apex4_quant.publishing.metadata import metadata_of, read_metadata, write_metadata
from apex4_quant.quantization.plan_file import plan_file_text, read_plan_file
from apex4_quant.recipes import get_recipe

from .conftest import refused_or_right

Cases = Callable[[int], settings]
# What has a meaning of its own in YAML, or the form of one.
PIECES = (
    "[", "]", "{", "}", ":", "- ", "? ", "|", ">", "&a ", "*a", "<<: ", "!!binary ", "!!python/name:os.system ", "!!set ", "!x ", "%",
    "@", "`", "#", "'", '"', "\\ud800", "\t", "\0", "\u2028", "\x85", "\ufeff", "---\n", "...\n", "2020-13-45", "2001-1-1 25:61:61",
    "1:99:99", "0o8", "0x", "1e999", ".nan", "-.inf", "9" * 5000, "[" * 2000, "{a: " * 2000, "null", "~", "on", "=", "128", "channel",
    "\n  ", "\n", "a: &b [x]\nc: [*b, *b]", "dense128", "8",
)  # fmt: skip
CHANGES = st.lists(st.tuples(st.integers(0, 1500), st.sampled_from(PIECES) | st.text(max_size=4), st.integers(0, 9)), min_size=1, max_size=3)  # fmt: skip
RECIPE = "transform: dense128\nrounding: gptq\nsearch_clip: true\nrefinement: 2\ndiagonal: 0.5\nimportance: gradients\n"
CARD = "license: mit\nbase_model: org/name\nlanguage:\n- en\ntags: [a, 'b']\ndate: 2020-01-02\n"


def changed(text: str, changes: list[tuple[int, str, int]]) -> bytes:
    for at, inserted, removed in changes:
        place = at % (len(text) + 1)
        text = text[:place] + inserted + text[place + removed :]
    return text.encode("utf-8", "surrogatepass")


def test_recipes(tmp_path: Path, cases: Cases) -> None:
    path = tmp_path / "recipe.yaml"

    @cases(400)
    @given(CHANGES)
    def try_it(changes: list[tuple[int, str, int]]) -> None:
        path.write_bytes(changed(RECIPE, changes))
        with refused_or_right(changes):
            get_recipe(str(path))

    try_it()


@pytest.fixture(scope="module")
def source(small_model: Path) -> ModelSource:
    return ModelSource(str(small_model))


def test_plans(source: ModelSource, tmp_path: Path, cases: Cases) -> None:
    path = tmp_path / "plan.yaml"
    names = [f"{source.family.layer_prefix(0)}{name}" for name in source.family.linears(source.config, 0)]
    entry = {"group_size": 128, "transform": "hadamard128", "activation_bits": 4}
    groups = [{name: dict(entry)} for name in names]
    whole = plan_file_text({"model": "m"}, groups, ["loss"] * len(names), dict.fromkeys(names, "error"))

    @cases(400)
    @given(CHANGES)
    def try_it(changes: list[tuple[int, str, int]]) -> None:
        path.write_bytes(changed(whole, changes))
        with refused_or_right(changes):
            read_plan_file(path)

    path.write_text(whole)
    assert set(read_plan_file(path).linears) == set(names)
    try_it()


def test_heads_of_cards(cases: Cases) -> None:
    """What is kept is written again, with the same meaning; what cannot be is refused."""

    @cases(400)
    @given(CHANGES)
    def try_it(changes: list[tuple[int, str, int]]) -> None:
        card = f"---\n{changed(CARD, changes).decode('utf-8', 'replace')}\n---\ntext\n"
        read_metadata(card)
        try:
            metadata, text = metadata_of(card)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            return
        again = write_metadata(metadata, text)
        again.encode()
        assert repr(metadata_of(again)) == repr((metadata, text))  # NaN is not equal to itself

    try_it()


def test_aliases_do_not_grow(tmp_path: Path) -> None:
    """Nine lines that stand for 10^9 words."""
    path = tmp_path / "recipe.yaml"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    path.write_text("\n".join(lines))
    with refused_or_right("aliases"), pytest.raises(Apex4Error, match="line 2: an alias"):
        get_recipe(str(path))
