"""Large files in several parts, and the README's block of commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from ..hub_server import server
from ..hub_server.server import HubServer
from .conftest import same_files
from .test_publish import NAME, send

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_in_several_parts(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 000 bytes in parts of 70 000: the last one is shorter."""
    monkeypatch.setattr(server, "PART", 70_000)
    folder = checkpoint()
    send(folder)
    assert same_files(at_hub, NAME, folder)
    parts = sorted(
        int(request.rsplit("/", 1)[1]) for request in at_hub.requests if re.search(r"^PUT .*/part/\d+$", request)
    )
    assert parts == sorted([0, 1, 2, 3, 4] * 3)


def test_a_part_that_is_lost_is_sent_again(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "PART", 70_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    lost = at_hub.inject("PUT .*/part/2", status=500)
    folder = checkpoint()
    send(folder)
    assert lost.times <= 0 or lost.status == 500
    assert same_files(at_hub, NAME, folder)


def test_the_block_of_the_readme(
    at_hub: HubServer,
    invoke: Callable[..., Result],
    python: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """quantize, eval --record, publish and loading by name, line for line, with an organization of the server's for ORG."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```\n(apex4 quantize demo -o demo-w4a4\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = block[1].replace("ORG/", "acme/").strip().splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [words[0] for words in commands] == ["apex4", "apex4", "apex4", "python"]
    for words in commands[:3]:
        result = invoke(*words[1:])
        assert result.exit_code == 0, f"{words}: {result.stderr}"
    (code,) = [words[2] for words in commands[3:]]
    said, errors = python(f"{code}; print('loaded')").communicate(timeout=200)
    assert said.strip().endswith("loaded"), errors
    assert same_files(at_hub, "acme/demo-w4a4", tmp_path / "demo-w4a4")
    card = at_hub.content("acme/demo-w4a4", "README.md").decode()
    assert "nothing was measured" not in card.lower() and "KL" in card
