"""What makes a run restartable: a folder inside OUT that holds everything needed to go on after a kill.

    OUT/.apex4-run/lock              held while a process works on OUT
    OUT/.apex4-run/settings.json     the settings of the first run; a restart refuses others
    OUT/.apex4-run/shard-00003.json  a finished shard: checksum, size, per-linear errors. Writing it is the commit.
    OUT/.apex4-run/hidden-00003.safetensors   the hidden states entering decoder layer 3
    OUT/.apex4-run/distilling.safetensors     the state of a distillation on its way (distilling.py)
    OUT/.apex4-run/distilled.safetensors, distilled.json      its outcome; writing the second is the commit
    OUT/.apex4-run/entering-00003.safetensors, gradients-00003.safetensors   of the float model, see predictions.py

Order per layer: the shard, the next hidden states, then the record. A kill between them repeats the layer, which gives
the same bytes again. config.json is written last of all, so an unfinished OUT loads nowhere.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Mapping
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import Apex4Error, UsageError
from ..format.storage import (
    REPORT_NAME,
    RUN_FOLDER,
    RUN_SETTINGS_NAME,
    make_folder,
    read_json,
    remove_temporaries,
    require_empty,
    sha256,
    write_json,
    write_tensors,
)
from .settings import ResolvedSettings, other_setting


class StateKind(StrEnum):
    """Tensors that are kept for a layer. The value begins the file's name and, but for HIDDEN, is the tensor's."""

    HIDDEN = (
        "hidden"  # the states that enter it: through the quantized layers and, for GPTAQ, through the original ones
    )
    ENTERING = "entering"  # the states of the float model that enter it (predictions.py)
    LEAVING_GRADIENTS = "gradients"  # of the float model's predictions by what leaves it (predictions.py)


_DISTILLING, _DISTILLED, _DISTILLED_RECORD = "distilling.safetensors", "distilled.safetensors", "distilled.json"


class OutputFolder(Enum):
    """What an output folder holds."""

    EMPTY = auto()  # nothing, or what was left by a kill before a run began; or the folder is absent
    RUN = auto()  # a run that can go on
    CHECKPOINT = auto()  # a finished run
    OTHER = auto()  # anything else

    @classmethod
    def look(cls, out: Path) -> OutputFolder:
        if (out / RUN_FOLDER / RUN_SETTINGS_NAME).is_file():
            return cls.RUN
        if (out / "config.json").is_file() and (out / REPORT_NAME).is_file():
            return cls.CHECKPOINT
        if not out.exists() or (out.is_dir() and all(path.name == RUN_FOLDER for path in out.iterdir())):
            return cls.EMPTY
        return cls.OTHER


class Streams(NamedTuple):
    """The calibration text's hidden states on their way into a decoder layer, each [S, L, H].

    `hidden` comes through the quantized layers; `original` through those of the model before quantization, where the
    recipe asks for it.
    """

    hidden: torch.Tensor
    original: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]


class RunState:
    """One run on one output folder. Create with `begin` or `resume`, give back with `close`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / RUN_FOLDER

    @classmethod
    def begin(cls, out: Path, recorded: dict[str, Any]) -> RunState:
        """Start a run in a folder that is absent or empty. `recorded`: its settings, and "inputs". Raises UsageError."""
        require_empty(out)
        state = cls(out)
        make_folder(out)
        make_folder(state.folder)
        state._lock()
        write_json(state.folder / RUN_SETTINGS_NAME, recorded)
        return state

    @classmethod
    def resume(cls, out: Path, recorded: dict[str, Any]) -> RunState:
        """Go on with a stopped run. Raises UsageError if it recorded something else."""
        first = read_json(out / RUN_FOLDER / RUN_SETTINGS_NAME)
        for name, value in recorded["inputs"].items():
            if first["inputs"].get(name) != value:
                raise UsageError(f"the {name} changed since {out} was begun: begin again in another folder")
        for name, value in recorded.items():
            if first.get(name) != value:
                raise other_setting(out, name, first.get(name), value)
        state = cls(out)
        state._lock()
        for folder in (out, state.folder):
            remove_temporaries(folder)
        for path in sorted(state.folder.glob("shard-*.json")):
            record = read_json(path)
            shard = out / record["file"]
            if not shard.is_file() or sha256(shard) != record["sha256"]:
                state.close()
                raise Apex4Error(f"{shard} was finished and is now gone or damaged: begin again in another folder")
        return state

    def _lock(self) -> None:
        self._lock_file = open(self.folder / "lock", "w")  # noqa: SIM115  (held until close)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise Apex4Error(
                f"another apex4 process is working on {self.out}: wait for it or choose another folder"
            ) from error

    def close(self) -> None:
        self._lock_file.close()

    def finish(self) -> None:
        """Remove the run's folder: OUT is complete. The settings go first, so that a kill in between stays finished."""
        self.close()
        (self.folder / RUN_SETTINGS_NAME).unlink()
        shutil.rmtree(self.folder)

    def record(self, shard: int) -> dict[str, Any] | None:
        """What `commit` wrote of a shard; None if it is not finished."""
        path = self.folder / f"shard-{shard:05}.json"
        return read_json(path) if path.is_file() else None

    def commit(self, shard: int, record: dict[str, Any]) -> None:
        """From now on the shard is finished. `record` has its "file" and "sha256"."""
        write_json(self.folder / f"shard-{shard:05}.json", record)

    def records(self) -> dict[int, dict[str, Any]]:
        """What `commit` wrote of all finished shards, in their order."""
        found = sorted(self.folder.glob("shard-*.json"))
        return {int(path.stem.removeprefix("shard-")): read_json(path) for path in found}

    def withdraw(self, shard: int) -> None:
        """The shard is not finished any more: `commit` it again."""
        (self.folder / f"shard-{shard:05}.json").unlink(missing_ok=True)

    def save_distilling(self, tensors: Mapping[str, torch.Tensor]) -> None:
        write_tensors(self.folder / _DISTILLING, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def load_distilling(self) -> dict[str, torch.Tensor] | None:
        """What `save_distilling` wrote last, None if there is nothing. Raises Apex4Error."""
        path = self.folder / _DISTILLING
        return self._load_file(path) if path.is_file() else None

    @property
    def is_distilled(self) -> bool:
        return (self.folder / _DISTILLED_RECORD).is_file()

    def save_distilled(self, tensors: Mapping[str, torch.Tensor], outcome: Mapping[str, Any]) -> None:
        write_tensors(self.folder / _DISTILLED, {name: tensor.contiguous() for name, tensor in tensors.items()})
        write_json(self.folder / _DISTILLED_RECORD, outcome)
        (self.folder / _DISTILLING).unlink(missing_ok=True)

    def load_distilled(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `save_distilled` wrote. Raises Apex4Error."""
        return self._load_file(self.folder / _DISTILLED), read_json(self.folder / _DISTILLED_RECORD)

    def _load_file(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Apex4Error(f"{path} is damaged ({error}): begin again in another folder") from error

    def save_hidden(self, layer: int, streams: Streams) -> None:
        tensors = {"hidden_states": streams.hidden}
        if streams.original is not None:
            tensors["original_hidden_states"] = streams.original
        write_tensors(self._path(StateKind.HIDDEN, layer), tensors)

    def load_hidden(self, layer: int, original: bool) -> Streams:
        """What `save_hidden` wrote; `original`: whether both streams must be there. Raises Apex4Error."""
        tensors = self._load(StateKind.HIDDEN, layer)
        try:
            return Streams(tensors["hidden_states"], tensors["original_hidden_states"] if original else None)
        except KeyError as error:
            raise self._damaged(StateKind.HIDDEN, layer, error) from error

    def save(self, kind: StateKind, layer: int, tensor: torch.Tensor) -> None:
        """Keep one tensor for a layer, of any kind but HIDDEN."""
        write_tensors(self._path(kind, layer), {str(kind): tensor})

    def load(self, kind: StateKind, layer: int) -> torch.Tensor:
        """What `save` kept. Raises Apex4Error."""
        tensors = self._load(kind, layer)
        if kind not in tensors:
            raise self._damaged(kind, layer, KeyError(kind))
        return tensors[kind]

    def has(self, kind: StateKind, layer: int) -> bool:
        return self._path(kind, layer).is_file()

    def drop(self, kind: StateKind, layer: int) -> None:
        self._path(kind, layer).unlink(missing_ok=True)

    def drop_all(self, layer: int) -> None:
        """What was kept for a layer that is finished."""
        for kind in StateKind:
            self.drop(kind, layer)

    def _load(self, kind: StateKind, layer: int) -> dict[str, torch.Tensor]:
        path = self._path(kind, layer)
        if not path.is_file():
            raise Apex4Error(f"{path} is missing: {self._advice(kind)}")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise self._damaged(kind, layer, error) from error

    def _damaged(self, kind: StateKind, layer: int, error: Exception) -> Apex4Error:
        return Apex4Error(f"{self._path(kind, layer)} is damaged ({error}): {self._advice(kind)}")

    def _advice(self, kind: StateKind) -> str:
        if kind is StateKind.HIDDEN:
            return f"{self.out} cannot be resumed, begin again in a new folder"
        return f"remove it, 'apex4 quantize --resume -o {self.out}' makes it again"

    def _path(self, kind: StateKind, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05}.safetensors"


def stored_settings(out: Path) -> ResolvedSettings:
    """The settings that the run or the finished checkpoint in `out` recorded. Raises Apex4Error if they are damaged."""
    if OutputFolder.look(out) is OutputFolder.CHECKPOINT:
        path = out / REPORT_NAME
        recorded = read_json(path)
        recorded = recorded.get("settings") if isinstance(recorded, dict) else None
    else:
        path = out / RUN_FOLDER / RUN_SETTINGS_NAME
        recorded = read_json(path)
        if isinstance(recorded, dict) and not isinstance(recorded.get("inputs"), dict):
            recorded = None
    if not isinstance(recorded, dict):
        raise Apex4Error(f"{path} is damaged: the run cannot be resumed, begin again in another folder")
    return ResolvedSettings.from_dict(recorded, path)
