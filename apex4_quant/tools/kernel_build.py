"""`apex4 kernels`: which kernels there are, and all of them compiled before anyone waits for one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..environment import CACHE_DIR
from ..errors import Apex4Error, UsageError
from ..kernels.catalogue import ARCHITECTURES, Configuration, configurations, sm_of
from ..kernels.runtime import compiler
from ..kernels.runtime.compiler import arch_of
from ..progress import Progress


@dataclass(frozen=True)
class Built:
    """One kernel, compiled or found in the cache."""

    arch: str
    name: str
    source: str
    file: str | None
    bytes: int
    registers: int
    static_shared_bytes: int
    spill_bytes: int
    from_cache: bool
    seconds: float
    warnings: str


@dataclass(frozen=True)
class BuildResult:
    kernels: list[Built]
    seconds: float
    where: Path

    def as_dict(self) -> dict[str, Any]:
        return {
            "kernels": [asdict(built) for built in self.kernels],
            "seconds": round(self.seconds, 3),
            "where": str(self.where),
        }

    def as_text(self) -> str:
        cached = sum(built.from_cache for built in self.kernels)
        lines = [f"{built.arch} {built.name}: {built.warnings}" for built in self.kernels if built.warnings]
        spilled = [f"{built.arch} {built.name}" for built in self.kernels if built.spill_bytes]
        lines += [f"registers are spilled by {', '.join(spilled)}"] if spilled else []
        done = f"{len(self.kernels)} kernels in {self.where}: {len(self.kernels) - cached} compiled, {cached} from the cache"
        return "\n".join([*lines, f"{done}, {self.seconds:.1f} s"])


_Task = tuple[Configuration, str, str | None]


def build(archs: Sequence[str], out: Path | None, jobs: int | None, progress: Progress) -> BuildResult:
    """Compile all kernels of `archs` in `jobs` processes into the cache, and as NAME.ARCH.cubin into `out` if given.

    Raises UsageError for an architecture without kernels or a wrong folder, Apex4Error for what compiling needs.
    """
    if not archs:
        raise UsageError("there is nothing to build: give --arch, for example --arch sm_86")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} can do no work: give 1 or more")
    sms = sorted({sm_of(arch) for arch in archs})
    where = out or compiler.cache_folder()
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder: give another with -o")
    supported = compiler.supported_archs()
    for sm in sms:
        if sm not in supported:
            raise Apex4Error(f"NVRTC {compiler.nvrtc_version()} does not compile for sm_{sm}: {compiler.INSTALL}")
    compiler.header_folder()
    reason = compiler.why_not_writable(where)
    if reason:
        raise Apex4Error(f"{where} cannot be written ({reason}): give another folder with -o or in {CACHE_DIR}")
    tasks: list[_Task] = [
        (each, arch_of(sm), str(out) if out else None) for sm in sms for each in configurations(arch_of(sm))
    ]
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    started = time.perf_counter()
    with progress.stage(f"compiling for {', '.join(map(arch_of, sms))}", len(tasks), "kernel") as tell:
        built: list[Built] = []
        for one in _compile_all(tasks, jobs):
            built.append(one)
            tell(1)
    return BuildResult(built, time.perf_counter() - started, where)


def _compile_all(tasks: list[_Task], jobs: int) -> Iterator[Built]:
    if jobs <= 1:
        yield from map(_compile_one, tasks)
        return
    # spawn: the caller may have threads (torch), which do not survive a fork.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)
    try:
        yield from pool.map(_compile_one, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile_one(task: _Task) -> Built:
    configuration, arch, out = task
    started = time.perf_counter()
    compiled = compiler.compile_kernel(configuration.source, configuration.defines, arch)
    path = Path(out) / f"{configuration.name}.{arch}.cubin" if out else None
    if path:
        try:
            compiler.write_whole(path, compiled.cubin)
        except OSError as error:
            raise Apex4Error(f"{path} cannot be written: {error.strerror or error}") from error
    used = compiled.resources
    return Built(
        arch=arch,
        name=configuration.name,
        source=configuration.source,
        file=str(path) if path else None,
        bytes=len(compiled.cubin),
        registers=used.registers,
        static_shared_bytes=used.static_shared_bytes,
        spill_bytes=used.spill_store_bytes + used.spill_load_bytes,
        from_cache=compiled.from_cache,
        seconds=round(time.perf_counter() - started, 3),
        warnings=compiled.warnings,
    )


def _kernels_of(archs: Sequence[str]) -> list[tuple[str, Configuration]]:
    """The kernels of `archs`, or of every architecture that has any, each behind its architecture."""
    sms = sorted({sm_of(arch) for arch in archs}) or sorted(ARCHITECTURES)
    return [(arch_of(sm), each) for sm in sms for each in configurations(arch_of(sm))]


def kernels_as_dict(archs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    return {"kernels": [{"arch": arch} | asdict(each) for arch, each in _kernels_of(archs)]}


def kernels_as_text(archs: Sequence[str]) -> str:
    rows = [
        ((arch, each.name, each.source), " ".join(f"{name}={value}" for name, value in each.defines.items()))
        for arch, each in _kernels_of(archs)
    ]
    widths = [max(len(columns[index]) for columns, _ in rows) for index in range(3)]
    return "\n".join("  ".join([*map(str.ljust, columns, widths), macros]).rstrip() for columns, macros in rows)
