"""`apex4 card`: README.md of a Hub model, made from the checkpoint's report and from what was measured.

The text between BEGIN and END is made anew every time; what stands before and behind is a person's and stays, as do
the metadata that are none of ours. Every number comes from apex4_report.json, config.json or apex4_evaluation.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..format.storage import format_bytes, write_bytes
from ..models.families import auto_class_of
from . import facts
from .base_model import INHERITED, LICENCE, BaseModel, base_model_of
from .facts import Row
from .folder import CARD_NAME, PICTURES_FOLDER, CheckpointFolder
from .metadata import metadata_of, read_metadata, write_metadata
from .records import read_records

BEGIN = (
    "<!-- apex4: made by `apex4 card`; what you write between these two lines is lost, the rest of the page stays -->"
)
END = "<!-- apex4: end -->"
_BLOCK = re.compile(r"<!-- apex4: made by .*?-->.*?<!-- apex4: end -->", re.DOTALL)
TAGS = ("apex4", "w4a4", "int4")
PAPER = "https://arxiv.org/abs/2606.08761"
_FOUR_BITS_ON = "sm_80, sm_86 and sm_89 (Ampere, Ada) and sm_90 (Hopper)"
_EIGHT_BITS_ON = "sm_75, sm_100 and sm_120 (Turing, Blackwell)"


def make_card(
    checkpoint: CheckpointFolder,
    base: BaseModel,
    repository: str | None = None,
    licence: str | None = None,
    existing: str = "",
) -> str:
    """The whole card. `repository` is ORG/NAME, `existing` the card that is there. Raises UsageError or Apex4Error."""
    records = read_records(checkpoint)
    try:
        metadata, text = metadata_of(existing)
    except ValueError as error:
        raise UsageError(
            f"the metadata at the head of {checkpoint.folder / CARD_NAME} are no YAML that can be kept ({error}): correct them"
        ) from error
    made = _metadata(checkpoint, base, records, repository, licence, metadata)
    body = "\n".join([BEGIN, *_text(checkpoint, base, records, repository, made), END])
    if _BLOCK.search(text):
        text = _BLOCK.sub(lambda _: body, text, count=1)
    elif "<!-- apex4:" in text:
        raise UsageError(
            f"{checkpoint.folder / CARD_NAME} has one of the two apex4 markers and not the other: restore or remove it"
        )
    else:
        text = (text.rstrip() + "\n\n" if text.strip() else "\n") + body + "\n"
    return write_metadata(made, text)


def read_card(path: Path) -> str:
    """The card that is there, "" if there is none. Raises UsageError for bytes that are no text."""
    try:
        return path.read_text("utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}): convert or remove it") from error


def write_card(
    folder: Path,
    repository: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    pictures: bool = False,
    existing: str | None = None,
) -> dict[str, Any]:
    """Make README.md of a checkpoint, or make its part anew. Returns what `apex4 card --json` prints.

    `existing` stands for the card that is there now. Raises UsageError or Apex4Error.
    """
    checkpoint = CheckpointFolder(folder)
    base = base_model_of(checkpoint, base_model)
    path = checkpoint.folder / CARD_NAME
    if pictures:
        from .pictures import write_pictures

        write_pictures(checkpoint)
    before = read_card(path)
    card = make_card(checkpoint, base, repository, licence, before if existing is None else existing)
    if card != before:
        write_bytes(path, card.encode())
    metadata = read_metadata(card)[0]
    return {
        "card": str(path),
        "changed": card != before,
        "base_model": base.hub_id,
        "base_model_revision": base.revision,
        "license": metadata.get("license"),
        "records": len(read_records(checkpoint)),
        "metadata": metadata,
    }


def card_as_text(result: dict[str, Any]) -> str:
    """What the command prints for people."""
    line = f"{result['card']}: {'written' if result['changed'] else 'unchanged'}, {result['records']} measurements"
    if result["license"] is None:
        line += "\n  the licence is not known: give --license, or 'apex4 publish' will refuse"
    return line


def handwritten(card: str) -> str:
    """What a person wrote of a card: its text without ours."""
    return _BLOCK.sub("", read_metadata(card)[1]).strip()


def _metadata(
    checkpoint: CheckpointFolder,
    base: BaseModel,
    records: list[dict[str, Any]],
    repository: str | None,
    licence: str | None,
    existing: dict[str, Any],
) -> dict[str, Any]:
    """Ours first, in a fixed order, then what else a person put there."""
    made: dict[str, Any] = {}
    if base.hub_id is not None:
        made |= {"base_model": base.hub_id, "base_model_relation": "quantized"}
    made |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    by_hand = {key: existing[key] for key in INHERITED if key in existing}
    inherited = {key: _plain(key, value) for key, value in base.inherited.items()}
    if "license" in by_hand:  # licence and its name belong together: all three from one place
        inherited = {key: value for key, value in inherited.items() if key not in LICENCE}
    made |= _linked(inherited | by_hand, base, checkpoint.folder)
    if licence is not None:
        for key in LICENCE:
            made.pop(key, None)
        made["license"] = licence
    tags = [tag for tag in existing.get("tags") or () if isinstance(tag, str) and tag not in TAGS]
    made["tags"] = [*TAGS, *tags]
    dataset = facts.hub_dataset(str(checkpoint.report["settings"].get("calib", "")))
    datasets = [one for one in existing.get("datasets") or () if isinstance(one, str) and one != dataset]
    if dataset or datasets:
        made["datasets"] = ([dataset] if dataset else []) + datasets
    index = _model_index(checkpoint, records, repository)
    ours = set(made) | {"model-index", "base_model", "base_model_relation", *(LICENCE if licence else ())}
    made |= {key: value for key, value in existing.items() if key not in ours}
    return made | ({"model-index": index} if index else {})


def _plain(key: str, value: Any) -> Any:
    """YAML reads the language code of Norwegian, no, as false."""
    if key != "language":
        return value
    languages = value if isinstance(value, list) else [value]
    return ["no" if language is False else str(language) for language in languages]


def _linked(metadata: dict[str, Any], base: BaseModel, folder: Path) -> dict[str, Any]:
    """A licence's link to a file of the base model's repository leads there, unless the file came along."""
    link = metadata.get("license_link")
    if not isinstance(link, str) or link.startswith("http") or base.hub_id is None or (folder / link).is_file():
        return metadata
    return metadata | {"license_link": f"https://huggingface.co/{base.hub_id}/blob/{base.revision or 'main'}/{link}"}


def _model_index(
    checkpoint: CheckpointFolder, records: list[dict[str, Any]], repository: str | None
) -> list[dict[str, Any]]:
    """Through huggingface_hub's own classes, so that it is in the form which they read back."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    found = []
    for record in facts.quality_records(records):
        for figure in facts.comparisons(record):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=facts.hub_dataset(figure.dataset) or figure.dataset,
                    dataset_name=facts.text_name(figure.dataset),
                    metric_type=figure.metric,
                    metric_value=figure.quantized,
                    metric_name=figure.name,
                )
            )
    if not found:
        return []
    return list(eval_results_to_model_index(_name(checkpoint, repository), found))


