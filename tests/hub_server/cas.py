"""The Hub's content-addressed storage (CAS), which hf_xet uploads to and downloads from: the Xet protocol over a folder.

    upload      chunks of a file -> xorbs, each through a grant: asked for, put, committed -> a shard that lists, for every
                file, its chunks in xorbs and its SHA-256: only now the file is there
    download    hash of a file -> terms, which are chunks in xorbs, and where to fetch their bytes

As the real one does, a shard is taken only if all its xorbs are there and the files that it makes have their SHA-256. What
is registered becomes an object of the `Store`, so that clients without Xet read it too. Checksums of xorbs are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .store import Missing, Refused, Store

if TYPE_CHECKING:
    from .server import HubServer

ENTRY = 48  # bytes of every record of a shard
BOOKEND = b"\xff" * 32 + bytes(16)
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file in a shard
FOOTER = 200
LZ4_FRAME = b"\x04\x22\x4d\x18"
XORB_FOOTER = b"XETBLOB"  # begins what may stand behind a xorb's chunks


class Chunk(NamedTuple):
    """Of a xorb: where its header begins and its data end, how it is stored, its bytes as stored and unpacked."""

    start: int
    end: int
    scheme: int
    size: int


class Term(NamedTuple):
    """Chunks first to end (exclusive) of a xorb, which unpack to `size` bytes."""

    xorb: str
    size: int
    first: int
    end: int


class Cas:
    def __init__(self, store: Store) -> None:
        self.store, self.folder = store, store.folder / "cas"
        for name in ("xorbs", "files", "hashes"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.grants: dict[str, bytes | None] = {}
        self.blocks: dict[str, bytes] = {}  # what a shard says of a xorb, by the hash of each of its chunks
        self.tag = b""  # that begins every shard

    def xorb(self, name: str) -> Path:
        return self.folder / "xorbs" / name

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of an object, None if it was not uploaded over Xet."""
        path = self.folder / "hashes" / sha256
        return path.read_text() if path.is_file() else None

    def terms(self, file: str) -> list[Term]:
        path = self.folder / "files" / file
        if not path.is_file():
            raise Missing("EntryNotFound")
        return [Term(*values) for values in json.loads(path.read_text())]

    def register(self, shard: bytes) -> None:
        """Raises Refused, and then no file of the shard is there."""
        self.tag, version = shard[:32], int.from_bytes(shard[32:40], "little")
        assert version == 2, version
        at, files = ENTRY, []
        while shard[at : at + ENTRY] != BOOKEND:
            flags, count = struct.unpack_from("<2I", shard, at + 32)
            if flags & (WITH_VERIFICATION | WITH_SHA256) != WITH_VERIFICATION | WITH_SHA256:
                raise Refused(400, "a file of the shard has no verification, or no SHA-256")
            records = [at + ENTRY * (1 + index) for index in range(count)]
            terms = [Term(name_of(shard, record), *struct.unpack_from("<3I", shard, record + 36)) for record in records]
            sha256 = at + ENTRY * (1 + 2 * count)
            files.append((name_of(shard, at), name_of(shard, sha256), terms))
            at = sha256 + ENTRY
        for file, sha256, terms in files:
            self._make(sha256, terms)
            (self.folder / "files" / file).write_text(json.dumps(terms))
            (self.folder / "hashes" / sha256).write_text(file)
        at += ENTRY
        while shard[at : at + ENTRY] != BOOKEND:
            end = at + ENTRY * (1 + struct.unpack_from("<I", shard, at + 36)[0])
            for record in range(at + ENTRY, end, ENTRY):
                self.blocks[name_of(shard, record)] = shard[at:end]
            at = end

    def _make(self, sha256: str, terms: list[Term]) -> None:
        """The object that the terms are, zeros as holes, if it is what its name says."""
        found, path = hashlib.sha256(), self.store.object(f"{sha256}.{secrets.token_hex(4)}")
        with path.open("wb") as file:
            for term in terms:
                size = 0
                for piece in self._pieces(term):
                    found.update(piece)
                    size += len(piece)
                    file.seek(len(piece), 1) if not any(piece) else file.write(piece)
                if size != term.size:
                    raise Refused(400, f"chunks {term.first} to {term.end} of {term.xorb} are {size} bytes")
            file.truncate(file.tell())
        if found.hexdigest() != sha256:
            path.unlink()
            raise Refused(400, f"the content stored for {sha256} does not have this checksum")
        path.replace(self.store.object(sha256))

    def _pieces(self, term: Term) -> Iterator[bytes]:
        if not self.xorb(term.xorb).is_file():
            raise Refused(400, f"xorb {term.xorb} was never uploaded")
        content = self.xorb(term.xorb).read_bytes()
        last: tuple[bytes, bytes] = (b"", b"")
        for chunk in chunks_of(content)[term.first : term.end]:
            stored = content[chunk.start : chunk.end]
            if stored != last[0]:  # a file of zeros is the same chunk ever again
                last = stored, unpacked(stored)
            yield last[1]

    def dedup_shard(self, chunk: str) -> bytes:
        """A shard that tells in which xorb the chunk is, and what else is there; its three tables of hashes are empty."""
        if chunk not in self.blocks:
            raise Missing("EntryNotFound")
        body = BOOKEND + self.blocks[chunk] + BOOKEND
        now, end = int(time.time()), ENTRY + len(body)
        footer = struct.pack("<9Q32x2Q72xQ", 1, ENTRY, 2 * ENTRY, *(end, 0) * 3, now, now + 3600, end)
        return self.tag + struct.pack("<2Q", 2, FOOTER) + body + footer

    def reconstruction(self, file: str, start: int, end: int | None, url: str) -> dict[str, Any]:
        """The terms that bytes `start` to `end` (exclusive) of a file lie in; `url` of a xorb's bytes, without its name."""
        at, taken, skipped = 0, [], 0
        for term in self.terms(file):
            if at + term.size > start and (end is None or at < end):
                if not taken:
                    skipped = start - at
                taken.append(term)
            at += term.size
        if start and start >= at:
            raise Refused(416, "the range begins behind the end of the file")
        xorbs = {}
        for name in {term.xorb for term in taken}:
            chunks = chunks_of(self.xorb(name).read_bytes())
            first = min(term.first for term in taken if term.xorb == name)
            behind = max(term.end for term in taken if term.xorb == name)
            bytes_ = {"start": chunks[first].start, "end": chunks[behind - 1].end - 1}
            ranges = [{"chunks": {"start": first, "end": behind}, "bytes": bytes_}]
            xorbs[name] = [{"url": f"{url}/{name}", "ranges": ranges}]
        terms = [
            {"hash": one.xorb, "unpacked_length": one.size, "range": {"start": one.first, "end": one.end}}
            for one in taken
        ]
        return {"offset_into_first_range": skipped, "terms": terms, "xorbs": xorbs}


