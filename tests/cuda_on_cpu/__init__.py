"""Kernels on a CPU: their own source, compiled by a C++ compiler with cuda_on_cpu.h in CUDA's place. Of sm_90's GEMMs the one for
few tokens and 8-bit activations, without clusters: of wgmma its product of int8 is there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from apex4_quant.kernels.runtime.compiler import SOURCES, cache_folder

HERE = Path(__file__).parent
HEADER = "cuda_on_cpu.h"
KEPT_SECONDS = 30 * 24 * 3600  # after the last use
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ("-std=c++17", "-fPIC", "-fsanitize=alignment", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w")  # fmt: skip


class KernelFault(AssertionError):
    """A launch that a GPU would have refused, or would never have ended."""


class CpuKernel:
    """`bind` as `launcher.Kernel.bind` has it; pointers are addresses of the CPU's memory."""

    def __init__(self, library: Path) -> None:
        self._launch = ctypes.CDLL(str(library)).launch_on_cpu
        self._launch.restype = ctypes.c_char_p

    def bind(
        self, grid: tuple[int, int, int], block: int, pointers: int, numbers: Sequence[Any], *, shared_bytes: int = 0,
        **_: Any,
    ) -> Callable[..., None]:  # fmt: skip
        def launch(stream: int, *given: int) -> None:
            assert len(given) == pointers
            args = [*map(ctypes.c_void_p, given), *numbers]
            addresses = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, args))
            fault = self._launch(addresses, (ctypes.c_int * 3)(*grid), block, shared_bytes)
            if fault is not None:
                raise KernelFault(fault.decode())

        return launch


def _with_placed_shared_memory(text: str) -> str:
    """Dynamic shared memory gets its address from its declared alignment and from the size of the static variables."""
    static = re.findall(r"^ *__shared__ (\w+) \w+;$", text, re.MULTILINE)
    sizes = " + ".join(["0", *(f"sizeof({type})" for type in static)])
    return re.sub(
        r"extern __shared__ (?:__align__\((\d+)\) )?(\w+) (\w+)\[\];",
        lambda found: (
            f"{found[2]}* const {found[3]} = reinterpret_cast<{found[2]}*>"
            f"(cpu::dynamic_shared({found[1] or f'alignof({found[2]})'}, {sizes}));"
        ),
        text,
    )


class CpuLauncher:
    """Stands in for `launcher.kernel`. `edits` (file, old text, new text) are made to the sources before.

    `optimization` "-O0" compiles in two thirds of the time, for a library that is used little. Libraries are kept in the
    cache folder of apex4 under a hash of all that they are made of, as cubins are.
    """

    def __init__(self, edits: Sequence[tuple[str, str, str]] = (), optimization: str = "-O1") -> None:
        self._flags = (optimization, *FLAGS)
        self._kernels: dict[Any, CpuKernel] = {}
        self._texts = {HEADER: (HERE / HEADER).read_text()}  # by the name that #include gives
        for path in (*SOURCES.rglob("*.cuh"), *SOURCES.rglob("*.cu")):
            text = path.read_text()
            for name, old, new in edits:
                if name == path.name:
                    assert text.count(old) == 1, (name, old)
                    text = text.replace(old, new)
            self._texts[path.relative_to(SOURCES).as_posix()] = _with_placed_shared_memory(text)
        self._texts["common/ptx.cuh"] = (HERE / "ptx.cuh").read_text()
        self._texts["quantize/quantize_wgmma.cuh"] = (HERE / "quantize_wgmma.cuh").read_text()
        self._texts["gemm/wgmma.cuh"] = "#pragma once\n"
        self._texts["quantize/quantize_ptx.cuh"] = "#pragma once\n"  # cuda_on_cpu.h has it

    def kernel(self, source: str, entry: str, defines: Mapping[str, int | str], device: int) -> CpuKernel:
        key = (source, entry, *sorted(defines.items()))
        if key not in self._kernels:
            program = (
                f'#include "{HEADER}"\n#include "{source}"\nextern "C" const char* launch_on_cpu(void** arguments, '
                "const int* grid, int threads, int shared_bytes) "
                f"{{ return cpu::launch({entry}, arguments, grid, threads, shared_bytes); }}\n"
            )
            flags = (*self._flags, *(f"-D{macro}={value}" for macro, value in defines.items()))
            self._kernels[key] = CpuKernel(self._library(program, flags))
        return self._kernels[key]

    def _library(self, program: str, flags: Sequence[str]) -> Path:
        """The compiled program, from the cache or compiled into it. Several processes may do so at once."""
        texts = self._included(program)
        digest = hashlib.sha256()
        for part in (_compiler_version(), *flags, program, *(part for item in sorted(texts.items()) for part in item)):
            digest.update(f"{len(part)}\n{part}".encode())
        folder = cache_folder() / "cuda_on_cpu"
        library = folder / f"{digest.hexdigest()}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as name:
                os.replace(_compile(Path(name), program, texts, flags), library)
            _remove_unused(folder)
        os.utime(library)
        return library

    def _included(self, text: str) -> dict[str, str]:
        """Our files that a program includes, and those that they include."""
        found: dict[str, str] = {}
        waiting = [text]
        while waiting:
            for name in re.findall(r'^ *#include "([^"]+)"', waiting.pop(), re.MULTILINE):
                if name not in found:
                    found[name] = self._texts[name]
                    waiting.append(found[name])
        return found


def _compile(folder: Path, program: str, texts: Mapping[str, str], flags: Sequence[str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "program.cpp").write_text(program)
    made, library = folder / "program.o", folder / "program.so"
    subprocess.run([COMPILER, *flags, f"-I{folder}", "-c", str(folder / "program.cpp"), "-o", str(made)], check=True)
    # Without the sanitizer's library: cuda_on_cpu.h has what it calls.
    subprocess.run([COMPILER, "-shared", str(made), "-o", str(library)], check=True)
    return library


@cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "-v"], capture_output=True, text=True, check=True).stderr


def _remove_unused(folder: Path) -> None:
    """Libraries of sources that are no more."""
    for path in folder.glob("*.so"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()
