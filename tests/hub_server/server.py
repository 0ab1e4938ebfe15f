"""The HTTP side: what huggingface_hub asks for, answered from a `Store`, and faults where a test wants them.

    with HubServer(folder) as hub:
        HF_ENDPOINT=hub.url HF_TOKEN=WRITER ...

Large files are downloaded from another host name (`localhost`, where the API is `127.0.0.1`), as the Hub redirects to a
CDN: a client that sends its token there is answered with 400. Uploads are LFS, in one part or, above `PART`, in several,
or Xet (cas.py), as the client likes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from .cas import CAS_ROUTES, Cas, CasRoutes
from .store import LFS_SUFFIXES, REGULAR_LIMIT, Conflict, Missing, Refused, Repository, Store

WRITER, READER, STRANGER = "hf_writeWriteWriteWriteWrite", "hf_readReadReadReadReadRead", "hf_strangerStrangerStranger"
PART = 512 * 1024 * 1024
PAGE = 20
PIECE = 64 * 1024

USERS: dict[str, dict[str, Any]] = {
    WRITER: {
        "type": "user",
        "name": "alice",
        "orgs": [{"name": "acme", "roleInOrg": "admin"}, {"name": "library", "roleInOrg": "read"}],
        "auth": {"accessToken": {"displayName": "write", "role": "write"}},
    },
    READER: {
        "type": "user",
        "name": "bob",
        "orgs": [],
        "auth": {"accessToken": {"displayName": "read", "role": "read"}},
    },
    STRANGER: {
        "type": "user",
        "name": "eve",
        "orgs": [],
        "auth": {"accessToken": {"displayName": "write", "role": "write"}},
    },
}


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches, after `skip` of them have passed.

    `status` answers with it and `headers`. `cut_after` closes the connection after so many bytes of the request's body.
    `lose_answer` does what is asked and closes the connection instead of answering. `seconds` delays. `corrupt` flips a
    byte of what is stored. `meanwhile` is called first. `hold` waits until the server is released, before or (with
    `lose_answer`) after the request is carried out; `reached` tells that a request is held.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int = 0
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    lose_answer: bool = False
    seconds: float = 0.0
    corrupt: bool = False
    meanwhile: Callable[[], None] | None = None
    hold: bool = False
    reached: threading.Event = field(default_factory=threading.Event)
    hits: int = 0

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.hits += 1
        return self.skip < self.hits <= self.skip + self.times


class Cut(Exception):
    """The connection is to be closed without an answer."""


class HubServer:
    """A running server on a free port of the loopback interface. `requests` has "METHOD path" of all it was asked."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.cas = Cas(self.store)
        self.requests: list[str] = []
        self.received = 0  # bytes of content, over LFS or Xet
        self.faults: list[Fault] = []
        self.released = threading.Event()
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._http = _Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        assert not self._http.errors, self._http.errors

    def inject(self, pattern: str, **what: Any) -> Fault:
        fault = Fault(pattern, **what)
        self.faults.append(fault)
        return fault

    def files(self, name: str, revision: str = "main") -> dict[str, dict[str, Any]]:
        return self.store.load(name).files(revision)

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        return self.store.object(self.files(name, revision)[path]["oid"]).read_bytes()

    def writes(self) -> list[str]:
        """The requests that could have changed something."""
        return [r for r in self.requests if re.search(r"^PUT |/commit/|/repos/create|/tag/|/branch/", r)]


