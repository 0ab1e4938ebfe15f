"""Every failure a user can cause or meet, each with the exit code the command line turns it into.

A message is one sentence that says what was given, what is needed and what to do. Nothing here is raised for a bug
of ours: those keep their traceback.
"""

from __future__ import annotations

STOPPING = "stopping after the layer in flight (once more: at once)"  # what is said when a signal asks for it


class Apex4Error(Exception):
    """Something failed: damaged data, no space, a refusal to go on. Exit code 1."""

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        # Names of files and tensors stand in it, and a name may hold the end of a line.
        super().__init__(" ".join(sentence.splitlines()))


class UsageError(Apex4Error):
    """The request itself cannot be carried out as given. Exit code 2."""

    exit_code = 2


class Stopped(Apex4Error):
    """Stopped on request at a safe point; `--resume` goes on from there. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


_LONGEST_SHOWN = 200


def shown(value: object) -> str:
    """A value that was given, as it stands in a sentence."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
