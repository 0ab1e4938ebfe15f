"""The command line as its users meet it: help, JSON, dry runs, evaluation, and what `check` finds in damage."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import apex4_quant
from apex4_quant.calib.text import load_text
from apex4_quant.format.layouts import get_layout

FAILED, USAGE = 1, 2
Call = Callable[..., Any]  # the fixtures of conftest.py
COMMANDS = ("quantize", "plan", "eval", "inspect", "check", "gpus", "doctor", "repack", "bench")
GROUPS = {"kernels": ("build", "list", "tune")}
REPORT = "apex4_report.json"
INDEX = "model.safetensors.index.json"


def one_object(result: Any) -> dict[str, Any]:
    """The JSON object that is all a successful command wrote to stdout."""
    code = result.returncode if hasattr(result, "returncode") else result.exit_code
    assert code == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("}\n")
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


# Help


@pytest.mark.parametrize(
    "command",
    [(), *((name,) for name in COMMANDS), *((group, name) for group in GROUPS for name in GROUPS[group])],
    ids=lambda c: " ".join(c) or "apex4",
)
def test_help_imports_no_library(command: tuple[str, ...], run_cli: Call) -> None:
    result = run_cli(*command, "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: apex4 " + " ".join(command))
    assert all(name in result.stdout for name in ((*COMMANDS, *GROUPS) if not command else ("--json", "--help")))
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert {"click", "apex4_quant"} <= imported
    assert not {"torch", "numpy", "transformers", "safetensors", "tqdm", "yaml"} & imported


def test_version(run_cli: Call) -> None:
    result = run_cli("--version")
    assert (result.returncode, result.stdout) == (0, f"apex4, version {apex4_quant.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "nouns"),
    [
        (("--jason",), ("no such option", "--jason", "'apex4 --help'")),
        (("quantise",), ("no such command 'quantise'", "'apex4 --help'")),
        (("quantize", "--grop-size", 128), ("no such option", "--grop-size", "'apex4 quantize --help'")),
        (("eval",), ("missing argument 'PATH'", "'apex4 eval --help'")),
        (("check", "a", "b"), ("unexpected extra argument (b)", "'apex4 check --help'")),
        (("kernels", "tune", "--out-dtype", "fp8"), ("out-dtype 'fp8'", "bf16, fp16")),
        (("kernels", "build", "--jobs", "2"), ("missing option", "--arch", "'apex4 kernels build --help'")),
        (("plan", "demo", "--budget", "0.5"), ("--budget is 0.5", "1 or more")),
        (("plan", "demo", "--max-loss", "nan"), ("--max-loss is nan", "1 or more")),
        (("plan", "demo", "--max-loss", "little"), ("--max-loss is little", "1 or more")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_usage_errors_of_the_parser(
    arguments: tuple[object, ...], nouns: tuple[str, ...], invoke: Call, one_sentence: Call
) -> None:
    one_sentence(invoke(*arguments), USAGE, *nouns)


@pytest.mark.parametrize("group", [(), ("kernels",)], ids=["apex4", "kernels"])
def test_a_group_without_a_command_shows_its_help(group: tuple[str, ...], invoke: Call) -> None:
    result = invoke(*group)
    assert result.exit_code == USAGE and "Commands:" in result.stdout + result.stderr


# quantize


def test_quantize_json(run_cli: Call, invoke: Call, tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    model, out = tiny_model(sharded=True), tmp_path / "out"
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "RTX 3090", "--ignore", "layers.0.mlp.*")
    result = run_cli("quantize", model, "-o", out, *options, "--json")
    summary = one_object(result)
    assert result.stderr == ""
    assert set(summary) == {
        "model",
        "output",
        "linears_quantized",
        "tensors_kept",
        "bytes_before",
        "bytes_after",
        "bits_per_weight",
        "mean_relative_error",
        "max_relative_error",
        "seconds",
        "left_behind",
        "memory_budget",
        "peak_memory",
        "states_on_disk",
        "experts_at_once",
    }
    assert (summary["model"], summary["output"]) == (str(model), str(out))
    assert summary["linears_quantized"] == 14 - 3
    assert summary["tensors_kept"] == 3 + 4 + 3  # outside, norms, ignored
    stored = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert summary["bytes_after"] == sum(t.numel() * t.itemsize for t in stored.values())
    quantized = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    assert len(quantized) == 11 and not any(name.startswith("model.layers.0.mlp") for name in quantized)
    # A float16 scale for 128 weights (64 rows are whole tiles of sm80), and the learned transforms: one float16 matrix
    # per block of 128 channels of every input, its error feedback, and its clip ratio.
    weights = 2 * (128 * 128 + 2 * 64 * 128 + 128 * 128) + 3 * 256 * 128
    blocks = 2 * 1 + 2 * 1 + 1 + 2
    assert summary["bits_per_weight"] == round(4.125 + 16 * 185 * 128 * blocks / weights, 4)
    assert 0.01 < summary["mean_relative_error"] <= summary["max_relative_error"] < 0.3
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["target"] == {"gpu": "RTX 3090", "arch": "sm_86"} and config["layout"] == "sm80"
    assert config["modules_to_not_convert"] == [
        "lm_head",
        *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
    ]
    one_object(invoke("check", out, "--json"))


def test_quantize_for_people(invoke: Call, tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    model, out = tiny_model(max_position_embeddings=64), tmp_path / "out"
    result = invoke(
        "quantize",
        model,
        "-o",
        out,
        "--calib",
        calib,
        "--samples",
        500,
        "--target",
        "none",
        "--recipe",
        "apex4-hadamard",
    )
    assert result.exit_code == 0
    first, sizes, errors, memory, following = result.stdout.splitlines()
    assert memory.startswith("  memory at most: of the host ")
    assert following == f"  next: apex4 eval {out} --baseline {model} --record; apex4 publish {out} ORG/NAME"
    assert first == f"{out}: 14 linears quantized; tensors kept: 3 outside the decoder layers, 4 not a linear weight"
    assert "4.125 bits per quantized weight" in sizes and "MB -> " in sizes
    assert "mean 0." in errors and "largest 0." in errors
    assert "calibration windows are 64 tokens, the model's context (2048 asked)" in result.stderr
    assert "(500 asked)" in result.stderr
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert f"model.layers.1.{part}" in result.stderr
    assert "128 x 256  group 128  output error 0." in result.stderr
    assert "quantizing" in result.stderr and "checking weights" in result.stderr


def test_dry_run(invoke: Call, tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    model, out = tiny_model(), tmp_path / "out"
    before = sorted(path for path in tmp_path.rglob("*") if path != out)
    command = ("quantize", model, "--calib", calib, "--ignore", "*.o_proj", "--dry-run")
    plan = one_object(invoke(*command, "-o", out, "--json"))
    assert [entry["name"] for entry in plan["quantized"]][:4] == [
        f"model.layers.0.{part}"
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    ]
    assert len(plan["quantized"]) == 12 and plan["quantized"][1] == {
        "name": "model.layers.0.self_attn.k_proj",
        "shape": [64, 128],
        "group_size": 128,
        "transform": "feedback128x16",
        "bytes": 64 * 64 + 2 * 64,
    }
    reasons = {entry["name"]: entry["reason"] for entry in plan["kept"]}
    assert reasons["model.layers.1.self_attn.o_proj.weight"] == "--ignore"
    assert reasons["lm_head.weight"] == "outside the decoder layers"
    assert plan["architecture"] == "LlamaForCausalLM" and plan["bytes_after"] < plan["bytes_before"]
    assert plan["peak_memory_estimate"] > 0 and 0 <= plan["seconds_estimate"] <= plan["seconds_estimate_if_busy"]
    result = invoke(*command)
    assert result.exit_code == 0 and "nothing was written" in result.stdout
    assert "kept, --ignore: 2 tensors" in result.stdout
    assert "2 x model.layers.*.mlp.down_proj " in result.stdout and "layers.1.mlp" not in result.stdout
    every = invoke(*command, "--verbose").stdout
    assert "model.layers.1.mlp.down_proj " in every and "*" not in every
    assert invoke(*command[:-1], "-o", out, "--verbose").exit_code == 2
    assert "about" in result.stdout and " s on cpu" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


# eval


def test_eval_json_with_baseline_and_bundled_tasks(
    invoke: Call, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: the bundled tasks and texts need no Hub."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    tasks = ("--tasks", "apex4_choice,apex4_lastword", "--limit", 8)
    result = one_object(invoke("eval", demo_checkpoint, "--baseline", "demo", *tasks, "--json"))
    assert set(result) >= {
        "model",
        "perplexity",
        "baseline_perplexity",
        "tasks",
        "tokens",
        "seconds",
        "device",
        "dtype",
    }
    assert (result["model"], result["baseline"]) == (str(demo_checkpoint), "demo")
    assert (result["tokens"], result["seq_len"]) == (8 * 512, 512)
    assert (result["dtype"], result["kv_cache_bits"]) == ("bfloat16", 16)
    assert 5 < result["baseline_perplexity"] < result["perplexity"] < 4096**0.75
    for found in (result["tasks"], result["baseline_tasks"]):
        assert set(found) == {"apex4_choice", "apex4_lastword"}
        assert {"acc", "acc_norm"} <= set(found["apex4_choice"]) and found["apex4_choice"]["rows"] == 8
        assert 0 <= found["apex4_choice"]["acc"] <= 1 and found["apex4_lastword"]["perplexity"] > 1
    assert result["tasks"] != result["baseline_tasks"]


def test_eval_for_people(invoke: Call, demo_checkpoint: Path) -> None:
    result = invoke("eval", demo_checkpoint, "--baseline", "demo", "--limit", 2, "--seq-len", 128)
    assert result.exit_code == 0
    head, text, columns, row, divergence, agreement = result.stdout.splitlines()
    assert "W4A4 g128, apex4" in head and "KV cache 16 bits" in head
    assert "256 tokens of heldout in windows of 128" in text
    assert columns.split() == ["baseline", "model", "difference"]
    _, baseline, model, difference = row.split()[:4]
    assert float(model) - float(baseline) == pytest.approx(float(difference), abs=2e-4)
    assert "KL divergence" in divergence and agreement.endswith("%")


def test_eval_says_that_windows_are_capped(invoke: Call, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(load_text("heldout")[:6000])
    result = invoke("eval", "demo", "--text", text, "--limit", 1)
    assert result.exit_code == 0
    assert "windows are 512 tokens, the model's context (2048 asked)" in result.stderr
    assert f"512 tokens of {text} in windows of 512" in result.stdout


def test_eval_of_a_users_own_task(invoke: Call, demo_checkpoint: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"The colour of thing {i} is", "answer": "red", "other": "xqzvk"} for i in range(6)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "my_colours.yaml").write_text(
        f"""task: my_colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tasks / "rows.jsonl"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[other, answer]}}}}"