def name_of(shard: bytes, at: int) -> str:
    """A hash as text: four numbers of 64 bits in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack_from("<4Q", shard, at))


def chunks_of(xorb: bytes) -> list[Chunk]:
    """Each has a header of 8 bytes: 0, stored size (3 bytes), scheme, unpacked size (3 bytes)."""
    at, found = 0, []
    while at < len(xorb) and xorb[at : at + 7] != XORB_FOOTER:
        stored, size = (int.from_bytes(xorb[at + one : at + one + 3], "little") for one in (1, 5))
        end = at + 8 + stored
        if xorb[at] != 0 or xorb[at + 4] > 2 or end > len(xorb):
            raise Refused(400, f"the xorb has no chunk at {at}")
        found.append(Chunk(at, end, xorb[at + 4], size))
        at = end
    return found


def unpacked(chunk: bytes) -> bytes:
    """A chunk with its header -> its data. Schemes: 0 as they are, 1 LZ4, 2 grouped by place in four bytes, then LZ4."""
    scheme, size, data = chunk[4], int.from_bytes(chunk[5:8], "little"), chunk[8:]
    if scheme:
        data = lz4(data)
    if scheme == 2:
        whole, at = bytearray(len(data)), 0
        for place in range(4):
            count = len(range(place, len(data), 4))
            whole[place::4] = data[at : at + count]
            at += count
        data = bytes(whole)
    if len(data) != size:
        raise Refused(400, f"a chunk has {len(data)} bytes and says {size}")
    return data


def lz4(frame: bytes) -> bytes:
    """The content of one LZ4 frame (github.com/lz4/lz4, doc/lz4_Frame_format.md); its checksums are not looked at."""
    assert frame[:4] == LZ4_FRAME, frame[:4]
    flags, out = frame[4], bytearray()
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    while size := int.from_bytes(frame[at : at + 4], "little"):
        block = frame[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            _expand(block, out)
        at += 4 + len(block) + (4 if flags & 16 else 0)
    return bytes(out)


def _expand(block: bytes, out: bytearray) -> None:
    """Sequences of literals, and of what stands `offset` bytes before; the last has literals only."""
    at = 0
    while True:
        token = block[at]
        length, at = _length(block, at + 1, token >> 4)
        out += block[at : at + length]
        at += length
        if at >= len(block):
            return
        offset = int.from_bytes(block[at : at + 2], "little")
        length, at = _length(block, at + 2, token & 15)
        length += 4
        piece = out[-offset:][:length]
        out += (piece * -(-length // len(piece)))[:length]


def _length(block: bytes, at: int, first: int) -> tuple[int, int]:
    """15 is continued by bytes that are added, up to one that is not 255."""
    length = first
    while first in (15, 255) and length >= 15:
        first = block[at]
        length, at = length + first, at + 1
        if first != 255:
            break
    return length, at


class CasRoutes:
    """Of the server's handler. Tokens are of one kind and one repository; those of the Hub are not for the CAS."""

    server_state: HubServer

    def xet_token(self, name: str, kind: str, revision: str) -> Any:
        self._repository(name, write=kind == "write" and "create_pr" not in self.query)
        url, expires = f"{self.server_state.url}/cas", int(time.time()) + 3600
        token = f"xet-{kind}-{name}"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return 200, {"casUrl": url, "accessToken": token, "exp": expires}, headers

    def _require(self, *kinds: str) -> Cas:
        given = self.headers.get("Authorization", "").removeprefix("Bearer xet-").partition("-")[0]
        if given not in ("read", "write"):
            raise Refused(401, "no token of the CAS")
        if given not in kinds:
            raise Refused(403, f"a token to {given}")
        return self.server_state.cas

    def xorb_grant(self, name: str) -> Any:
        cas, asked = self._require("write"), self._json()
        if cas.xorb(name).is_file():
            return {}
        grant = secrets.token_hex(8)
        cas.grants[grant] = None
        assert asked["checksum"]["algo"] == "crc64nvme" and asked["length"] > 0, asked
        url = f"{self.server_state.cdn}/cas-upload/{grant}"
        return 201, {"id": grant, "method": "PUT", "url": url, "headers": {"X-Length": str(asked["length"])}}, {}

    def xorb_upload(self, grant: str) -> Any:
        self._without_token()
        content = self._body()
        if len(content) != int(self.headers["X-Length"]):
            raise Refused(400, "another length than was granted")
        self.server_state.received += len(content)
        self.server_state.cas.grants[grant] = content
        return 200, b"", {}

    def xorb_commit(self, name: str, grant: str) -> Any:
        content = self._require("write").grants.pop(grant, None)
        if content is None:
            raise Missing("EntryNotFound")
        return self._keep(name, content)

    def xorb(self, name: str) -> Any:
        """Without a grant: what clients do that get none."""
        self._require("write")
        content = self._body()
        self.server_state.received += len(content)
        return self._keep(name, content)

    def _keep(self, name: str, content: bytes) -> Any:
        if self.fault is not None and self.fault.corrupt:
            content = content[:8] + bytes([content[8] ^ 1]) + content[9:]
        chunks_of(content)
        self.server_state.cas.xorb(name).write_bytes(content)
        return {"was_inserted": True}

    def shard(self) -> Any:
        """Answers line by line how far it is; what it refuses is told in the last line, under status 200."""
        cas, shard = self._require("write"), self._body()
        lines: list[dict[str, Any]] = [{"type": "validating", "verified": 0, "total": 1}]
        try:
            cas.register(shard)
            lines += [{"type": "committing", "stage": "uploading"}, {"type": "result"}]
        except Refused as error:
            lines.append({"type": "error", "message": str(error), "retryable": False})
        return 200, "".join(json.dumps(line) + "\n" for line in lines).encode(), {}

    def dedup(self, chunk: str) -> Any:
        return 200, self._require("read", "write").dedup_shard(chunk), {}

    def reconstruction(self, file: str) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        assert asked is not None
        end = int(asked[2]) + 1 if asked[2] else None
        url = f"{self.server_state.cdn}/cas-data"
        return self._require("read", "write").reconstruction(file, int(asked[1]), end, url)

    def xorb_data(self, name: str) -> Any:
        self._without_token()
        if "Range" not in self.headers:
            raise Refused(403, "only what was granted")
        return self._content(self.server_state.cas.xorb(name), {})

    def _without_token(self) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")


HASH = r"([0-9a-f]{64})"
CAS_ROUTES = [
    (("GET",), r"/api/models/([^/]+/[^/]+)/xet-(read|write)-token/([^/]+)", "xet_token"),
    (("POST",), f"/cas/v1/xorb-grants/default/{HASH}", "xorb_grant"),
    (("PUT",), r"/cas-upload/([0-9a-f]+)", "xorb_upload"),
    (("POST",), f"/cas/v1/xorb-commits/default/{HASH}/grant/([0-9a-f]+)", "xorb_commit"),
    (("POST",), f"/cas/v1/xorbs/default/{HASH}", "xorb"),
    (("POST",), "/cas/v2/shards", "shard"),
    (("GET",), f"/cas/v1/chunks/default(?:-merkledb)?/{HASH}", "dedup"),
    (("GET",), f"/cas/v2/reconstructions/{HASH}", "reconstruction"),
    (("GET",), f"/cas-data/{HASH}", "xorb_data"),
]
