"""What hf_xet says when it fails. It carries large files to and from the Hub, and raises what Python has: text, read here.

    ConnectionError   Network error: ... HTTP status client error (403 Forbidden), domain: https://host/path
    RuntimeError      Task error: ... error sending request for url (https://host/path)
    RuntimeError      Task error: ... IO Error: No space left on device (os error 28)

Seen in hf_xet 1.8. It has tried again by itself what may pass. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

WITHOUT_XET = "HF_HUB_DISABLE_XET=1"
_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
_URL = re.compile(r"(?:domain: |for url \()(https?://[^\s)]+)")
_ERRNO = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True)
class XetFailure:
    """`status` is None where nobody answered; `errno` that of the operating system; `url` what was asked for."""

    status: int | None
    errno: int | None
    url: str | None

    @property
    def host(self) -> str:
        """Who did not do what was asked."""
        parts = urlsplit(self.url or "")
        return f"{parts.scheme}://{parts.netloc}" if parts.netloc else "the Hub's storage"

    @property
    def reason(self) -> str:
        return f"{self.host} does not answer" if self.status is None else f"{self.host} answers {self.status}"


def xet_failure(error: BaseException) -> XetFailure | None:
    """None for an error that is not hf_xet's."""
    if type(error) not in (ConnectionError, RuntimeError):
        return None
    text = str(error)
    status, url, errno = (pattern.search(text) for pattern in (_STATUS, _URL, _ERRNO))
    if not url and not errno:
        return None
    return XetFailure(int(status[1]) if status else None, int(errno[1]) if errno else None, url[1] if url else None)
