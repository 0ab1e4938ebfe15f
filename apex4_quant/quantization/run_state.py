"""What makes a run restartable: a folder inside OUT that holds everything needed to go on after a kill.

    OUT/.apex4-run/lock              held while a process works on OUT
    OUT/.apex4-run/settings.json     the settings of the first run; a restart refuses others
    OUT/.apex4-run/shard-00003.json  a finished shard: checksum, size, per-linear errors. Writing it is the commit.
    OUT/.apex4-run/hidden-00003.safetensors   the hidden states entering decoder layer 3; see models/states.py for those
                                     that stay there while they are used
    OUT/.apex4-run/distilling_text.safetensors      the windows that a distillation learns on (distilling.py)
    OUT/.apex4-run/distilling.safetensors     its state, on its way
    OUT/.apex4-run/distilled.safetensors, distilled.json      its outcome; writing the second is the commit
    OUT/.apex4-run/entering-00003.safetensors, gradients-00003.safetensors   of the float model, see predictions.py

Order: the shards of one or more layers, the hidden states behind the last of them, then their records, then what was kept for them
is removed. A kill between them repeats the layers, which gives the same bytes again. config.json is written last of all, so an unfinished OUT loads nowhere.

Of several processes (docs/scaling.md) each writes the states of its own windows, hidden-00003.00064-00128.safetensors those of
windows 64 to 127, and any number of others can read them. All else is written by the first.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..distributed.shares import Share
from ..environment import KEEP_EVERY, SECONDS_TO_KEEP
from ..errors import Apex4Error, UsageError
from ..format.storage import (
    REPORT_NAME,
    RUN_FOLDER,
    RUN_SETTINGS_NAME,
    json_text,
    make_folder,
    read_json,
    remove_temporaries,
    require_empty,
    sha256,
    write_json,
    write_tensors,
)
from ..models.states import TENSOR_NAME, States, StoredStates, in_memory
from .settings import ResolvedSettings, other_setting


class StateKind(StrEnum):
    """Tensors that are kept for a layer. The value begins the file's name and, but for HIDDEN, is the tensor's."""

    HIDDEN = (
        "hidden"  # the states that enter it: through the quantized layers and, for GPTAQ, through the original ones
    )
    ORIGINAL = "original"  # for GPTAQ, those through the original ones where states are streamed from the disk
    ENTERING = "entering"  # the states of the float model that enter it (predictions.py)
    LEAVING_GRADIENTS = "gradients"  # of the float model's predictions by what leaves it (predictions.py)


_ORIGINAL_NAME = "original_hidden_states"
_DISTILLING, _DISTILLED, _DISTILLED_RECORD = "distilling.safetensors", "distilled.safetensors", "distilled.json"
_DISTILLING_TEXT = "distilling_text.safetensors"


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
    """The calibration text's hidden states on their way into a decoder layer, each [S, L, H], S the windows of this process.

    `hidden` comes through the quantized layers; `original` through those of the model before quantization, where the
    recipe asks for it. `share`: which of all windows these are; None: all.
    """

    hidden: States
    original: States | None = None
    share: Share | None = None

    @property
    def windows(self) -> Share:
        return self.share or Share.whole(len(self.hidden))

    @property
    def tokens(self) -> int:
        """Of all windows, those of other processes too."""
        return self.windows.total * self.hidden.shape[1]

    @property
    def first_token(self) -> int:
        """How many tokens other processes have before the first of these."""
        return self.windows.first * self.hidden.shape[1]


class RunState:
    """One run on one output folder. Create with `begin` or `resume`, give back with `close`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / RUN_FOLDER
        self._lock_file: TextIO | None = None

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

    @classmethod
    def join(cls, out: Path, recorded: dict[str, Any]) -> RunState:
        """The run that another process began or resumed, and works on. Raises UsageError if it is not seen here."""
        state = cls(out)
        path = state.folder / RUN_SETTINGS_NAME
        if not path.is_file() or path.read_text() != json_text(recorded, indent=2) + "\n":
            raise UsageError(
                f"{out} is not the folder that rank 0 sees: give an output folder on a disk that all ranks share"
            )
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
        if self._lock_file is not None:
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

    def save_distilling_text(self, windows: Mapping[str, torch.Tensor]) -> None:
        write_tensors(self.folder / _DISTILLING_TEXT, {name: each.to(torch.int32) for name, each in windows.items()})

    def load_distilling_text(self) -> dict[str, torch.Tensor] | None:
        """Token windows, int64, that `save_distilling_text` wrote by source; None if there are none. Raises Apex4Error."""
        path = self.folder / _DISTILLING_TEXT
        return {name: each.long() for name, each in self._load_file(path).items()} if path.is_file() else None

    @property
    def is_distilled(self) -> bool:
        return (self.folder / _DISTILLED_RECORD).is_file()

    def save_distilled(self, tensors: Mapping[str, torch.Tensor], outcome: Mapping[str, Any]) -> None:
        write_tensors(self.folder / _DISTILLED, {name: tensor.contiguous() for name, tensor in tensors.items()})
        write_json(self.folder / _DISTILLED_RECORD, outcome)
        for name in (_DISTILLING, _DISTILLING_TEXT):
            (self.folder / name).unlink(missing_ok=True)

    def load_distilled(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `save_distilled` wrote. Raises Apex4Error."""
        return self._load_file(self.folder / _DISTILLED), read_json(self.folder / _DISTILLED_RECORD)

    def _load_file(self, path: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Apex4Error(f"{path} is damaged ({error}): begin again in another folder") from error

    def save_hidden(self, layer: int, streams: Streams) -> None:
        """The windows of this process. All must be there before the layer is committed."""
        if isinstance(streams.hidden, StoredStates):
            if isinstance(streams.original, StoredStates):
                streams.original.move_to(self._path(StateKind.ORIGINAL, layer, streams.windows))
            streams.hidden.move_to(self._path(StateKind.HIDDEN, layer, streams.windows))
            return
        tensors = {TENSOR_NAME: streams.hidden}
        if streams.original is not None:
            tensors[_ORIGINAL_NAME] = in_memory(streams.original)
        self._save_part(StateKind.HIDDEN, layer, tensors, streams.windows)

    def load_hidden(self, layer: int, original: bool, share: Share, streamed: bool = False) -> Streams:
        """What `save_hidden` wrote of the windows of `share`; `original`: whether both streams must be there. `streamed`: they
        stay on the disk. Raises Apex4Error."""
        load = self._stream_part if streamed else self._load_part
        hidden = load(StateKind.HIDDEN, layer, TENSOR_NAME, share)
        if not original:
            return Streams(hidden, None, share)
        if self._part_paths(StateKind.ORIGINAL, layer):
            return Streams(hidden, load(StateKind.ORIGINAL, layer, TENSOR_NAME, share), share)
        return Streams(hidden, load(StateKind.HIDDEN, layer, _ORIGINAL_NAME, share), share)

    def save(self, kind: StateKind, layer: int, states: States, share: Share | None = None) -> None:
        """Keep one tensor for a layer, of any kind but HIDDEN: that of the windows of `share`, or of all."""
        if share is None or share.size:
            self._save_part(kind, layer, {str(kind): in_memory(states)}, share or Share.whole(len(states)))

    def load(self, kind: StateKind, layer: int, share: Share) -> torch.Tensor:
        """What `save` kept of the windows of `share`. Raises Apex4Error."""
        return self._load_part(kind, layer, str(kind), share)

    def has(self, kind: StateKind, layer: int, total: int) -> bool:
        """Whether there is something of all `total` windows."""
        stop = 0
        for share in sorted(self._parts(kind, layer, total)):
            stop = share.stop if share.first == stop else stop
        return stop == total

    def drop(self, kind: StateKind, layer: int) -> None:
        for path in self._part_paths(kind, layer):
            path.unlink(missing_ok=True)

    def drop_all(self, layer: int) -> None:
        """What was kept for a layer that is finished."""
        for kind in StateKind:
            self.drop(kind, layer)

    def drop_uncommitted(self) -> None:
        """Hidden states that no commit stands behind: fewer or more processes will write other parts."""
        for kind in (StateKind.HIDDEN, StateKind.ORIGINAL):
            for path in self.folder.glob(f"{kind}-*.safetensors"):
                layer = int(path.name.removeprefix(f"{kind}-")[:5])
                if self.record(layer + 1) is None:
                    path.unlink()

    def withdraw_unfollowed(self, layers: int, windows: int) -> None:
        """Layers that were being committed, one after the other, when a kill came: no states enter the next one, and those that
        enter the first of them are there still. `layers` and `windows`: of the run."""
        finished = {shard - 2 for shard in self.records()}
        following = next((layer for layer in range(layers) if layer not in finished), None)
        if following is None:
            return
        begins = following
        while begins > 0 and not self.has(StateKind.HIDDEN, begins, windows):
            begins -= 1
        if self.has(StateKind.HIDDEN, begins, windows):
            for layer in reversed(range(begins, following)):  # the first of them last: a kill may come here, too
                self.withdraw(layer + 2)

    def _save_part(self, kind: StateKind, layer: int, tensors: Mapping[str, torch.Tensor], share: Share) -> None:
        write_tensors(self._path(kind, layer, share), tensors)

    def _load_part(self, kind: StateKind, layer: int, name: str, share: Share) -> torch.Tensor:
        found = []
        for path, first, stop in self._parts_of(kind, layer, share):
            try:
                with safe_open(path, framework="pt", backend="pread") as file:
                    found.append(file.get_slice(name)[first:stop])
            except (SafetensorError, OSError) as error:
                raise self._damaged(path, kind, error) from error
        return found[0] if len(found) == 1 else torch.cat(found)

    def _stream_part(self, kind: StateKind, layer: int, name: str, share: Share) -> StoredStates:
        parts = self._parts_of(kind, layer, share)
        try:
            for path, _, _ in parts:
                with safe_open(path, framework="pt", backend="pread"):
                    pass  # validates header and size
            return StoredStates.of(parts, name)
        except (SafetensorError, OSError, ValueError, KeyError, StopIteration) as error:
            raise self._damaged(parts[0][0], kind, error) from error

    def _parts_of(self, kind: StateKind, layer: int, share: Share) -> list[tuple[Path, int, int]]:
        """The files that have the windows of `share`, and which of the windows in each. Raises Apex4Error if some are missing."""
        found = []
        stop = share.first
        for part, path in sorted(self._parts(kind, layer, share.total).items()):
            if part.stop <= stop or part.first >= share.stop:
                continue
            if part.first > stop:
                break
            end = min(share.stop, part.stop)
            found.append((path, stop - part.first, end - part.first))
            stop = end
        if stop < share.stop:
            raise Apex4Error(f"{self._path(kind, layer)} is missing: {self._advice(kind)}")
        return found

    def _damaged(self, path: Path, kind: StateKind, error: Exception) -> Apex4Error:
        return Apex4Error(f"{path} is damaged ({error}): {self._advice(kind)}")

    def _advice(self, kind: StateKind) -> str:
        if kind in (StateKind.HIDDEN, StateKind.ORIGINAL):
            return f"{self.out} cannot be resumed, begin again in a new folder"
        return f"remove it, 'apex4 quantize --resume -o {self.out}' makes it again"

    def _path(self, kind: StateKind, layer: int, share: Share | None = None) -> Path:
        part = "" if share is None or share.is_whole else f".{share.first:05}-{share.stop:05}"
        return self.folder / f"{kind}-{layer:05}{part}.safetensors"

    def _part_paths(self, kind: StateKind, layer: int) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-{layer:05}*.safetensors"))

    def _parts(self, kind: StateKind, layer: int, total: int) -> dict[Share, Path]:
        """The files of a layer, by the windows that each has."""
        found = {}
        for path in self._part_paths(kind, layer):
            _, _, windows = path.stem.partition(".")
            first, _, stop = windows.partition("-")
            found[Share(int(first), int(stop), total) if windows else Share.whole(total)] = path
        return found


class BackgroundWork:
    """A thread for what has to reach the disk while something else is worked on: one thing at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "apex4-keep")
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with it, when all that was started before is done. Raises what that raised."""
        self.finish()
        self._work = self._thread.submit(work)

    @property
    def is_done(self) -> bool:
        """Whether nothing is on its way."""
        return self._work is None or self._work.done()

    def finish(self) -> None:
        """Wait for what was started. Raises what it raised, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> BackgroundWork:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()  # a layer that is done is kept, whatever ends the run


def seconds_to_keep() -> float:
    """That a run may go on before it keeps states again. Raises UsageError."""
    text = os.environ.get(KEEP_EVERY, str(SECONDS_TO_KEEP))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{KEEP_EVERY} is {text!r}: give a number of seconds, 0 or more")
    return seconds


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
