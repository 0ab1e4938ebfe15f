"""The model card: metadata that huggingface_hub reads back, only recorded numbers, and text that people wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, metadata_update

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES, FAMILIES, gains_by_eight_bits
from apex4_quant.publishing.base_model import base_model_of
from apex4_quant.publishing.card import make_card, write_card
from apex4_quant.publishing.folder import CheckpointFolder
from apex4_quant.publishing.records import describe_device, read_records, record_evaluation

from ..hub_server.server import HubServer
from .test_publish import NAME, file, header, send

QUALITY: dict[str, Any] = {
    "model": "/home/someone/model", "format": "W4A4 g128", "perplexity": 12.34567, "baseline": "/home/someone/Tiny",
    "baseline_perplexity": 11.25, "tasks": {"apex4_choice": {"acc": 0.515625, "acc_stderr": 0.03125}},
    "baseline_tasks": {"apex4_choice": {"acc": 0.53125, "acc_stderr": 0.03}}, "text": "wikitext2", "seq_len": 2048,
    "tokens": 65536, "kv_cache_bits": 16, "device": "cpu", "dtype": "bfloat16", "seconds": 9.87,
    "activation_bits": [4], "kernels": ["reference"],
}  # fmt: skip
SPEED: dict[str, Any] = {
    "batch": 3, "prompt_len": 511, "gen_len": 77, "device": "cpu", "seconds": 1.0,
    "result": {"model": "model", "prefill": {"tokens_per_second": 4321.5}, "decode": {"tokens_per_second": 67.25},
               "peak_memory_bytes": 123_400_000, "activation_bits": [4], "kernels": ["reference"]},
    "baseline": {"model": "x", "prefill": {"tokens_per_second": 2000.0}, "decode": {"tokens_per_second": 50.0},
                 "peak_memory_bytes": 246_800_000, "activation_bits": [], "kernels": []},
}  # fmt: skip


@pytest.fixture(autouse=True)
def only_the_server(at_hub: HubServer) -> None:
    """The original's card is asked for at the Hub: at this one, which has none unless a test says so."""


def card_of(folder: Path, **options: Any) -> str:
    write_card(folder, **options)
    return (folder / "README.md").read_text()


def test_without_measurements_the_card_says_so(checkpoint: Callable[..., Path]) -> None:
    card = card_of(checkpoint())
    assert "Nothing was measured." in card and "model-index" not in card and "perplexity" not in card


