"""What the command line's options take, which of them commands share, and how everything that is refused is said.

No library is imported here: `apex4 COMMAND --help` needs none.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import click

from .errors import Apex4Error, UsageError
from .format.layout_name import LayoutName
from .format.number_format import ACTIVATION_BITS as ACTIVATION_BITS_KNOWN
from .format.number_format import BLOCK, CHANNEL, GroupSize, parse_group_size
from .hardware.dtype_names import DTYPE_NAMES
from .recipes import DEFAULT_RECIPE, recipe_names

_C = TypeVar("_C", bound=Callable[..., object])


# ---- what is refused ------------------------------------------------------------------------------------------------


def is_rank() -> bool:
    """Whether torchrun, or what sets its variables, started this process beside others (distributed/starting.py)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Whether this process prints: of several the first."""
    return not is_rank() or os.environ["RANK"] == "0"


def ranks_started() -> int:
    """How many, where `is_rank`. Raises UsageError if what a launcher sets is no number."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdecimal()):
            raise UsageError(
                f"{name} is {text!r} in the environment: give a whole number, or unset it and use torchrun"
            )
    return int(os.environ["WORLD_SIZE"])


_FIRST_REFUSES_WITHIN = 10.0  # seconds


def _refuse(sentence: str, exit_code: int) -> NoReturn:
    """Say it and exit, before ranks have met. What all ranks refuse is said by the first; what only this one does, by it."""
    if not is_first_rank():
        # A launcher ends all ranks when one fails. Were this the one, the first might be ended before it has said why.
        time.sleep(_FIRST_REFUSES_WITHIN)
        sentence = f"rank {os.environ['RANK']}: {sentence}"
    click.echo(f"apex4: {sentence}", err=True)
    sys.exit(exit_code)


