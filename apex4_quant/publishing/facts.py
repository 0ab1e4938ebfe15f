"""What a card and a report say of a checkpoint, taken from its report and its measurements and from nowhere else."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..calib.text import names_a_file
from ..evaluation.engine import EngineName
from ..format.number_format import BITS, arithmetic_name
from ..format.storage import format_bytes
from .base_model import BaseModel
from .folder import CheckpointFolder
from .records import QUALITY, THROUGHPUT, public_name

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_HUB_TEXT = re.compile(r"([\w-][\w.-]*/[\w.-]+)(:[^:]+(:[^:]+)?)?")
_WIKITEXT2 = "Salesforce/wikitext"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """One figure of the original and of the quantized model. `original` is None where it was not measured.

    `metric` is the Hub's name of the figure, `dataset` what it was measured on. `less_is_better` is None where neither
    is.
    """

    name: str
    metric: str
    dataset: str
    quantized: float
    original: float | None
    stderr: float | None = None
    digits: int = 4
    rows: int | None = None
    of_both: bool = False  # a figure that compares the two: the original has none of its own

    def row(self) -> Row:
        """original | quantized | difference, as text."""
        spread = "" if self.stderr is None else f" ± {self.stderr:.{self.digits}f}"
        ours = f"{self.quantized:.{self.digits}f}{spread}"
        name = self.name if self.rows is None else f"{self.name}, {self.rows} rows"
        if self.original is None:
            return (name, "" if self.of_both else "not measured", ours, "")
        difference = f"{self.quantized - self.original:+.{self.digits}f}"
        if self.original:
            difference += f" ({100 * (self.quantized / self.original - 1):+.2f} %)"
        return (name, f"{self.original:.{self.digits}f}", ours, difference)


def comparisons(record: dict[str, Any]) -> list[Comparison]:
    """The figures of one measurement of quality."""
    result = record["result"]
    text = f"{result['text']}"
    found = [
        Comparison("perplexity", "perplexity", text, result["perplexity"], result.get("baseline_perplexity")),
    ]
    of_both = (
        ("divergence", "KL divergence from the original, nats/token", "kl_divergence", 5),
        ("top1_agreement", "same most probable token, share", "top1_agreement", 4),
    )
    found += [
        Comparison(name, metric, text, result[key], None, digits=digits, of_both=True)
        for key, name, metric, digits in of_both
        if result.get(key) is not None
    ]
    others = result.get("baseline_tasks") or {}
    for task, metrics in sorted((result.get("tasks") or {}).items()):
        for metric, value in metrics.items():
            if metric.endswith("_stderr") or not isinstance(value, int | float) or metric == "rows":
                continue
            rows = int(metrics["rows"]) if "rows" in metrics else None
            other = others.get(task, {}).get(metric)
            found.append(
                Comparison(f"{task}: {metric}", metric, task, value, other, metrics.get(f"{metric}_stderr"), rows=rows)
            )
    return found


def format_name(checkpoint: CheckpointFolder) -> str:
    """ "W4A4", "W4A8", or both."""
    section = checkpoint.quantization
    usual = section.get("activation_bits", BITS)
    overrides = (module.get("activation_bits", usual) for module in section.get("modules", {}).values())
    return arithmetic_name(section.get("bits", BITS), (usual, *overrides))


def activations_name(checkpoint: CheckpointFolder) -> str:
    """ "INT4", "INT8", or both."""
    return format_name(checkpoint).replace("W4A", "INT")


def quality_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == QUALITY]


def throughput_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == THROUGHPUT]


def conditions(record: dict[str, Any]) -> str:
    """One sentence that says under which conditions a measurement was made."""
    result, device = record["result"], record["device"]
    where = device["name"] + (f" (driver {device['driver']})" if "driver" in device else "")
    kernels = [name for name in record["activations"]["kernels"] if name != "reference"]
    how = f"the {' and '.join(kernels)} kernels" if kernels else "PyTorch operations"
    served = " in vLLM" if result.get("engine") == EngineName.VLLM else ""
    bits = record["activations"]["bits"]
    bits = " and ".join(map(str, bits)) if isinstance(bits, list) else bits
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    if record["kind"] == THROUGHPUT:
        what = f"{result['batch']} requests of {result['prompt_len']} + {result['gen_len']} tokens"
    else:
        what = f"{result['tokens']} tokens of {text_name(result['text'])} in windows of {result['seq_len']}"
        what += ", each behind BOS" if result.get("bos") else ""
        what += f", KV cache in {result['kv_cache_bits']} bits, {result['dtype']}"
    return f"{what}; activations in {bits} bits, computed by {how}{served} on {where}; {versions}; {record['date']}."


def text_name(text: str) -> str:
    return {"heldout": "apex4's bundled held-out text", "bundled": "apex4's bundled calibration text"}.get(
        text, public_name(text)
    )


def hub_dataset(text: str) -> str | None:
    """The Hub id of a calibration or evaluation text, None if it is not from the Hub."""
    if text == "wikitext2":
        return _WIKITEXT2
    if names_a_file(text):
        return None
    match = _HUB_TEXT.fullmatch(text)
    return match[1] if match else None


def kinds(checkpoint: CheckpointFolder) -> list[Row]:
    """(how many, group size, transform) of the quantized linears, most frequent first."""
    counted = Counter(
        (str(entry["group_size"]), str(entry.get("transform", checkpoint.quantization.get("transform", "none"))))
        for entry in checkpoint.report["quantized"]
    )
    return [(str(count), group, transform) for (group, transform), count in counted.most_common()]


def kept(checkpoint: CheckpointFolder) -> list[Row]:
    """(how many, size, why) of the tensors that were not quantized."""
    counts: dict[str, list[int]] = {}
    for entry in checkpoint.report["kept"]:
        found = counts.setdefault(entry["reason"], [0, 0])
        found[0] += 1
        found[1] += int(entry["bytes"])
    return [(str(count), format_bytes(size), reason) for reason, (count, size) in counts.items()]


def errors_by_layer(checkpoint: CheckpointFolder) -> dict[str, dict[int, float]]:
    """{kind of linear: {layer: relative output error}}; of experts, the mean over those of a layer."""
    sums: dict[str, dict[int, list[float]]] = {}
    for entry in checkpoint.report["quantized"]:
        match = _LAYER.search("." + entry["name"])
        if match is None or entry.get("error") is None:
            continue
        kind = _EXPERT.sub(".experts.", "." + match[2]).lstrip(".")
        sums.setdefault(kind, {}).setdefault(int(match[1]), []).append(float(entry["error"]))
    return {
        kind: {layer: sum(found) / len(found) for layer, found in sorted(layers.items())}
        for kind, layers in sums.items()
    }


def choices_by_layer(checkpoint: CheckpointFolder) -> dict[str, dict[int, str]]:
    """{kind of linear: {layer: "group size, transform"}}."""
    found: dict[str, dict[int, str]] = {}
    for entry in checkpoint.report["quantized"]:
        match = _LAYER.search("." + entry["name"])
        if match is not None:
            kind = _EXPERT.sub(".experts.", "." + match[2]).lstrip(".")
            transform = entry.get("transform", checkpoint.quantization.get("transform", "none"))
            found.setdefault(kind, {})[int(match[1])] = f"{entry['group_size']}, {transform}"
    return found


@dataclass(frozen=True)
class Planned:
    """How the plan of a checkpoint came about, as the planner wrote it down. Times are microseconds, losses and divergences
    nats a token.

    `predicted` is {} where nothing was predicted of what was quantized: the plan was edited, or linears were left out.
    `front` has the time and loss of the plans that there were, `measured` the divergence on every text that was recorded.
    """

    origin: dict[str, Any]
    predicted: dict[str, float]
    front: list[tuple[float, float]]
    measured: list[tuple[str, float]]

    @property
    def asked(self) -> str:
        """For which GPU, and what else decides the times."""
        tokens = self.origin.get("tokens")
        return f"{self.origin.get('target')}, {tokens} token{'' if tokens == 1 else 's'} at once"

    @property
    def sentence(self) -> str:
        said = f"Planned for {self.asked} (mode {self.origin.get('mode')}). "
        if not self.predicted:
            return f"{said}Nothing was predicted of it as it is: the plan was edited, or linears were left out."
        found = self.predicted
        return (
            f"{said}Predicted for all quantized linears: {found['microseconds']:.1f} us, {found['of_fastest']:.2f} times the "
            f"fastest plan, {found['speedup_over_fp16']:.2f} times as fast as FP16, and a KL divergence of "
            f"{found['loss']:.5f} nats a token."
        )


def planned(checkpoint: CheckpointFolder, records: list[dict[str, Any]]) -> Planned | None:
    """None for a checkpoint that was not made from a plan of the planner's."""
    settings = checkpoint.report["settings"]
    origin = settings.get("plan_origin")
    if not origin:
        return None
    measured = [
        (text_name(record["result"]["text"]), float(record["result"]["divergence"]))
        for record in quality_records(records)
        if record["result"].get("divergence") is not None
    ]
    predicted = {} if settings.get("ignore") else origin.get("predicted") or {}
    return Planned(origin, predicted, [(time, loss) for time, loss in origin.get("front") or ()], measured)


