"""The block of a published model's card that serves it, as written: `vllm serve ORG/NAME`, from a Hub on loopback."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ...hub_server.server import STRANGER, WRITER, HubServer
from .serving import Server

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

NAME = "acme/demo-w4a4"


def test_the_card_s_command_serves_the_published_model(
    quantized: Callable[..., Path], cli_environment: dict[str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(quantized("demo", "gptq"), tmp_path / "demo-w4a4")  # publishing writes a card into it
    with HubServer(tmp_path / "hub") as hub:
        at_hub = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HOME": str(tmp_path / "writer"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "apex4_quant", "publish", str(folder), NAME, "--no-eval"]
        done = subprocess.run(
            command, env=cli_environment | at_hub, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        card = hub.content(NAME, "README.md").decode()
        (line,) = re.findall(r"^vllm serve .*$", card, re.MULTILINE)
        assert line == f"vllm serve {NAME}"
        # A reader: another token, an empty cache, and the model by its name.
        reader = at_hub | {"HF_TOKEN": STRANGER, "HF_HOME": str(tmp_path / "reader"), "HF_HUB_OFFLINE": "0"}
        reader["HF_HUB_CACHE"] = str(tmp_path / "reader" / "hub")
        server = Server(line, tmp_path / "log", reader)
        try:
            answer = server.complete()
            assert answer.model == NAME and answer.usage.completion_tokens == 16
            assert len(set(answer.choices[0].text.split())) > 4
        finally:
            server.process.terminate()
            server.process.wait(60)
        assert any(Path(reader["HF_HUB_CACHE"]).rglob("*.safetensors"))
        assert "apex4 computes with PyTorch operations on cpu" in server.log.read_text()
