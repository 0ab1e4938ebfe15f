"""Pictures of a checkpoint, as SVG text: the same bytes for the same numbers. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..format.storage import make_folder, write_bytes
from . import facts
from .folder import PICTURES_FOLDER, CheckpointFolder
from .records import read_records

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

_INK, _GRID = "#22303c", "#d5dde3"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "apex4", "svg.fonttype": "path", "font.size": 9, "axes.edgecolor": _GRID, "axes.labelcolor": _INK,
    "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def draw(checkpoint: CheckpointFolder) -> dict[str, str]:
    """{name: SVG} of every picture that the numbers allow. Raises UsageError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'apex4-quant[plot]'") from error
    records = read_records(checkpoint)
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        drawn = {
            "output_error": _errors(facts.errors_by_layer(checkpoint)),
            "size": _sizes(checkpoint),
            "plan": _plan(facts.choices_by_layer(checkpoint)),
            "plan_front": _front(facts.planned(checkpoint, records)),
            "divergence": _divergences(records),
        }
        return {name: _svg(figure) for name, figure in drawn.items() if figure is not None}


def write_pictures(checkpoint: CheckpointFolder) -> list[Path]:
    """Into the checkpoint's folder, where its card shows them."""
    folder = checkpoint.folder / PICTURES_FOLDER
    drawn = draw(checkpoint)
    make_folder(folder)
    for name, svg in drawn.items():
        write_bytes(folder / f"{name}.svg", svg.encode())
    return [folder / f"{name}.svg" for name in drawn]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display is asked for

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _mesh(axes: Any, rows: list[list[float]], kinds: list[str], layers: list[int], **colours: Any) -> Any:
    """One row for every kind of linear, one column for every layer; vectors, no embedded bitmap."""
    mesh = axes.pcolormesh(rows, edgecolors="white", linewidth=0.5, **colours)
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    shown = range(0, len(layers), max(1, len(layers) // 16))
    axes.set_xticks([column + 0.5 for column in shown], [str(layers[column]) for column in shown])
    axes.set_xlabel("layer")
    return mesh


def _errors(found: dict[str, dict[int, float]]) -> Figure | None:
    if not found:
        return None
    layers = sorted({layer for by_layer in found.values() for layer in by_layer})
    rows = [[by_layer.get(layer, float("nan")) for layer in layers] for by_layer in found.values()]
    figure, axes = _figure(min(12.0, 3.2 + 0.22 * len(layers)), 1.1 + 0.28 * len(rows))
    mesh = _mesh(axes, rows, list(found), layers, cmap="viridis", vmin=0)
    axes.set_title("relative output error of every linear", loc="left")
    _draw_vectors(figure.colorbar(mesh, ax=axes, shrink=0.9))
    return figure


def _draw_vectors(bar: Colorbar) -> None:
    """Matplotlib makes a bitmap of the colours of a long bar."""
    if bar.solids is not None:
        bar.solids.set_rasterized(False)


def _plan(found: dict[str, dict[int, str]]) -> Figure | None:
    """What was chosen for every kind of linear in every layer, where not all got the same."""
    choices = sorted({choice for by_layer in found.values() for choice in by_layer.values()})
    if len(choices) < 2:
        return None
    from matplotlib.colors import ListedColormap

    layers = sorted({layer for by_layer in found.values() for layer in by_layer})
    rows = [
        [choices.index(by_layer[layer]) if layer in by_layer else float("nan") for layer in layers]
        for by_layer in found.values()
    ]
    figure, axes = _figure(min(12.0, 4.2 + 0.22 * len(layers)), 1.1 + 0.28 * len(rows))
    colours = ["#2a7f9e", "#e0a030", "#7a5ea8", "#5f9e5a", "#c0564f", "#8a7a5c", "#50b0b0", "#404a54"]
    shades = ListedColormap([colours[index % len(colours)] for index in range(len(choices))])
    mesh = _mesh(axes, rows, list(found), layers, cmap=shades, vmin=-0.5, vmax=len(choices) - 0.5)
    axes.set_title("group size and transform of every linear", loc="left")
    bar = figure.colorbar(mesh, ax=axes, ticks=range(len(choices)))
    _draw_vectors(bar)
    bar.ax.set_yticklabels(choices)
    return figure


def _front(plan: facts.Planned | None) -> Figure | None:
    """Predicted loss against predicted time of the plans that there were, and what was measured of the one that was taken."""
    if plan is None or not plan.front:
        return None
    figure, axes = _figure(6.0, 3.2)
    times, losses = zip(*((time, 1000 * loss) for time, loss in plan.front), strict=True)
    axes.plot(times, losses, "o-", color="#9fb2bf", markersize=4, label="the best plans, predicted")
    taken = plan.predicted.get("microseconds")
    if taken is not None:
        loss = 1000 * plan.predicted["loss"]
        axes.plot([taken], [loss], "o", color="#2a7f9e", markersize=9, label="this plan, predicted")
    markers = "Ds^vP*"
    for number, (text, divergence) in enumerate(plan.measured):
        label, marker = f"measured on {text}", markers[number % len(markers)]
        if taken is None:
            axes.axhline(1000 * divergence, color="#e0a030", linestyle="--", label=label)
        else:
            axes.plot([taken], [1000 * divergence], marker, color="#e0a030", markersize=7, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("us for all quantized linears")
    axes.set_ylabel("KL divergence, 1/1000 nat a token")
    axes.set_title(f"plans for {plan.asked}", loc="left")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _sizes(checkpoint: CheckpointFolder) -> Figure | None:
    before = checkpoint.report.get("bytes_before")
    if before is None:
        return None
    linears = sum(int(entry.get("bytes", 0)) for entry in checkpoint.report["quantized"])
    rest = max(0, checkpoint.weight_bytes - linears)
    figure, axes = _figure(6.0, 1.6)
    scale = 1e9 if before >= 1e9 else 1e6
    axes.barh(["quantized", "original"], [linears / scale, before / scale], color=["#2a7f9e", "#9fb2bf"], height=0.6)
    axes.barh(["quantized"], [rest / scale], left=[linears / scale], color="#9fb2bf", height=0.6)
    axes.set_xlabel("GB" if scale == 1e9 else "MB")
    axes.set_title("size: quantized linears (blue) and what was kept (grey)", loc="left")
    return figure


def _divergences(records: list[dict[str, Any]]) -> Figure | None:
    """Only where several measurements can be compared: the same checkpoint on several texts."""
    found = [
        (facts.text_name(record["result"]["text"]), record["result"]["divergence"])
        for record in facts.quality_records(records)
        if record["result"].get("divergence") is not None
    ]
    if len(found) < 2:
        return None
    figure, axes = _figure(6.0, 0.9 + 0.35 * len(found))
    axes.barh([name for name, _ in found], [value for _, value in found], color="#2a7f9e", height=0.6)
    axes.set_xlabel("nats a token")
    axes.set_title("KL divergence from the original", loc="left")
    return figure


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]  # without the XML head, which HTML does not take
