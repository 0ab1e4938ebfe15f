"""`apex4 doctor` and `apex4 kernels`: what they say on machines that are not here, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels.catalogue import Configuration, configurations, kernel_family, sm_of
from apex4_quant.kernels.experts import configs as expert_configs
from apex4_quant.kernels.gemm import configs as gemm_configs
from apex4_quant.kernels.gemm import fused_linear, s8_configs, sm90_s8_configs
from apex4_quant.kernels.quantize import configs as quantize_configs
from apex4_quant.kernels.runtime import compiler
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES
from apex4_quant.kernels.sweeps import configs as sweep_configs
from apex4_quant.kernels.training import configs as training_configs
from apex4_quant.progress import Progress
from apex4_quant.tools import doctor, kernel_build

Call = Callable[..., Any]
MISSING = "cuda-core is needed to compile kernels and is not installed: pip install it"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("APEX4_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """machine(gpus, cuda, nvrtc) pretends: GPUs as (name, capability), CUDA of the driver, NVRTC (None: not there)."""

    def pretend(
        gpus: list[tuple[str, tuple[int, int]]], cuda: str | None, nvrtc: str | None, build: str | None
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(doctor, "_driver", lambda: {"release": "580.95" if cuda else None, "cuda": cuda})

        def version() -> str:
            if nvrtc is None:
                raise Apex4Error(MISSING)
            return nvrtc

        monkeypatch.setattr(compiler, "nvrtc_version", version)

    return pretend


# doctor


def test_doctor_here(invoke: Call, cache: Path) -> None:
    result = invoke("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.stderr == "" and result.exit_code == bool(found["problems"])
    assert found["torch"]["version"] == torch.__version__
    assert found["packages"]["cuda-core"] and found["compiling"]["problem"] is None
    assert Path(found["compiling"]["headers"], "cuda_fp16.h").is_file()
    assert found["cache"] == {"folder": str(cache), "kernels": 0, "bytes": 0, "not_writable": None}
    text = invoke("doctor").stdout
    assert torch.__version__ in text and str(cache) in text and found["compiling"]["nvrtc"] in text


@pytest.fixture
def eight_bit_families(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, str]], None]:
    """eight_bit_families({90: name}) pretends that there are those kernels of 8-bit activations, and no others."""

    def pretend(families: dict[int, str]) -> None:
        for sm in list(EIGHT_BIT_FAMILIES):
            monkeypatch.delitem(EIGHT_BIT_FAMILIES, sm)
        for sm, family in families.items():
            monkeypatch.setitem(EIGHT_BIT_FAMILIES, sm, family)

    monkeypatch.delenv("APEX4_ACTIVATIONS", raising=False)
    return pretend


def test_doctor_says_with_how_many_bits(
    machine: Call, invoke: Call, eight_bit_families: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine([("A40", (8, 6)), ("H200", (9, 0)), ("B200", (10, 0)), ("T4", (7, 5))], "13.0", "13.5", "13.0")
    eight_bit_families({86: "gemm_s8", 90: "gemm_sm90_s8", 100: "gemm_s8"})

    def lines() -> list[str]:
        return [line.partition(": ")[2] for line in invoke("doctor").stdout.splitlines() if line.startswith("GPU")]

    assert lines() == [
        "the kernels of gemm_sm80.cu; 8-bit activations: gemm_s8.cu, which never ran on such a GPU",
        "the kernels of gemm_sm90_s8.cu, all linears with 8-bit activations",
        "the kernels of gemm_s8.cu, all linears with 8-bit activations, which never ran on such a GPU",
        "PyTorch operations, exact but slow: there are no kernels for it",
    ]
    found = json.loads(invoke("doctor", "--json").stdout)["gpus"]
    assert [gpu["activation_bits"] for gpu in found] == [4, 8, 8, 4]
    assert [gpu["eight_bit_kernels"] for gpu in found] == ["gemm_s8", "gemm_sm90_s8", "gemm_s8", None]
    monkeypatch.setenv("APEX4_ACTIVATIONS", "4")
    assert lines()[1] == "the kernels of gemm_sm90.cu; 8-bit activations: gemm_sm90_s8.cu; experts one after the other"
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    assert (
        lines()[0]
        == "the kernels of gemm_s8.cu, all linears with 8-bit activations (APEX4_ACTIVATIONS=8), which never ran on such a GPU"
    )
    monkeypatch.setenv("APEX4_ACTIVATIONS", "5")
    result = invoke("doctor")
    assert (result.exit_code, result.stderr) == (2, "apex4: APEX4_ACTIVATIONS=5 is not known: give 4, 8 or auto\n")


def test_doctor_of_gpus_with_and_without_kernels(machine: Call, invoke: Call, eight_bit_families: Call) -> None:
    eight_bit_families({})
    gpus = [("NVIDIA A40", (8, 6)), ("NVIDIA H200", (9, 0)), ("Tesla T4", (7, 5)), ("NVIDIA B200", (10, 0))]
    machine(gpus, "13.0", "13.5", "13.0")
    result = invoke("doctor")
    assert result.exit_code == 0 and "problem" not in result.stdout
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert "NVIDIA A40, sm_86: the kernels of gemm_sm80.cu" in lines["GPU 0"]
    assert "NVIDIA H200, sm_90: the kernels of gemm_sm90.cu" in lines["GPU 1"]
    assert "sm_75: PyTorch operations, exact but slow: there are no kernels" in lines["GPU 2"]
    assert "sm_100: PyTorch operations" in lines["GPU 3"]
    assert "580.95, up to CUDA 13.0" in lines["driver"]
    found = json.loads(invoke("doctor", "--json").stdout)
    assert [gpu["kernels"] for gpu in found["gpus"]] == ["gemm_sm80", "gemm_sm90", None, None]


@pytest.mark.parametrize(
    ("gpu", "cuda", "nvrtc", "build", "problem"),
    [
        ((8, 6), "13.0", None, "13.0", MISSING),
        ((8, 6), "12.8", "13.5", "12.8", "NVRTC 13.5 makes kernels that a driver for CUDA 12.8 does not load"),
        ((8, 6), "13.0", "12.9", "12.8", None),
        ((7, 5), "13.0", None, "13.0", MISSING),
        ((8, 7), "13.0", None, "13.0", None),
        (None, "13.0", "13.5", None, "is a build without CUDA"),
        (None, None, None, None, None),
    ],
)
def test_doctor_finds_what_is_missing(
    gpu: Any, cuda: str | None, nvrtc: str | None, build: str | None, problem: str | None, machine: Call, invoke: Call
) -> None:
    machine([("GPU", gpu)] if gpu else [], cuda, nvrtc, build)
    for as_json in ((), ("--json",)):
        result = invoke("doctor", *as_json)
        assert (result.exit_code, result.stderr) == (int(problem is not None), "")
        assert problem is None or problem in result.stdout
        assert "Traceback" not in result.stdout
    found = json.loads(result.stdout)
    assert len(found["problems"]) == (problem is not None)
    assert found["extra"] == ("cuda12" if cuda == "12.8" else "cuda13")
    if nvrtc is None:
        assert "NVRTC" in invoke("doctor").stdout and MISSING in invoke("doctor").stdout


def test_doctor_without_the_packages(invoke: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "_driver", lambda: {"release": None, "cuda": "12.4"})
    text = invoke("doctor").stdout
    assert "cuda-core      not installed: pip install 'apex4-quant[cuda12]'" in text


def test_doctor_of_a_cache(cache: Path, invoke: Call, toy: list[Configuration]) -> None:
    compiler.compile_cubin(toy[0].source, toy[0].defines, "sm_80")
    found = json.loads(invoke("doctor", "--json").stdout)["cache"]
    assert found["kernels"] == 1 and found["bytes"] == sum(file.stat().st_size for file in cache.rglob("*.kernel"))
    cache.rename(cache.with_name("moved"))
    cache.write_text("")
    assert f"{cache}, 0 kernels, 0 B, not writable (" in invoke("doctor").stdout


# configurations


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Two kernels for every architecture, in the place of the real ones. Their source is named by its absolute path."""
    source = tmp_path / "toy.cu"
    source.write_text('extern "C" __global__ void toy(int* p) { p[threadIdx.x] = VALUE; }')
    made = [Configuration(f"toy_{value}", str(source), "toy", {"VALUE": value}) for value in (1, 2)]
    of_modules: tuple[tuple[Any, list[Configuration]], ...] = (
        (gemm_configs, made[:1]), (fused_linear, []), (s8_configs, []), (sm90_s8_configs, []), (quantize_configs, made[1:]),
        (expert_configs, []), (sweep_configs, []), (training_configs, []),
    )  # fmt: skip
    for module, configs in of_modules:
        monkeypatch.setattr(module, "all_configs", lambda sm, configs=configs: configs)
    return made


