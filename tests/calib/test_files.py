"""Text files: JSON Lines as the standard has them, any case, compressed; nothing is read as what it is not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from apex4_quant.calib.errors import CalibrationError
from apex4_quant.calib.files import read_file
from apex4_quant.calib.text import load_text

# Every character at which str.splitlines cuts and JSON Lines do not; all but the first may stand in a JSON string as it is.
SEPARATORS = "\u2028\u2029\x85\x1c"
TEXTS = ["one", f"two{SEPARATORS}halves", "drei \U0001f600 vier"]


def lines(ensure_ascii: bool, end: str = "\n") -> bytes:
    rows = [json.dumps({"text": text, "meta": {"id": 1}}, ensure_ascii=ensure_ascii) for text in TEXTS]
    return end.join(rows).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_json_lines(name: str, end: str, tmp_path: Path) -> None:
    for ensure_ascii in (True, False):
        (tmp_path / name).write_bytes(lines(ensure_ascii, end))
        assert load_text(str(tmp_path / name)) == "\n\n".join(TEXTS)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.Json"
    for value in ([{"text": text} for text in TEXTS], TEXTS):
        path.write_text(json.dumps(value, indent=2))
        assert read_file(path) == "\n\n".join(TEXTS)
    path.write_text('{"text": "alone"}')
    assert read_file(path) == "alone"
    for bad, said in (
        ('{"rows": ["braces and keys are no text"]}', "no list of objects"),
        ("plain text in a .json", "is not JSON"),
        ('[{"text": "a"}, {"txt": "b"}]', "entry 2 of"),
        ('{"text": "a"}\n{"txt": "b"}', "line 2 of"),
        ('[{"text": 3}]', "not a string"),
        ("[" * 200_000, "JSON|nested too deeply"),
        ("3", "no list of objects"),
    ):
        path.write_text(bad)
        with pytest.raises(CalibrationError, match=said) as refused:
            read_file(path)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed(suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    for name, data, expected in (
        ("a.jsonl", lines(False), "\n\n".join(TEXTS)),
        ("a.TXT", "plain ü".encode(), "plain ü"),
    ):
        path = tmp_path / f"{name}{suffix.upper()}"
        whole = compress(data)
        path.write_bytes(whole)
        assert load_text(str(path)) == expected
        for damaged in (whole[:-5], b"no such file", whole[:10] + b"\xff\xff" + whole[12:]):
            path.write_bytes(damaged)
            with pytest.raises(CalibrationError, match=r"damaged|cannot be read"):
                load_text(str(path))


def test_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md", "a.py", "a", "version-1.2", "a.rst"):
        (tmp_path / name).write_bytes("\ufeffäöü\r\nline\rline\n".encode())
        assert load_text(str(tmp_path / name)) == "äöü\nline\nline\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.CSV", "a.csv.gz", "a.html", "a.zip", "a.tar.gz", "a.yaml", "a.pdf"])
def test_what_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(CalibrationError, match="is no text: give plain text, or JSON Lines"):
        load_text(str(tmp_path / name))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\0text")
    with pytest.raises(CalibrationError, match="zero bytes"):
        load_text(str(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(CalibrationError, match=r"line 1 of .* surrogate"):
        load_text(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t\n\u2028"), ("a.jsonl", "\n\n"), ("a.jsonl", '{"text": ""}\n'), ("a.json", "[]")],
)
def test_nothing_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match="nothing in it but blanks"):
        load_text(str(tmp_path / name))
