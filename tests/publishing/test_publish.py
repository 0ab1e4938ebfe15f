"""`apex4 publish` against a server: what arrives, what is sent twice, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.progress import Progress
from apex4_quant.publishing.publish import PublishSettings, publication_as_text, publish

from ..hub_server.server import READER, STRANGER, WRITER, HubServer
from .conftest import same_files

NAME = "acme/tiny-w4a4"


def send(folder: Path, name: str = NAME, dry_run: bool = False, **options: Any) -> dict[str, Any]:
    """Publish without `apex4 check`, which these folders would not pass."""
    settings = PublishSettings(folder, name, without_records=True, **options)
    return publish(settings, Progress(), dry_run, check=lambda folder, progress: None)


def test_everything_arrives_and_a_second_time_nothing_is_sent(
    at_hub: HubServer, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint()
    result = send(folder)
    assert same_files(at_hub, NAME, folder)
    assert result["url"] == f"{at_hub.url}/{NAME}" and result["uploaded"] == len(result["changed"]) == 8
    assert at_hub.store.load(NAME).refs["refs/heads/main"] == result["commit"]

    at_hub.requests.clear()
    again = send(folder)
    assert not [r for r in at_hub.requests if not r.startswith(("GET ", "HEAD "))]
    assert again["uploaded"] == 0 and again["commit"] == result["commit"]
    assert "nothing was uploaded" in publication_as_text(again)


def test_one_commit_brings_everything(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    send(checkpoint(), message="The first of them")
    commits = at_hub.store.load(NAME).commits
    assert len(commits) == 2 and [len(one["files"]) for one in commits.values()] == [1, 9]
    assert [one["title"] for one in commits.values()] == ["initial commit", "The first of them"]


def test_a_change_sends_what_changed_and_removes_what_is_stale(
    at_hub: HubServer, checkpoint: Callable[..., Path]
) -> None:
    send(checkpoint())
    at_hub.store.commit(
        NAME, "main", [header(), file("notes.txt", b"mine"), file("apex4_old.json", b"{}")], create_pr=False
    )
    changed = checkpoint("changed", seed=1, shards=2)
    result = send(changed)
    assert result["removed"] == ["apex4_old.json", *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))]
    assert result["left"] == [".gitattributes", "notes.txt"]
    assert {one["path"] for one in result["changed"]} == {
        "README.md", "apex4_report.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    (changed / "notes.txt").write_bytes(b"mine")
    assert same_files(at_hub, NAME, changed)


def header() -> dict[str, Any]:
    return {"key": "header", "value": {"summary": "by hand"}}


def file(path: str, content: bytes) -> dict[str, Any]:
    return {"key": "file", "value": {"path": path, "content": content}}


def test_dry_run_changes_nothing_and_says_what_a_run_does(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    card = (folder / "README.md").read_bytes()
    planned = send(folder, dry_run=True, private=True)
    assert not at_hub.writes() and (folder / "README.md").read_bytes() == card
    assert "would be made, private" in publication_as_text(planned)
    done = send(folder, private=True)
    assert planned["changed"] == done["changed"] and planned["bytes"] == done["bytes"]


def test_private(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    send(folder, private=True)
    assert at_hub.store.load(NAME).private
    assert send(folder, private=True)["uploaded"] == 0
    send(folder, "acme/public")
    with pytest.raises(UsageError, match="acme/public is public, and --private is asked for"):
        send(folder, "acme/public", private=True)


def test_branch_and_tag(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    result = send(folder, revision="g256", tag="v1")
    refs = at_hub.store.load(NAME).refs
    assert refs["refs/heads/g256"] == refs["refs/tags/v1"] == result["commit"] != refs["refs/heads/main"]
    assert list(at_hub.files(NAME, "main")) == [".gitattributes"] and same_files(at_hub, NAME, folder, "g256")
    assert send(folder, revision="g256", tag="v1")["uploaded"] == 0
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tag v1 of .* is there and names commit"):
        send(folder, revision="g256", tag="v1")
    assert send(folder, revision="g256", tag="v2")["uploaded"] == 1


def test_pull_request_once(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    send(folder)
    (folder / "tokenizer.json").write_text("{}")
    result = send(folder, create_pr=True)
    assert result["url"] == f"{at_hub.url}/{NAME}/discussions/1" and result["pull_request"] == 1
    assert same_files(at_hub, NAME, folder, "refs/pr/1") and not same_files(at_hub, NAME, folder)
    again = send(folder, create_pr=True)
    assert again["pull_request"] == 1 and again["uploaded"] == 0 and len(at_hub.store.load(NAME).pulls) == 1


def test_a_stranger_may_open_a_pull_request(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    send(folder)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="eve is no member of acme"):
        send(folder)
    assert send(folder, create_pr=True)["pull_request"] == 1


@pytest.mark.parametrize(
    ("token", "name", "options", "sentence"),
    [
        (READER, "bob/tiny", {}, "the access token of bob may only read"),
        ("hf_unknown", NAME, {}, "does not accept the access token .401."),
        (WRITER, "library/tiny", {}, "alice has the role 'read' in library"),
        (WRITER, "nowhere/tiny", {}, "alice is no member of nowhere, or there is no such organization"),
        (WRITER, "tiny", {}, "'tiny' is no name on the Hub: give ORG/NAME"),
        (WRITER, "acme/--tiny", {}, "'acme/--tiny' is no legal name on the Hub"),
        (WRITER, NAME, {"create_pr": True}, "a pull request needs a repository"),
        (WRITER, NAME, {"create_pr": True, "revision": "x"}, "leave --revision away"),
        (WRITER, NAME, {"revision": "a..b"}, "--revision 'a..b' is no legal name"),
        (WRITER, NAME, {"create_pr": True, "tag": "v1"}, "--create-pr makes none"),
    ],
)
def test_refused_before_anything_is_sent(
    at_hub: HubServer,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    name: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=sentence) as refusal:
        send(checkpoint(), name, **options)
    assert not at_hub.writes() and token not in str(refusal.value)


def test_without_a_token(
    at_hub: HubServer, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UsageError, match="the Hub needs an access token: run 'hf auth login', or set HF_TOKEN"):
        send(checkpoint())


def test_folders_that_are_refused(at_hub: HubServer, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(Apex4Error) as error:
            send(folder)
        assert not at_hub.writes()
        return str(error.value)

    assert "is no folder" in refusal(tmp_path / "absent")
    unfinished = checkpoint("unfinished")
    (unfinished / ".apex4-run").mkdir()
    assert "holds an unfinished run: finish it with 'apex4 quantize --resume" in refusal(unfinished)
    foreign = checkpoint("foreign")
    (foreign / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "is not quantized by apex4" in refusal(foreign)
    truncated = checkpoint("truncated")
    shard = truncated / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model-00002-of-00003.safetensors has 299999 bytes" in refusal(truncated)
    flipped = checkpoint("flipped")
    shard = flipped / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    assert "does not have its recorded checksum" in refusal(flipped)
    stray = checkpoint("stray")
    shutil.copy(stray / shard.name, stray / "other.safetensors")
    assert "other.safetensors is not a file of this model" in refusal(stray)
    assert "the licence of meta/Tiny is not known" in refusal(checkpoint("unlicensed", licence=None))


def test_nothing_measured_has_to_be_asked_for(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"nothing was measured of .* or give --no-eval"):
        publish(PublishSettings(checkpoint(), NAME))


def test_another_model_is_replaced_only_on_request(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    send(checkpoint())
    at_hub.store.commit(NAME, "main", [header(), file("notes.txt", b"of the first")], create_pr=False)
    other = checkpoint("other", model="meta/Other", shards=1)
    before = at_hub.files(NAME)
    with pytest.raises(UsageError, match=r"holds another model than .*--exist-ok to replace it"):
        send(other)
    assert at_hub.files(NAME) == before
    assert "notes.txt" in send(other, exist_ok=True)["removed"]
    assert same_files(at_hub, NAME, other)


def test_handwritten_text_of_the_remote_card_survives(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    send(folder)
    edited = at_hub.content(NAME, "README.md") + b"\nAsk us on Mondays.\n"
    at_hub.store.commit(NAME, "main", [header(), file("README.md", edited)], create_pr=False)
    send(folder)
    assert b"Ask us on Mondays." in at_hub.content(NAME, "README.md")
    assert "Ask us on Mondays." in (folder / "README.md").read_text()


def test_the_token_is_nowhere(at_hub: HubServer, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    result = send(folder)
    assert WRITER not in json.dumps(result) + publication_as_text(result)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(WRITER.encode() in path.read_bytes() for path in written)


def test_many_files_are_listed_over_several_pages(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(shards=40)
    send(folder)
    assert same_files(at_hub, NAME, folder) and send(folder)["uploaded"] == 0
