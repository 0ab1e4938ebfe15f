"""A run by several processes: the same structure and quality as by one, resumable by any number, refused where they differ."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.calib.text import load_text
from apex4_quant.checkpoint.check import check
from apex4_quant.distributed.group import Group
from apex4_quant.errors import Apex4Error
from apex4_quant.evaluation.evaluate import EvalSettings, evaluate
from apex4_quant.format.storage import RUN_FOLDER, sha256
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.quantization import run
from apex4_quant.quantization.layer import LayerQuantizer
from apex4_quant.quantization.run_state import RunState
from apex4_quant.recipes import named_recipes

from ..conftest import TOKENIZER_FILES, write_tiny_model
from ..distributed.several import Ended, Several
from ..models import test_families as ZOO

STOPPED = 75
LAYERS = 2
# Of a report: sums in another order may send a token to another expert.
MEASURED = ("error", "sha256", "activation_clip", "calibration_tokens")


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its SHA-256."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_moe(folder: Path, **changes: Any) -> Path:
    """Of Qwen3's architecture: six experts, of which the last is sent no token; with `changes` of its configuration."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = Qwen3MoeConfig(**sizes | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate *= 5
            gate[5] = -20 * gate[:5].abs().sum(0)  # below some other for nearly every token
        model.to(torch.bfloat16).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(DEMO_PATH / file, folder / file)
    return folder


def settings_of(folder: Path, model: Path, recipe: str = "apex4", **changes: Any) -> QuantizeSettings:
    calib = folder / "calibration.txt"
    if not calib.exists():
        # Not a page of ours, which changes; and one that leaves no expert near the number of tokens it needs.
        calib.write_text(load_text("bundled")[200000 : 200000 + 60000])
    quick = named_recipes()[recipe].as_dict() | {"transform_steps": 10}
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in quick.items() if key != "name"}))
    settings = QuantizeSettings(str(model), recipe=str(path), calib=str(calib), samples=7, seq_len=64, target="none")
    return replace(settings, device="cpu", **changes)


def by_ranks(size: int, settings: QuantizeSettings, out: Path, **options: Any) -> list[Ended]:
    return several(size, settings, out, **options).wait()


def several(size: int, settings: QuantizeSettings, out: Path, resume: bool = False) -> Several:
    def work(group: Group) -> None:
        quantize(settings, out, resume=resume, group=group)

    return Several(size, out.with_name(f"{out.name}-{size}-said"), work)


def whole(ended: list[Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), ended
    assert not "".join(each.stdout for each in ended)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_tiny_model(folder / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def by_two(folder: Path, model: Path) -> Path:
    """What two ranks make of the model, without interruption."""
    out = folder / "by-two"
    whole(by_ranks(2, settings_of(folder, model), out))
    return out


def differing(one: Path, other: Path, layer: int) -> float:
    """The share of a layer's bytes of packed codes that are not the same."""
    found = [load_file(next(path.glob(f"model-{layer + 2:05}-*"))) for path in (one, other)]
    names = [name for name in found[0] if name.endswith("weight_packed")]
    changed = sum(int((found[0][name] != found[1][name]).sum()) for name in names)
    return changed / sum(found[0][name].numel() for name in names)


def without_numbers(value: Any) -> Any:
    """The structure of a report: what is measured, and checksums, left away."""
    if isinstance(value, dict):
        return {key: without_numbers(entry) for key, entry in value.items() if key not in MEASURED}
    if isinstance(value, str):
        return re.sub(r"\d+ calibration tokens", "calibration tokens", value)
    return [without_numbers(entry) for entry in value] if isinstance(value, list) else value


more = pytest.mark.slow("the same with another recipe or number of ranks")


@pytest.mark.parametrize(
    ("kind", "size", "recipe"),
    [
        ("llama", 2, "apex4"),
        ("moe", 2, "apex4-gptaq"),
        pytest.param("llama", 3, "apex4-hadamard", marks=more),
        pytest.param("moe", 4, "apex4", marks=more),
    ],
)
def test_checkpoint_is_that_of_one_process_but_for_the_order_of_sums(
    kind: str, size: int, recipe: str, folder: Path, model: Path, by_two: Path
) -> None:
    path = model if kind == "llama" else folder / "moe"
    if not path.exists():
        write_moe(path)
    settings = settings_of(folder, path, recipe)
    one, two = folder / f"{kind}-{recipe}-1", folder / f"{kind}-{recipe}-{size}"
    quantize(settings, one)
    if (kind, recipe) == ("llama", "apex4"):
        two = by_two
    else:
        whole(by_ranks(size, settings, two))
    assert set(contents(one)) == set(contents(two))
    reports = [json.loads((out / "apex4_report.json").read_text()) for out in (one, two)]
    assert without_numbers(reports[0]) == without_numbers(reports[1])
    errors = [[entry["error"] for entry in report["quantized"]] for report in reports]
    tokens = [[entry.get("calibration_tokens", 0) for entry in report["quantized"]] for report in reports]
    assert sum(abs(a - b) for a, b in zip(*tokens, strict=True)) <= 0.04 * sum(tokens[0])
    assert sum(errors[0]) == pytest.approx(sum(errors[1]), rel=0.01)
    print(f"{kind}, {recipe}, {size} ranks: bytes of codes that differ, by layer:", end="")
    print("", *(f"{100 * differing(one, two, layer):.1f} %" for layer in range(2)))
    found = [evaluate(EvalSettings(str(out), str(path), limit=32, seq_len=64, device="cpu")) for out in (one, two)]
    print(*(f"{1000 * each['divergence']:.3f}" for each in found))
    assert found[0]["divergence"] == pytest.approx(found[1]["divergence"], rel=0.1)


@pytest.mark.slow("one mixture is tested with every change")
@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("deepseek3", "apex4"),
        ("gptoss ragged", "apex4-fast"),
        ("qwen3next", "apex4-fast"),
        ("mixtral tied ragged", "rtn"),
    ],
)
def test_experts_of_other_families(kind: str, recipe: str, tmp_path: Path) -> None:
    """With biases, shared experts, dense layers first, widths that are padded: each expert by one of three ranks."""
    ZOO.write_model(tmp_path / "model", kind)
    settings, one, three = settings_of(tmp_path, tmp_path / "model", recipe), tmp_path / "one", tmp_path / "three"
    quantize(settings, one)
    whole(by_ranks(3, settings, three))
    reports = [json.loads((out / "apex4_report.json").read_text()) for out in (one, three)]
    assert without_numbers(reports[0]) == without_numbers(reports[1])
    errors = [sum(entry["error"] for entry in report["quantized"]) for report in reports]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert check(str(three))[-1]["check"] == "reload and one forward pass"


