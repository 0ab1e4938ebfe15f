"""Bytes led by coverage: `python -m tests.fuzz.with_atheris header|text [libFuzzer's options]`. Needs atheris.

An exception that is none of apex4's sentences, a hang or 1 GB of memory more ends the process with an exit code other than 0,
and libFuzzer leaves the input in a file. `-runs=N`, `-seed=N` and `-max_total_time=SECONDS` bound it.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["apex4_quant.calib", "apex4_quant.models.weight_files"]):
    from apex4_quant.calib.errors import CalibrationError
    from apex4_quant.calib.text import load_text
    from apex4_quant.errors import Apex4Error
    from apex4_quant.models.weight_files import read_header

FOLDER = Path(tempfile.mkdtemp(prefix="apex4-fuzz-"))
SUFFIXES = ("txt", "jsonl", "ndjson", "json", "jsonl.gz", "json.bz2", "txt.xz", "md")
SEEDS = {
    "header": [
        b'\x08{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}',
        b'\x04{"__metadata__":{"format":"pt"},"b":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
        b"\x00\x02\x00\x00\x00\x00\x00\x00\x00{}",
    ],
    "text": [
        b'\x01{"text": "a"}\n{"text": "b"}\n',
        b'\x03["a", "b"]',
        b'\x02{"messages": [{"role": "user", "content": "a"}]}\n',
        b"\x00plain \xe2\x80\xa8 text",
    ],
}


def sentence(error: Exception) -> None:
    said = str(error)
    if not said or "\n" in said:
        raise AssertionError(f"no single sentence: {said!r}")


def header(data: bytes) -> None:
    """The rest is a header, with its right length before it and as many bytes of data as the first byte says; after a
    first byte of 0 it is the whole file.
    """
    path = FOLDER / "model.safetensors"
    size, rest = (data[:1] or bytes(1))[0], data[1:]
    path.write_bytes(struct.pack("<Q", len(rest)) + rest + bytes(size) if size else rest)
    try:
        read_header(path)
    except Apex4Error as error:
        sentence(error)
    finally:
        path.unlink()  # writing over a file waits for the disk


def text(data: bytes) -> None:
    """The first byte chooses the file's suffix."""
    path = FOLDER / f"a.{SUFFIXES[(data[:1] or bytes(1))[0] % len(SUFFIXES)]}"
    path.write_bytes(data[1:])
    try:
        found = load_text(str(path))
    except CalibrationError as error:
        sentence(error)
        return
    finally:
        path.unlink()
    assert found.strip()
    found.encode()


READERS: dict[str, Callable[[bytes], None]] = {"header": header, "text": text}


def main() -> None:
    reader, options = sys.argv[1], sys.argv[2:]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[reader]):
        (corpus / str(number)).write_bytes(seed)
        READERS[reader](seed)  # imports what is imported when it is needed
    os.chdir(FOLDER)  # where libFuzzer leaves what failed
    # libFuzzer looks at the largest size so far, in which Linux counts that of the process that started this one.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10 + 1024
    atheris.Setup([sys.argv[0], f"-rss_limit_mb={limit}", "-timeout=20", *options, str(corpus)], READERS[reader])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