doc_to_target: 1
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    options = ("--tasks", "my_colours", "--include-path", tasks, "--limit", 4, "--seq-len", 64)
    result = one_object(invoke("eval", demo_checkpoint, *options, "--json"))
    assert list(result["tasks"]) == ["my_colours"]
    assert result["tasks"]["my_colours"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert result["tokens"] == 4 * 64


# inspect and check


def test_inspect_and_check(invoke: Call, demo_checkpoint: Path) -> None:
    found = one_object(invoke("inspect", demo_checkpoint, "--json"))
    assert found["architecture"] == "LlamaForCausalLM" and len(found["linears"]) == 6 * 7
    down = next(linear for linear in found["linears"] if linear["name"] == "model.layers.5.mlp.down_proj")
    assert (down["quantized"], down["shape"], down["group_size"]) == (True, [256, 768], 128)
    assert down["bytes"] == 256 * 768 // 2 + 2 * 256 * 6 + 2 * 6 * 185 * 128 and 0 < down["error"] < 0.5
    shards = [load_file(file) for file in demo_checkpoint.glob("*.safetensors")]
    assert found["bytes"] == sum(t.numel() * t.itemsize for shard in shards for t in shard.values())
    assert found["quantization_config"]["layout"] == "rowmajor"
    text = invoke("inspect", demo_checkpoint).stdout
    assert "model.layers.5.mlp.down_proj" in text and "256 x 768" in text and "W4A4, group 128" in text

    result = one_object(invoke("check", demo_checkpoint, "--json"))
    assert result["ok"] is True and result["path"] == str(demo_checkpoint)
    assert [done["check"] for done in result["checks"]][:3] == ["index and shards", "coverage", "checksums"]
    assert result["checks"][2]["found"] == "all files as recorded"
    assert result["checks"][3]["found"] == "W4A4, transform feedback128x16 and all activation clips as in the report"
    lines = invoke("check", demo_checkpoint).stdout.splitlines()
    assert len(lines) == len(result["checks"]) + 1 and lines[-1] == f"{demo_checkpoint} is whole"


class Damaged:
    """A copy of the demo checkpoint to damage; without its report, whose checksums would find everything first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file_of(self, tensor: str) -> Path:
        return self.folder / json.loads((self.folder / INDEX).read_text())["weight_map"][tensor]

    def edit(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Put `change(tensor)` in the place of a tensor; None removes it from shard and index."""
        path = self.file_of(name)
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        else:
            index = json.loads((self.folder / INDEX).read_text())
            del index["weight_map"][name]
            (self.folder / INDEX).write_text(json.dumps(index))
        save_file(tensors, path, metadata={"format": "pt"})

    def set(self, name: str, position: int, value: float) -> None:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[position] = value
            return tensor

        self.edit(name, change)


@pytest.fixture
def damaged(demo_checkpoint: Path, tmp_path: Path) -> Damaged:
    shutil.copytree(demo_checkpoint, tmp_path / "damaged")
    (tmp_path / "damaged" / REPORT).unlink()
    return Damaged(tmp_path / "damaged")


UP = "model.layers.2.mlp.up_proj"
DAMAGE: dict[str, tuple[Callable[[Damaged], None], tuple[str, ...]]] = {
    "code -8 in a low nibble": (
        lambda d: d.set(f"{UP}.weight_packed", 1000, 0x18),
        (f"{UP}.weight_packed", "model-00004-of", "-8"),
    ),
    "code -8 in a high nibble": (
        lambda d: d.set(f"{UP}.weight_packed", 77, 0x81),
        (f"{UP}.weight_packed", "model-00004-of", "-8"),
    ),
    "zero scale": (lambda d: d.set(f"{UP}.weight_scale", 5, 0.0), (f"{UP}.weight_scale", "zero")),
    "negative scale": (lambda d: d.set(f"{UP}.weight_scale", 5, -0.01), (f"{UP}.weight_scale", "negative")),
    "NaN scale": (lambda d: d.set(f"{UP}.weight_scale", 6, float("nan")), (f"{UP}.weight_scale", "NaN")),
    "infinite scale": (lambda d: d.set(f"{UP}.weight_scale", 7, float("inf")), (f"{UP}.weight_scale", "infinite")),
    "NaN in a norm": (lambda d: d.set("model.norm.weight", 3, float("nan")), ("model.norm.weight", "NaN")),
    "no codes": (lambda d: d.edit(f"{UP}.weight_packed", lambda t: None), (f"{UP}.weight_packed", "missing")),
    "no scales": (lambda d: d.edit(f"{UP}.weight_scale", lambda t: None), (f"{UP}.weight_scale", "missing")),
    "no norm": (
        lambda d: d.edit("model.layers.2.input_layernorm.weight", lambda t: None),
        ("model.layers.2.input_layernorm.weight",),
    ),
    "codes of another shape": (
        lambda d: d.edit(f"{UP}.weight_packed", lambda t: t[:-8].clone()),
        (f"{UP}.weight_packed", "[760, 2, 64]", "[768, 2, 64]"),
    ),
    "scales of another shape": (
        lambda d: d.edit(f"{UP}.weight_scale", lambda t: t[:, :1].clone()),
        (f"{UP}.weight_scale", "[768, 1, 1]", "[768, 2, 1]"),
    ),
    "scales of another dtype": (
        lambda d: d.edit(f"{UP}.weight_scale", lambda t: t.bfloat16()),
        (f"{UP}.weight_scale", "BF16", "F16"),
    ),
    "norm of another shape": (
        lambda d: d.edit("model.norm.weight", lambda t: t[:-1].clone()),
        ("model.norm.weight", "[255]"),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_check_names_the_damaged_tensor(what: str, damaged: Damaged, invoke: Call, one_sentence: Call) -> None:
    damage, nouns = DAMAGE[what]
    damage(damaged)
    one_sentence(invoke("check", damaged.folder, "--json"), FAILED, *nouns)


def test_check_without_a_report(damaged: Damaged, invoke: Call) -> None:
    """What all cases above have in common is not what makes them fail; legal changes pass."""
    damaged.set(f"{UP}.weight_packed", 1000, 0x97)
    damaged.set(f"{UP}.weight_scale", 5, 0.5)
    result = one_object(invoke("check", damaged.folder, "--json"))
    assert "none recorded" in result["checks"][2]["found"]
    assert "not compared" in result["checks"][3]["found"]


def test_check_of_files_and_config(damaged: Damaged, demo_checkpoint: Path, invoke: Call, one_sentence: Call) -> None:
    folder = damaged.folder
    extra = folder / "model-00009-of-00009.safetensors"
    shutil.copy(damaged.file_of(f"{UP}.weight_packed"), extra)
    one_sentence(invoke("check", folder, "--json"), FAILED, str(extra), "is no file of this model by", INDEX)
    extra.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append(UP)
    (folder / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", folder, "--json"), FAILED, f"{UP}.weight is missing", "not quantized")
    # With the report, the checksum of the file is what is found first.
    shutil.copy(demo_checkpoint / REPORT, folder)
    shutil.copy(demo_checkpoint / "config.json", folder)
    damaged.set(f"{UP}.weight_scale", 5, 0.5)
    shard = damaged.file_of(f"{UP}.weight_scale")
    one_sentence(invoke("check", folder, "--json"), FAILED, str(shard), "checksum")


def test_check_compares_config_and_report(
    invoke: Call, tiny_model: Call, calib: Path, tmp_path: Path, one_sentence: Call
) -> None:
    """Each of these loads and runs, and computes something else than was calibrated."""
    out, recipe = tmp_path / "out", tmp_path / "mine.yaml"
    recipe.write_text("search_clip: true")
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--recipe", recipe)
    assert invoke("quantize", tiny_model(), "-o", out, *options, "--json").exit_code == 0
    one_object(invoke("check", out, "--json"))
    config = json.loads((out / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    clip = config["quantization_config"]["modules"][name]["activation_clip"]

    def changed(**changes: Any) -> Any:
        section = config["quantization_config"] | changes
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
        return invoke("check", out, "--json")

    modules = config["quantization_config"]["modules"]
    both = ("config.json", REPORT)
    one_sentence(changed(transform="none"), FAILED, "transform is 'none' in", "'hadamard128' in", *both)
    for wrong, others in ((0.5, {name: {"activation_clip": 0.5}}), (1.0, {name: {}})):
        found = changed(modules=modules | others)
        one_sentence(found, FAILED, name, f"activation_clip {wrong} in config.json and {clip} in", *both)
    one_sentence(changed(modules={}), FAILED, "model.layers.0.self_attn.q_proj has activation_clip 1.0 in", *both)
    one_object(changed())


def test_check_of_layouts(invoke: Call, tiny_model: Call, calib: Path, tmp_path: Path, one_sentence: Call) -> None:
    """Ragged shapes in the fragment-ordered layout are padded: the padding holds no code either that is never written."""
    model, out = tiny_model(intermediate_size=200), tmp_path / "out"
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "RTX 3090", "--recipe", "gptq")
    assert invoke("quantize", model, "-o", out, *options, "--json").exit_code == 0
    one_object(invoke("check", out, "--json"))
    down = "model.layers.1.mlp.down_proj"
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["modules"][down] == {"shape": [128, 200]}
    del config["quantization_config"]["modules"][down]
    (out / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", out, "--json"), FAILED, down, "true shape")
    config["quantization_config"]["modules"][down] = {"shape": [128, 256]}
    (out / "config.json").write_text(json.dumps(config))
    one_sentence(invoke("check", out, "--json"), FAILED, down, "128 x 200", "[128, 256]")
    assert get_layout(config["quantization_config"]["layout"]).tile_n == 64


def test_reader_of_stdout_that_leaves(demo_checkpoint: Path, cli_environment: dict[str, str]) -> None:
    """`apex4 inspect OUT | head -1` ends without a traceback."""
    command = [sys.executable, "-m", "apex4_quant.cli", "inspect", str(demo_checkpoint)]
    with subprocess.Popen(
        command, env=cli_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
