"""`apex4 report`: one HTML page about a checkpoint, which asks nothing of the network and of no other file.

What the card says, and every linear with its error, the plan, the experts that shared statistics, all measurements with
their commands. Pictures are inline SVG.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..format.storage import format_bytes, write_bytes
from ..format.transform_kind import TransformKind
from . import facts
from .base_model import BaseModel, base_model_of
from .card import throughput_rows
from .folder import CheckpointFolder
from .pictures import draw
from .records import public_name, read_records

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dde3 }
table { border-collapse: collapse; margin: .6rem 0 } th { text-align: left; font-weight: 600 }
td, th { padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid #eef2f4; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } .small { color: #5a6a76; font-size: .9em }
pre { background: #f4f7f9; padding: .6rem .8rem; overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def write_report(folder: Path, out: Path) -> dict[str, Any]:
    """Write the page. Returns what `apex4 report --json` prints. Raises UsageError or Apex4Error."""
    checkpoint = CheckpointFolder(folder)
    if out.is_dir():
        raise UsageError(f"{out} is a folder: give the name of the HTML file to write")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent} is no folder: make it first")
    if checkpoint.folder.resolve() in out.resolve().parents:
        raise UsageError(f"{out} is in the checkpoint's folder and would be published: give another place")
    records = read_records(checkpoint)
    base = base_model_of(checkpoint)
    pictures = draw(checkpoint)
    write_bytes(out, make_page(checkpoint, base, records, pictures).encode())
    return {
        "report": str(out),
        "linears": len(checkpoint.report["quantized"]),
        "records": len(records),
        "pictures": list(pictures),
    }


def make_page(
    checkpoint: CheckpointFolder, base: BaseModel, records: list[dict[str, Any]], pictures: dict[str, str]
) -> str:
    name = html.escape(checkpoint.folder.resolve().name)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1>",
        *_summary(checkpoint, base),
        "<h2>Measured</h2>",
        *_measured(records),
        *_pictures(pictures),
        "<h2>What was quantized</h2>",
        _table(("linears", "group size", "transform of the input"), facts.kinds(checkpoint)),
        "<h2>Kept as in the original</h2>",
        _table(("tensors", "size", "why"), facts.kept(checkpoint)),
        *_planned(facts.planned(checkpoint, records)),
        "<h2>Messages of the run</h2>",
        *_messages(checkpoint),
        "<h2>Made with</h2>",
        f"<pre>{html.escape(chr(10).join(facts.reproducing_command(checkpoint, base)))}</pre>",
        *_settings(checkpoint),
        "<h2>Every linear</h2>",
        _linears(checkpoint),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(checkpoint: CheckpointFolder, base: BaseModel) -> Iterable[str]:
    quant, report = checkpoint.quantization, checkpoint.report
    errors = facts.errors(checkpoint)
    rows = [
        ("original", base.name + (f", commit {base.revision}" if base.revision else "")),
        ("architecture", str(report.get("architecture", "not recorded"))),
        ("format", f"{facts.format_name(checkpoint)}, group {quant.get('group_size')}"),
        ("packed for", f"{facts.packed_for(checkpoint)}, layout {quant.get('layout')}"),
        ("weight files", f"{len(report['files'])}, {format_bytes(checkpoint.weight_bytes)}"),
    ]
    if report.get("bytes_before") is not None:
        rows.append(("original's tensors", format_bytes(report["bytes_before"])))
    if report.get("bits_per_weight") is not None:
        rows.append(("bits of a quantized weight", f"{report['bits_per_weight']:.3f}"))
    if errors:
        rows.append(("relative output error", f"mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}"))
    yield _table(None, rows)


def _measured(records: list[dict[str, Any]]) -> Iterable[str]:
    if not records:
        yield "<p>Nothing was measured: <code>apex4 eval OUT --baseline ORIGINAL --record</code> does that.</p>"
    for record in facts.quality_records(records):
        rows = [figure.row() for figure in facts.comparisons(record)]
        yield _table(("", "original", "quantized", "difference"), rows)
        yield from _conditions(record)
    for record in facts.throughput_records(records):
        yield _table(("", "original", "quantized", "quantized / original"), throughput_rows(record))
        yield from _conditions(record)


def _conditions(record: dict[str, Any]) -> Iterable[str]:
    yield f"<p class='small'>{html.escape(facts.conditions(record))}</p>"
    yield f"<pre>{html.escape(record['command'])}</pre>"


def _pictures(pictures: dict[str, str]) -> Iterable[str]:
    if pictures:
        yield "<h2>Pictures</h2>"
    for svg in pictures.values():
        yield f"<p>{svg}</p>"


def _planned(plan: facts.Planned | None) -> Iterable[str]:
    if plan is None:
        return
    yield "<h2>Plan</h2>"
    yield f"<p>{html.escape(plan.sentence)}</p>"
    taken = plan.predicted.get("microseconds")
    rows = [(f"{time:.2f}", f"{loss:.5f}", "") for time, loss in plan.front]
    if taken is not None:
        rows.append((f"{taken:.2f}", f"{plan.predicted['loss']:.5f}", "this plan"))
    rows.sort(key=lambda row: float(row[0]))
    yield _table(("us, predicted", "KL divergence, nats a token, predicted", ""), rows)
    yield _table(None, [(f"measured on {text}", f"{divergence:.5f}") for text, divergence in plan.measured])


def _messages(checkpoint: CheckpointFolder) -> Iterable[str]:
    fallbacks, messages = facts.fallbacks(checkpoint), checkpoint.report.get("messages") or []
    if not fallbacks and not messages:
        yield "<p>No linear was quantized in another way than planned.</p>"
    if messages:
        yield f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in messages)}</ul>"
    if not fallbacks:
        return
    yield f"<p>{len(fallbacks)} linears of experts had too few calibration tokens of their own.</p>"
    yield _table(("linear", "quantized with", "tokens of its own"), fallbacks)


def _settings(checkpoint: CheckpointFolder) -> Iterable[str]:
    settings = {name: value for name, value in checkpoint.report["settings"].items() if not name.startswith("plan")}
    rows = [(name, _shown(value)) for name, value in settings.items()]
    rows += [(f"version of {name}", str(value)) for name, value in (checkpoint.report.get("versions") or {}).items()]
    if checkpoint.report.get("calibration_tokens") is not None:
        rows.append(("calibration tokens", str(checkpoint.report["calibration_tokens"])))
    yield _table(None, rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return shlex.join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else public_name(str(value))


def _linears(checkpoint: CheckpointFolder) -> str:
    rows = []
    for entry in checkpoint.report["quantized"]:
        clip, error, transform = entry.get("activation_clip"), entry.get("error"), str(entry.get("transform", ""))
        of_blocks = transform == TransformKind.FEEDBACK_16  # each block's stands in the weight files
        rows.append(
            (
                entry["name"],
                " x ".join(map(str, entry["shape"])),
                str(entry["group_size"]),
                transform,
                "by block" if of_blocks else "" if clip is None else f"{clip:.3f}",
                format_bytes(entry.get("bytes", 0)),
                "" if error is None else f"{error:.4f}",
            )
        )
    head = ("linear", "shape", "group size", "transform", "activation clip", "size", "relative output error")
    return _table(head, rows)


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table>"]
    if head is not None:
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    for row in rows:
        first, *others = row
        kind = "" if head is None else " class='n'"
        cells = f"<td>{html.escape(first)}</td>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])
