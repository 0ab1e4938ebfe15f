"""Text from a local file: plain text, JSON Lines, JSON, each compressed or not. What a file is, its name says.

    .jsonl .ndjson     one JSON object a line: its "text" field (or a JSON string a line), or its conversation, "messages",
                       as the model's chat template renders it
    .json              a list of the same; or, as data sets have it under this name, JSON Lines
    anything else      plain text, but for names of tables, documents and archives, which are no text

.gz, .bz2 and .xz behind any of these are decompressed. Case does not matter.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CalibrationError

_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = tuple(_OPENERS)
JSON_LINES = (".jsonl", ".ndjson")
# Read as plain text these would be columns, tags or bytes.
_NO_TEXT = frozenset(
    [
        ".parquet",
        ".arrow",
        ".feather",
        ".csv",
        ".tsv",
        ".xls",
        ".xlsx",
        ".html",
        ".htm",
        ".xml",
        ".yaml",
        ".yml",
        ".pdf",
        ".doc",
        ".docx",
        ".odt",
        ".rtf",
        ".epub",
        ".zip",
        ".tar",
        ".tgz",
        ".7z",
        ".rar",
        ".zst",
        ".lz4",
        ".br",
        ".npy",
        ".npz",
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
        ".bin",
        ".safetensors",
        ".gguf",
        ".h5",
        ".db",
    ]
)
# A conversation, [{"role": ..., "content": ...}, ...], to text.
Render = Callable[[list[dict[str, Any]]], str]
LARGEST = 4_000_000_000  # bytes of text: what is larger, or decompresses to more, is no calibration text
_PIECE = 1 << 24


def read_file(path: Path, render: Render | None = None) -> str:
    """The text of a file, documents joined by blank lines, conversations (`render`) one behind the other.

    Raises CalibrationError.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else None
    kind = suffixes[-1] if suffixes else ""
    if kind in _NO_TEXT:
        raise CalibrationError(f"{path} is no text: give plain text, or JSON Lines (.jsonl) with a 'text' field")
    text = _decoded(path, _content(path, compressed))
    if kind in JSON_LINES:
        return _joined(path, _lines(path, text), render)
    if kind == ".json":
        return _joined(path, _json(path, text), render)
    if "\0" in text:
        raise CalibrationError(f"{path} is no text, it holds zero bytes: give plain text or JSON Lines (.jsonl)")
    return text


def _content(path: Path, compressed: str | None) -> bytes:
    pieces: list[bytes] = []
    size = 0
    try:
        with _OPENERS[compressed](path) if compressed else path.open("rb") as file:
            while piece := file.read(_PIECE):
                size += len(piece)
                if size > LARGEST:
                    raise CalibrationError(f"text file {path} has more than {LARGEST // 10**9} GB: give a part of it")
                pieces.append(piece)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{path} is damaged or no {compressed} file ({error}): get it again") from error
    except OSError as error:  # bz2 has no error of its own
        reason = error.strerror or str(error)
        raise CalibrationError(f"text file {path} cannot be read ({reason}): check it and its permissions") from error
    return b"".join(pieces)


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {path} is not UTF-8 (byte {error.start}): convert it first") from error


# What an entry of JSON Lines is called in messages, and what stands there.
Entry = tuple[str, Any]


def _lines(path: Path, text: str) -> list[Entry]:
    # Only \n ends a line of JSON Lines: str.splitlines would also cut at U+2028 and others, which JSON strings may hold.
    return [
        (where := f"line {number} of {path}", _parsed(line, where))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _json(path: Path, text: str) -> list[Entry]:
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CalibrationError(f"{path} is nested too deeply: give a list of objects with a 'text' field") from error
    except ValueError as error:
        if len([line for line in text.split("\n") if line.strip()]) > 1 and text.lstrip()[:1] == "{":
            return _lines(path, text)
        raise CalibrationError(
            f"{path} is not JSON ({error}): give a list of objects with a 'text' field, or plain text named .txt"
        ) from error
    if isinstance(value, list):
        return [(f"entry {number} of {path}", entry) for number, entry in enumerate(value, 1)]
    if isinstance(value, dict) and (isinstance(value.get("text"), str) or isinstance(value.get("messages"), list)):
        return [(str(path), value)]
    raise CalibrationError(f"{path} is no list of objects with a 'text' field: give that, or plain text named .txt")


def _joined(path: Path, entries: list[Entry], render: Render | None) -> str:
    texts, conversations = [], []
    for where, entry in entries:
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if isinstance(messages, list):
            conversations.append(_rendered(messages, render, where))
        else:
            texts.append(_text_of(entry, where))
    if texts and conversations:
        raise CalibrationError(f"{path} has texts and conversations ('messages'): give one kind in a file")
    return "".join(conversations) or "\n\n".join(texts)


def _rendered(messages: list[Any], render: Render | None, where: str) -> str:
    if render is None:
        raise CalibrationError(f"{where} is a conversation and the model has no chat template: give plain text")
    try:
        return render(messages)
    except Exception as error:  # whatever the model's template raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"the chat template of the model refuses the messages of {where} ({reason})") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not a JSON object with a 'text' field") from error


def _text_of(entry: Any, where: str) -> str:
    text = entry.get("text", ...) if isinstance(entry, dict) else entry if isinstance(entry, str) else ...
    if text is ...:
        raise CalibrationError(f"{where} is not a JSON object with a 'text' field")
    if not isinstance(text, str):
        raise CalibrationError(f"{where} has a 'text' field that is not a string")
    if re.search("[\ud800-\udfff]", text):
        raise CalibrationError(f"{where} has half a surrogate pair, which is no character: correct its 'text' field")
    return text
