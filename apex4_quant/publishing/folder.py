"""A finished checkpoint as files: its configuration, its report, its measurements, and what of it is published.

Nothing here imports torch: what the command line shows before it uploads anything is read from JSON files, sizes and
checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Apex4Error, UsageError
from ..format.storage import RUN_FOLDER, TEMPORARY_SUFFIX, read_json

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
REPORT_NAME = "apex4_report.json"
RECORDS_NAME = "apex4_evaluation.json"
CARD_NAME = "README.md"
PICTURES_FOLDER = "apex4_pictures"
WEIGHTS_SUFFIX = ".safetensors"
_PIECE = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """`path` is relative to the checkpoint's folder, with slashes. `git_oid` is the name git gives the content."""

    path: str
    size: int
    sha256: str
    git_oid: str


class CheckpointFolder:
    """A folder that `apex4 quantize` finished. Raises UsageError for another, Apex4Error for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UsageError(f"{folder} is no folder: give one that 'apex4 quantize' wrote")
        if (self.folder / RUN_FOLDER).exists():
            raise UsageError(
                f"{folder} holds an unfinished run: finish it with 'apex4 quantize --resume -o {folder}' first"
            )
        if not (self.folder / CONFIG_NAME).is_file():
            raise UsageError(f"{folder} has no {CONFIG_NAME}: give a folder that 'apex4 quantize' wrote")
        self.config = _read_object(self.folder / CONFIG_NAME)
        section = self.config.get("quantization_config")
        if not isinstance(section, dict) or section.get("quant_method") != "apex4":
            raise UsageError(f"{folder} is not quantized by apex4: give a folder that 'apex4 quantize' wrote")
        self.quantization: dict[str, Any] = section
        if not (self.folder / REPORT_NAME).is_file():
            raise UsageError(
                f"{folder} has no {REPORT_NAME}, which says how it was made: give a folder that 'apex4 quantize' or "
                "'apex4 repack' wrote"
            )
        self.report = _read_object(self.folder / REPORT_NAME)
        missing = {"model", "files", "quantized", "kept", "settings"} - set(self.report)
        if missing:
            raise Apex4Error(f"{self.folder / REPORT_NAME} has no {sorted(missing)[0]!r}: the file is damaged")

    @property
    def weights_digest(self) -> str:
        """One SHA-256 for all weight files, of their recorded names and checksums: what measurements belong to."""
        lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(self.report["files"].items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def weight_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.report["files"].values())

    def published_files(self) -> list[Path]:
        """What belongs to the model, sorted: everything but hidden files, locks and what a kill left behind."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not hidden and path.suffix not in (TEMPORARY_SUFFIX, ".lock"):
                found.append(path)
        return found

    def require_whole(self) -> None:
        """Every recorded weight file is there with its size, and no other one is. Raises Apex4Error."""
        for name, entry in self.report["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise Apex4Error(f"{path} is missing: the checkpoint is incomplete, quantize again")
            if path.stat().st_size != entry["bytes"]:
                raise Apex4Error(
                    f"{path} has {path.stat().st_size} bytes and {REPORT_NAME} records {entry['bytes']}: "
                    "the file is damaged, quantize again"
                )
        for path in self.published_files():
            if path.suffix == WEIGHTS_SUFFIX and path.relative_to(self.folder).as_posix() not in self.report["files"]:
                raise Apex4Error(f"{path} is not a file of this model by {REPORT_NAME}: remove it and publish again")

    def manifest(self, advance: Callable[[int], None] = lambda done: None) -> list[LocalFile]:
        """Every file with its checksums, each read once, in pieces. `advance` is told the bytes done.

        Raises Apex4Error for a weight file that differs from its recorded checksum.
        """
        files = []
        for path in self.published_files():
            file = _hashed(path, path.relative_to(self.folder).as_posix(), advance)
            recorded = self.report["files"].get(file.path)
            if recorded is not None and recorded["sha256"] != file.sha256:
                raise Apex4Error(f"{path} does not have its recorded checksum: the file is damaged, quantize again")
            files.append(file)
        return files


def _hashed(path: Path, name: str, advance: Callable[[int], None]) -> LocalFile:
    size = path.stat().st_size
    whole, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    small = path.suffix != WEIGHTS_SUFFIX  # a weight file is never a plain git object on the Hub
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            whole.update(piece)
            if small:
                git.update(piece)
            advance(len(piece))
    return LocalFile(name, size, whole.hexdigest(), git.hexdigest() if small else "")


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise Apex4Error(f"{path} is not a JSON object: the file is damaged, get it again")
    return value
