"""What makes a run restartable: a folder inside OUT that holds everything needed to go on after a kill.

    OUT/.apex4-run/lock              held while a process works on OUT
    OUT/.apex4-run/settings.json     the settings of the first run; a restart refuses others
    OUT/.apex4-run/shard-00003.json  a finished shard: checksum, size, per-linear errors. Writing it is the commit.
    OUT/.apex4-run/hidden-00003.safetensors   the hidden states entering decoder layer 3
    OUT/.apex4-run/entering-00003.safetensors, gradients-00003.safetensors   of the float model, see predictions.py

Order per layer: the shard, the next hidden states, then the record. A kill between them repeats the layer, which gives
the same bytes again. config.json is written last of all, so an unfinished OUT loads nowhere.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import Apex4Error, UsageError
from ..format.storage import RUN_FOLDER, read_json, remove_temporaries, sha256, write_json, write_tensors

_SETTINGS = "settings.json"
_HIDDEN = "hidden"
ENTERING, GRADIENTS = "entering", "gradients"  # kinds of tensors that are kept for a layer


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
    def begin(cls, out: Path, settings: dict[str, Any]) -> RunState:
        """Start a run in a folder that is absent or empty. Raises UsageError otherwise."""
        require_empty(out)
        state = cls(out)
        try:
            state.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output folder {out} cannot be made ({error.strerror}): choose another") from error
        state._lock()
        write_json(state.folder / _SETTINGS, settings)
        return state

    @classmethod
    def resume(cls, out: Path, settings: dict[str, Any]) -> RunState:
        """Go on with a stopped run. Raises UsageError if its settings were others."""
        first = stored_settings(out)
        for name, value in settings["inputs"].items():
            if first["inputs"].get(name) != value:
                raise UsageError(f"the {name} changed since {out} was begun: begin again in another folder")
        for name, value in settings.items():
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
        (self.folder / _SETTINGS).unlink()
        shutil.rmtree(self.folder)

    def record(self, shard: int) -> dict[str, Any] | None:
        path = self.folder / f"shard-{shard:05}.json"
        return read_json(path) if path.is_file() else None

    def commit(self, shard: int, record: dict[str, Any]) -> None:
        write_json(self.folder / f"shard-{shard:05}.json", record)

    def save_hidden(self, layer: int, streams: Streams) -> None:
        tensors = {"hidden_states": streams.hidden}
        if streams.original is not None:
            tensors["original_hidden_states"] = streams.original
        write_tensors(self._path(_HIDDEN, layer), tensors)

    def load_hidden(self, layer: int, original: bool) -> Streams:
        """What `save_hidden` wrote; `original`: whether both streams must be there. Raises Apex4Error."""
        tensors = self._load(_HIDDEN, layer)
        try:
            return Streams(tensors["hidden_states"], tensors["original_hidden_states"] if original else None)
        except KeyError as error:
            raise self._damaged(_HIDDEN, layer, error) from error

    def save(self, kind: str, layer: int, tensor: torch.Tensor) -> None:
        """Keep one tensor for a layer, ENTERING or GRADIENTS."""
        write_tensors(self._path(kind, layer), {kind: tensor})

    def load(self, kind: str, layer: int) -> torch.Tensor:
        """What `save` kept. Raises Apex4Error."""
        tensors = self._load(kind, layer)
        if kind not in tensors:
            raise self._damaged(kind, layer, KeyError(kind))
        return tensors[kind]

    def has(self, kind: str, layer: int) -> bool:
        return self._path(kind, layer).is_file()

    def drop(self, kind: str, layer: int) -> None:
        self._path(kind, layer).unlink(missing_ok=True)

    def drop_all(self, layer: int) -> None:
        """What was kept for a layer that is finished."""
        for kind in (_HIDDEN, ENTERING, GRADIENTS):
            self.drop(kind, layer)

    def _load(self, kind: str, layer: int) -> dict[str, torch.Tensor]:
        path = self._path(kind, layer)
        if not path.is_file():
            raise Apex4Error(f"{path} is missing: {self._advice(kind)}")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise self._damaged(kind, layer, error) from error

    def _damaged(self, kind: str, layer: int, error: Exception) -> Apex4Error:
        return Apex4Error(f"{self._path(kind, layer)} is damaged ({error}): {self._advice(kind)}")

    def _advice(self, kind: str) -> str:
        if kind == _HIDDEN:
            return f"{self.out} cannot be resumed, begin again in a new folder"
        return f"remove it, 'apex4 quantize --resume -o {self.out}' makes it again"

    def _path(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05}.safetensors"


def other_setting(out: Path, name: str, first: Any, now: Any) -> UsageError:
    """The refusal to resume with another setting."""
    describe = _recipe_as_text if name == "recipe" else _setting_as_text
    return UsageError(
        f"{out} was begun with {name} = {describe(first, now)} and now {describe(now, first)} is asked for: "
        "resume with the first run's settings or choose another output folder"
    )


def _setting_as_text(value: Any, other: Any) -> str:
    # A plan has hundreds of entries: which of them differ is for a diff of the two files.
    return "a plan of its own" if isinstance(value, dict) else repr(value)


def _recipe_as_text(recipe: Any, other: Any) -> str:
    """A recipe's name, and of a file's content what is not the same in the `other`."""
    if not isinstance(recipe, dict):
        return repr(recipe)
    differ = [key for key in recipe if isinstance(other, dict) and key != "name" and recipe[key] != other.get(key)]
    content = ", ".join(f"{key}: {recipe[key]!r}" for key in differ)
    return f"{recipe.get('name')!r} of a file" + (f" with {content}" if content else "")


def require_empty(out: Path) -> None:
    """Raise UsageError unless `out` is absent, empty, or holds only a run killed before it began."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file: give a folder")
    if not out.is_dir():
        return
    begun = (out / RUN_FOLDER / _SETTINGS).is_file()
    if begun or any(path.name != RUN_FOLDER for path in out.iterdir()):
        advice = "add --resume to go on with the run it holds" if begun else "choose another folder or empty it"
        raise UsageError(f"output folder {out} is not empty: {advice}")


def stored_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`. Raises UsageError if there is none."""
    path = out / RUN_FOLDER / _SETTINGS
    if path.is_file():
        settings = read_json(path)
        if not isinstance(settings, dict) or not {"model", "inputs"} <= set(settings):
            raise Apex4Error(f"{path} is damaged: {out} cannot be resumed, begin again in another folder")
        return settings
    if (out / "config.json").is_file():
        shutil.rmtree(out / RUN_FOLDER, ignore_errors=True)  # what a kill during `finish` left
        raise UsageError(f"{out} holds a finished checkpoint: there is nothing to resume, see 'apex4 inspect {out}'")
    raise UsageError(f"{out} holds no run: there is nothing to resume, leave --resume away")
