"""Kernels on a CPU: their own source, compiled by a C++ compiler with cuda_on_cpu.h in CUDA's place. Not for sm_90's GEMM,
whose wgmma and mbarriers are not there."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apex4_quant.kernels.runtime.compiler import SOURCES

HERE = Path(__file__).parent
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
    """Stands in for `launcher.kernel`. `folder` receives the libraries; `edits` are made to the sources before.

    `optimization` "-O0" compiles in two thirds of the time, for a library that is used once.
    """

    def __init__(self, folder: Path, edits: Sequence[tuple[str, str, str]] = (), optimization: str = "-O1") -> None:
        self._folder = folder
        self._flags = (optimization, *FLAGS)
        self._kernels: dict[Any, CpuKernel] = {}
        for path in (*SOURCES.rglob("*.cuh"), *SOURCES.rglob("*.cu")):
            text = path.read_text()
            for name, old, new in edits:
                if name == path.name:
                    assert text.count(old) == 1, (name, old)
                    text = text.replace(old, new)
            copy = folder / path.relative_to(SOURCES)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(_with_placed_shared_memory(text))
        shutil.copy(HERE / "ptx.cuh", folder / "common")
        shutil.copy(HERE / "quantize_wgmma.cuh", folder / "quantize")
        (folder / "quantize" / "quantize_ptx.cuh").write_text("#pragma once\n")  # cuda_on_cpu.h has it

    def kernel(self, source: str, entry: str, defines: Mapping[str, int | str], device: int) -> CpuKernel:
        key = (source, *sorted(defines.items()))
        if key not in self._kernels:
            name = "_".join(str(part) for part in (Path(source).stem, *(value for _, value in sorted(defines.items()))))
            program, library = self._folder / f"{name}.cpp", self._folder / f"{name}.so"
            program.write_text(
                f'#include "cuda_on_cpu.h"\n#include "{source}"\nextern "C" const char* launch_on_cpu(void** arguments, '
                "const int* grid, int threads, int shared_bytes) "
                f"{{ return cpu::launch({entry}, arguments, grid, threads, shared_bytes); }}\n"
            )
            macros = [f"-D{macro}={value}" for macro, value in defines.items()]
            made = self._folder / f"{name}.o"
            folders = [f"-I{HERE}", f"-I{self._folder}"]
            command = [COMPILER, *self._flags, *macros, *folders, "-c", str(program), "-o", str(made)]
            subprocess.run(command, check=True)
            # Without the sanitizer's library: cuda_on_cpu.h has what it calls.
            subprocess.run([COMPILER, "-shared", str(made), "-o", str(library)], check=True)
            self._kernels[key] = CpuKernel(library)
        return self._kernels[key]
