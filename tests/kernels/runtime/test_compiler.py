"""NVRTC and its cache: hits, keys, damage, kills, many processes, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.runtime import compiler

KERNEL = """#include <cuda_fp16.h>
#include "scale.cuh"
extern "C" __global__ void halve(float* out, const __half* in) {
  __shared__ float kept[64];
  kept[threadIdx.x] = __half2float(in[threadIdx.x]) * scale(FACTOR);
  __syncthreads();
  out[threadIdx.x] = kept[63 - threadIdx.x];
}
"""
HEADER = "#pragma once\n__device__ constexpr float scale(int factor) { return 0.5f * factor; }\n"
DEFINES: dict[str, int | str] = {"FACTOR": 3, "NAME": "some"}
ARCH = "sm_86"
Script = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with halve.cu in the place of kernels/cuda, and a cache of this test's own."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "halve.cu").write_text(KERNEL)
    (folder / "scale.cuh").write_text(HEADER)
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setenv("APEX4_CACHE_DIR", str(tmp_path / "cache"))
    yield folder
    for cached in (compiler._nvrtc, compiler.installed_nvrtc, compiler._headers, compiler._say_not_kept):
        cached.cache_clear()


def halve(**changes: object) -> compiler.Compiled:
    given = {"source": "halve.cu", "defines": DEFINES, "arch": ARCH} | changes
    return compiler.compile_kernel(**given)  # type: ignore[arg-type]


def entry() -> Path:
    (found,) = compiler.cache_entries()
    return found


@pytest.fixture
def never_compiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def from_now_on() -> None:
        monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))

    return from_now_on


@pytest.fixture
def script(sources: Path, cli_environment: dict[str, str]) -> Iterator[Script]:
    """script(code) starts a Python in which compiler.SOURCES is this test's; `halve()` there is what it is here."""
    started: list[subprocess.Popen[str]] = []
    before = f"""
import os, sys, time
from pathlib import Path
from apex4_quant.kernels.runtime import compiler
compiler.SOURCES = Path({str(sources)!r})
def halve(): return compiler.compile_kernel("halve.cu", {DEFINES!r}, {ARCH!r})
"""

    def start(code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", before + code],
            env=cli_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# What is compiled


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_compiles_for_every_architecture(arch: str) -> None:
    compiled = halve(arch=arch)
    assert compiled.cubin.startswith(b"\x7fELF") and b"halve" in compiled.cubin
    assert compiled.warnings == ""
    used = compiled.resources
    assert 0 < used.registers < 32 and used.static_shared_bytes >= 256
    assert (used.stack_bytes, used.spill_store_bytes, used.spill_load_bytes) == (0, 0, 0)
    assert compiler.compile_cubin("halve.cu", DEFINES, arch) == compiled.cubin


def test_spills_and_warnings_are_seen(sources: Path) -> None:
    body = "float v[64]; for (int i = 0; i < 64; ++i) v[i] = p[i]; __syncthreads(); " + " ".join(
        f"p[{i}] = v[{63 - i}] * v[{i}] + v[{(7 * i) % 64}];" for i in range(64)
    )
    (sources / "halve.cu").write_text(
        f'extern "C" __global__ void __maxnreg__(24) halve(float* p) {{ int unused; {body} }}'
    )
    compiled = halve(defines={})
    assert compiled.resources.spill_store_bytes > 0 and compiled.resources.stack_bytes > 0
    assert "unused" in compiled.warnings and "Used" not in compiled.warnings
    assert halve(defines={}).warnings == compiled.warnings, "the log comes from the cache too"


def test_resources_are_those_cuobjdump_reads(tmp_path: Path) -> None:
    packages = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in packages.submodule_search_locations or ()] if packages else []
    tools = [*(tool for root in roots for tool in root.glob("*/bin/cuobjdump")), shutil.which("cuobjdump")]
    tool = next((tool for tool in tools if tool), None)
    if tool is None:
        pytest.skip("cuobjdump (nvidia-cuda-cuobjdump) is not installed")
    compiled = halve()
    path = tmp_path / "halve.cubin"
    path.write_bytes(compiled.cubin)
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    read = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    used = compiled.resources
    assert read == {"REG": used.registers, "STACK": used.stack_bytes, "SHARED": used.static_shared_bytes, "LOCAL": 0}