@pytest.mark.slow("portions are tested with one process")
def test_ranks_collect_portions_of_experts_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them would have memory for more."""
    settings, kept_to = settings_of(folder, write_moe(tmp_path / "moe"), "apex4-gptaq"), run.fit
    whole(by_ranks(2, settings, tmp_path / "whole"))

    def work(group: Group) -> None:
        monkeypatch.setattr(run, "fit", lambda *words: replace(kept_to(*words), experts_at_once=2 + group.rank))
        assert quantize(settings, tmp_path / "portions", group=group).experts_at_once == 2

    whole(Several(2, tmp_path / "said", work).wait())
    assert contents(tmp_path / "whole") == contents(tmp_path / "portions")


def killed_and_resumed(
    size: int, by: int, victim: int, after: float, settings: QuantizeSettings, out: Path
) -> list[Ended]:
    """A run of `size` ranks of which one is killed after so many seconds, and then resumed by others."""
    running = several(size, settings, out)
    time.sleep(after)
    running.kill(victim)
    ended = running.wait(60)
    whole(by_ranks(by, settings, out, resume=True))
    return ended


def test_rank_that_is_killed_ends_all_and_the_run_goes_on_to_the_same_bytes(
    folder: Path, model: Path, by_two: Path, tmp_path: Path
) -> None:
    """At random moments: tests/fuzz/test_kills.py."""
    victim = 1
    ended = killed_and_resumed(2, 2, victim, 1.8, settings_of(folder, model), tmp_path / "out")
    if ended[victim].code != -signal.SIGKILL:  # it had finished
        whole(ended)
    elif (other := ended[1 - victim]).code != 0:  # 0: all was written when it was killed
        lines = [line for line in other.stderr.splitlines() if line.startswith("apex4: ")]
        assert other.code == STOPPED and len(lines) == 1 and f"rank {victim} ended without a word" in lines[0]
        assert "Traceback" not in other.stderr
    assert contents(tmp_path / "out") == contents(by_two)


def test_a_layer_is_kept_while_the_next_one_is_worked_on_and_committed_when_all_have_kept_it(
    folder: Path, model: Path, by_two: Path, tmp_path: Path
) -> None:
    """Rank 1 is slow to keep the states that leave layer 0."""
    settings, out, log = settings_of(folder, model), tmp_path / "out", tmp_path / "log"

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(text + "\n")

    def work(group: Group) -> None:
        begun = threading.Event()
        save, quantize_layer, commit = RunState.save_hidden, LayerQuantizer.quantize, RunState.commit

        def saved(self: RunState, layer: int, streams: Any) -> None:
            if group.rank == 1 and layer == 1:
                assert begun.wait(60)
                time.sleep(0.3)
            save(self, layer, streams)
            note(f"rank {group.rank} kept {layer}")

        def quantized(self: LayerQuantizer, layer: int, *rest: Any) -> Any:
            if layer == 1:
                begun.set()
            note(f"rank {group.rank} begins {layer}")
            return quantize_layer(self, layer, *rest)

        def committed(self: RunState, shard: int, record: dict[str, Any]) -> None:
            commit(self, shard, record)
            note(f"rank {group.rank} committed {shard}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunState, "save_hidden", saved)
            patch.setattr(RunState, "commit", committed)
            patch.setattr(LayerQuantizer, "quantize", quantized)
            quantize(settings, out, group=group)

    whole(Several(2, tmp_path / "said", work).wait())
    lines = log.read_text().splitlines()
    assert [line for line in lines if "committed" in line] == [f"rank 0 committed {shard}" for shard in (1, 2, 3, 4)]
    assert lines.index("rank 1 begins 1") < lines.index("rank 1 kept 1") < lines.index("rank 0 committed 2")
    assert contents(out) == contents(by_two)


def test_a_layer_that_one_rank_cannot_keep_is_not_committed(
    folder: Path, model: Path, by_two: Path, tmp_path: Path
) -> None:
    settings, out = settings_of(folder, model), tmp_path / "out"

    def work(group: Group) -> None:
        save = RunState.save_hidden

        def saved(self: RunState, layer: int, streams: Any) -> None:
            if group.rank == 1 and layer == 1:
                raise Apex4Error("no room for the states")
            save(self, layer, streams)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunState, "save_hidden", saved)
            quantize(settings, out, group=group)

    ended = Several(2, tmp_path / "said", work).wait()
    assert [each.code for each in ended] == [1, 1]
    assert "".join(each.stderr for each in ended) == "apex4: rank 1: no room for the states\n"
    assert [path.name for path in (out / RUN_FOLDER).glob("shard-*.json")] == ["shard-00001.json"]  # the embedding
    whole(by_ranks(2, settings, out, resume=True))
    assert contents(out) == contents(by_two)


@pytest.mark.parametrize(("size", "by"), [(2, 3), pytest.param(3, 1, marks=more), pytest.param(1, 2, marks=more)])
def test_another_number_of_ranks_goes_on(size: int, by: int, folder: Path, model: Path, tmp_path: Path) -> None:
    settings, out = settings_of(folder, model), tmp_path / "out"

    def work(group: Group) -> None:
        quantize(settings, out, should_stop=lambda: len(list(out.glob("model-*.safetensors"))) > 1, group=group)

    ended = Several(size, tmp_path / "first", work).wait()
    assert [each.code for each in ended] == [STOPPED] * size
    said = "".join(each.stderr for each in ended)
    assert said.startswith("apex4: stopped before layer 1 of 2, nothing is lost") and said.count("\n") == 1
    parts = [path.name for path in (out / RUN_FOLDER).glob("hidden-*")]
    assert len(parts) == size and all(name.startswith("hidden-00001") for name in parts)
    whole(by_ranks(by, settings, out, resume=True))
    report = json.loads((out / "apex4_report.json").read_text())
    assert len(report["quantized"]) == 7 * LAYERS and max(each["error"] for each in report["quantized"]) < 0.3
    assert not (out / RUN_FOLDER).exists()


def test_ranks_that_see_other_things_are_refused(folder: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    settings, out = settings_of(folder, model), tmp_path / "out"

    def other_model(group: Group) -> None:
        quantize(replace(settings, model=str([model, other][group.rank])), out, group=group)

    def other_setting(group: Group) -> None:
        quantize(replace(settings, seed=group.rank), out, group=group)

    def other_disk(group: Group) -> None:
        quantize(settings, tmp_path / f"disk-{group.rank}", group=group)

    def too_many(group: Group) -> None:
        quantize(replace(settings, samples=1), out, group=group)

    def distilled(group: Group) -> None:
        quantize(settings_of(folder, model, "apex4-distill"), out, group=group)

    refused = {
        other_model: f"rank 1 has another weights of {model} than rank 0: give every rank the same files",
        other_setting: "rank 1 has another calibration text",
        other_disk: "give an output folder on a disk that all ranks share",
        too_many: "2 ranks have 1 calibration windows to share",
        distilled: "distills, which one process does",
    }
    for work, sentence in refused.items():
        ended = Several(2, tmp_path / work.__name__, work).wait()
        said = "".join(each.stderr for each in ended).splitlines()
        assert [each.code for each in ended] == [2, 2], ended
        assert len(said) == 1 and sentence in said[0], said
        assert not (out / "config.json").exists()


@pytest.mark.slow("what a disk without room does is tested for one process")
def test_a_full_disk_of_one_rank_is_said_once(folder: Path, model: Path, by_two: Path, tmp_path: Path) -> None:
    """Of rank 1, which writes states only. When there is room again the run goes on."""
    import resource

    settings, out = settings_of(folder, model), tmp_path / "out"

    def work(group: Group) -> None:
        if group.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        quantize(settings, out, group=group)

    ended = Several(2, tmp_path / "said", work).wait()
    assert [each.code for each in ended] == [1, 1]
    said = "".join(each.stderr for each in ended).splitlines()
    assert len(said) == 1 and said[0].startswith("apex4: rank 1: no space left to write"), said
    whole(by_ranks(2, settings, out, resume=True))
    assert contents(out) == contents(by_two)
