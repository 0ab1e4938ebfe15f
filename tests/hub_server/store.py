"""What a Hub keeps: content-addressed objects and, for every repository, commits that are lists of files, and refs.

Everything is a file under one folder, written whole or not at all, so that a second server over the same folder goes on
where the first one ended. There is no git: a commit's name is a hash of what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
REGULAR_LIMIT = 10 * 1024 * 1024  # larger files are LFS whatever their name


class Missing(Exception):
    """What the Hub answers with 404 and an X-Error-Code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Conflict(Exception):
    """What the Hub answers with 409 or 412."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Refused(Exception):
    """What the Hub answers with any other status, and says why."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """`commits`: {oid: {"parent", "title", "files": {path: {"oid", "size", "lfs"}}}}; `refs`: {full ref name: oid}."""

    name: str
    private: bool
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def resolve(self, revision: str) -> str:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise Missing("RevisionNotFound")
        return found[0]

    def files(self, revision: str) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = self.commits[self.resolve(revision)]["files"]
        return files


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        (folder / "objects").mkdir(parents=True, exist_ok=True)

    # Objects: content under its git or SHA-256 name.

    def object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def put(self, content: bytes) -> str:
        oid = git_blob_id(content)
        self._write(self.object(oid), content)
        return oid

    # Repositories.

    def _file(self, name: str) -> Path:
        return self.folder / "repositories" / name.replace("/", "--") / "repository.json"

    def exists(self, name: str) -> bool:
        return self._file(name).is_file()

    def load(self, name: str) -> Repository:
        if not self.exists(name):
            raise Missing("RepoNotFound")
        return Repository(**json.loads(self._file(name).read_text()))

    def save(self, repository: Repository) -> None:
        self._file(repository.name).parent.mkdir(parents=True, exist_ok=True)
        self._write(self._file(repository.name), json.dumps(repository.__dict__).encode())

    def create(self, name: str, private: bool) -> Repository:
        """With the commit that every new repository has: .gitattributes."""
        with self.lock:
            if self.exists(name):
                raise Conflict(409, "You already created this model repo")
            repository = Repository(name, private)
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
            files = {".gitattributes": {"oid": self.put(attributes), "size": len(attributes), "lfs": False}}
            self._append(repository, "refs/heads/main", None, "initial commit", files)
            return repository

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]], create_pr: bool) -> dict[str, Any]:
        """Apply the NDJSON lines of a commit request. Raises Conflict or Missing, and then nothing has changed."""
        with self.lock:
            repository = self.load(name)
            header = next(line["value"] for line in lines if line["key"] == "header")
            parent = repository.resolve(revision)
            if header.get("parentCommit") not in (None, parent):
                raise Conflict(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repository.files(parent))
            for line in lines:
                files = self._applied(files, line["key"], line["value"])
            ref = f"refs/heads/{revision}" if f"refs/heads/{revision}" in repository.refs else revision
            if create_pr:
                ref = f"refs/pr/{len(repository.pulls) + 1}"
                repository.pulls.append({"num": len(repository.pulls) + 1, "title": header["summary"]})
            elif ref not in repository.refs:
                raise Missing("RevisionNotFound")
            oid = self._append(repository, ref, parent, header["summary"], files)
            return {"oid": oid, "pull": len(repository.pulls) if create_pr else None}

    def _applied(self, files: dict[str, Any], key: str, value: dict[str, Any]) -> dict[str, Any]:
        if key == "header":
            return files
        path = value["path"]
        if key == "deletedFile":
            if path not in files:
                raise Missing("EntryNotFound")
            return {name: entry for name, entry in files.items() if name != path}
        if key == "deletedFolder":
            return {name: entry for name, entry in files.items() if not name.startswith(path.rstrip("/") + "/")}
        if key == "file":
            return files | {path: {"oid": self.put(value["content"]), "size": len(value["content"]), "lfs": False}}
        assert key == "lfsFile", key
        stored = self.object(value["oid"])
        if not stored.is_file():
            raise Conflict(400, f"LFS object {value['oid']} of {path} was never uploaded")
        return files | {path: {"oid": value["oid"], "size": stored.stat().st_size, "lfs": True}}

    def _append(self, repository: Repository, ref: str, parent: str | None, title: str, files: dict[str, Any]) -> str:
        commit = {"parent": parent, "title": title, "files": files}
        oid = hashlib.sha1(json.dumps([commit, ref, len(repository.commits)], sort_keys=True).encode()).hexdigest()
        repository.commits[oid] = commit
        repository.refs[ref] = oid
        self.save(repository)
        return oid

    def objects_uploaded(self) -> Iterator[str]:
        return (path.name for path in (self.folder / "objects").iterdir() if len(path.name) == 64)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
