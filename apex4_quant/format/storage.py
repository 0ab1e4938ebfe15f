"""Files of a checkpoint that are whole or absent: write to a temporary name, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..errors import Apex4Error, UsageError

if TYPE_CHECKING:
    import torch

REPORT_NAME = "apex4_report.json"  # in a checkpoint: what was done to every tensor, and every file's checksum
RUN_FOLDER = ".apex4-run"  # inside an output folder: the state of an unfinished run (quantization/run_state.py)
RUN_SETTINGS_NAME = "settings.json"  # inside RUN_FOLDER: written first of all, so that without it no run was begun
TEMPORARY_SUFFIX = ".tmp"  # what a kill can leave behind; removed when the run is resumed
_OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")  # save_file of safetensors 0.8 writes under a name of its own and renames


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    if path.exists() and not path.is_file():  # /dev/null would be replaced too
        raise UsageError(f"{path} is no file that can be written anew: give another name")
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Apex4Error(write_failure(path, error)) from error


def _replace(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def in_place_of(temporary: Path, path: Path) -> None:
    """Give a file that was written under a temporary name beside it its own. Raises Apex4Error."""
    try:
        _replace(temporary, path)
    except OSError as error:
        raise Apex4Error(write_failure(path, error)) from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FAILS = (*_FULL, errno.EIO)


def write_failure(path: Path, error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in _FULL
    # safetensors reports I/O errors as text only.
    full = full or any(phrase in str(error) for phrase in ("No space left", "File too large", "quota exceeded"))
    if full:
        out = path.parent.parent if path.parent.name == RUN_FOLDER else path.parent
        if not (out / RUN_FOLDER).is_dir():  # not a run that can be resumed
            return f"no space left to write {path}: free some space and run it again"
        return (
            f"no space left to write {path}: what is finished is kept; free some space and "
            f"run 'apex4 quantize --resume -o {out}'"
        )
    return f"{path} cannot be written ({error}): check the folder and its permissions"


def write_bytes(path: Path, data: bytes) -> None:
    with _atomic(path) as temporary:
        temporary.write_bytes(data)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON by its standard: what is not finite is null, which Python would write as NaN."""
    text = json.dumps(_finite_or_null(value), indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 does not have
        return json.dumps(_finite_or_null(value), indent=indent, allow_nan=False)
    return text


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite_or_null(entry) for key, entry in value.items()}
    return [_finite_or_null(entry) for entry in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json_text(value, indent=2) + "\n").encode())


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_json(path: Path) -> Any:
    """Raises Apex4Error, naming the file, if it is not there or not JSON."""
    try:
        return json.loads(path.read_text("utf-8"), parse_constant=_no_json)
    except FileNotFoundError as error:
        raise Apex4Error(f"{path} is missing: the folder is not a complete model") from error
    except OSError as error:
        raise Apex4Error(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from error
    except RecursionError as error:
        raise Apex4Error(f"{path} is not valid JSON (nested too deeply): the file is damaged, get it again") from error
    except ValueError as error:
        raise Apex4Error(f"{path} is not valid JSON ({error}): the file is damaged, get it again") from error


def _umask() -> int:
    """Read from what the kernel says: to ask os.umask is to change it, for other threads too."""
    with contextlib.suppress(OSError):  # another system has no such file
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file. Its bytes depend on the tensors alone."""
    from safetensors.torch import save_file  # torch: most of this module does without it

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _atomic(path) as temporary:
        # One metadata entry only: safetensors writes several in a random order.
        save_file(on_cpu, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors creates files only their owner can read


def copy_file(source: Path, target: Path) -> None:
    with _atomic(target) as temporary:
        shutil.copyfile(source, temporary)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, needed: int) -> None:
    """Raise UsageError if the disk of `folder` (or of its nearest existing parent) has less than `needed` bytes."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{folder} has {format_bytes(free)} free and the run needs {format_bytes(needed)}: "
            "free some space or choose another output folder"
        )


def require_outside(out: Path, folder: Path) -> None:
    """Raise UsageError if `out` is below the checkpoint `folder`: it would be copied and published with it."""
    if folder.resolve() in out.resolve().parents:
        raise UsageError(
            f"output {out} is in the checkpoint's folder and would be published with it: give another place"
        )


def require_empty(out: Path) -> None:
    """Raise UsageError unless `out` is absent, empty, or holds only a run killed before it began."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file: give a folder")
    if not out.is_dir():
        return
    begun = (out / RUN_FOLDER / RUN_SETTINGS_NAME).is_file()
    if begun or any(path.name != RUN_FOLDER for path in out.iterdir()):
        advice = "add --resume to go on with the run it holds" if begun else "choose another folder or empty it"
        raise UsageError(f"output folder {out} is not empty: {advice}")


def make_folder(out: Path) -> None:
    """Make the folder `out`, and those above it. Raises UsageError where the name is the reason, else Apex4Error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _DISK_FAILS:
            raise Apex4Error(write_failure(out, error)) from error
        raise UsageError(f"output folder {out} cannot be made ({error.strerror}): choose another") from error


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Make `out`, which is absent or empty, for what is written in one go by this process alone. If that fails, all of it
    goes again, so that the same command can be given again. Raises UsageError, or Apex4Error where another process is at it.
    """
    was_there = out.is_dir()
    make_folder(out)
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock_folder(folder, out)
        require_empty(out)
        try:
            yield
        except BaseException:
            _remove_contents(out)
            if not was_there:
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise
    finally:
        os.close(folder)


def _lock_folder(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Apex4Error(f"another apex4 process is writing {out}: wait for it or choose another folder") from error
    except OSError:
        pass  # a network disk that locks no folders


def _remove_contents(folder: Path) -> None:
    """As far as the disk lets us: a failure that is on its way is said, not this one."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def remove_temporaries(folder: Path) -> None:
    """What a kill left in a folder of ours."""
    for path in list(folder.iterdir()):
        if path.suffix == TEMPORARY_SUFFIX or _OF_SAFETENSORS.fullmatch(path.name):
            path.unlink()


def format_bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
