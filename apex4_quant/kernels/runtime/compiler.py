"""Kernels from source with NVRTC, kept in a cache on disk. Needs no GPU, no nvcc and no torch.

A cubin is decided by its source, the headers beside it, CUDA's own half-precision headers, the macros, the flags, the
NVRTC version and the architecture; a hash of all of these is the name of its cache entry. Entries are written under
another name, synced and renamed, so a reader sees a whole entry or none, whoever is killed and however many processes
compile at once; each entry carries its length and checksum, and one that does not agree is compiled again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ... import environment
from ...errors import Apex4Error
from .bindings import Handle, Nvrtc, Status

SOURCES = Path(__file__).parents[1] / "cuda"
CUDA_HEADERS = ("cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp")  # NVRTC brings the others itself
FLAGS = ("-std=c++17", "--ptxas-options=-v")  # -v: what Resources says comes from the log
INSTALL = "pip install 'apex4-quant[cuda13]' (or [cuda12], for a driver older than 580)"

_MAGIC = b"apex4 kernel 1\n"
_HEADER = struct.Struct(f"<{len(_MAGIC)}s32sQQ")  # magic, sha256 of what follows, bytes of the log, bytes of the cubin
_ABANDONED_SECONDS = 3600
# What ptxas -v says of every kernel. Anything else in a log is a warning, also where ptxas calls it "info".
_REPORT = re.compile(
    r"ptxas info\s*: \d+ bytes gmem.*"
    r"|ptxas info\s*: Compiling entry function .*"
    r"|ptxas info\s*: Function properties for .*"
    r"|(ptxas\s*\.)?\s*\d+ bytes stack frame, .*"
    r"|ptxas info\s*: Used \d+ registers.*"
)
_VARIES = re.compile(r"^ptxas info\s*: Compile time = .*\n?", re.MULTILINE)


class CompileError(Apex4Error):
    """The message has NVRTC's first complaint; `log` (and a note of the traceback) has all of them."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log
        if log:
            self.add_note(log)

    def __reduce__(
        self,
    ) -> tuple[type[CompileError], tuple[str, str]]:  # it comes back from the processes of kernel_build.py
        return type(self), (str(self), self.log)


@dataclass(frozen=True)
class Resources:
    """What one thread (registers, stack, spills) and one block (static shared memory) take, as ptxas says."""

    registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    log: str
    from_cache: bool = False

    @property
    def warnings(self) -> str:
        """The log without its resource report; empty for a kernel that compiles as it should."""
        return "\n".join(line for line in self.log.splitlines() if line.strip() and not _REPORT.fullmatch(line))

    @property
    def resources(self) -> Resources:
        """The largest over the functions of the cubin: an entry, and device functions that were not inlined."""

        def largest(pattern: str) -> int:
            return max((int(number) for number in re.findall(pattern, self.log)), default=0)

        return Resources(
            registers=largest(r"Used (\d+) registers"),
            static_shared_bytes=largest(r"(\d+) bytes smem"),
            stack_bytes=largest(r"(\d+) bytes stack frame"),
            spill_store_bytes=largest(r"(\d+) bytes spill stores"),
            spill_load_bytes=largest(r"(\d+) bytes spill loads"),
        )


def compile_cubin(source: str, defines: Mapping[str, int | str], arch: str) -> bytes:
    """The cubin of `source` (a file of kernels/cuda) for "sm_86", "sm_90a", ..., from the cache or compiled into it."""
    return compile_kernel(source, defines, arch).cubin


def compile_kernel(source: str, defines: Mapping[str, int | str], arch: str) -> Compiled:
    """As compile_cubin, with the log. Raises Apex4Error where NVRTC or headers are missing, CompileError for a source."""
    version = installed_nvrtc()
    found = _read(cache_key(source, defines, arch, version))
    if found is None and nvrtc_version() != version:  # another one was loaded than lies in the packages
        version = nvrtc_version()
        found = _read(cache_key(source, defines, arch, version))
    if found is None:
        found = _compile(source, defines, arch)
        _write(cache_key(source, defines, arch, version), found)
    return found


