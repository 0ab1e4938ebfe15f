"""What goes wrong on the way to the Hub ends in success or in one clear sentence, and never in half a model."""

from __future__ import annotations

import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.models.source import resolve_model

from ..hub_server.server import WRITER, HubServer
from .conftest import same_files
from .test_publish import NAME, file, header, send

SHARD = "PUT /lfs/"
COMMIT = "POST .*/commit/"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waiting is remembered and not done."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def looks_whole(hub: HubServer, name: str = NAME, revision: str = "main") -> bool:
    """Whether a reader would take the repository for a model."""
    return hub.store.exists(name) and "config.json" in hub.files(name, revision)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("whoami", {"status": 500}),
        ("whoami", {"status": 429, "headers": {"Retry-After": "7"}}),
        ("GET /api/models/acme/tiny-w4a4$", {"status": 503}),
        ("GET /api/models/acme/tiny-w4a4$", {"cut_after": 0}),
        ("repos/create", {"status": 500}),
        ("repos/create", {"lose_answer": True}),
        ("preupload", {"status": 429, "headers": {"Retry-After": "7"}}),
        ("objects/batch", {"status": 502}),
        (SHARD, {"status": 500}),
        (SHARD, {"cut_after": 100_000}),
        (SHARD, {"cut_after": 100_000, "skip": 2}),
        (SHARD, {"lose_answer": True}),
        ("verify", {"status": 504}),
        (COMMIT, {"lose_answer": True}),
        ("GET .*/tree/", {"status": 500, "skip": 1}),
    ],
)
def test_what_passes_is_waited_for(
    at_hub: HubServer, checkpoint: Callable[..., Path], impatient: list[float], pattern: str, fault: dict[str, Any]
) -> None:
    folder = checkpoint()
    injected = at_hub.inject(pattern, **fault)
    send(folder)
    assert injected.hits > injected.skip, "the fault never struck"
    assert same_files(at_hub, NAME, folder)
    if fault.get("headers"):
        assert any(7 <= seconds <= 8 for seconds in impatient)


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        ("whoami", {"status": 401}, "does not accept the access token .401.: run 'hf auth login'"),
        ("whoami", {"status": 500}, "the Hub answers 500 while the access token is checked"),
        ("whoami", {"status": 429, "headers": {"Retry-After": "3600"}}, "the Hub asks to wait 3600 s"),
        ("repos/create", {"status": 401, "message": "Invalid credentials"}, "does not accept the access token .401."),
        ("repos/create", {"status": 403, "message": "no rights"}, "may not do this: .*created, in acme/tiny-w4a4 .403. .no rights."),
        ("repos/create", {"status": 404, "message": "no such org"}, "the Hub knows no acme that acme/tiny-w4a4 could belong to"),
        ("repos/create", {"status": 402, "message": "pay first"}, "the Hub refuses with 402 while .* .pay first."),
        ("preupload", {"status": 403}, "the access token may not do this: .*is uploaded"),
        ("objects/batch", {"status": 403, "message": "storage limit reached"}, "storage limit reached"),
        (SHARD, {"cut_after": 100_000}, "the connection to http.* failed while .*run the same command again"),
        (SHARD, {"status": 500}, "the Hub answers 500 while .*what is uploaded is kept"),
        (SHARD, {"corrupt": True}, "the Hub refuses with 400 while .*does not have this checksum"),
        (COMMIT, {"status": 412}, "was changed by somebody else in the meantime .412.: run the same command again"),
        (COMMIT, {"status": 500}, "the Hub answers 500 while the files are committed"),
        (COMMIT, {"status": 413}, "the Hub refuses with 413"),
        (COMMIT, {"cut_after": 0}, "the connection to http.* failed while the files are committed"),
    ],
)  # fmt: skip
def test_what_stays_is_said_and_the_next_run_ends_it(
    at_hub: HubServer,
    checkpoint: Callable[..., Path],
    impatient: list[float],
    pattern: str,
    fault: dict[str, Any],
    sentence: str,
) -> None:
    folder = checkpoint()
    injected = at_hub.inject(pattern, times=1000, **fault)
    with pytest.raises(Apex4Error, match=sentence) as error:
        send(folder)
    text = str(error.value)
    assert "\n" not in text and WRITER not in text and "http" not in text.replace(at_hub.url, "")
    assert not looks_whole(at_hub)
    if fault.get("status", 500) not in (429, 500):
        assert not impatient, "waiting for what does not pass"
    at_hub.faults.remove(injected)
    send(folder)
    assert same_files(at_hub, NAME, folder)