def test_configurations_are_those_of_all_modules(toy: list[Configuration]) -> None:
    assert configurations("sm_86") == toy and configurations("sm_90") == toy


def test_two_kernels_of_one_name_are_a_bug(toy: list[Configuration], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_configs, "all_configs", gemm_configs.all_configs)
    with pytest.raises(ValueError, match="the name toy_1"):
        configurations("sm_86")


@pytest.mark.parametrize("arch", ["sm_70", "sm_110", "sm_87", "sm_80a", "sm_", "ampere", "86a", ""])
def test_architectures_without_kernels(arch: str) -> None:
    with pytest.raises(UsageError, match="give one of sm_75, sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120"):
        sm_of(arch)


def test_architectures_with_kernels() -> None:
    assert [sm_of(arch) for arch in ("sm_80", "sm86", "SM_89", "sm_90", "sm_90a", "SM_90A")] == [80, 86, 89, 90, 90, 90]
    assert [kernel_family(sm) for sm in (75, 80, 86, 89, 90, 100, 120)] == [
        None, "gemm_sm80", "gemm_sm80", "gemm_sm80", "gemm_sm90", None, None,
    ]  # fmt: skip


# kernels build and list


def test_build_into_the_cache(toy: list[Configuration], cache: Path, invoke: Call) -> None:
    result = invoke("kernels", "build", "--arch", "sm_86", "--arch", "sm_90", "--arch", "sm_90a", "--jobs", 1, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert [(each["arch"], each["name"]) for each in found["kernels"]] == [
        ("sm_86", "toy_1"), ("sm_86", "toy_2"), ("sm_90a", "toy_1"), ("sm_90a", "toy_2"),
    ]  # fmt: skip
    assert found["where"] == str(cache) and len(list(cache.rglob("*.kernel"))) == 4
    first = found["kernels"][0]
    assert first["registers"] > 0 and first["bytes"] > 0
    assert (first["file"], first["from_cache"], first["spill_bytes"], first["warnings"]) == (None, False, 0, "")
    again = invoke("kernels", "build", "--arch", "sm_86", "--jobs", 1)
    assert f"2 kernels in {cache}: 0 compiled, 2 from the cache" in again.stdout
    assert "compiling for sm_86" in again.stderr


def test_build_in_processes_into_a_folder(toy: list[Configuration], cache: Path, invoke: Call, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = invoke("kernels", "build", "--arch", "sm_80", "--jobs", 2, "-o", out, "--json")
    found = json.loads(result.stdout)
    assert sorted(path.name for path in out.iterdir()) == ["toy_1.sm_80.cubin", "toy_2.sm_80.cubin"]
    assert [each["file"] for each in found["kernels"]] == [str(path) for path in sorted(out.iterdir())]
    for each in toy:
        cubin = (out / f"{each.name}.sm_80.cubin").read_bytes()
        assert cubin == compiler.compile_cubin(each.source, each.defines, "sm_80")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_kernel_that_does_not_compile(
    jobs: int, toy: list[Configuration], invoke: Call, one_sentence: Call, tmp_path: Path
) -> None:
    (tmp_path / "toy.cu").write_text("wrong")
    result = invoke("kernels", "build", "--arch", "sm_80", "--jobs", jobs, "--json")
    one_sentence(result, 1, "toy.cu does not compile for sm_80", "VALUE=1", "error: ")


def test_warnings_and_spills_are_told() -> None:
    built = [
        kernel_build.Built("sm_86", "a", "a.cu", None, 1, 1, 0, 0, False, 1.0, "warning: something"),
        kernel_build.Built("sm_86", "b", "b.cu", None, 1, 255, 0, 64, True, 0.0, ""),
    ]
    text = kernel_build.BuildResult(built, 1.0, Path("there")).as_text()
    assert text.splitlines() == [
        "sm_86 a: warning: something",
        "registers are spilled by sm_86 b",
        "2 kernels in there: 1 compiled, 1 from the cache, 1.0 s",
    ]


def test_what_build_refuses(
    toy: list[Configuration], cache: Path, invoke: Call, one_sentence: Call, tmp_path: Path, machine: Call
) -> None:
    (tmp_path / "file").write_text("")
    one_sentence(invoke("kernels", "build", "--arch", "sm_87"), 2, "'sm_87'", "sm_86")
    one_sentence(invoke("kernels", "build", "--arch", "sm_86", "--jobs", 0), 2, "--jobs is 0")
    one_sentence(invoke("kernels", "build", "--arch", "sm_86", "-o", tmp_path / "file"), 2, "is not a folder")
    under = tmp_path / "file" / "under"
    one_sentence(invoke("kernels", "build", "--arch", "sm_86", "-o", under), 1, "cannot be written", str(under))
    result = invoke("kernels", "build")
    assert result.exit_code == 2 and "--arch" in result.stderr
    cache.write_text("")
    one_sentence(invoke("kernels", "build", "--arch", "sm_86"), 1, "cannot be written", "APEX4_CACHE_DIR")


def test_build_without_what_compiles(
    toy: list[Configuration], invoke: Call, one_sentence: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compiler._nvrtc.cache_clear()
    one_sentence(invoke("kernels", "build", "--arch", "sm_86"), 1, "cuda-core", "pip install 'apex4-quant[cuda13]'")
    monkeypatch.undo()
    compiler._nvrtc.cache_clear()
    monkeypatch.setattr(compiler, "supported_archs", lambda: [90, 100])
    with pytest.raises(Apex4Error, match=r"NVRTC \S+ does not compile for sm_86"):
        kernel_build.build(["sm_86"], None, 1, Progress())


def test_list(toy: list[Configuration], invoke: Call, one_sentence: Call) -> None:
    found = json.loads(invoke("kernels", "list", "--json").stdout)["kernels"]
    archs = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
    assert [each["arch"] for each in found] == [arch for arch in archs for _ in toy]
    assert found[0] == {
        "arch": "sm_75",
        "name": "toy_1",
        "source": toy[0].source,
        "entry": "toy",
        "defines": {"VALUE": 1},
    }
    lines = invoke("kernels", "list", "--arch", "sm_90").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["sm_90a", each.name, each.source, f"VALUE={each.defines['VALUE']}"] for each in toy
    ]
    one_sentence(invoke("kernels", "list", "--arch", "sm_70"), 2, "'sm_70'")