def _name(checkpoint: CheckpointFolder, repository: str | None) -> str:
    return repository.partition("/")[2] if repository else checkpoint.folder.resolve().name


def _least_version(report: Mapping[str, Any]) -> str:
    """ ">=0.1.0": an older release may not read what this one wrote. Nothing where the report does not say it."""
    version = (report.get("versions") or {}).get("apex4")
    return f">={version}" if version else ""


def table(head: Sequence[str], rows: Sequence[Row]) -> list[str]:
    line = "|".join(["", *(" --- " for _ in head), ""])
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]


def _text(
    checkpoint: CheckpointFolder,
    base: BaseModel,
    records: list[dict[str, Any]],
    repository: str | None,
    metadata: dict[str, Any],
) -> list[str]:
    quant, report = checkpoint.quantization, checkpoint.report
    name, place = _name(checkpoint, repository), repository or checkpoint.folder.resolve().name
    origin = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else base.name
    if base.hub_id and base.revision:
        origin += f" (commit [`{base.revision[:12]}`](https://huggingface.co/{base.hub_id}/tree/{base.revision}))"
    before, after = report.get("bytes_before"), checkpoint.weight_bytes
    lines = [
        f"# {name}",
        "",
        f"{origin}, quantized to {facts.format_name(checkpoint)} with apex4: the linear layers compute on INT4 weights and "
        f"{facts.activations_name(checkpoint)} activations, in groups of {quant.get('group_size')}.",
        "",
        "## Load",
        "",
        "In transformers:",
        "",
        "```",
        f"pip install 'apex4-quant{_least_version(report)}'",
        "```",
        "",
        "```python",
        *load_block(place, auto_class_of(checkpoint.config)),
        "```",
        "",
        "In vLLM, with apex4-quant installed beside it:",
        "",
        "```",
        f"vllm serve {place}",
        "```",
        "",
        "## Measured",
        "",
        *_measured(checkpoint, base, records),
        "",
        "## What was quantized",
        "",
        *table(("linears", "group size", "transform of the input"), facts.kinds(checkpoint)),
        "",
        "Kept as in the original:",
        "",
        *table(("tensors", "size", "why"), facts.kept(checkpoint)),
        "",
    ]
    size = f"The weight files have {format_bytes(after)}"
    if before is not None:
        size += f", the original's tensors {format_bytes(before)}"
    if report.get("bits_per_weight") is not None:
        size += f"; a quantized weight takes {report['bits_per_weight']:.3f} bits, scales and transforms included"
    lines.append(f"{size}.")
    plan = facts.planned(checkpoint, records)
    if plan is not None:
        lines.append(plan.sentence)
    errors = facts.errors(checkpoint)
    if errors:
        lines.append(
            f"Relative output error of a linear on calibration data: mean {sum(errors) / len(errors):.4f}, "
            f"largest {max(errors):.4f}."
        )
    if (checkpoint.folder / PICTURES_FOLDER).is_dir():
        pictures = sorted((checkpoint.folder / PICTURES_FOLDER).glob("*.svg"))
        lines += ["", *(f"![{path.stem.replace('_', ' ')}]({PICTURES_FOLDER}/{path.name})" for path in pictures)]
    fallbacks = facts.fallbacks(checkpoint)
    if fallbacks:
        lines.append(
            f"{len(fallbacks)} linears of experts that calibration rarely reached were quantized with statistics of all "
            "tokens; `apex4_report.json` names them."
        )
    lines += ["", "## Made with", "", "```", *facts.reproducing_command(checkpoint, base), "```", ""]
    lines += _made_with(checkpoint)
    lines += ["", "## GPUs", "", *_gpus(checkpoint), "", "## Limits", "", *_limits(metadata), "", "## Citation", ""]
    return [*lines, *_citation(base), ""]


