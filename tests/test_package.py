"""The wheel: built, installed into an empty environment, used from another folder."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through the source distribution, so that both are tested."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_nothing_common_lands_at_the_top_of_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"apex4_quant", "apex4_quant-0.1.0.dist-info"}
    for needed in (
        "apex4_quant/cli.py",
        "apex4_quant/calib/text.py",
        "apex4_quant/calib/bundled/heldout.txt",
        "apex4_quant/calib/bundled/calibration.txt",
        "apex4_quant/demo/model.safetensors",
        "apex4_quant/demo/checksums.json",
        "apex4_quant/evaluation/tasks/apex4_choice.yaml",
        "apex4_quant/evaluation/tasks/apex4_choice.jsonl",
        "apex4_quant/kernels/reference.py",
    ):
        assert needed in names


def test_kernel_sources_are_in_wheel_and_source_distribution(wheel: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "apex4_quant" / "kernels" / "cuda").iterdir()}
    assert any(name.endswith(".cuh") for name in sources)
    assert sources <= set(zipfile.ZipFile(wheel).namelist())
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources | {"constraints.txt", "tests/test_package.py"} <= names


def test_the_installed_wheel_does_the_main_job_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    # The dependencies are lent by the environment of the tests (its folder is appended, so the wheel goes first);
    # the editable install there is not, as .pth files of appended folders are not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = subprocess.run(
        [python, "-c", "import apex4_quant.calib, apex4_quant.cli as c; print(c.__file__, apex4_quant.calib.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(environment)) for path in where), where
    apex4 = environment / "bin" / "apex4"
    command = [apex4, "quantize", "demo", "-o", "out", "--target", "A100", "--samples", "2", "--seq-len", "64"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([apex4, "check", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "out is whole" in done.stdout, done.stderr


def test_no_bare_cli_or_calib_is_importable_from_the_editable_install(tmp_path: Path) -> None:
    code = """
import importlib.util
print([name for name in ("cli", "calib") if importlib.util.find_spec(name)])
import apex4_quant.cli, apex4_quant.calib.text
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_calib_imports_nothing_of_apex4() -> None:
    for path in (ROOT / "calib").glob("*.py"):
        source = path.read_text()
        assert "import apex4" not in source and "from apex4" not in source and "from .." not in source, path


def test_kernels_know_nothing_of_models_or_files() -> None:
    """Of ours, the kernels package imports itself, the number format, the layouts and the errors."""
    ours = {"errors", "layouts", "number_format"}
    foreign = {"transformers", "safetensors", "accelerate", "click", "lm_eval", "datasets"}
    for path in (ROOT / "apex4_quant" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                top = (node.module or "").partition(".")[0]
                assert node.level < 2 or top in ours, f"{path.name}: from ..{node.module}"
                assert node.level > 0 or top not in {*foreign, "apex4_quant"}, f"{path.name}: from {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name.partition(".")[0] not in {*foreign, "apex4_quant"}, f"{path.name}: {alias.name}"
