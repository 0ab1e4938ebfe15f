"""A Hub on the loopback interface, this process pointed at it, and checkpoints that are quickly made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..hub_server.server import WRITER, HubServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def hub_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """What points a new process at the server, with a cache of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
    }


@pytest.fixture
def at_hub(hub: HubServer, hub_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """This process pointed at the server: huggingface_hub has read its environment long ago."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session, logging

    for name, value in hub_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", hub_environment["HF_HUB_CACHE"])
    logging.set_verbosity_error()
    close_session()
    return hub


@pytest.fixture
def over_xet(
    at_hub: HubServer, hub_environment: dict[str, str], forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are carried by hf_xet, here and in new processes. It waits for nothing between its attempts."""
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    hub_environment |= {
        "HF_HUB_DISABLE_XET": "", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
    }  # fmt: skip
    for name, value in hub_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    forget()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """forget() makes hf_xet begin as a new process on a new machine does: what it uploaded and fetched it keeps otherwise."""
    from huggingface_hub.utils import _xet

    caches = iter(range(100))

    def begin() -> None:
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / f"xet-{next(caches)}"))
        monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
        _xet.XET_CONNECTION_INFO_CACHE.clear()
        shutil.rmtree(tmp_path / "hf" / "hub", ignore_errors=True)

    return begin


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(name="model", model="meta/Tiny", seed=0, shards=3, licence="mit", **report) -> a folder with all the
    files of a checkpoint and bytes in the place of weights: what publishing reads of it, not what a model loads.
    """

    def make(
        name: str = "model",
        model: str = "meta/Tiny",
        seed: int = 0,
        shards: int = 3,
        licence: str | None = "mit",
        **report: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        files = {}
        for number in range(1, shards + 1):
            shard = folder / f"model-{number:05}-of-{shards:05}.safetensors"
            shard.write_bytes(hashlib.shake_256(f"{seed} {number}".encode()).digest(300_000))
            digest = hashlib.sha256(shard.read_bytes()).hexdigest()
            files[shard.name] = {"bytes": shard.stat().st_size, "sha256": digest}
        quantization = {
            "quant_method": "apex4", "bits": 4, "activation_bits": 4, "group_size": 128, "format_version": 1,
            "layout": "rowmajor", "transform": "hadamard128", "recipe": "gptq", "target": {"gpu": None, "arch": None},
        }  # fmt: skip
        linears = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qkv"]
        write(folder / "config.json", {"model_type": "llama", "quantization_config": quantization})
        write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"a": next(iter(files))}})
        write(folder / "tokenizer.json", {"model": {}})
        write(
            folder / "apex4_report.json",
            {
                "model": model,
                "architecture": "LlamaForCausalLM",
                "quantized": [
                    {"name": name, "shape": [64, 128], "group_size": 128, "transform": "hadamard128", "bytes": 5000,
                     "error": 0.01 * (1 + number)}
                    for number, name in enumerate(linears)
                ],
                "kept": [{"name": "model.norm.weight", "reason": "not a linear", "bytes": 256}],
                "bytes_before": 3_333_333,
                "bits_per_weight": 4.25,
                "versions": {"apex4": "0.1.0", "torch": "2.13.0"},
                "settings": {"model": model, "recipe": "gptq", "group_size": 128, "transform": "hadamard128",
                             "target": "none", "layout": "rowmajor", "calib": "bundled", "samples": 4, "seq_len": 64,
                             "seed": 7, "device": "cpu", "dtype": "bfloat16", "ignore": [], "plan": None},
                "calibration_tokens": 256,
                "files": files,
            }
            | report,
        )  # fmt: skip
        if licence is not None:
            (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        return folder

    return make


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def same_files(hub: HubServer, name: str, folder: Path, revision: str = "main") -> bool:
    """Whether the repository holds the folder's files, byte for byte, by what the server stored."""
    there = {path for path in hub.files(name, revision) if path != ".gitattributes"}
    here = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return there == here and all(hub.content(name, path, revision) == (folder / path).read_bytes() for path in here)


@pytest.fixture
def published_demo(demo_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the quantized demo, to publish."""
    return Path(shutil.copytree(demo_checkpoint, tmp_path / "demo-w4a4"))


@pytest.fixture
def python(hub_environment: dict[str, str], cli_environment: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    """python(code, **env) -> the started process of `python -c code`, pointed at the server."""

    def start(code: str, **env: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=cli_environment | hub_environment | {"PYTHONPATH": path} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