def load_block(place: str, auto_class: str = "AutoModelForCausalLM") -> list[str]:
    """The Python that loads a model by its name, or from its folder."""
    return [
        "import apex4_quant  # registers the format: without it transformers warns, and loads random linears",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("{place}", device_map="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        'inputs = tokenizer("The old house stood", return_tensors="pt").to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
    ]


def _measured(checkpoint: CheckpointFolder, base: BaseModel, records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return [
            "Nothing was measured. The command that measures and records:",
            "",
            "```",
            f"apex4 eval OUT --baseline {base.hub_id or 'ORIGINAL'} --record",
            "```",
        ]
    lines: list[str] = []
    for record in facts.quality_records(records):
        rows = [figure.row() for figure in facts.comparisons(record)]
        lines += [*table(("", "original", "quantized", "difference"), rows), "", facts.conditions(record), ""]
        lines += ["```", record["command"], "```", ""]
    for record in facts.throughput_records(records):
        rows = [(name, original, quantized, ratio) for name, original, quantized, ratio in throughput_rows(record)]
        lines += [*table(("", "original", "quantized", "quantized / original"), rows), ""]
        lines += [facts.conditions(record), "", "```", record["command"], "```", ""]
    return lines[:-1]


def throughput_rows(record: dict[str, Any]) -> list[Row]:
    ours, theirs = record["result"]["result"], record["result"].get("baseline")
    rows: list[Row] = []
    for name, part in (("prefill, tokens a second", "prefill"), ("decoding, tokens a second", "decode")):
        speed = ours[part]["tokens_per_second"]
        other = theirs[part]["tokens_per_second"] if theirs else None
        rows.append(
            (name, f"{other:.1f}" if other else "not measured", f"{speed:.1f}", f"{speed / other:.2f}" if other else "")
        )
    peak, other = ours["peak_memory_bytes"], theirs["peak_memory_bytes"] if theirs else None
    if peak is None:  # measured in vLLM
        return rows
    ratio = f"{peak / other:.2f}" if other else ""
    rows.append(("peak memory", format_bytes(other) if other else "not measured", format_bytes(peak), ratio))
    return rows


def _made_with(checkpoint: CheckpointFolder) -> list[str]:
    settings, report = checkpoint.report["settings"], checkpoint.report
    recipe = settings.get("recipe")
    name = recipe.get("name", "from a file") if isinstance(recipe, dict) else recipe
    lines = [f"Recipe `{name}`."]
    tokens = report.get("calibration_tokens")
    calibrated = f"Calibration: {facts.text_name(str(settings.get('calib')))}"
    if tokens is not None:
        calibrated += f", {tokens} tokens in windows of {settings.get('seq_len')}, seed {settings.get('seed')}"
        calibrated += ", each behind BOS" if report.get("calibration_bos") else ""
    lines.append(f"{calibrated}.")
    versions = report.get("versions") or {}
    if versions:
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return lines


def _gpus(checkpoint: CheckpointFolder) -> list[str]:
    quant = checkpoint.quantization
    return [
        f"The codes are stored in the order `{quant.get('layout')}`, for {facts.packed_for(checkpoint)}.",
        f"apex4 has kernels of 4-bit and 8-bit activations for {_FOUR_BITS_ON}, and of 8-bit activations alone for "
        f"{_EIGHT_BITS_ON}: on each of them the model is put into its order while it loads.",
        "`apex4 repack` makes that permanent.",
        "They were run on Hopper alone, where those for the other GPUs were checked, too.",
        "Hopper, Turing and Blackwell take 8 bits for 4-bit activations, unless `APEX4_ACTIVATIONS=4` is set.",
        "On any other GPU, and on a CPU, the model computes the same through PyTorch operations, slowly.",
    ]


def _limits(metadata: dict[str, Any]) -> list[str]:
    licence = metadata.get("license_name") or metadata.get("license")
    lines = [
        "* `import apex4_quant` has to come before transformers loads the model.",
        "* The quantized linears take no LoRA adapters and no gradients.",
        "* The kernels read bfloat16 and float16 activations.",
        "* The KV cache is not quantized.",
    ]
    if licence:
        lines.append(f"* Licence: `{licence}`. What the original's licence asks for holds for this model too.")
    return lines


def _citation(base: BaseModel) -> list[str]:
    lines = [
        f"The method: *APEX4: Efficient Pure W4A4 LLM Inference via Intra-SM Compute Rebalancing* ({PAPER}).",
    ]
    if base.hub_id:
        lines.append(f"The model: cite {base.hub_id} as its own card asks.")
    return lines
