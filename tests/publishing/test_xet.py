"""Publishing and loading over Xet, as huggingface_hub does where hf_xet is installed: the real client, a CAS of the tests."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.models.source import resolve_model
from apex4_quant.publishing import remote

from ..hub_server.server import STRANGER, WRITER, HubServer
from .conftest import same_files
from .test_faults import PUBLISH, looks_whole
from .test_publish import NAME, send

pytest.importorskip("hf_xet")
SIZE = 300_000  # of a shard


@pytest.fixture(autouse=True)
def always(over_xet: None) -> None:
    """All of these tests."""


def asked_for(hub: HubServer, part: str) -> int:
    return sum(part in request for request in hub.requests)


def same_model(folder: Path) -> bool:
    """Whether what the Hub's name gives is the folder, byte for byte."""
    there = resolve_model(NAME)
    return all(
        (there / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir() if path.suffix != ".svg"
    )


def test_published_and_loaded_over_xet(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, forget: Callable[[], None]
) -> None:
    folder = checkpoint()
    result = send(folder)
    assert result["uploaded"] == 8 and same_files(at_hub, NAME, folder)
    assert asked_for(at_hub, "/cas/v2/shards") == 3 and not asked_for(at_hub, "/lfs/")
    assert SIZE * 3 < at_hub.received < SIZE * 3.1, "shards are random bytes: each is sent once"
    assert send(folder)["uploaded"] == 0 and asked_for(at_hub, "/cas/v2/shards") == 3
    assert same_model(folder)
    assert asked_for(at_hub, "/cas/v2/reconstructions/") >= 3 and not asked_for(at_hub, "/cdn/")
    forget()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert same_model(folder) and asked_for(at_hub, "GET /cdn/") == 3


def test_a_stranger_opens_a_pull_request(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CAS gives a token to write, for pull requests, to those who may only read the repository."""
    send(checkpoint("old", shards=1))
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    new = checkpoint("new", seed=1, shards=1)
    assert send(new, create_pr=True)["pull_request"] == 1
    assert same_files(at_hub, NAME, new, "refs/pr/1") and not same_files(at_hub, NAME, new)


@pytest.mark.parametrize(
    ("given", "uploads"),
    [({}, 8), ({remote.XET_UPLOADS[0]: "2"}, 2), ({remote.XET_MORE: "1"}, None)],
    ids=["bounded", "by the user", "all there is"],
)
def test_uploads_at_once_which_take_memory(
    at_hub: HubServer,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    uploads: int | None,
) -> None:
    """As hf_xet reads it. What it takes is measured by scripts/bench/publish."""
    from hf_xet import XetConfig

    for name in (remote.XET_UPLOADS[0], remote.XET_MORE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = XetConfig().get("client.ac_max_upload_concurrency")
    send(checkpoint(shards=1))
    assert XetConfig().get("client.ac_max_upload_concurrency") == (uploads or before)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["the same machine", "another machine"])
def test_of_a_change_only_new_chunks_are_sent(
    at_hub: HubServer, checkpoint: Callable[..., Path], forget: Callable[[], None], elsewhere: bool
) -> None:
    """Another machine learns from the CAS which chunks are there."""
    folder = checkpoint(shards=1)
    send(folder)
    first, at_hub.received = at_hub.received, 0
    if elsewhere:
        forget()
    shard = next(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Apex4Error, match="does not have its recorded checksum"):
        send(folder)
    record_again(folder, shard)
    send(folder)
    assert same_files(at_hub, NAME, folder) and same_model(folder)
    assert 0 < at_hub.received < first / 2


def record_again(folder: Path, shard: Path) -> None:
    report = json.loads((folder / "apex4_report.json").read_text())
    report["files"][shard.name]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (folder / "apex4_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("xet-write-token", {"status": 500}),
        ("xet-write-token", {"cut_after": 0}),
        ("xorb-grants", {"status": 404, "times": 1000}),  # a server without grants
        ("cas-upload", {"cut_after": 100_000}),
        ("cas-upload", {"lose_answer": True}),
        ("xorb-commits", {"lose_answer": True}),
        ("shards", {"status": 503}),
        ("shards", {"lose_answer": True}),
    ],
)
def test_what_passes_is_tried_again(
    at_hub: HubServer, checkpoint: Callable[..., Path], pattern: str, fault: dict[str, Any]
) -> None:
    folder = checkpoint(shards=1)
    injected = at_hub.inject(pattern, **fault)
    send(folder)
    assert injected.hits and same_files(at_hub, NAME, folder)


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        ("xet-write-token", {"status": 401}, "does not accept the access token .401."),
        ("xet-write-token", {"status": 403}, "the access token may not do this: .*is uploaded, in acme/tiny-w4a4 .403."),
        ("xorb-grants", {"status": 500}, "answers 500 while .* is uploaded over Xet: .*; HF_HUB_DISABLE_XET=1 uploads without"),
        ("cas/", {"cut_after": 0}, "does not answer while .* is uploaded over Xet: .*; HF_HUB_DISABLE_XET=1 uploads without"),
        ("xorb-commits", {"corrupt": True}, "could not be published: .* does not have this checksum, while .* is uploaded"),
    ],
)  # fmt: skip
def test_what_stays_is_said_and_the_next_run_ends_it(
    at_hub: HubServer,
    checkpoint: Callable[..., Path],
    forget: Callable[[], None],
    pattern: str,
    fault: dict[str, Any],
    sentence: str,
) -> None:
    folder = checkpoint(shards=1)
    injected = at_hub.inject(pattern, times=1000, **fault)
    with pytest.raises(Apex4Error, match=sentence) as error:
        send(folder)
    text = str(error.value)
    assert "\n" not in text and WRITER not in text and "http" not in text.replace(at_hub.url, "")
    assert not looks_whole(at_hub)
    at_hub.faults.remove(injected)
    forget()
    for xorb in (at_hub.cas.folder / "xorbs").iterdir():
        xorb.unlink()  # a damaged one would not be asked for again
    send(folder)
    assert same_files(at_hub, NAME, folder)


def test_a_server_without_xet(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub 2 takes Xet without asking: the sentence says what to set, and that uploads over LFS."""
    folder = checkpoint()
    at_hub.inject("xet-write-token|/cas/", times=1000, status=404)
    with pytest.raises(UsageError, match=r"offers no Xet, .*: set HF_HUB_DISABLE_XET=1 and run the same command again"):
        send(folder)
    assert not looks_whole(at_hub)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    send(folder)
    assert same_files(at_hub, NAME, folder) and asked_for(at_hub, "PUT /lfs/") == 3


@pytest.mark.parametrize(
    ("pattern", "fault", "stored"),
    [
        ("cas-upload", {"hold": True, "cut_after": 100_000, "skip": 1}, 1),  # in the middle of the second shard
        ("shards", {"hold": True, "lose_answer": True, "skip": 1}, 2),  # registered, and the publisher does not know
    ],
    ids=["in an upload", "after a registration"],
)
def test_kill_and_the_same_command_again(
    at_hub: HubServer,
    checkpoint: Callable[..., Path],
    python: Callable[..., subprocess.Popen[str]],
    pattern: str,
    fault: dict[str, Any],
    stored: int,
) -> None:
    folder = checkpoint()
    held = at_hub.inject(pattern, **fault)
    first = python(PUBLISH)
    if not held.reached.wait(60):
        pytest.fail(f"the fault never struck: {first.communicate()}")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not looks_whole(at_hub) and len(list(at_hub.store.objects_uploaded())) == stored
    at_hub.released.set()
    at_hub.received = 0
    output, errors = python(PUBLISH).communicate(timeout=60)
    assert errors == "" and output.strip() == "8", errors
    assert same_files(at_hub, NAME, folder)
    assert at_hub.received < SIZE * (3.1 - stored), "what was stored is not sent again"


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        ("cas-data", {"status": 404}, "answers 404 over Xet, try again later, or set HF_HUB_DISABLE_XET=1"),
        ("reconstructions", {"cut_after": 0}, "does not answer over Xet, try again later, or set HF_HUB_DISABLE_XET=1"),
    ],
)
def test_a_download_that_fails(
    at_hub: HubServer, checkpoint: Callable[..., Path], pattern: str, fault: dict[str, Any], sentence: str
) -> None:
    folder = checkpoint(shards=1)
    send(folder)
    injected = at_hub.inject(pattern, times=1000, **fault)
    with pytest.raises(UsageError, match=sentence) as error:
        resolve_model(NAME)
    assert "\n" not in str(error.value)
    at_hub.faults.remove(injected)
    assert same_model(folder)


def test_disk_full_on_download(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(shards=1)
    send(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UsageError, match=f"no space left to download model '{NAME}' into the Hub's cache"):
            resolve_model(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert same_model(folder)