def test_the_hub_accepts_the_metadata_and_reads_it_back(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    record_evaluation(str(folder), QUALITY, ["eval", "model"])
    write_card(folder, repository=NAME)
    card = ModelCard.load(folder / "README.md")
    card.validate()
    data = card.data
    assert (data.base_model, data.library_name, data.pipeline_tag, data.license) == (
        "meta/Tiny", "transformers", "text-generation", "mit",
    )  # fmt: skip
    assert data.to_dict()["base_model_relation"] == "quantized" and {"apex4", "w4a4"} <= set(data.tags)
    results = {one.metric_type: (one.dataset_type, one.metric_value) for one in data.eval_results}
    assert results == {"perplexity": ("Salesforce/wikitext", 12.34567), "acc": ("apex4_choice", 0.515625)}
    send(folder)
    metadata_update(NAME, {"model-index": metadata_load(folder / "README.md")["model-index"]}, overwrite=True)


def test_the_server_refuses_metadata_that_the_hub_refuses(at_hub: HubServer) -> None:
    for wrong in ("license: mine", "base_model: a b", "license: other", "model-index: [{name: x, results: [{}]}]"):
        with pytest.raises(ValueError):
            ModelCard(f"---\n{wrong}\n---\n").validate()


def test_every_number_is_a_recorded_one(checkpoint: Callable[..., Path]) -> None:
    """Each number of the card is found, rounded as it is shown, in config.json, the report or the measurements."""
    folder = checkpoint()
    record_evaluation(str(folder), QUALITY, ["eval", "model", "--limit", "32"])
    record_evaluation(str(folder), SPEED, ["eval", "model", "--throughput"])
    body = card_of(folder).split("---\n", 2)[2]
    assert "12.3457" in body and "+1.0957 (+9.74 %)" in body and "0.5156 ± 0.0312" in body and "| 2.16 |" in body
    sources = "".join(
        (folder / name).read_text() for name in ("config.json", "apex4_report.json", "apex4_evaluation.json")
    )
    recorded = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", sources)]
    weights = sum(entry["bytes"] for entry in json.loads((folder / "apex4_report.json").read_text())["files"].values())
    errors = [0.01 * (1 + number) for number in range(6)]
    recorded += [sum(errors) / 6, weights]
    pairs = [(12.34567, 11.25), (0.515625, 0.53125), (4321.5, 2000.0), (67.25, 50.0), (123.4, 246.8)]
    recorded += [abs(a - b) for a, b in pairs] + [100 * abs(a / b - 1) for a, b in pairs] + [a / b for a, b in pairs]
    recorded += [6, 1]  # linears by kind, tensors kept: counted in the report
    text = re.sub(r"```python.*?```|<!--.*?-->|## (GPUs|Limits|Citation).*", "", body, flags=re.DOTALL)
    text = re.sub(r"(?<=[A-Za-z_-])\d[\w.-]*|W4A4|INT4|https?://\S+|\d{4}-\d\d-\d\d|\d+\.\d+\.\d+\S*", "", text)
    for number in re.findall(r"\d+(?:\.\d+)?", text):
        digits = len(number.partition(".")[2])
        shown = [round(value / scale, digits) for value in recorded for scale in (1, 1e3, 1e6, 1e9)]
        assert float(number) in shown, f"{number} of the card was not recorded"


def test_the_data_set_of_calibration_is_in_the_metadata(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    report = json.loads((folder / "apex4_report.json").read_text())
    for calib, datasets in (
        ("wikitext2", ["Salesforce/wikitext"]),
        ("org/data:train", ["org/data"]),
        ("bundled", None),
    ):
        report["settings"]["calib"] = calib
        (folder / "apex4_report.json").write_text(json.dumps(report))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        write_card(folder)
        card = ModelCard.load(folder / "README.md")
        card.validate()
        assert card.data.datasets == datasets


def test_handwritten_text_and_metadata_survive(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    first = card_of(folder)
    metadata, text = yaml.safe_load(first.split("---\n")[1]), first.split("---\n", 2)[2]
    metadata |= {"thumbnail": "cat.png", "tags": [*metadata["tags"], "cats"], "license": "llama3"}
    edited = f"---\n{yaml.safe_dump(metadata)}---\n# Mine\n\nBefore.\n{text}\nBehind.\n"
    (folder / "README.md").write_text(edited.replace("## Load", "## Lost"))
    second = card_of(folder)
    assert second.index("Before.") < second.index("## Load") < second.index("Behind.") and "## Lost" not in second
    found = metadata_load(folder / "README.md")
    assert (found["thumbnail"], found["license"]) == ("cat.png", "llama3")
    assert found["tags"] == ["apex4", "w4a4", "int4", "cats"]
    assert card_of(folder) == second, "made again, it is another"


def test_a_card_that_was_there_before_stays_whole(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / "README.md").write_text("# All of this is mine\n")
    assert card_of(folder).index("# All of this is mine") < card_of(folder).index("<!-- apex4: made by")


def test_half_a_pair_of_markers_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / "README.md").write_text(card_of(folder).replace("<!-- apex4: end -->", ""))
    with pytest.raises(UsageError, match="has one of the two apex4 markers and not the other"):
        write_card(folder)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("caf\xe9".encode("latin-1"), "is not UTF-8 .byte 3"),
        (b"---\nlicense: mit\ntags: [a\n---\nmine\n", "metadata at the head of .*line 2"),
        (b"---\nlicense: mit\nlicense: apache-2.0\n---\nmine\n", "license is there twice"),
        (b"---\n- mit\n---\nmine\n", "no mapping"),
        (b"---\ndate: 2020-13-45\n---\nmine\n", "a value cannot be read"),
    ],
)
def test_a_card_that_would_be_lost_is_refused(card: bytes, said: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint() / "README.md"
    path.write_bytes(card)
    with pytest.raises(UsageError, match=said):
        write_card(path.parent)
    assert path.read_bytes() == card


def test_licence_and_languages_come_from_the_original(at_hub: HubServer, checkpoint: Callable[..., Path]) -> None:
    """From the Hub, of the commit that was quantized; given by hand they win, and an option wins over both."""
    at_hub.store.create("meta/Tiny", private=False)
    card = (
        b"---\nlicense: other\nlicense_name: tiny-1.0\nlicense_link: LICENSE\nlanguage:\n- en\n- no\ntags: [x]\n---\n"
    )
    commit = at_hub.store.commit("meta/Tiny", "main", [header(), file("README.md", card)], create_pr=False)["oid"]
    at_hub.store.commit(
        "meta/Tiny", "main", [header(), file("README.md", b"---\nlicense: mit\n---\n")], create_pr=False
    )
    folder = checkpoint(licence=None, model_revision=commit)
    write_card(folder)
    found = metadata_load(folder / "README.md")
    assert (found["license"], found["license_name"], found["language"]) == ("other", "tiny-1.0", ["en", "no"])
    assert found["license_link"] == f"https://huggingface.co/meta/Tiny/blob/{commit}/LICENSE"
    ModelCard.load(folder / "README.md").validate()
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n")
    write_card(folder)
    found = metadata_load(folder / "README.md")
    assert found["license"] == "gemma" and "license_name" not in found and found["language"] == ["en", "no"]
    write_card(folder, licence="apache-2.0")
    assert metadata_load(folder / "README.md")["license"] == "apache-2.0"


def test_a_model_quantized_from_a_folder(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Its path is nobody's business; --base-model names what it was."""
    folder = checkpoint(model=str(tmp_path / "secret" / "llama"))
    card = card_of(folder)
    assert "secret" not in card and "base_model" not in card and "llama, quantized to W4A4" in card
    card = card_of(folder, base_model="meta/Tiny@main")
    assert "base_model: meta/Tiny\n" in card and "apex4 quantize meta/Tiny@main -o OUT" in card
    with pytest.raises(UsageError, match="--base-model 'llama' is no Hub id"):
        write_card(folder, base_model="llama")


def test_the_original_in_the_hubs_cache_has_its_name(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--meta--Tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    base = base_model_of(CheckpointFolder(checkpoint(model=str(snapshot))))
    assert (base.hub_id, base.card_found) == ("meta/Tiny", False)


def test_measurements_of_other_weights_are_refused(checkpoint: Callable[..., Path]) -> None:
    folder, other = checkpoint(), checkpoint("other", seed=1)
    record_evaluation(str(folder), QUALITY, ["eval", "model"])
    (other / "apex4_evaluation.json").write_bytes((folder / "apex4_evaluation.json").read_bytes())
    for use in (lambda: write_card(other), lambda: record_evaluation(str(other), QUALITY, [])):
        with pytest.raises(UsageError, match="holds measurements of other weights than those in"):
            use()
    (other / "apex4_evaluation.json").write_text("[]")
    with pytest.raises(Apex4Error, match="holds no measurements: the file is damaged"):
        write_card(other)
    (other / "apex4_evaluation.json").write_text('{"version": 1')
    with pytest.raises(Apex4Error, match="the file is damaged, remove it and measure again"):
        write_card(other)


def test_a_measurement_made_again_takes_the_place_of_the_first(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    record_evaluation(str(folder), QUALITY, ["eval", "/home/someone/model"])
    record_evaluation(str(folder), QUALITY | {"text": "heldout"}, ["eval", "model"])
    record_evaluation(str(folder), QUALITY | {"perplexity": 9.0}, ["eval", "model"])
    records = read_records(CheckpointFolder(folder))
    assert [(one["result"]["text"], one["result"]["perplexity"]) for one in records] == [
        ("heldout", 12.34567), ("wikitext2", 9.0),
    ]  # fmt: skip
    first = records[0]
    assert first["versions"]["apex4"] and first["activations"] == {"bits": 4, "kernels": ["reference"]}
    assert "someone" not in (folder / "apex4_evaluation.json").read_text()


def test_a_record_names_all_devices_of_a_model_that_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: ["H200", "L40S", "H200"][index])
    named = {
        "cuda": "H200",
        "cuda:1": "L40S",
        "cuda:0, cuda:2, disk": "2 x H200",
        "cuda:1, cuda:0, cpu": "L40S and H200",
    }
    for device, name in named.items():
        found = describe_device(device)
        assert (found["device"], found["name"]) == (device, name)
    assert describe_device("cpu, disk")["name"] == describe_device("cpu")["name"]


def test_measurements_with_other_bits_stand_beside_each_other(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    with_eight = {"activation_bits": [8], "kernels": ["s8"]}
    for result in (QUALITY, QUALITY | with_eight | {"perplexity": 9.0}, QUALITY | {"activation_bits": [4, 8]}):
        record_evaluation(str(folder), result, ["eval", "model"])
    for speed in (SPEED, SPEED | {"result": SPEED["result"] | with_eight}):
        record_evaluation(str(folder), speed, ["eval", "model", "--throughput"])
    records = read_records(CheckpointFolder(folder))
    assert [record["activations"]["bits"] for record in records] == [4, 8, [4, 8], 4, 8]
    card = card_of(folder)
    assert "activations in 8 bits, computed by the s8 kernels" in card and "activations in 4 and 8 bits" in card


def test_a_checkpoint_of_eight_bit_activations_says_so(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 2, "activation_bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    report = json.loads((folder / "apex4_report.json").read_text())
    report["settings"]["activation_bits"] = 8
    (folder / "apex4_report.json").write_text(json.dumps(report))
    card = card_of(folder)
    assert "quantized to W4A8 with apex4: the linear layers compute on INT4 weights and INT8 activations" in card
    assert "--activation-bits 8" in card
    config["quantization_config"]["modules"] = {"model.layers.0.self_attn.q_proj": {"activation_bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "INT4 weights and INT4 and INT8 activations" in card_of(folder)


def test_an_edited_recipe_and_a_plan_are_in_the_command(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    report = json.loads((folder / "apex4_report.json").read_text())
    report["settings"] |= {"recipe": {"name": "mine", "rounding": "gptq"}, "plan": {"a": {"group_size": 256}}}
    report["settings"]["ignore"] = ["*.down_proj"]
    (folder / "apex4_report.json").write_text(json.dumps(report))
    card = card_of(folder)
    assert '{"name": "mine", "rounding": "gptq"}' in card and "--recipe recipe.json --plan plan.json" in card
    assert "--group-size" not in card and "--ignore '*.down_proj'" in card


def test_the_card_names_every_gpu_that_there_are_kernels_for(checkpoint: Callable[..., Path]) -> None:
    (kernels,) = re.findall(r"apex4 has kernels of .*", card_of(checkpoint()))
    both, _, eight = kernels.partition("8-bit activations alone")
    assert {int(sm) for sm in re.findall(r"sm_(\d+)", both)} == set(FAMILIES)
    assert {int(sm) for sm in re.findall(r"sm_(\d+)", eight)} == set(EIGHT_BIT_FAMILIES) - set(FAMILIES)
    assert all(gains_by_eight_bits(sm) for sm in (75, 90, 100, 120)) and not any(map(gains_by_eight_bits, (80, 86, 89)))


DATA = Path(__file__).parent / "data" / "demo-w4a4"
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "example_card.md"


def test_the_example_is_what_the_code_makes() -> None:
    """From the files of a real run. A change of the card is written down with

    python -m apex4_quant card tests/publishing/data/demo-w4a4 --repository ORG/demo-w4a4 &&
    mv tests/publishing/data/demo-w4a4/README.md docs/example_card.md
    """
    checkpoint = CheckpointFolder(DATA)
    made = make_card(checkpoint, base_model_of(checkpoint), "ORG/demo-w4a4")
    assert made == EXAMPLE.read_text("utf-8")
    ModelCard(made).validate()


def test_a_card_of_today_has_the_parts_of_the_example(demo_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo-w4a4"
    folder.mkdir()
    for name in ("config.json", "apex4_report.json"):
        (folder / name).write_bytes((demo_checkpoint / name).read_bytes())
    parts = re.findall(r"^## .*|^[a-z_-]+:", card_of(folder), re.MULTILINE)
    example = re.findall(r"^## .*|^[a-z_-]+:", EXAMPLE.read_text("utf-8"), re.MULTILINE)
    assert parts == [part for part in example if part != "model-index:"]


@pytest.mark.parametrize("repository", [None, NAME])
def test_making_a_card_twice_gives_the_same_bytes(checkpoint: Callable[..., Path], repository: str | None) -> None:
    folder = CheckpointFolder(checkpoint())
    base = base_model_of(folder, offline=True)
    first = make_card(folder, base, repository)
    assert make_card(folder, base, repository, existing=first) == first