def errors(checkpoint: CheckpointFolder) -> list[float]:
    return [float(entry["error"]) for entry in checkpoint.report["quantized"] if entry.get("error") is not None]


def fallbacks(checkpoint: CheckpointFolder) -> list[Row]:
    """(linear, what was used, tokens of its own) of experts that calibration rarely reached."""
    return [
        (entry["name"], str(entry["fallback"]), str(entry.get("calibration_tokens", "")))
        for entry in checkpoint.report["quantized"]
        if "fallback" in entry
    ]


def reproducing_command(checkpoint: CheckpointFolder, base: BaseModel) -> list[str]:
    """Lines of a shell script that make the same checkpoint again."""
    settings = checkpoint.report["settings"]
    model = base.hub_id or public_name(str(settings.get("model", base.name)))
    if base.hub_id and base.revision:
        model += f"@{base.revision}"
    lines = []
    options: list[tuple[str, Any]] = []
    recipe = settings.get("recipe")
    if isinstance(recipe, dict):
        lines += ["cat > recipe.json <<'END'", json.dumps(recipe), "END"]
        recipe = "recipe.json"
    options.append(("--recipe", recipe))
    if settings.get("plan"):
        script = (
            "import json; plan = json.load(open('apex4_report.json'))['settings']['plan']; "
            "json.dump({'apex4_plan': 1, 'linears': plan}, open('plan.json', 'w'))"
        )
        lines.append(f'python -c "{script}"  # the plan is in this repository')
        options.append(("--plan", "plan.json"))
    else:
        options += [("--group-size", settings.get("group_size")), ("--transform", settings.get("transform"))]
    for name in ("activation_bits", "target", "layout", "calib", "samples", "seq_len", "seed", "bos", "dtype"):
        value = settings.get(name)
        options.append((f"--{name.replace('_', '-')}", public_name(str(value)) if value is not None else None))
    options += [("--ignore", pattern) for pattern in settings.get("ignore") or ()]
    words = ["apex4", "quantize", model, "-o", "OUT"]
    words += [part for name, value in options if value is not None for part in (name, str(value))]
    return [*lines, shlex.join(words)]


def packed_for(checkpoint: CheckpointFolder) -> str:
    target = checkpoint.quantization.get("target") or {}
    return target.get("gpu") or target.get("arch") or "no GPU in particular"