_LONGEST_NAME = 200
BARS_OFF = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    try:
        yield
    except Apex4Error as error:
        _refuse(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError:  # shows the help
        raise
    except click.UsageError as error:
        said = error.format_message().rstrip(".")
        command = error.ctx.command_path if error.ctx else "apex4"
        _refuse(f"{said[0].lower()}{said[1:]}: see '{command} --help'", error.exit_code)
    except BrokenPipeError:
        # The reader of stdout is gone (`apex4 inspect ... | head`): nothing to tell it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a name too long, a folder that may not be read, a disk that fails: no bug of ours
        if error.errno is None:
            raise
        if not isinstance(error.filename, str | bytes | os.PathLike):
            _refuse(f"a file could not be read or written ({error.strerror}): check the disk and the files given", 1)
        name = os.fsdecode(error.filename)
        shown = repr(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}...")
        usage = error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
        _refuse(f"{shown} cannot be used ({error.strerror}): check the name and its permissions", 2 if usage else 1)


class Commands(click.Group):
    """The `apex4` group. What a user can cause is said in one sentence; the traceback of a bug stays."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _in_one_sentence():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
            os.environ.setdefault(library, "error")
        if not sys.stderr.isatty():  # bars of other libraries: tqdm and the Hub's read this when they are imported
            for name in BARS_OFF:
                os.environ.setdefault(name, "1")
        with _in_one_sentence():
            return super().invoke(ctx)


# ---- what options take ----------------------------------------------------------------------------------------------


def _name_of(param: click.Parameter | None) -> str:
    """As on the command line: --seq-len."""
    return max(param.opts, key=len) if param else "the value"


class Whole(click.types.IntParamType):
    """A whole number, bounds included."""

    def __init__(self, least: int, most: int | None = None) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        wanted = f"{self.least} or more" if self.most is None else f"from {self.least} to {self.most}"
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or number < self.least or (self.most is not None and number > self.most):
            raise UsageError(f"{_name_of(param)} is {value}: give a whole number, {wanted}")
        return number


class Multiple(click.types.FloatParamType):
    """A bound, in multiples of the best there is: a number of 1 or more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 1 <= number < float("inf"):
            raise UsageError(
                f"{_name_of(param)} is {value} and counts in multiples of the best there is: give 1 or more"
            )
        return number


class OneOf(click.Choice[str]):
    """One of some names."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__([str(name) for name in names])  # of an enum, click would take the members' own names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            what = _name_of(param).removeprefix("--")
            raise UsageError(f"{what} {value!r} is not known: give one of {', '.join(self.choices)}")
        return str(value)


def _group_size(context: click.Context, param: click.Parameter, value: str) -> GroupSize:
    return parse_group_size(value)


LARGEST = 2**31 - 1
COUNT = Whole(1, LARGEST)
SEED = Whole(-(2**63), 2**64 - 1)  # what torch's generators take


# ---- options --------------------------------------------------------------------------------------------------------


class Option(Protocol):
    """The decorator that adds an option, or several, to a command."""

    def __call__(self, command: _C, /) -> _C: ...


def together(*options: Option) -> Option:
    """Several options as one decorator, in the order of the help."""

    def add(command: _C) -> _C:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def number(name: str, type: Whole, default: int | None, help: str) -> Option:
    """An option that takes a number; without a default, the help says what happens."""
    return click.option(name, type=type, default=default, show_default=default is not None, help=help)


def choice(name: str, names: Sequence[str], default: str | None, help: str) -> Option:
    default = None if default is None else str(default)  # click would show the name of an enum's member
    return click.option(name, type=OneOf(names), default=default, show_default=default is not None, help=help)


def listed(flag: str, help: str, default: str = "", name: str | None = None) -> Option:
    """Several values in one, comma separated. `name` is the parameter's, if not the flag's."""
    names = (flag,) if name is None else (flag, name)
    return click.option(*names, default=default, show_default=bool(default), metavar="LIST", help=help)


OUT = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder: absent or empty."
)
OUT_OR_RESUME = click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Output folder: absent or empty, or --resume."
)
RECIPE = click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    help=f"{', '.join(reversed(recipe_names()))}, or a YAML file.",
)
GROUP_SIZE = click.option(
    "--group-size",
    default=str(BLOCK),
    show_default=True,
    callback=_group_size,
    help=f"{BLOCK}, {2 * BLOCK}, {4 * BLOCK}, ... or '{CHANNEL}'.",
)
ACTIVATION_BITS = click.option(
    "--activation-bits",
    type=OneOf([str(bits) for bits in ACTIVATION_BITS_KNOWN]),
    callback=lambda context, param, value: None if value is None else int(value),
    help="Of the linears' inputs: 8 is closer to the original.  [default: the plan's, or 4]",
)
TARGET = click.option(
    "--target", default="auto", show_default=True, help="GPU ('RTX 3090'), sm_XX, none, or auto: the GPU here."
)
LAYOUT = choice("--layout", list(LayoutName), None, "Order of the packed codes.  [default: what the target reads]")
TEXT = click.option(
    "--calib",
    default="bundled",
    show_default=True,
    help="Text: bundled, a file (.txt, .jsonl with text or messages, .json, also .gz), a Hub data set.",
)
SEQ_LEN = number("--seq-len", COUNT, 2048, "Tokens a window, at most the model's context.")
DRAWN_BY = number("--seed", SEED, 0, "Which windows of the text are drawn.")
DEVICE = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
DEVICE_MAP = click.option(
    "--device-map",
    metavar="MAP",
    help="Spread a model that no GPU holds: auto, balanced, balanced_low_0, sequential, or a JSON file of modules and devices.",
)
DTYPE = choice("--dtype", (*DTYPE_NAMES, "auto"), "auto", "Dtype layers run in; auto: the checkpoint's.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
BOS = choice(
    "--bos", ("auto", "always", "never"), "auto", "Windows begin with BOS; auto: where the tokenizer adds one."
)
SHAPES = listed("--shapes", "Llama-3-8B, Llama-2-70B:down, 4096x4096 (NxK), ...  [default: all]")


def calibration(samples: int | None, help: str) -> Option:
    """Which text is calibrated on: --calib, --samples, --seq-len, --seed, --bos."""
    return together(TEXT, number("--samples", COUNT, samples, help), SEQ_LEN, DRAWN_BY, BOS)


GPUS = number("--gpus", Whole(1, 1024), None, "Share the work among so many GPUs of this host.  [default: one GPU]")
COMPUTING = together(DEVICE, DTYPE, JSON)