def test_somebody_else_makes_the_repository(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    at_hub.inject("repos/create", meanwhile=lambda: at_hub.store.create(NAME, private=False))
    send(folder)
    assert same_files(at_hub, NAME, folder)


def test_somebody_else_makes_the_repository_and_fills_it(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    def fill() -> None:
        at_hub.store.create(NAME, private=False)
        at_hub.store.commit(NAME, "main", [header(), file("config.json", b"{}")], create_pr=False)

    at_hub.inject("repos/create", meanwhile=fill)
    with pytest.raises(UsageError, match="was made by somebody else in the meantime"):
        send(checkpoint())
    assert at_hub.content(NAME, "config.json") == b"{}"


def test_somebody_else_commits_in_between(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    commit = lambda: at_hub.store.commit(NAME, "main", [header(), file("notes.txt", b"x")], create_pr=False)  # noqa: E731
    at_hub.inject(COMMIT, meanwhile=commit)
    with pytest.raises(Apex4Error, match="was changed by somebody else in the meantime"):
        send(folder)
    assert not looks_whole(at_hub)
    received = at_hub.received
    assert "notes.txt" in send(folder)["left"]
    assert looks_whole(at_hub) and at_hub.received == received, "the shards were sent again"


def test_a_file_that_is_not_what_was_sent_is_withdrawn(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    # Looked at once the commit is there: the repository before it, the one just made, and the commit.
    wrong = at_hub.inject("GET .*/tree/", corrupt=True, skip=1)
    with pytest.raises(Apex4Error, match=r"is not what was uploaded .* config.json was removed there"):
        send(folder)
    assert not looks_whole(at_hub)
    at_hub.faults.remove(wrong)
    send(folder)
    assert same_files(at_hub, NAME, folder)


def test_an_update_leaves_the_old_model_whole_until_the_new_one_is(
    at_hub: HubServer, checkpoint: Callable[..., Path]
) -> None:
    old = checkpoint("old")
    send(old)
    new = checkpoint("new", seed=1)
    fault = at_hub.inject(SHARD, times=1000, skip=1, status=500)
    with pytest.raises(Apex4Error, match="the Hub answers 500"):
        send(new)
    assert same_files(at_hub, NAME, old)
    at_hub.faults.remove(fault)
    send(new)
    assert same_files(at_hub, NAME, new)


def test_a_lost_answer_opens_no_second_pull_request(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    send(folder)
    (folder / "tokenizer.json").write_text("{}")
    at_hub.inject(COMMIT, lose_answer=True)
    assert send(folder, create_pr=True)["pull_request"] == 1
    assert len(at_hub.store.load(NAME).pulls) == 1


def test_slow_server(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    slow = [at_hub.inject(pattern, seconds=0.3) for pattern in ("whoami", "repos/create", "preupload", SHARD, COMMIT)]
    send(folder)
    assert all(fault.hits for fault in slow) and same_files(at_hub, NAME, folder)


@pytest.mark.parametrize("fault", [{"status": 500}, {"cut_after": 0}, {"status": 429, "headers": {"Retry-After": "7"}}])
def test_the_remote_card_is_asked_for_again(
    at_hub: HubServer, checkpoint: Callable[..., Path], fault: dict[str, Any]
) -> None:
    """huggingface_hub says of a lost connection that the file is not in the cache: it is no missing file."""
    folder = checkpoint()
    send(folder)
    edited = at_hub.content(NAME, "README.md") + b"\nAsk us on Mondays.\n"
    at_hub.store.commit(NAME, "main", [header(), file("README.md", edited)], create_pr=False)
    at_hub.inject("HEAD .*/resolve/.*/README.md", **fault)
    at_hub.inject("HEAD .*/resolve/.*/apex4_report.json", **fault)
    send(folder)
    assert b"Ask us on Mondays." in at_hub.content(NAME, "README.md")


def test_no_server(at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Apex4Error, match=r"the connection to http://127.0.0.1:9 failed while the access"):
        send(checkpoint())


def test_offline(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set, and publishing needs the Hub: unset it"):
        send(checkpoint())
    assert not impatient


PUBLISH = """
import sys
from pathlib import Path
from apex4_quant.publishing.publish import PublishSettings, publish
settings = PublishSettings(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("model"), "acme/tiny-w4a4",
                           tag="v1", without_records=True)
print(publish(settings, check=lambda folder, progress: None)["uploaded"])
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("pattern", "fault", "stored"),
    [
        ("preupload", {"hold": True}, 0),  # the repository is there, and empty
        (SHARD, {"hold": True, "cut_after": 100_000, "skip": 2}, 2),  # in the middle of the third shard
        (COMMIT, {"hold": True}, 3),  # everything uploaded, nothing committed
        (COMMIT, {"hold": True, "lose_answer": True}, 3),  # committed, and the publisher does not know
        ("POST .*/tag/", {"hold": True}, 3),  # committed and compared
    ],
    ids=["before the upload", "in an upload", "before the commit", "after the commit", "before the tag"],
)
def test_kill_and_the_same_command_again(
    hub: HubServer,
    checkpoint: Callable[..., Path],
    python: Callable[..., subprocess.Popen[str]],
    pattern: str,
    fault: dict[str, Any],
    stored: int,
) -> None:
    folder = checkpoint()
    held = hub.inject(pattern, **fault)
    first = python(PUBLISH)
    if not held.reached.wait(60):
        pytest.fail(f"the fault never struck: {first.communicate()}")
    while len(list(hub.store.objects_uploaded())) < stored:  # the shards beside the one that is held
        threading.Event().wait(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert not looks_whole(hub) or same_files(hub, NAME, folder)
    hub.released.set()
    hub.received = 0
    output, errors = python(PUBLISH).communicate(timeout=60)
    assert errors == "" and output.strip().isdigit(), errors
    assert hub.received == 300_000 * (3 - stored), "what was stored is not sent again"
    assert same_files(hub, NAME, folder)
    assert hub.store.load(NAME).refs["refs/tags/v1"] == hub.store.load(NAME).refs["refs/heads/main"]


def test_disk_full_on_download(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    send(checkpoint())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UsageError, match=f"no space left to download model '{NAME}' into the Hub's cache"):
            resolve_model(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(list(resolve_model(NAME).glob("*.safetensors"))) == 3
