"""`apex4 publish`: a finished checkpoint to the Hub, so that a reader finds all of it or nothing.

looks, and refuses -> README.md made anew -> every file hashed -> compared with what is there (the same: done)
-> `apex4 check` -> repository and branch made -> large files uploaded, unseen -> one commit of everything
-> the remote files compared with the local ones -> tag

After a kill the same command goes on: what was uploaded is not sent again. torch is imported by the check alone, and a
dry run does without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Apex4Error, UsageError
from ..format.storage import format_bytes, write_bytes
from ..progress import Progress
from .base_model import base_model_of
from .card import handwritten, make_card, read_card
from .folder import CARD_NAME, CONFIG_NAME, INDEX_NAME, REPORT_NAME, CheckpointFolder, LocalFile
from .metadata import read_metadata
from .records import read_records
from .remote import Exists, Hub, ParentMoved, RemoteState, require_legal

MAIN = "main"
# Of an earlier version of the same model: without the new one's files it would be read by mistake.
_STALE = re.compile(r"[^/]+\.safetensors(\.index\.json)?|apex4_[^/]+\.json|apex4_pictures/.+")
_KEPT_OF_ANOTHER = (".gitattributes",)


@dataclass(frozen=True)
class PublishSettings:
    """`repository` is ORG/NAME. `revision` is a branch, made if there is none; `tag` names the commit afterwards.

    `without_records` allows a model of which nothing was measured, `exist_ok` the replacement of another model.
    """

    folder: Path
    repository: str
    private: bool = False
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    message: str | None = None
    without_records: bool = False
    exist_ok: bool = False
    base_model: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """What a run will do. `state` is None where there is no repository yet."""

    checkpoint: CheckpointFolder
    files: list[LocalFile]
    card: str
    state: RemoteState | None
    branch_missing: bool
    changed: list[LocalFile]
    stale: list[str]
    left: list[str]
    licence: str


def run_check(folder: Path, progress: Progress) -> None:
    """`apex4 check`. Raises UsageError or Apex4Error at the first damage."""
    from ..checkpoint.check import check

    check(str(folder), progress.line)


def publish(
    settings: PublishSettings,
    progress: Progress | None = None,
    dry_run: bool = False,
    check: Callable[[Path, Progress], None] = run_check,
) -> dict[str, Any]:
    """Everything `apex4 publish --json` prints. Raises UsageError or Apex4Error, one sentence each."""
    progress = progress or Progress()
    hub = Hub(settings.repository, progress.line)
    prepared = _prepare(settings, hub, progress)
    result = _as_dict(settings, hub, prepared) | {"dry_run": dry_run}
    if dry_run:
        return result
    write_bytes(settings.folder / CARD_NAME, prepared.card.encode())
    if prepared.state is not None and not prepared.changed and not prepared.stale:
        commit = prepared.state.head
        if prepared.branch_missing:
            hub.create_branch(str(settings.revision))
        _tag(settings, hub, commit)
        return result | {"uploaded": 0, "uploaded_bytes": 0, "commit": commit, "url": _url(settings, hub)}
    if settings.create_pr and (found := _same_pull_request(hub, prepared)) is not None:
        opened, commit = found
        return result | {
            "uploaded": 0, "uploaded_bytes": 0, "commit": commit, "url": f"{hub.url}/discussions/{opened}",
            "pull_request": opened,
        }  # fmt: skip
    check(settings.folder, progress)
    state = _repository(settings, hub, prepared)
    commit, pull_request = _send(settings, hub, prepared, state, progress)
    _verify(settings, hub, prepared, commit, pull_request)
    _tag(settings, hub, commit)
    return result | {
        "uploaded": len(prepared.changed),
        "uploaded_bytes": sum(file.size for file in prepared.changed),
        "commit": commit,
        "url": pull_request or _url(settings, hub),
        "pull_request": int(pull_request.rsplit("/", 1)[1]) if pull_request else None,
    }


def _prepare(settings: PublishSettings, hub: Hub, progress: Progress) -> _Prepared:
    """Everything that can be refused, before anything is changed anywhere."""
    require_legal(settings.repository)
    for option, value in (("--revision", settings.revision), ("--tag", settings.tag)):
        if value is not None and not _legal_ref(value):
            raise UsageError(f"{option} {value!r} is no legal name of a branch or tag")
    if settings.create_pr and settings.revision not in (None, MAIN):
        raise UsageError("--create-pr opens a pull request against main: leave --revision away")
    if settings.create_pr and settings.tag is not None:
        raise UsageError("--tag names a commit of a branch, and --create-pr makes none: leave one of them away")
    checkpoint = CheckpointFolder(settings.folder)
    checkpoint.require_whole()
    if not read_records(checkpoint) and not settings.without_records:
        raise UsageError(
            f"nothing was measured of {settings.folder}: run 'apex4 eval {settings.folder} --baseline "
            f"{checkpoint.report['model']} --record' first, or give --no-eval to publish without"
        )
    hub.require_rights(hub.user(), settings.create_pr)
    main = hub.state()
    if main is None and settings.create_pr:
        raise UsageError(f"{settings.repository} is not there, or hidden: a pull request needs a repository")
    if main is not None and settings.private and not main.private:
        raise UsageError(
            f"{settings.repository} is public, and --private is asked for: change it in its settings, or leave it away"
        )
    state, branch_missing = main, False
    if main is not None and settings.revision not in (None, MAIN):
        state = hub.state(settings.revision)
        branch_missing, state = state is None, state or main
    replaces = state is not None and state.holds_a_model and not _same_model(hub, state, checkpoint)
    if replaces and not settings.exist_ok:
        raise UsageError(
            f"{settings.repository} holds another model than {settings.folder}: give another name, or --exist-ok to "
            "replace it"
        )
    tags = hub.tags() if main is not None and settings.tag is not None else {}
    card = _card(settings, hub, checkpoint, state, progress)
    licence = read_metadata(card)[0].get("license")
    if not licence:
        raise UsageError(
            f"the licence of {checkpoint.report['model']} is not known, and a model is published under one: give it with "
            "--license, or as 'license' in the metadata of README.md"
        )
    with progress.stage("checksums", sum(p.stat().st_size for p in checkpoint.published_files()), "B") as advance:
        files = _with_card(checkpoint.manifest(advance), card)
    changed = state.differing(files) if state is not None else files
    stale, left = _surplus(state, files, replaces)
    if settings.tag in tags and (state is None or changed or stale or tags[settings.tag] != state.head):
        raise UsageError(
            f"tag {settings.tag} of {settings.repository} is there and names commit {tags[settings.tag][:12]}: give "
            "another --tag"
        )
    return _Prepared(checkpoint, files, card, state, branch_missing, changed, stale, left, str(licence))


def _legal_ref(name: str) -> bool:
    """The rules of git for the name of a ref, as far as people meet them."""
    return bool(re.fullmatch(r"[\w][\w./+-]*", name)) and not re.search(r"\.\.|//|\.lock$|[./]$", name)


def _same_model(hub: Hub, state: RemoteState, checkpoint: CheckpointFolder) -> bool:
    """Whether what is there was made from the same original: an update and no replacement."""
    report = hub.json(REPORT_NAME, state.head) if REPORT_NAME in state.files else None
    if not isinstance(report, dict) or "model" not in report:
        return False
    return _original(report) == _original(checkpoint.report)


def _original(report: dict[str, Any]) -> tuple[Any, ...]:
    """A folder's name says nothing on another machine: then the tensors' sizes have to tell."""
    model = str(report["model"]).partition("@")[0]
    name = Path(model).name if Path(model).is_absolute() else model
    return (name, report.get("architecture"), report.get("bytes_before"))


def _card(
    settings: PublishSettings,
    hub: Hub,
    checkpoint: CheckpointFolder,
    state: RemoteState | None,
    progress: Progress,
) -> str:
    """README.md made anew, not written yet. Hand-written text of the remote one is taken over where the folder has none of its own."""
    path = checkpoint.folder / CARD_NAME
    existing = read_card(path)
    remote = hub.text(CARD_NAME, state.head) if state is not None and CARD_NAME in state.files else None
    if remote is not None and handwritten(remote) != handwritten(existing):
        if not handwritten(existing):
            existing = remote
            progress.line(f"  hand-written text of {settings.repository}'s card is taken over into {path}")
        else:
            progress.line(f"  hand-written text of {settings.repository}'s card is replaced by that of {path}")
    base = base_model_of(checkpoint, settings.base_model)
    return make_card(checkpoint, base, settings.repository, settings.licence, existing)


def _with_card(files: list[LocalFile], card: str) -> list[LocalFile]:
    """The files as they would be with this card."""
    content = card.encode()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    made = LocalFile(CARD_NAME, len(content), hashlib.sha256(content).hexdigest(), git)
    return sorted([*(file for file in files if file.path != CARD_NAME), made], key=lambda file: file.path)


def _surplus(state: RemoteState | None, files: list[LocalFile], replaces: bool) -> tuple[list[str], list[str]]:
    """(what is removed, what is left alone) of the remote files that are not local ones."""
    if state is None:
        return [], []
    surplus = sorted(set(state.files) - {file.path for file in files})
    if replaces:
        stale = [path for path in surplus if path not in _KEPT_OF_ANOTHER]
    else:
        stale = [path for path in surplus if _STALE.fullmatch(path)]
    return stale, [path for path in surplus if path not in stale]


def _same_pull_request(hub: Hub, prepared: _Prepared) -> tuple[int, str] | None:
    """The number and commit of an open pull request that already brings exactly these files."""
    for number in hub.open_pull_requests():
        state = hub.state(f"refs/pr/{number}")
        if state is not None and not state.differing(prepared.files) and not set(prepared.stale) & set(state.files):
            return number, state.head
    return None


def _repository(settings: PublishSettings, hub: Hub, prepared: _Prepared) -> RemoteState:
    """The repository and the branch, made where they are missing."""
    state = prepared.state
    if state is None:
        try:
            hub.create(settings.private)
        except Exists as error:
            state = hub.state()
            if state is None or state.holds_a_model:
                raise UsageError(
                    f"{settings.repository} was made by somebody else in the meantime: run the command again to compare"
                ) from error
        state = hub.state()
    if settings.revision not in (None, MAIN) and (prepared.branch_missing or prepared.state is None):
        hub.create_branch(str(settings.revision))
        state = hub.state(settings.revision)
    if state is None:
        raise Apex4Error(f"{settings.repository} was made and is not there: run the same command again")
    return state


def _send(
    settings: PublishSettings, hub: Hub, prepared: _Prepared, state: RemoteState, progress: Progress
) -> tuple[str, str | None]:
    """Upload and commit. Returns the commit and the URL of the pull request."""
    revision = None if settings.create_pr else settings.revision
    # What says that here is a model comes last, also within the one commit that brings all of it.
    changed = sorted(prepared.changed, key=lambda file: (file.path in (CONFIG_NAME, INDEX_NAME), file.path))
    total = sum(file.size for file in changed)
    with progress.stage(f"uploading {len(changed)} files", total, "B") as advance:
        additions = hub.upload(settings.folder, changed, revision, settings.create_pr, advance)
    message = settings.message or f"{prepared.checkpoint.folder.resolve().name} by apex4"
    try:
        return hub.commit(additions, prepared.stale, message, state.head, revision, settings.create_pr)
    except ParentMoved:
        # Ours may be the commit that moved it: an answer can be lost on its way.
        if settings.create_pr:
            found = _same_pull_request(hub, prepared)
            if found is not None:
                return found[1], f"{hub.url}/discussions/{found[0]}"
            raise
        now = hub.state(settings.revision)
        if now is None or now.head == state.head or now.differing(prepared.files):
            raise
        return now.head, None


def _verify(settings: PublishSettings, hub: Hub, prepared: _Prepared, commit: str, pull_request: str | None) -> None:
    """Compare what the commit holds with what is here. What differs must not look like a model."""
    state = hub.state(commit)
    wrong = prepared.files if state is None else state.differing(prepared.files)
    if not wrong:
        return
    revision = f"refs/pr/{pull_request.rsplit('/', 1)[1]}" if pull_request else settings.revision
    hidden = [path for path in (CONFIG_NAME, INDEX_NAME) if state is not None and path in state.files]
    if hidden:
        hub.commit([], hidden, "Withdrawn: a file is not what was uploaded", commit, revision, False)
    raise Apex4Error(
        f"{wrong[0].path} of {settings.repository} is not what was uploaded (size or checksum differ): {CONFIG_NAME} was "
        "removed there, so that nobody loads it; run the same command again"
    )


def _tag(settings: PublishSettings, hub: Hub, commit: str) -> None:
    if settings.tag is not None:
        hub.create_tag(settings.tag, commit)


def _url(settings: PublishSettings, hub: Hub) -> str:
    revision = settings.tag or settings.revision
    return hub.url if revision in (None, MAIN) else f"{hub.url}/tree/{revision}"


def _as_dict(settings: PublishSettings, hub: Hub, prepared: _Prepared) -> dict[str, Any]:
    return {
        "folder": str(settings.folder),
        "repository": settings.repository,
        "endpoint": hub.api.endpoint,
        "creates_repository": prepared.state is None,
        "private": settings.private if prepared.state is None else prepared.state.private,
        "revision": settings.revision or MAIN,
        "tag": settings.tag,
        "license": prepared.licence,
        "files": len(prepared.files),
        "bytes": sum(file.size for file in prepared.files),
        "changed": [{"path": file.path, "bytes": file.size} for file in prepared.changed],
        "removed": prepared.stale,
        "left": prepared.left,
    }


def publication_as_text(result: dict[str, Any]) -> str:
    """What the command prints for people."""
    name, changed = result["repository"], result["changed"]
    size = format_bytes(sum(file["bytes"] for file in changed))
    lines = []
    if result["dry_run"]:
        kind = "private" if result["private"] else "public"
        new = f"would be made, {kind}" if result["creates_repository"] else f"is there, {kind}"
        lines.append(f"{name} at {result['endpoint']} {new}; licence {result['license']}")
        lines.append(f"  {len(changed)} of {result['files']} files would be uploaded, {size}:")
        lines += [f"    {file['path']}  {format_bytes(file['bytes'])}" for file in changed]
        lines += [f"    {path}  would be removed" for path in result["removed"]]
        lines.append("  checksums are as recorded; 'apex4 check' would run before the upload; nothing was changed")
    elif not result["uploaded"] and not result["removed"]:
        lines.append(f"{result['url']}: all {result['files']} files are there already, nothing was uploaded")
    else:
        removed = f", {len(result['removed'])} removed" if result["removed"] else ""
        lines.append(f"{result['url']}: {len(changed)} files uploaded ({size}){removed}")
        lines.append(f"  all {result['files']} files compared with the local ones; commit {result['commit']}")
    if result["left"]:
        lines.append(f"  left as they are there: {', '.join(result['left'])}")
    return "\n".join(lines)
