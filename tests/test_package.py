"""The wheel: built, installed into an empty environment, used from another folder."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = sorted(["cli.py", *(str(path.relative_to(ROOT)) for path in (ROOT / "calib").rglob("*.py"))])


def build(source: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build(ROOT, folder, "--sdist")
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source distribution, as `pip install` of one makes it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (folder,) = source.iterdir()
    build(folder, out, "--wheel")
    (path,) = out.glob("*.whl")
    return path


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


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


def test_the_wheel_of_the_source_distribution_is_that_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    (direct,) = tmp_path.glob("*.whl")
    assert files_of(direct) == files_of(wheel)


def test_what_is_linked_into_the_package_is_packed_as_files(wheel: Path, sdist: Path) -> None:
    """cli.py and calib/ stand at the root, apex4_quant has links to them: a link in an archive may lead nowhere."""
    in_wheel = files_of(wheel)
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert len(members) == len(archive.getmembers()), "a file is packed twice"
        assert all(member.isfile() or member.isdir() for member in members.values()), "a link is packed"
        for name in LINKED:
            packed = archive.extractfile(members[f"apex4_quant/{name}"])
            assert packed is not None
            assert packed.read() == in_wheel[f"apex4_quant/{name}"] == (ROOT / name).read_bytes()


def test_kernel_sources_are_in_wheel_and_source_distribution(wheel: Path, sdist: Path) -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "apex4_quant" / "kernels" / "cuda").rglob("*.cu*")}
    assert any(name.endswith(".cuh") for name in sources)
    assert sources <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources | {"constraints.txt", "tests/test_package.py"} <= names


def test_the_installed_wheel_does_the_main_job_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    # The dependencies are lent by the environment of the tests (its folder is appended, so the wheel goes first);
    # the editable install there is not, as .pth files of appended folders are not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    where = subprocess.run(
        [python, "-c", "import apex4_quant.calib, apex4_quant.cli as c; print(c.__file__, apex4_quant.calib.__file__)"],
        cwd=tmp_path, env=outside, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(path.startswith(str(environment)) for path in where), where
    apex4 = environment / "bin" / "apex4"
    command = [apex4, "quantize", "demo", "-o", "out", "--target", "A100", "--samples", "2", "--seq-len", "64"]
    command += ["--recipe", "gptq"]
    subprocess.run(command, cwd=tmp_path, env=outside, check=True, capture_output=True)
    done = subprocess.run([apex4, "check", "out"], cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0 and "out is whole" in done.stdout, done.stderr


def test_no_bare_cli_or_calib_is_importable_from_the_editable_install(tmp_path: Path) -> None:
    installed = importlib.metadata.distribution("apex4-quant").read_text("direct_url.json") or "{}"
    if json.loads(installed).get("url") != ROOT.as_uri():
        pytest.skip("this checkout is not installed")
    code = """
import importlib.util, apex4_quant.cli, apex4_quant.calib.text
print([name for name in ("cli", "calib") if importlib.util.find_spec(name)])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_package_holds_no_second_copy_of_itself() -> None:
    """With the root of the checkout in `apex4_quant.__path__` the package could be imported again inside itself, which
    registers the operators twice."""
    assert importlib.util.find_spec("apex4_quant.calib.text") is not None
    for name in ("apex4_quant.apex4_quant", "apex4_quant.tests", "apex4_quant.scripts"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_calib_imports_nothing_of_apex4() -> None:
    for path in (ROOT / "calib").glob("*.py"):
        source = path.read_text()
        assert "import apex4" not in source and "from apex4" not in source and "from .." not in source, path


def test_kernels_know_nothing_of_models_or_files() -> None:
    """Whom of ours it may import is in test_architecture.py."""
    foreign = {"transformers", "safetensors", "accelerate", "click", "lm_eval", "datasets"}
    paths = list((ROOT / "apex4_quant" / "kernels").rglob("*.py"))
    assert len(paths) > 20
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                top = (node.module or "").partition(".")[0]
                assert node.level > 0 or top not in {*foreign, "apex4_quant"}, f"{path.name}: from {node.module}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name.partition(".")[0] not in {*foreign, "apex4_quant"}, f"{path.name}: {alias.name}"