class _Http(ThreadingHTTPServer):
    """Clients that hang up are what the tests are about; a bug of the server fails the test that met it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.errors: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.errors.append(traceback.format_exc())


class _Handler(CasRoutes, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer
    fault: Fault | None = None

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub = self.server_state
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.route = split.path
        self.body_read = False
        request = f"{self.command} {unquote(self.route)}"
        hub.requests.append(request)
        self.fault = next((fault for fault in hub.faults if fault.strikes(request)), None)
        try:
            self._faults_before()
            status, body, headers = self._answer()
            if self.fault is not None and self.fault.lose_answer:
                self._hold()
                raise Cut
            self._send(status, body, headers)
        except Missing as error:
            self._send(404, {"error": error.code}, {"X-Error-Code": error.code})
        except Conflict as error:
            self._send(error.status, {"error": str(error)})
        except Refused as error:
            self._send(error.status, {"error": str(error)}, error.headers)
        except (Cut, ConnectionError):
            self.close_connection = True

    def _faults_before(self) -> None:
        fault = self.fault
        if fault is None:
            return
        if fault.meanwhile is not None:
            fault.meanwhile()
        if fault.seconds:
            threading.Event().wait(fault.seconds)  # tests patch time.sleep
        if fault.cut_after is not None:
            left = fault.cut_after
            for piece in self._pieces():
                left -= len(piece)
                if left <= 0:
                    break
            self._hold()
            raise Cut
        if fault.hold and not fault.lose_answer:
            self._hold()
            raise Cut
        if fault.status:
            raise Refused(fault.status, fault.message, fault.headers)

    def _hold(self) -> None:
        if self.fault is not None and self.fault.hold:
            self.fault.reached.set()
            self.server_state.released.wait(60)

    # Bodies.

    def _pieces(self) -> Iterator[bytes]:
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                left = size
                while left:
                    piece = self.rfile.read(min(left, PIECE))
                    if not piece:
                        raise ConnectionError
                    left -= len(piece)
                    yield piece
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, PIECE))
            if not piece:
                raise ConnectionError
            left -= len(piece)
            yield piece

    def _body(self) -> bytes:
        return b"".join(self._pieces())

    def _json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._body() or b"{}")
        return value

    def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        if not self.body_read:
            for _ in self._pieces():
                pass
        headers = dict(headers or {})
        source = body if isinstance(body, Path) else None
        if source is None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers.setdefault("Content-Length", str(len(content)))
        if not isinstance(body, bytes | Path):
            headers["Content-Type"] = "application/json"
            if status >= 400 and isinstance(body, dict) and "error" in body:
                headers.setdefault("X-Error-Message", str(body["error"]))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if source is None:
            self.wfile.write(content)
            return
        start, end = self.range
        with source.open("rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(PIECE, end - start))
                start += len(piece)
                self.wfile.write(piece)

    # Who asks, and what they may.

    def _user(self) -> dict[str, Any] | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = USERS.get(given.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, namespace: str) -> bool:
        user = self._user()
        if user is None or user["auth"]["accessToken"]["role"] == "read":
            return False
        roles = {org["name"]: org["roleInOrg"] for org in user["orgs"]} | {user["name"]: "admin"}
        return roles.get(namespace) in ("admin", "write", "contributor")

    def _repository(self, name: str, write: bool = False) -> Repository:
        user = self._user()
        repository = self.server_state.store.load(name)
        namespace = name.partition("/")[0]
        if repository.private:
            members = {org["name"] for org in user["orgs"]} | {user["name"]} if user else set()
            if namespace not in members:
                raise Missing("RepoNotFound")
        if write and not self._may_write(namespace):
            raise Refused(403, f"you do not have write access to {name}")
        return repository

    # Routes.

    def _answer(self) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                answer = getattr(self, name)(*(unquote(part or "") for part in match.groups()))
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Missing("RepoNotFound" if self.route.startswith("/api/") else "EntryNotFound")

    def whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return user

    def create(self) -> Any:
        asked = self._json()
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        namespace = asked.get("organization") or user["name"]
        known = {"acme", "library"} | {one["name"] for one in USERS.values()}
        if namespace not in known:
            raise Refused(404, f"Organization {namespace} not found")
        if not self._may_write(namespace):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        name = f"{namespace}/{asked['name']}"
        self.server_state.store.create(name, asked.get("visibility") == "private")
        return {"url": f"{self.server_state.url}/{name}", "name": name}

    def validate(self) -> Any:
        errors = card_errors(self._json()["content"])
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}

    def info(self, name: str, revision: str = "") -> Any:
        repository = self._repository(name)
        oid = repository.resolve(revision or "main")
        files = repository.files(oid)
        return {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def tree(self, name: str, revision: str, folder: str = "") -> Any:
        files = self._repository(name).files(revision)
        prefix = folder.strip("/") + "/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in files):
            raise Missing("EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                part = prefix + "/".join(inner[:depth])
                if recursive or depth == 1:
                    entries[part] = {"type": "directory", "oid": hashlib.sha1(part.encode()).hexdigest(), "path": part}
                    entries[part]["size"] = 0
            if recursive or len(inner) == 1:
                entries[path] = {"type": "file", "path": path} | self._tree_entry(entry)
        start = int(self.query.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + PAGE]
        headers = {}
        if start + PAGE < len(entries):
            query = f"recursive={recursive}&cursor={start + PAGE}"
            headers["Link"] = f'<{self.server_state.url}{quote(self.route, safe="/%")}?{query}>; rel="next"'
        return 200, page, headers

    def _tree_entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        oid = entry["oid"]
        if self.fault is not None and self.fault.corrupt:
            oid = oid[::-1]
        if not entry["lfs"]:
            return {"oid": oid, "size": entry["size"]}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {entry['size']}\n".encode()
        return {
            "oid": hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(),
            "size": entry["size"],
            "lfs": {"oid": oid, "size": entry["size"], "pointerSize": len(pointer)},
            "xetHash": self.server_state.cas.hash_of(oid),
        }

    def refs(self, name: str) -> Any:
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "converts": "refs/convert/",
            "pullRequests": "refs/pr/",
        }
        found = self._repository(name).refs
        return {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in found.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }

    def preupload(self, name: str, revision: str) -> Any:
        asked = self._json()["files"]
        files = self._repository(name, write="create_pr" not in self.query).files(revision)
        answer = []
        for file in asked:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in files:
                entry["oid"] = files[file["path"]]["oid"]
            answer.append(entry)
        return {"files": answer}

    def lfs_batch(self, name: str) -> Any:
        asked = self._json()
        self._repository(name)
        if self._user() is None:
            raise Refused(401, "Invalid username or password.")
        hub, objects = self.server_state, []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not hub.store.object(item["oid"]).is_file():
                href = f"{hub.url}/lfs/{item['oid']}"
                header: dict[str, str] = {}
                if item["size"] > PART:
                    count = -(-item["size"] // PART)
                    header = {"chunk_size": str(PART)} | {
                        str(number + 1): f"{href}/part/{number}" for number in range(count)
                    }
                entry["actions"] = {
                    "upload": {"href": f"{href}/complete" if header else href, "header": header},
                    "verify": {"href": f"{hub.url}/lfs/{item['oid']}/verify"},
                }
            objects.append(entry)
        return {"transfer": "multipart" if any("actions" in one for one in objects) else "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        return self._store_part(self.server_state.store.object(f"{oid}.uploading"), "wb")

    def lfs_part(self, oid: str, number: str) -> Any:
        mode = "wb" if number == "0" else "r+b"
        return self._store_part(self.server_state.store.object(f"{oid}.uploading"), mode, int(number) * PART)

    def _store_part(self, path: Path, mode: str, start: int = 0) -> Any:
        """Zeros are left out of the file, so that a test of many of them does not need their room."""
        with open(path, mode) as file:
            file.seek(start)
            size = start
            for piece in self._pieces():
                self.server_state.received += len(piece)
                size += len(piece)
                if piece.count(0) == len(piece):
                    file.seek(len(piece), 1)
                else:
                    file.write(piece)
            if size > path.stat().st_size:
                file.truncate(size)
        if self.fault is not None and self.fault.corrupt:
            content = path.read_bytes()
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        return 200, b"", {"ETag": f'"{size}"'}

    def lfs_complete(self, oid: str) -> Any:
        numbers = [part["partNumber"] for part in self._json()["parts"]]
        assert numbers == list(range(1, len(numbers) + 1))
        return {}

    def lfs_verify(self, oid: str) -> Any:
        """An object gets its name only if its content has it."""
        asked, store = self._json(), self.server_state.store
        uploading = store.object(f"{oid}.uploading")
        if not uploading.is_file():
            if store.object(oid).is_file():
                return {}
            raise Refused(404, "the object was not uploaded")
        with uploading.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if (found, uploading.stat().st_size) != (oid, asked["size"]):
            uploading.unlink()
            raise Refused(400, f"the content stored for {oid} does not have this checksum")
        uploading.rename(store.object(oid))
        return {}

    def commit(self, name: str, revision: str) -> Any:
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        create_pr = self.query.get("create_pr") == ["1"]
        self._repository(name, write=not create_pr)
        if self._user() is None:
            raise Refused(401, "Invalid username or password.")
        for line in lines:
            if line["key"] == "file":
                line["value"]["content"] = base64.b64decode(line["value"]["content"])
        done = self.server_state.store.commit(name, revision, lines, create_pr)
        url = f"{self.server_state.url}/{name}"
        answer = {
            "success": True,
            "commitOid": done["oid"],
            "commitUrl": f"{url}/commit/{done['oid']}",
            "hookOutput": "",
        }
        if create_pr:
            answer["pullRequestUrl"] = f"{url}/discussions/{done['pull']}"
        return answer

    def branch(self, name: str, branch: str) -> Any:
        return self._new_ref(name, f"refs/heads/{branch}", self._json().get("startingPoint", "main"))

    def tag(self, name: str, revision: str) -> Any:
        return self._new_ref(name, f"refs/tags/{self._json()['tag']}", revision)

    def _new_ref(self, name: str, ref: str, revision: str) -> Any:
        with self.server_state.store.lock:
            repository = self._repository(name, write=True)
            if ref in repository.refs:
                raise Conflict(409, f"Reference {ref} already exists")
            repository.refs[ref] = repository.resolve(revision)
            self.server_state.store.save(repository)
        return {}

    def discussions(self, name: str) -> Any:
        found = [
            {
                "num": pull["num"],
                "title": pull["title"],
                "author": {"name": "alice"},
                "createdAt": "2026-11-28T00:00:00.000Z",
                "status": "open",
                "isPullRequest": True,
                "repo": {"name": name, "type": "model"},
            }
            for pull in self._repository(name).pulls
        ]
        return {"discussions": found, "count": len(found), "start": 0}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repository = self._repository(name)
        oid = repository.resolve(revision)
        entry = repository.files(oid).get(path)
        if entry is None:
            raise Missing("EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{entry["oid"]}"', "X-Linked-Size": str(entry["size"])}
            if (xet := self.server_state.cas.hash_of(entry["oid"])) is not None:
                route = f"{self.server_state.url}/api/models/{name}/xet-read-token/{oid}"
                headers |= {"X-Xet-Hash": xet, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
            return 302, b"", headers | {"Location": f"{self.server_state.cdn}/cdn/{entry['oid']}"}
        return self._content(self.server_state.store.object(entry["oid"]), headers)

    def cdn(self, oid: str) -> Any:
        self._without_token()
        return self._content(self.server_state.store.object(oid), {"Accept-Ranges": "bytes"})

    def _content(self, path: Path, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]]:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        # A range may end behind the file: readers of headers ask for the first 100 kB of whatever there is.
        self.range = (int(asked[1]), min(int(asked[2] or size) + 1, size)) if asked else (0, size)
        start, end = self.range
        headers = headers | {"Content-Length": str(end - start)}
        if asked:
            return 206, path, headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        return 200, path, headers


NAME, REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("GET",), f"/api/models/{NAME}", "info"),
    (("GET",), f"/api/models/{NAME}/revision/{REVISION}", "info"),
    (("GET",), f"/api/models/{NAME}/tree/{REVISION}(/.*)?", "tree"),
    (("GET",), f"/api/models/{NAME}/refs", "refs"),
    (("POST",), f"/api/models/{NAME}/preupload/{REVISION}", "preupload"),
    (("POST",), f"/api/models/{NAME}/commit/{REVISION}", "commit"),
    (("POST",), f"/api/models/{NAME}/branch/{REVISION}", "branch"),
    (("POST",), f"/api/models/{NAME}/tag/{REVISION}", "tag"),
    (("GET",), f"/api/models/{NAME}/discussions", "discussions"),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), r"/lfs/([0-9a-f]{64})", "lfs_put"),
    (("PUT",), r"/lfs/([0-9a-f]{64})/part/(\d+)", "lfs_part"),
    (("POST",), r"/lfs/([0-9a-f]{64})/complete", "lfs_complete"),
    (("POST",), r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(.+)", "resolve"),
    (("GET", "HEAD"), r"/cdn/([0-9a-f]+)", "cdn"),
    *CAS_ROUTES,
]

LICENSES = {
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "gemma", "openrail", "other", "unknown",
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
REPOSITORY = r"[\w.-]+/[\w.-]+"


def card_errors(content: str) -> list[str]:
    """What the Hub's documentation of model cards requires of the metadata; the Hub's own validator is not public."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    errors = []
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    if "license" in data and data["license"] not in LICENSES:
        errors.append('"license" must be one of the identifiers of the Hub')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is required when license is "other"')
    if "license_name" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license_name"])):
        errors.append('"license_name" must match /^[a-z0-9-.]+$/')
    models = data.get("base_model", [])
    for model in models if isinstance(models, list) else [models]:
        if not re.fullmatch(REPOSITORY, str(model)):
            errors.append(f'"base_model" {model!r} is not a model id from hf.co/models')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append('"base_model_relation" is not known')
    for key in ("tags", "datasets"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(one, str) for one in data.get(key, [])):
            errors.append(f'"{key}" must be a list of strings')
    for dataset in data.get("datasets", []):
        if not re.fullmatch(rf"{REPOSITORY}|[\w-]+", dataset):
            errors.append(f'"datasets" {dataset!r} is not a dataset id')
    languages = data.get("language", [])
    for language in languages if isinstance(languages, list) else [languages]:
        if not re.fullmatch(r"[a-z]{2,3}(-.+)?|multilingual|code", str(language)):
            errors.append(f'"language" {language!r} is not an ISO 639 code')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append('"model-index" needs a name and results')
            continue
        for result in model["results"]:
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"name", "type"} <= set(result.get("dataset", {})):
                errors.append('"model-index[0].results[0].dataset" needs name and type')
            for metric in result.get("metrics", [{}]):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append('"model-index[0].results[0].metrics" needs type and value')
    return errors
