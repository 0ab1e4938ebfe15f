"""Every kernel source under both compilers it is written for: NVRTC and plain nvcc, without one warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from apex4_quant.kernels.catalogue import ARCHITECTURES, Configuration, configurations
from apex4_quant.kernels.runtime import compiler

SOURCES = sorted(str(path.relative_to(compiler.SOURCES)) for path in compiler.SOURCES.rglob("*.cu"))
ARCHS = [compiler.arch_of(sm) for sm in ARCHITECTURES]


def first_of(source: str, arch: str) -> Configuration | None:
    return next((each for each in configurations(arch) if each.source == source), None)


@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_has_nothing_to_say(source: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    arch, configuration = next((arch, found) for arch in ARCHS if (found := first_of(source, arch)))
    command = [nvcc, f"-arch={arch}", "-std=c++17", "-cubin", "-Xcompiler=-Wall,-Wextra", "-o", str(tmp_path / "cubin")]
    command += [*compiler.macros(configuration.defines), f"-I{compiler.SOURCES}", str(compiler.SOURCES / source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_nvrtc_has_nothing_to_say(source: str, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_CACHE_DIR", str(tmp_path))
    configuration = first_of(source, arch)
    if configuration is None:
        pytest.skip(f"{source} is not for {arch}")
    compiled = compiler.compile_kernel(source, configuration.defines, arch)
    assert compiled.warnings == ""
    assert configuration.entry.encode() in compiled.cubin


def test_every_source_is_used() -> None:
    used = {each.source for arch in ARCHS for each in configurations(arch)}
    assert used == set(SOURCES)
