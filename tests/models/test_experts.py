"""Mixtures of experts: unfusing, both ways of storing them, experts that see few tokens, and every command on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.calib.probes import InputProbe
from apex4_quant.errors import Apex4Error, Stopped
from apex4_quant.models.experts import UnfusedExperts, unfuse_experts
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.progress import Progress
from apex4_quant.quantization.collector import SHARED_STATISTICS, Collector
from apex4_quant.quantization.plan import build_plan
from apex4_quant.quantization.run_state import Streams

from ..conftest import stop_after

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
EXPERT = "model.layers.1.mlp.experts.3"


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen3moe() -> torch.nn.Module:
    """Dense layer 0, sparse layer 1 with six experts of which the router can never choose 4 and 5."""
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, head_dim=64, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=96, decoder_sparse_step=2
        )
    )
    router = model.model.layers[1].mlp.gate.weight.data
    row = torch.randn(128)
    router[:] = torch.stack([row, row, -row, -row, 0 * row, 0 * row])
    return model


MODELS = {"mixtral": mixtral, "qwen3moe": qwen3moe}


@pytest.fixture
def moe(tmp_path: Path) -> Callable[..., Path]:
    """moe(name, folder=name, **how to save) -> the folder of a small random model in bfloat16."""

    def make(name: str, folder: str = "", **save: Any) -> Path:
        path = tmp_path / (folder or name)
        torch.manual_seed(3)
        MODELS[name]().to(torch.bfloat16).save_pretrained(path, **save)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_PATH / file, path)
        return path

    return make


def settings_for(model: Path, **changes: Any) -> QuantizeSettings:
    return QuantizeSettings(str(model), **{"target": "none", "samples": 2, "seq_len": 32, "recipe": "gptq"} | changes)


class Lines(Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_unfused_experts_compute_what_the_fused_ones_do(name: str, implementation: str) -> None:
    model = MODELS[name]().eval()
    model.set_experts_implementation(implementation)
    unfused = MODELS[name]().eval()
    unfuse_experts(unfused)
    state = {}
    for key, tensor in model.state_dict().items():
        if ".experts." not in key:
            state[key] = tensor
            continue
        parent, _, part = key.rpartition(".")
        for i, matrix in enumerate(tensor):
            halves = matrix.chunk(2) if part == "gate_up_proj" else (matrix,)
            for projection, half in zip(part.replace("gate_up", "gate_proj,up").split(","), halves, strict=True):
                state[f"{parent}.{i}.{projection}.weight"] = half
    unfused.load_state_dict(state, assign=True)
    ids = torch.arange(40)[None] * 97 % 4096
    torch.testing.assert_close(unfused(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_published_sources_give_the_same_bytes(name: str, moe: Callable[..., Path], tmp_path: Path) -> None:
    published, fused = moe(name), moe(name, "fused", save_original_format=False)
    names = [set(load_file(folder / "model.safetensors")) for folder in (published, fused)]
    assert any(".experts.1." in key for key in names[0]) and not any(".experts.1." in key for key in names[1])
    for folder in (published, fused):
        quantize(settings_for(folder), tmp_path / f"out-{folder.name}")
    shards = sorted((tmp_path / f"out-{name}").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "out-fused" / shard.name).read_bytes()


def test_experts_of_another_form_are_refused() -> None:
    for attribute, value in (("has_bias", True), ("is_transposed", True), ("has_gate", False)):
        model = mixtral()
        setattr(model.model.layers[1].mlp.experts, attribute, value)
        with pytest.raises(Apex4Error, match=r"experts in model\.layers\.1\.mlp\.experts"):
            unfuse_experts(model)


def test_a_fused_source_is_read_expert_by_expert(moe: Callable[..., Path]) -> None:
    source = ModelSource(str(moe("mixtral", save_original_format=False)))
    whole = load_file(source.folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(source.read([f"{EXPERT}.gate_proj.weight"])[f"{EXPERT}.gate_proj.weight"], whole[3, :128])
    assert torch.equal(source.read([f"{EXPERT}.up_proj.weight"])[f"{EXPERT}.up_proj.weight"], whole[3, 128:])
    assert source.total_bytes == sum(t.nbytes for t in load_file(source.folder / "model.safetensors").values())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


MIXTRAL_EXPERT = "model.layers.1.block_sparse_moe.experts.3"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGES: dict[str, tuple[str, bool, Callable[[dict[str, torch.Tensor]], object], tuple[str, ...]]] = {
    "mixtral expert": ("mixtral", True, lambda t: t.pop(f"{MIXTRAL_EXPERT}.w3.weight"), (f"{MIXTRAL_EXPERT}.w3.weight",)),
    "qwen expert": ("qwen3moe", True, lambda t: t.pop(f"{EXPERT}.down_proj.weight"), (f"{EXPERT}.down_proj.weight",)),
    "router": (
        "mixtral",
        True,
        lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"),
        ("model.layers.1.block_sparse_moe.gate.weight", "incomplete"),
    ),
    "an expert too many": (
        "mixtral",
        True,
        lambda t: t.update({MIXTRAL_EXPERT[:-1] + "4.w1.weight": torch.ones(128, 128)}),
        (MIXTRAL_EXPERT[:-1] + "4.w1.weight", "config.json"),
    ),
    "fused, an expert too few": (
        "mixtral", False, lambda t: t.update({FUSED: t[FUSED][:3].clone()}), (f"{EXPERT}.gate_proj.weight", "incomplete")
    ),
    "fused, odd rows": ("mixtral", False, lambda t: t.update({FUSED: t[FUSED][:, 1:].clone()}), (FUSED, "[4, 255, 128]")),
    "fused, another width": (
        "mixtral", False, lambda t: t.update({FUSED: t[FUSED][..., :64].clone()}), (FUSED, "[128, 64]", "[128, 128]")
    ),
    "stored twice": (
        "qwen3moe",
        True,
        lambda t: t.update({FUSED: torch.ones(6, 192, 128)}),
        (FUSED, "model.layers.1.mlp.experts.0", "stored both"),
    ),
    "NaN in a part": (
        "mixtral", False, lambda t: t[FUSED][2, 130, 5:6].fill_(float("nan")), (FUSED, "NaN")
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources_are_refused(
    damage: str, moe: Callable[..., Path], quantize_badly: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    name, published, change, nouns = DAMAGES[damage]
    folder = moe(name, **({} if published else {"save_original_format": False}))
    edit(folder, change)
    one_sentence(quantize_badly(folder), 1, *nouns)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_local_experts", None), ("num_local_experts", "4"), ("mlp_only_layers", 3), ("decoder_sparse_step", 0)],
)
def test_damaged_configs_are_refused(
    field: str,
    value: object,
    moe: Callable[..., Path],
    quantize_badly: Callable[..., Result],
    one_sentence: Callable[..., str],
) -> None:
    folder = moe("mixtral")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(config))
    one_sentence(quantize_badly(folder), 1, field, "config.json")


@pytest.mark.parametrize("recipe", ["rtn", "apex4"])
def test_experts_without_tokens_are_quantized_reported_and_inspected(
    recipe: str, moe: Callable[..., Path], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    progress = Lines()
    settings = settings_for(moe("qwen3moe"), recipe=recipe, samples=8, seq_len=128)
    result = quantize(settings, tmp_path / "out", progress=progress)
    records = {record["name"]: record for record in result.records}
    assert len(records) == 7 + 4 + 6 * 3
    report = json.loads((tmp_path / "out" / "apex4_report.json").read_text())
    for entry in report["quantized"]:
        record = records[entry["name"]]
        assert 0 < record["error"] < 0.5 and record["error"] == entry["error"]
        if ".experts." not in record["name"]:
            assert "calibration_tokens" not in record and "fallback" not in record
            continue
        expert = int(record["name"].split(".")[5])
        unreachable = expert in (4, 5)
        assert (record["calibration_tokens"] == 0) == unreachable
        assert record.get("fallback") == entry.get("fallback") == (SHARED_STATISTICS if unreachable else None)
        assert record["calibration_tokens"] == entry["calibration_tokens"]
    tokens = [records[f"model.layers.1.mlp.experts.{i}.up_proj"]["calibration_tokens"] for i in range(6)]
    assert sum(tokens) == 2 * 8 * 128
    said = [line for line in progress.said if "no calibration token reached" in line]
    assert [line.partition(":")[0][-1] for line in said] == ["4", "5", "4", "5"]
    assert "gate_proj, up_proj use shared statistics" in said[0] and "down_proj use" in said[2]
    assert [message for message in report["messages"] if message in said] == said
    assert not any("output error" in message for message in report["messages"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[1].mlp.experts[5].up_proj, Apex4Linear)

    linears = json.loads(invoke("inspect", tmp_path / "out", "--json").stdout)["linears"]
    inspected = {linear["name"]: linear for linear in linears}
    for name, record in records.items():
        for key in ("calibration_tokens", "fallback"):
            assert inspected[name].get(key) == record.get(key)
    *lines, last = invoke("inspect", tmp_path / "out").stdout.splitlines()
    marked = [line.split()[0] for line in lines if f"{SHARED_STATISTICS} (0 tokens of its own)" in line]
    parts = ("4.gate", "4.up", "5.gate", "5.up", "4.down", "5.down")
    assert marked == [f"model.layers.1.mlp.experts.{part}_proj" for part in parts]
    assert last.startswith("  6 linears of experts") and SHARED_STATISTICS in last and "--samples" in last


@torch.no_grad()
def test_statistics_are_those_of_the_tokens_that_the_router_sends(moe: Callable[..., Path]) -> None:
    source = ModelSource(str(moe("qwen3moe")))
    runner = LayerRunner(source, "cpu", torch.float32)
    ids = torch.arange(16 * 64).reshape(16, 64) * 31 % 4096
    runner.prepare(64)
    hidden = runner.embed(ids, source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"])
    runner.load_layer(0, source.read(source.layer_tensors(0)))
    hidden = runner.run_layer(0, hidden)
    layer = runner.load_layer(1, source.read(source.layer_tensors(1)))
    plan = build_plan(source, recipe="gptq", transform="none", group_size=128, layout="rowmajor", target={}, ignore=())
    said: list[str] = []
    collector = Collector(runner, source.family, source.config, True, said.append)
    groups = list(collector.inputs_of(1, layer, plan.of_layer(1), Streams(hidden)))
    assert [len(group.parts) for group in groups] == [1, 1, 5] + [1] * 6  # four fed experts and the starved together

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    model.set_experts_implementation("eager")
    calls: list[tuple[torch.Tensor, ...]] = []
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    model(ids)
    states, index, _ = calls[0]

    def moments(rows: torch.Tensor) -> torch.Tensor:
        return rows.t() @ rows / len(rows)

    def inner(expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ experts.gate_up_proj[expert].t()).chunk(2, dim=-1)
        return torch.nn.functional.pad(torch.nn.functional.silu(gate) * up, (0, 32))

    for part in [*groups[2].parts[:4], *(group.parts[0] for group in groups[3:])]:
        expert = next(iter(part.tokens))
        chosen = (index == expert).any(-1)
        assert part.tokens == {expert: int(chosen.sum())}
        assert part.shared == (expert in (4, 5))
        rows = states if part.shared else states[chosen]
        expected = moments(rows if "down_proj" not in part.planned[0].name else inner(expert, rows))
        torch.testing.assert_close(part.statistics.take_hessian(None), expected, rtol=1e-3, atol=1e-5)
    starved = groups[2].parts[4]
    assert starved.shared and starved.tokens == {4: 0, 5: 0}
    torch.testing.assert_close(starved.statistics.take_hessian(None), moments(states), rtol=1e-3, atol=1e-5)
    assert len(said) == 4


def test_rows_of_an_input_of_unknown_length_stay_evenly_spaced() -> None:
    for total in (5, 63, 64, 65, 127, 128, 1000):
        probe = InputProbe(None, 64)
        for start in range(0, total, 37):
            probe.add(torch.arange(start, min(start + 37, total), dtype=torch.float32)[:, None])
        rows = probe.rows()[:, 0]
        assert min(total, 32) <= len(rows) <= 64
        stride = int(rows[1] - rows[0])
        assert torch.equal(rows, torch.arange(0, total, stride, dtype=torch.float32))


def test_a_stopped_run_goes_on_to_the_same_bytes(moe: Callable[..., Path], tmp_path: Path) -> None:
    settings = settings_for(moe("qwen3moe"))
    quantize(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        quantize(settings, tmp_path / "parts", should_stop=stop_after(1, tmp_path / "parts"))
    quantize(settings, tmp_path / "parts", resume=True)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file


def test_every_command_and_ignored_experts(
    moe: Callable[..., Path], invoke: Callable[..., Result], tmp_path: Path
) -> None:
    model, out = moe("mixtral"), tmp_path / "out"
    small = ("--samples", 2, "--seq-len", 32, "--target", "none", "--ignore", "mlp.experts.1.*", "--json")
    dry = json.loads(invoke("quantize", model, "-o", out, *small, "--dry-run").stdout)
    assert len(dry["quantized"]) == 2 * (4 + 3 * 3) and dry["peak_memory_estimate"] > 0
    reasons = {kept["name"]: kept["reason"] for kept in dry["kept"]}
    assert reasons["model.layers.0.mlp.gate.weight"] == "a router"
    assert reasons["model.layers.0.mlp.experts.1.up_proj.weight"] == "--ignore"
    assert json.loads(invoke("quantize", model, "-o", out, *small).stdout)["linears_quantized"] == 26
    checked = invoke("check", out)
    assert checked.exit_code == 0, checked.output
    inspected = json.loads(invoke("inspect", out, "--json").stdout)["linears"]
    assert len(inspected) == 32 and sum(linear["quantized"] for linear in inspected) == 26

    before, after = load_file(model / "model.safetensors"), AutoModelForCausalLM.from_pretrained(out).state_dict()
    stored = before["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert torch.equal(after["model.layers.0.mlp.experts.1.down_proj.weight"], stored)
    wrong = invoke("quantize", model, "-o", tmp_path / "other", "--ignore", "experts.7.*")
    assert wrong.exit_code == 2 and "model.layers.0.mlp.experts.3.down_proj" in wrong.stderr


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_saves_and_loads_again(name: str, moe: Callable[..., Path], tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    quantize(settings_for(moe(name), ignore=("mlp.experts.0.up_proj",)), out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(model.model.layers[1].mlp.experts, UnfusedExperts)
    model.save_pretrained(again)
    stored, saved = (
        {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (out, again)
    )
    assert stored.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in stored.items())
    ids = torch.arange(32)[None]
    base = AutoModel.from_pretrained(again)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("tensor", ["down_proj.weight_packed", "up_proj.weight"])
def test_a_quantized_checkpoint_without_a_tensor_of_an_expert_never_loads(
    tensor: str, moe: Callable[..., Path], tmp_path: Path
) -> None:
    quantize(settings_for(moe("mixtral"), ignore=("mlp.experts.3.up_proj",)), tmp_path / "out")
    edit(tmp_path / "out", lambda tensors: tensors.pop(f"{EXPERT}.{tensor}", None))
    with pytest.raises(Apex4Error, match=f"no tensor {EXPERT}.{tensor}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