def test_info_that_is_no_resource_report_is_a_warning() -> None:
    complaint = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    report = (
        "ptxas info    : Used 12 registers, 256 bytes smem\n         0 bytes stack frame, 0 bytes spill stores, 0 ..."
    )
    assert compiler.Compiled(b"", f"{report}\n{complaint}\n\n").warnings == complaint


@pytest.mark.parametrize(("sm", "arch"), [(80, "sm_80"), (86, "sm_86"), (89, "sm_89"), (90, "sm_90a")])
def test_arch_of(sm: int, arch: str) -> None:
    assert compiler.arch_of(sm) == arch


# The cache


def test_a_hit_is_byte_identical_and_compiles_nothing(never_compiles: Callable[[], None]) -> None:
    first = halve()
    assert not first.from_cache and oct(entry().stat().st_mode & 0o444) == oct(0o444 & ~_umask())
    never_compiles()
    second = halve(defines=dict(reversed(DEFINES.items())))
    assert second.from_cache and (second.cubin, second.log) == (first.cubin, first.log)
    assert not list(entry().parent.glob("*.tmp"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_compiling_is_deterministic() -> None:
    first = halve()
    entry().unlink()
    assert halve().cubin == first.cubin


def test_the_key_changes_with_every_ingredient(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    def key(**changes: object) -> None:
        keys.append(compiler.cache_key(**({"source": "halve.cu", "defines": DEFINES, "arch": ARCH} | changes)))  # type: ignore[arg-type]

    key()
    key(arch="sm_80")
    key(defines=DEFINES | {"FACTOR": 4})
    key(defines=DEFINES | {"MORE": 1})
    key(defines={"FACTOR": 3})
    (sources / "copy.cu").write_text(KERNEL)
    key(source="copy.cu")
    (sources / "halve.cu").write_text(KERNEL + "\n")
    key()
    (sources / "scale.cuh").write_text(HEADER + "\n")
    key()
    (sources / "other.cuh").write_text("")
    key()
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-lineinfo"))
    key()
    monkeypatch.setattr(compiler, "installed_nvrtc", lambda: "12.9")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "12.9")
    key()
    monkeypatch.setattr(compiler, "_headers", lambda: (tmp_path, "another hash"))
    compiler._say_not_kept.cache_clear()
    key()
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    compiler._nvrtc.cache_clear()
    compiler._headers.cache_clear()


def test_the_key_has_no_place_in_it(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache made on one machine is good on another with the same versions."""
    before = compiler.cache_key("halve.cu", DEFINES, ARCH)
    moved = sources.rename(tmp_path / "moved")
    monkeypatch.setattr(compiler, "SOURCES", moved)
    assert compiler.cache_key("halve.cu", DEFINES, ARCH) == before
    assert str(moved).encode() not in halve().cubin


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half a header": lambda data: data[:20],
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a flipped bit of the cubin": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "a flipped bit of the checksum": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "another format": lambda data: b"x" + data[1:],
    "zeros, as a power cut leaves them": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_again(damage: str) -> None:
    first = halve()
    whole = entry().read_bytes()
    entry().write_bytes(DAMAGE[damage](whole))
    again = halve()
    assert not again.from_cache and again.cubin == first.cubin
    assert entry().read_bytes() == whole


def test_an_entry_that_cannot_be_read_is_compiled_again() -> None:
    first = halve()
    path = entry()
    path.unlink()
    path.mkdir()
    assert halve().cubin == first.cubin


def test_four_processes_at_once(script: Script) -> None:
    code = "import hashlib; c = halve(); print(hashlib.sha256(c.cubin).hexdigest())"
    outputs = [process.communicate(timeout=120) for process in [script(code) for _ in range(4)]]
    assert len({stdout for stdout, _ in outputs}) == 1 and len(outputs[0][0]) == 65
    assert all(stderr == "" for _, stderr in outputs)
    assert halve().from_cache and not list(entry().parent.glob("*.tmp"))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_in_mid_write_leaves_no_half_entry(moment: str, script: Script) -> None:
    hang = f"os.{moment} = lambda *_: (print('writing', flush=True), time.sleep(60))\nhalve()"
    process = script(hang)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = compiler.cache_folder() / "kernels"
    (abandoned,) = folder.iterdir()
    assert abandoned.suffix == ".tmp"
    assert not halve().from_cache and halve().from_cache
    assert abandoned.exists(), "it could be another process at work"
    os.utime(abandoned, (time.time() - 7200,) * 2)
    halve(arch="sm_80")
    assert not abandoned.exists()


@pytest.mark.parametrize("obstacle", ["a file in the way", "full"])
def test_a_cache_that_cannot_be_written_is_said_once(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    if obstacle == "a file in the way":
        cache.write_text("")
    else:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    first = halve()
    assert halve().cubin == first.cubin and not halve().from_cache
    said = capfd.readouterr().err
    assert said.count("apex4: ") == 1 and str(cache) in said and "APEX4_CACHE_DIR" in said
    assert not cache.is_dir() or not list(cache.rglob("*.*"))
    assert compiler.why_not_writable(cache) is not None


def test_a_read_only_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    compiled = halve()
    cache = compiler.cache_folder()
    entry().unlink()
    for folder in (cache / "kernels", cache):
        folder.chmod(0o500)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # root may write everywhere
    try:
        compiler._write("0" * 64, compiled)
        compiler._write("1" * 64, compiled)
        assert compiler.why_not_writable(cache) == "Permission denied"
    finally:
        if root:
            os.seteuid(0)
        for folder in (cache, cache / "kernels"):
            folder.chmod(0o700)
    assert not list((cache / "kernels").iterdir())
    said = capfd.readouterr().err
    assert said.count("apex4: ") == 1 and f"({cache}: Permission denied)" in said


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APEX4_CACHE_DIR", "given")
    assert compiler.cache_folder() == Path("given")
    monkeypatch.delenv("APEX4_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "apex4"
    monkeypatch.setenv("HOME", "/home/someone")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert compiler.cache_folder() == Path("/home/someone/.cache/apex4")


# What is said


def test_a_compile_error_is_one_sentence_with_the_log(sources: Path) -> None:
    (sources / "halve.cu").write_text(KERNEL.replace("kept[63", "lost[63"))
    with pytest.raises(compiler.CompileError) as caught:
        halve()
    said = str(caught.value)
    assert "\n" not in said and said.startswith("halve.cu does not compile for sm_86 with NVRTC ")
    assert "FACTOR=3" in said and 'identifier "lost" is undefined' in said
    assert "1 error detected" in caught.value.log and caught.value.log in caught.value.__notes__
    assert not list(compiler.cache_folder().rglob("*")), "nothing is kept of a failure"
    back = pickle.loads(pickle.dumps(caught.value))
    assert (str(back), back.log) == (said, caught.value.log)


@pytest.mark.parametrize("arch", ["sm_12", "turing", "sm_86; rm"])
def test_an_architecture_nvrtc_does_not_know(arch: str) -> None:
    with pytest.raises(compiler.CompileError, match="--gpu-architecture"):
        halve(arch=arch)


def test_ptx_that_does_not_assemble(sources: Path) -> None:
    (sources / "halve.cu").write_text('extern "C" __global__ void halve() { asm volatile("bogus;"); }')
    with pytest.raises(compiler.CompileError, match="bogus"):
        halve()


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(Apex4Error, match=r"no kernel source 'third.cu'"):
        halve(source="third.cu")


def test_without_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler._nvrtc.cache_clear()
    with pytest.raises(Apex4Error, match=r"cuda-core is needed .* pip install 'apex4-quant\[cuda13\]'"):
        halve()


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", missing)
    compiler._nvrtc.cache_clear()
    with pytest.raises(Apex4Error, match=r"its library is not found: pip install 'apex4-quant\[cuda13\]'"):
        halve()


def package_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """The Python packages of NVIDIA have these files."""
    for file in files:
        path = tmp_path / "nvidia" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: packages)


@pytest.mark.parametrize("folder", ["cu13/lib", "cuda_nvrtc/lib"])
def test_the_version_is_in_a_file_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_of(tmp_path, monkeypatch, f"{folder}/libnvrtc.so.12", f"{folder}/libnvrtc-builtins.so.12.8")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: pytest.fail("it was loaded"))
    assert compiler.installed_nvrtc() == "12.8"


@pytest.mark.parametrize(
    "files",
    [
        (),
        ("cu13/lib/libnvrtc-builtins.so.13.5",),  # the library itself is gone
        ("cu13/lib/libnvrtc.so.13",),
        ("cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.5", "cuda_nvrtc/lib/libnvrtc.so.12",
         "cuda_nvrtc/lib/libnvrtc-builtins.so.12.8"),  # either may be the one
    ],
)  # fmt: skip
def test_otherwise_nvrtc_is_asked(files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package_of(tmp_path, monkeypatch, *files)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.1")
    assert compiler.installed_nvrtc() == "13.1"


def test_an_nvrtc_that_is_not_the_packages_keeps_its_own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    real = halve()
    monkeypatch.setattr(compiler, "installed_nvrtc", lambda: "99.9")
    again = halve()  # nothing of 99.9 is there: the loaded one is asked, and its entry found
    assert again.from_cache and again.cubin == real.cubin and len(compiler.cache_entries()) == 1
    entry().unlink()
    assert not halve().from_cache and halve().from_cache
    assert compiler.cache_key("halve.cu", DEFINES, ARCH, compiler.nvrtc_version()) in entry().name
    monkeypatch.undo()


# Headers


def test_where_headers_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: packages)
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.setenv("CUDA_PATH", "")
    assert [str(folder) for folder in compiler._header_candidates(12)] == [
        f"{tmp_path}/nvidia/cu12/include",
        f"{tmp_path}/nvidia/cuda_runtime/include",
        "/opt/cuda/include",
        "/usr/local/cuda/include",
    ]
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert str(next(compiler._header_candidates(13))) == "/opt/cuda/include"


def test_four_headers_are_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC has the others (vector_types.h, nv/target, ...) built in, so nvidia-cuda-runtime is enough."""
    real = compiler.header_folder()
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in compiler.CUDA_HEADERS:
        (alone / name).write_bytes((real / name).read_bytes())
    compiler._headers.cache_clear()
    monkeypatch.setattr(compiler, "_header_candidates", lambda major: [tmp_path / "absent", alone])
    assert compiler.header_folder() == alone
    assert halve().warnings == ""


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_header_candidates", lambda major: [tmp_path])
    compiler._headers.cache_clear()
    with pytest.raises(Apex4Error, match=r"cuda_fp16\.h is found neither .* pip install"):
        halve()


def test_nothing_of_cuda_or_torch_is_imported_with_the_modules(cli_environment: dict[str, str]) -> None:
    code = """
import sys
import apex4_quant.kernels.runtime.compiler, apex4_quant.kernels.runtime.launcher, apex4_quant.kernels.catalogue
import apex4_quant.tools.kernel_build
print(sorted({name.split(".")[0] for name in sys.modules} & {"cuda", "torch", "numpy"}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=cli_environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
