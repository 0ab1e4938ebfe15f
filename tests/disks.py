"""Disks that fail: what a program meets at any of its calls that change the disk, and what is left afterwards."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.format import storage

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def failing(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The call of this number that changes the disk fails with the error `code`, where it writes after half of its bytes.

    Yields the names of the calls that were made; no call has the number -1.
    """
    import safetensors.torch

    calls: list[str] = []

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                if name == "write_bytes" and code != errno.EROFS:
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(code, os.strerror(code), str(arguments[0]) if arguments else None)
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", wrapped("save_file", safetensors.torch.save_file))
        patch.setattr(storage.shutil, "copyfile", wrapped("copyfile", shutil.copyfile))
        for name in ("replace", "fsync"):
            patch.setattr(storage.os, name, wrapped(name, getattr(os, name)))
        for name in ("write_bytes", "mkdir", "unlink"):
            patch.setattr(Path, name, wrapped(name, getattr(Path, name)))
        yield calls
