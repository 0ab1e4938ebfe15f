"""Bytes and JSON of any kind under every suffix: text, or a sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from apex4_quant.calib.errors import CalibrationError
from apex4_quant.calib.text import load_text

Cases = Callable[[int], settings]
NAMES = st.sampled_from(["a.txt", "a.jsonl", "A.JSONL", "a.ndjson", "a.json", "a.md", "a", "a.csv", "a.parquet"])
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "id"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def read(path: Path) -> str | None:
    try:
        text = load_text(str(path))
    except CalibrationError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None
    assert text.strip()
    text.encode()  # a tokenizer takes it
    return text


def test_bytes(tmp_path: Path, cases: Cases) -> None:
    @cases(1500)
    @given(NAMES, st.sampled_from(list(PACKED)), st.binary(max_size=60), st.integers(0, 12))
    def try_it(name: str, suffix: str, content: bytes, cut: int) -> None:
        packed = PACKED[suffix](content)
        path = tmp_path / (name + suffix)
        path.write_bytes(packed[: len(packed) - cut])
        read(path)
        path.unlink()

    try_it()


def test_json_lines(tmp_path: Path, cases: Cases) -> None:
    """What is read is what was written, for all strings that UTF-8 has."""

    @cases(1500)
    @given(st.lists(JSON, max_size=4), st.booleans(), st.sampled_from(["a.jsonl", "a.json", "a.ndjson"]), st.booleans())
    def try_it(rows: list[Any], ascii_only: bool, name: str, as_list: bool) -> None:
        path = tmp_path / name
        if as_list:
            text = json.dumps(rows, ensure_ascii=ascii_only)
        else:
            text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = read(path)
        texts = [
            row["text"] if isinstance(row, dict) else row for row in rows if not isinstance(row, dict) or "text" in row
        ]
        if (
            found is not None
            and len(texts) == len(rows)
            and (name != "a.json" or as_list)
            and not (as_list and name != "a.json")
        ):
            assert found == "\n\n".join(texts)

    try_it()
