"""The Hub, as far as publishing needs it: who asks, what a repository holds, one atomic change of it.

All of it goes through huggingface_hub (its token, endpoint, proxies, Xet where that is installed). What that library
leaves to its callers is here: requests that it sends once are sent again after 429, 5xx and lost connections, and every
failure becomes one sentence without the token in it.

A change is one commit: large files are uploaded first (`preupload_lfs_files`), which no reader of the repository sees,
and then everything becomes visible at once, config.json and the index included. `upload_folder` would commit in several
parts where Xet is installed; `upload_large_folder` is no longer in huggingface_hub 2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]  # public, and not in __all__

from ..errors import Apex4Error, UsageError
from ..models.xet_failure import WITHOUT_XET, XetFailure, xet_failure
from .folder import CONFIG_NAME, WEIGHTS_SUFFIX, LocalFile

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 300  # seconds that a server may ask for before the command gives up
BATCH = 5  # files uploaded at once: what a kill loses is at most so many
# hf_xet has up to 64 xorbs on their way, each with 128 MB of memory: 8 GB where the network is slower than the disk.
XET_UPLOADS = ("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "8")
XET_MORE = "HF_XET_HIGH_PERFORMANCE"  # with which a user asks for all there is
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_WRITING_ROLES = ("admin", "write", "contributor")


@dataclass(frozen=True)
class RemoteFile:
    """`sha256` is known of large files only, `git_oid` names the content of the others."""

    path: str
    size: int
    sha256: str | None
    git_oid: str

    def holds(self, local: LocalFile) -> bool:
        if self.size != local.size:
            return False
        return self.sha256 == local.sha256 if self.sha256 is not None else self.git_oid == local.git_oid


@dataclass(frozen=True)
class RemoteState:
    """What a revision of a repository holds. `head` is its commit."""

    head: str
    private: bool
    files: dict[str, RemoteFile]

    @property
    def holds_a_model(self) -> bool:
        return CONFIG_NAME in self.files or any(path.endswith(".safetensors") for path in self.files)

    def differing(self, local: Sequence[LocalFile]) -> list[LocalFile]:
        return [file for file in local if file.path not in self.files or not self.files[file.path].holds(file)]


class ParentMoved(Apex4Error):
    """Somebody else committed since the state was read."""


class Exists(Apex4Error):
    """What was to be created is there already."""


def require_legal(repository: str) -> None:
    """Raise UsageError for a name that the Hub does not allow."""
    parts = repository.split("/")
    if len(parts) != 2:
        raise UsageError(
            f"{repository!r} is no name on the Hub: give ORG/NAME, your user name or an organization first"
        )
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = str(error).splitlines()[0].partition(": '")[0].rstrip(".:")
        raise UsageError(f"{repository!r} is no legal name on the Hub ({reason})") from error


class Hub:
    """One user's way to one repository. `say` is told what is waited for."""

    def __init__(self, repository: str, say: Callable[[str], None] = lambda line: None) -> None:
        require_legal(repository)
        disable_progress_bars()
        self.repository, self.say = repository, say
        self.api = HfApi()
        self.url = f"{self.api.endpoint}/{repository}"

    # Looking.

    def user(self) -> dict[str, Any]:
        """Who the token belongs to. Raises UsageError without a valid one."""
        try:
            return self._call("the access token is checked", self.api.whoami)
        except LocalTokenNotFoundError as error:
            raise UsageError("the Hub needs an access token: run 'hf auth login', or set HF_TOKEN") from error

    def require_rights(self, user: dict[str, Any], opens_pull_request: bool) -> None:
        """Raise UsageError if the user's token or role does not allow what is asked for."""
        name = user.get("name")
        token = (user.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise UsageError(f"the access token of {name} may only read: make one that may write, and log in with it")
        organization = self.repository.partition("/")[0]
        roles = {one.get("name"): one.get("roleInOrg") for one in user.get("orgs") or ()}
        if opens_pull_request or organization == name:
            return
        if organization not in roles:
            raise UsageError(
                f"{name} is no member of {organization}, or there is no such organization: publish as {name}/..., or "
                "with --create-pr if the repository exists"
            )
        if roles[organization] not in (None, *_WRITING_ROLES):
            raise UsageError(
                f"{name} has the role {roles[organization]!r} in {organization}, which may not write: ask for another, or "
                "publish with --create-pr"
            )

    def state(self, revision: str | None = None) -> RemoteState | None:
        """What is there now, None if there is no such repository or revision."""
        try:
            info = self._call("the repository is looked at", self.api.model_info, self.repository, revision=revision)
            listed = self._call(
                "its files are listed",
                lambda: list(self.api.list_repo_tree(self.repository, recursive=True, revision=info.sha)),
            )
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None
        files = {
            entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in listed
            if isinstance(entry, RepoFile)
        }
        return RemoteState(str(info.sha), bool(info.private), files)

    def tags(self) -> dict[str, str]:
        """{tag: commit}."""
        refs = self._call("its tags are listed", self.api.list_repo_refs, self.repository)
        return {tag.name: tag.target_commit for tag in refs.tags}

    def text(self, path: str, revision: str) -> str | None:
        """A small file's content, None if it is not there."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = self._call(
                    f"{path} is read", hf_hub_download, self.repository, path, revision=revision, local_dir=folder
                )
            except RemoteEntryNotFoundError:
                return None
            return Path(found).read_text("utf-8", errors="replace")

    def json(self, path: str, revision: str) -> Any:
        try:
            return json.loads(self.text(path, revision) or "null")
        except ValueError:
            return None

    def open_pull_requests(self) -> Iterator[int]:
        listed = self._call(
            "its pull requests are listed",
            lambda: list(
                self.api.get_repo_discussions(self.repository, discussion_type="pull_request", discussion_status="open")
            ),
        )
        return (one.num for one in listed)

    # Changing.

    def create(self, private: bool) -> None:
        """Raises Exists if somebody was faster."""
        self._call("the repository is created", self.api.create_repo, self.repository, private=private)

    def create_branch(self, branch: str) -> None:
        with contextlib.suppress(Exists):
            self._call("the branch is created", self.api.create_branch, self.repository, branch=branch)

    def create_tag(self, tag: str, commit: str) -> None:
        with contextlib.suppress(Exists):
            self._call("the tag is set", self.api.create_tag, self.repository, tag=tag, revision=commit)

    def upload(
        self,
        folder: Path,
        files: Sequence[LocalFile],
        revision: str | None,
        create_pr: bool,
        advance: Callable[[int], None],
    ) -> list[CommitOperationAdd]:
        """Bring the content of large files to the Hub, where nobody sees it yet. What is there is not sent again."""
        if XET_MORE not in os.environ:
            os.environ.setdefault(*XET_UPLOADS)
        operations: list[CommitOperationAdd] = []
        for batch in _batches(files):
            additions = [_Addition.of(folder, file, advance) for file in batch]
            self._call(
                f"{batch[0].path} is uploaded",
                self.api.preupload_lfs_files,
                self.repository,
                additions,
                revision=revision,
                create_pr=create_pr,
                free_memory=False,
                num_threads=BATCH,
                attempts=1,  # huggingface_hub sends each of these requests again itself
            )
            for addition in additions:
                addition.finish()
            operations += additions
        return operations

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        deletions: Sequence[str],
        message: str,
        parent: str,
        revision: str | None,
        create_pr: bool,
    ) -> tuple[str, str | None]:
        """Make everything visible at once. Returns the commit and, with `create_pr`, the pull request's URL.

        Raises ParentMoved if `parent` is not the revision's commit any more, or if an answer was lost on the way: the
        caller looks which of both it is.
        """
        operations = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in deletions)]
        done = self._call(
            "the files are committed",
            self.api.create_commit,
            self.repository,
            operations,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
            attempts=1,
        )
        return done.oid, done.pr_url

    # Failing.

    def _call(
        self, what: str, function: Callable[..., Result], *args: Any, attempts: int = ATTEMPTS, **kwargs: Any
    ) -> Result:
        """`function` is called again while its failures pass. `what` says in the passive what is done.

        Raises what the methods above handle, else UsageError or Apex4Error with one sentence.
        """
        for attempt in range(1, attempts + 1):
            try:
                return function(*args, **kwargs)
            except (
                RepositoryNotFoundError,
                RevisionNotFoundError,
                RemoteEntryNotFoundError,
                LocalTokenNotFoundError,
            ) as error:
                if not (
                    isinstance(error, RepositoryNotFoundError) and _status(error) == 401 and self._refused_token(error)
                ):
                    raise
                raise self._sentence(what, error) from error
            except Exception as error:
                cause = _cause(error)
                wait = _wait(cause, attempt)
                if wait is None or attempt == attempts:
                    raise self._sentence(what, cause) from error
                if wait > LONGEST_WAIT:
                    raise Apex4Error(
                        f"the Hub asks to wait {wait:.0f} s before {what} (429): run the command again then, what is "
                        "uploaded is kept"
                    ) from error
                self.say(f"  {_reason(cause)} while {what}: again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("unreachable")

    @staticmethod
    def _refused_token(error: Exception) -> bool:
        """huggingface_hub takes a 401 for a missing repository; with a bad token the server says so."""
        return "credentials" in str(error).lower() or "invalid" in str(error).lower()

    def _sentence(self, what: str, error: BaseException) -> Apex4Error:
        status = _status(error)
        server = _server_message(error)
        detail = f" ({_hidden(server)})" if server else ""
        name = self.repository
        again = "run the same command again, what is uploaded is kept"
        failure = xet_failure(error)
        if failure is not None and status not in (401, 403):
            return self._xet_sentence(what, failure)
        if isinstance(error, OfflineModeIsEnabled):
            return UsageError("HF_HUB_OFFLINE is set, and publishing needs the Hub: unset it")
        if status == 401:
            return UsageError(
                "the Hub does not accept the access token (401): run 'hf auth login', or set HF_TOKEN to a valid one"
            )
        if status == 403:
            return UsageError(f"the access token may not do this: {what}, in {name} (403){detail}")
        if status == 404:
            organization = name.partition("/")[0]
            return UsageError(
                f"the Hub knows no {organization} that {name} could belong to (404){detail}: check the name"
            )
        if status == 409:
            return Exists(f"{name} exists already (409){detail}")
        if status == 412:
            return ParentMoved(f"{name} was changed by somebody else in the meantime (412): run the same command again")
        if status in _TRANSIENT:
            return Apex4Error(f"the Hub answers {status} while {what}{detail}: {again}")
        if status is not None:
            return Apex4Error(f"the Hub refuses with {status} while {what}{detail}")
        if _is_network(error):
            lost = ParentMoved if what == "the files are committed" else Apex4Error
            return lost(f"the connection to {self.api.endpoint} failed while {what} ({_reason(error)}): {again}")
        text = _hidden((str(error).strip().splitlines() or [type(error).__name__])[-1])
        return Apex4Error(f"{name} could not be published: {text}, while {what}")

    def _xet_sentence(self, what: str, failure: XetFailure) -> Apex4Error:
        if failure.status == 404 and "/xet-write-token/" in str(failure.url):
            return UsageError(
                f"{self.api.endpoint} offers no Xet, over which huggingface_hub uploads where hf_xet is installed: set "
                f"{WITHOUT_XET} and run the same command again"
            )
        if failure.errno is not None:
            return Apex4Error(f"{os.strerror(failure.errno)}, while {what}: mend that and run the same command again")
        return Apex4Error(
            f"{failure.reason} while {what} over Xet: run the same command again, what is uploaded is kept; "
            f"{WITHOUT_XET} uploads without Xet"
        )


def _batches(files: Sequence[LocalFile]) -> Iterator[list[LocalFile]]:
    """BATCH files each. Over Xet a weight file is alone: hf_xet sends one file with several tasks, says nothing meanwhile, and
    what it sent counts as uploaded only when the batch ends."""
    alone = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
    batch: list[LocalFile] = []
    for file in files:
        apart = alone and any(one.path.endswith(WEIGHTS_SUFFIX) for one in (file, *batch[-1:]))
        if batch and (apart or len(batch) == BATCH):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


class _Addition(CommitOperationAdd):
    """A file to upload whose reading is told to `advance`, also when it is read anew after a lost connection."""

    advance: Callable[[int], None]
    told: int

    @classmethod
    def of(cls, folder: Path, file: LocalFile, advance: Callable[[int], None]) -> _Addition:
        addition = cls(path_in_repo=file.path, path_or_fileobj=str(folder / file.path))
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # it is known: the file is not read once more
        addition.advance, addition.told = advance, 0
        return addition

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with _Told(os.fspath(str(self.path_or_fileobj)), self._tell) as file:
            yield io.BufferedReader(file, 1 << 20)

    def _tell(self, position: int) -> None:
        if position > self.told:
            self.advance(position - self.told)
            self.told = position

    def finish(self) -> None:
        """All of it is there: also what was not read, because the Hub had it."""
        self._tell(self.upload_info.size)


class _Told(io.FileIO):
    def __init__(self, path: str, tell: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._tell_position = tell

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._tell_position(self.tell())
        return count


def _cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps a failed upload into a RuntimeError, and a failed download into one that says that the file
    is not in the cache."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    if isinstance(error, HfHubHTTPError):
        return int(error.response.status_code)
    failure = xet_failure(error)
    return failure.status if failure is not None else None


def _is_network(error: BaseException) -> bool:
    """Transport errors of httpx, under whichever name huggingface_hub uses it, and of the socket beneath."""
    if isinstance(error, HfHubHTTPError):  # an answer, though its class is one of httpx too
        return False
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "httpcore2"}) or isinstance(
        error, ConnectionError | TimeoutError
    )


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds until it is worth another attempt, None if it never is."""
    status = _status(error)
    if status in _TRANSIENT:
        asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
        return float(asked) if asked.isdigit() else float(2 ** (attempt - 1))
    passes = _is_network(error) and not isinstance(error, OfflineModeIsEnabled)
    return float(2 ** (attempt - 1)) if passes else None


def _reason(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answers {status}" if status is not None else _hidden(str(error) or type(error).__name__)


def _server_message(error: BaseException) -> str:
    return " ".join((getattr(error, "server_message", None) or "").split())


def _hidden(text: str) -> str:
    """`text` without the token, should somebody have put it there."""
    token = get_token()
    return text.replace(token, "***") if token else text


def endpoint() -> str:
    return str(constants.ENDPOINT)
