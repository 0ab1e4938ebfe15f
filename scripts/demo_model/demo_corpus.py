"""The English text the demo model is trained on: what every CPython carries.

Sources, all of the running interpreter: `pydoc_data.topics` (the language reference as shown by `help()`), the
docstrings and block comments of the standard library's Python files, and the docstrings of its C modules. One
document per topic or module. Paragraphs are deduplicated over the whole corpus *before* the split, so no paragraph
of the held-out documents occurs in a training document.

The split is by document, decided by a hash of its name:
    heldout     what `apex4 eval` measures on by default; never trained on, never calibrated on
    validation  chooses the training checkpoint
    train       the rest; `calibration` is a subset of its documents
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import pathlib
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator

MIN_PARAGRAPH = 40  # characters; shorter ones are headings and signatures without English
HELDOUT_SHARE, VALIDATION_SHARE, CALIBRATION_SHARE = 0.05, 0.02, 0.14
_SKIPPED = {"site-packages", "lib2to3", "__pycache__", "config"}


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic/{name}", inspect.cleandoc(topics[name])


def _block_comments(source: str) -> list[str]:
    """Runs of whole-line comments, joined; a run reads as prose when it is long enough."""
    runs: list[list[str]] = []
    last = -2
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                if token.start[0] != last + 1:
                    runs.append([])
                runs[-1].append(token.string.lstrip("#!: ").rstrip())
                last = token.start[0]
    except (tokenize.TokenError, SyntaxError):
        return []
    return ["\n".join(run).strip() for run in runs]


def _python_modules() -> Iterator[tuple[str, str]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in _SKIPPED or part.startswith("config-") for part in relative.parts):
            continue
        if relative.parts[:1] == ("pydoc_data",):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        texts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
        texts += [comment for comment in _block_comments(source) if " " in comment]
        yield f"module/{relative.as_posix()}", "\n\n".join(texts)


def _c_modules() -> Iterator[tuple[str, str]]:
    skipped = {"antigravity", "this", "idlelib", "turtle", "tkinter", "turtledemo"}
    for name in sorted(set(sys.stdlib_module_names) | set(sys.builtin_module_names)):
        if name in skipped:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except Exception:
            continue
        if getattr(module, "__file__", "").endswith(".py"):
            continue
        texts = [module.__doc__ or ""]
        for _, value in sorted(vars(module).items()):
            members = [value, *(vars(value)[k] for k in sorted(vars(value)))] if isinstance(value, type) else [value]
            for member in members:
                doc = getattr(member, "__doc__", None)
                named = isinstance(member, type) or inspect.isroutine(member) or inspect.isdatadescriptor(member)
                if named and isinstance(doc, str):
                    texts.append(inspect.cleandoc(doc))
        yield f"cmodule/{name}", "\n\n".join(texts)


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return len(paragraph) >= MIN_PARAGRAPH and letters >= 0.6 * len(paragraph)


def documents() -> dict[str, str]:
    """name -> text, in a fixed order, every paragraph once."""
    seen: set[str] = set()
    result: dict[str, str] = {}
    for name, text in (*_topics(), *_c_modules(), *_python_modules()):
        kept = []
        for paragraph in text.replace("\r", "").replace("\t", "    ").split("\n\n"):
            paragraph = "\n".join(line.rstrip() for line in paragraph.split("\n")).strip("\n")
            key = " ".join(paragraph.split())
            if key and key not in seen and _is_prose(paragraph):
                seen.add(key)
                kept.append(paragraph)
        if sum(map(len, kept)) >= 200:
            result[name] = "\n\n".join(kept)
    return result


def _position(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split() -> dict[str, list[str]]:
    """The four lists of documents; `calibration` is also contained in `train`."""
    parts: dict[str, list[str]] = {"heldout": [], "validation": [], "train": [], "calibration": []}
    for name, text in documents().items():
        position = _position(name)
        if position < HELDOUT_SHARE:
            parts["heldout"].append(text)
        elif position < HELDOUT_SHARE + VALIDATION_SHARE:
            parts["validation"].append(text)
        else:
            parts["train"].append(text)
            if position > 1 - CALIBRATION_SHARE:
                parts["calibration"].append(text)
    return parts


if __name__ == "__main__":
    for part, texts in split().items():
        print(f"{part:12} {len(texts):5} documents {sum(map(len, texts)):9} characters")