def arch_of(sm: int) -> str:
    """86 -> "sm_86". wgmma and TMA are architecture-specific features: kernels for sm_90 are compiled for sm_90a."""
    return "sm_90a" if sm == 90 else f"sm_{sm}"


# ---- NVRTC ----------------------------------------------------------------------------------------------------------


def nvrtc_version() -> str:
    """ "13.5"; loads NVRTC. Raises Apex4Error where it is not installed."""
    return "{}.{}".format(*_nvrtc()[1])


@cache
def installed_nvrtc() -> str:
    """ "13.5", from the name of a file where the Python packages have one NVRTC: loading it to ask takes 10 ms."""
    packages = importlib.util.find_spec("nvidia")
    roots = (packages.submodule_search_locations or ()) if packages else ()
    found = {
        match[1]
        for root in roots
        for folder in ("cu*/lib", "cuda_nvrtc/lib")  # nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12
        for file in Path(root).glob(f"{folder}/libnvrtc-builtins.so.*")
        if (match := re.search(r"\.so\.(\d+\.\d+)", file.name)) and any(file.parent.glob("libnvrtc.so.*"))
    }
    return found.pop() if len(found) == 1 else nvrtc_version()


@cache
def _nvrtc() -> tuple[Nvrtc, tuple[int, int]]:
    try:
        from cuda.bindings import nvrtc as bindings
    except ImportError as error:
        raise Apex4Error(f"cuda-core is needed to compile kernels and is not installed: {INSTALL}") from error
    nvrtc: Nvrtc = bindings
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a RuntimeError of cuda.bindings or an error of cuda.pathfinder, by version
        raise Apex4Error(f"NVRTC is needed to compile kernels and its library is not found: {INSTALL}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise Apex4Error(f"NVRTC does not tell its version ({status.name}): install it anew, {INSTALL}")
    return nvrtc, (major, minor)


def supported_archs() -> list[int]:
    """The sm numbers the installed NVRTC compiles for."""
    nvrtc, _ = _nvrtc()
    status, archs = nvrtc.nvrtcGetSupportedArchs()
    return sorted(archs) if status == nvrtc.nvrtcResult.NVRTC_SUCCESS else []


def header_folder() -> Path:
    """Where cuda_fp16.h and its kin are. Raises Apex4Error where they are not."""
    return _headers()[0]


@cache
def _headers() -> tuple[Path, str]:
    """The folder and a hash of the headers, which a kernel is made of as much as of our sources."""
    for folder in _header_candidates(int(installed_nvrtc().partition(".")[0])):
        if all((folder / name).is_file() for name in CUDA_HEADERS):
            contents = b"".join((folder / name).read_bytes() for name in CUDA_HEADERS)
            return folder, hashlib.sha256(contents).hexdigest()
    raise Apex4Error(
        f"the CUDA header cuda_fp16.h is found neither in the Python packages nor under CUDA_HOME, CUDA_PATH or "
        f"/usr/local/cuda: {INSTALL}"
    )


def _header_candidates(major: int) -> Iterator[Path]:
    packages = importlib.util.find_spec("nvidia")
    for root in (packages.submodule_search_locations or ()) if packages else ():
        yield Path(root) / f"cu{major}" / "include"  # nvidia-cuda-runtime
        yield Path(root) / "cuda_runtime" / "include"  # nvidia-cuda-runtime-cu12
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "include"
    yield Path("/usr/local/cuda/include")


def macros(defines: Mapping[str, int | str]) -> list[str]:
    """The -D options, in one order whatever the mapping's is."""
    return [f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(defines.items())]


def _compile(source: str, defines: Mapping[str, int | str], arch: str) -> Compiled:
    nvrtc, (major, minor) = _nvrtc()
    options = [f"--gpu-architecture={arch}", *FLAGS, *macros(defines), f"-I{SOURCES}", f"-I{header_folder()}"]
    status, program = nvrtc.nvrtcCreateProgram((SOURCES / source).read_bytes(), source.encode(), 0, [], [])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC {major}.{minor} does not take {source}: {status.name}", "")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        text = _VARIES.sub("", log.rstrip(b"\0").decode(errors="replace")).strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            complaint = next((line for line in text.splitlines() if "error" in line), status.name)
            given = " ".join(macros(defines))
            raise CompileError(
                f"{source} does not compile for {arch} with NVRTC {major}.{minor} ({given or 'no macros'}): {complaint}",
                text,
            )
        return Compiled(_fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), text)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _fetch(
    size_of: Callable[[Handle], tuple[Status, int]],
    get: Callable[[Handle, bytearray], tuple[Status]],
    program: Handle,
) -> bytes:
    buffer = bytearray(size_of(program)[1])
    (status,) = get(program, buffer)
    if int(status) != 0:
        raise CompileError(f"NVRTC does not give its result: {status.name}", "")
    return bytes(buffer)


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """APEX4_CACHE_DIR (environment.py), else apex4 in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    given = os.environ.get(environment.CACHE_DIR)
    if given:
        return Path(given)
    # XDG: a relative path is to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path("~/.cache").expanduser()) / "apex4"


def cache_key(source: str, defines: Mapping[str, int | str], arch: str, version: str | None = None) -> str:
    """sha256 of everything the cubin is made of; 64 hexadecimal digits. `version`: NVRTC's, if not the installed one's."""
    version = version or installed_nvrtc()  # the missing package is the first thing to say
    digest = hashlib.sha256()
    for path in (SOURCES / source, *sorted(SOURCES.rglob("*.cuh"))):
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise Apex4Error(f"there is no kernel source {source!r} in {SOURCES}") from error
        name = (
            path.relative_to(SOURCES) if path.is_relative_to(SOURCES) else path.name
        )  # the control kernel is elsewhere
        digest.update(f"{name} {len(text)}\n".encode() + text)
    for part in (_headers()[1], *macros(defines), "", *FLAGS, "", version, arch):
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def _entry(key: str) -> Path:
    return cache_folder() / "kernels" / f"{key}.kernel"


def cache_entries() -> list[Path]:
    return sorted((cache_folder() / "kernels").glob("*.kernel"))


def _read(key: str) -> Compiled | None:
    """The entry, or None if there is none, it cannot be read or it is not what was written."""
    try:
        data = _entry(key).read_bytes()
    except OSError:
        return None
    if len(data) < _HEADER.size:
        return None
    magic, checksum, log_bytes, cubin_bytes = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC or len(payload) != log_bytes + cubin_bytes or hashlib.sha256(payload).digest() != checksum:
        return None
    return Compiled(payload[log_bytes:], payload[:log_bytes].decode(), from_cache=True)


def _write(key: str, compiled: Compiled) -> None:
    log = compiled.log.encode()
    payload = log + compiled.cubin
    header = _HEADER.pack(_MAGIC, hashlib.sha256(payload).digest(), len(log), len(compiled.cubin))
    entry = _entry(key)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, header + payload)
        _remove_abandoned(entry.parent)
    except OSError as error:
        _say_not_kept(f"{cache_folder()}: {error.strerror or error}")


def write_whole(path: Path, data: bytes) -> None:
    """`path` holds `data`, or what it held before, also after a kill. With the permissions the umask says: a cache may be
    shared, which is why this is no tempfile."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def why_not_writable(folder: Path) -> str | None:
    """None if files can be made in `folder` (made itself if need be), else the reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"probe.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        write_whole(probe, b"")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _remove_abandoned(folder: Path) -> None:
    """What killed processes left behind."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


@cache  # once a process
def _say_not_kept(reason: str) -> None:
    print(
        f"apex4: compiled kernels cannot be kept ({reason}), so every process compiles them: set {environment.CACHE_DIR}",
        file=sys.stderr,
    )
