"""The demo, from `apex4 eval --record` to a process that loads it by its name, as the README has it, over Xet."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from apex4_quant.checkpoint.load import load_model

from ..hub_server.server import STRANGER, HubServer

NAME = "acme/demo-w4a4"
# What a reader of the card does: its own lines, then the logits of the model that they loaded.
REPORT_LOGITS = """
import torch
with torch.no_grad():
    torch.save(model(torch.arange(32)[None]).logits, "logits.pt")
"""


def readme_commands() -> list[list[str]]:
    """The lines of the README's block that publishes, as words, with a namespace that the server knows."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "apex4 publish" in block]
    return [shlex.split(line) for line in block.replace("ORG/demo-w4a4", NAME).splitlines()]


def python_block(card: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return str(block)


def test_from_a_measurement_to_a_process_that_loads_it_by_name(
    at_hub: HubServer,
    over_xet: None,
    published_demo: Path,
    invoke: Callable[..., Result],
    python: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize, evaluate, publish, load = readme_commands()
    assert quantize == ["apex4", "quantize", "demo", "-o", "demo-w4a4"]  # which `published_demo` is
    monkeypatch.chdir(tmp_path)
    small = ("--limit", "2", "--seq-len", "64", "--device", "cpu", "--json")
    measured = invoke(*evaluate[1:], *small)
    assert measured.exit_code == 0, measured.stderr
    result = invoke(*publish[1:], "--tag", "v1", "--json")
    assert result.exit_code == 0, result.stderr
    loaded = python(load[2])
    assert loaded.communicate(timeout=120)[1].count("Traceback") == 0 and loaded.returncode == 0
    published = json.loads(result.stdout)
    card = at_hub.content(NAME, "README.md").decode()
    perplexity = json.loads(measured.stdout)["perplexity"]
    assert f"{perplexity:.4f}" in card and f'"{NAME}"' in card

    reader = python(python_block(card) + REPORT_LOGITS)
    said, errors = reader.communicate(timeout=120)
    assert reader.returncode == 0, errors
    assert said.startswith("The old house stood")
    with torch.no_grad():
        logits = load_model(published_demo, "cpu", torch.bfloat16, as_it_is=True)(torch.arange(32)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)

    checked = invoke("check", f"{NAME}@v1")
    assert checked.exit_code == 0 and f"{NAME}@v1 is whole" in checked.stdout
    assert json.loads(invoke("inspect", f"{NAME}@{published['commit']}", "--json").stdout)["bytes"] > 0
    scored = invoke("eval", f"{NAME}@v1", "--limit", "1", "--seq-len", "32", "--device", "cpu", "--json")
    assert scored.exit_code == 0 and json.loads(scored.stdout)["perplexity"] > 1, scored.stderr
    assert not [request for request in at_hub.requests if "/lfs/" in request or "/cdn/" in request], "all over Xet"
    missing = invoke("check", f"{NAME}@v9")
    assert missing.exit_code == 2 and f"model '{NAME}' has no revision 'v9'" in missing.stderr


def test_check_stands_before_the_first_byte(
    at_hub: HubServer, published_demo: Path, invoke: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    """Damage that no checksum tells: the configuration says another clip than the run decided."""
    config = json.loads((published_demo / "config.json").read_text())
    config["quantization_config"]["activation_clip"] = 0.123
    config["quantization_config"].pop("modules", None)
    (published_demo / "config.json").write_text(json.dumps(config))
    result = invoke("publish", published_demo, NAME, "--no-eval", "--json")
    one_sentence(result, 1, "activation_clip")
    assert not at_hub.writes()


def test_a_private_model_is_for_those_who_may_see_it(
    at_hub: HubServer,
    published_demo: Path,
    invoke: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[..., str],
) -> None:
    assert invoke("publish", published_demo, NAME, "--no-eval", "--private", "--json").exit_code == 0
    assert invoke("inspect", NAME).exit_code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(published_demo.parent / "another-cache"))
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    one_sentence(invoke("inspect", NAME), 2, f"model '{NAME}' is no local folder and cannot be fetched from the Hub")


def test_dry_run_needs_no_torch(
    hub: HubServer, published_demo: Path, python: Callable[..., subprocess.Popen[str]]
) -> None:
    code = (
        "import sys; from apex4_quant.cli import cli\n"
        f"cli(['publish', {str(published_demo)!r}, '{NAME}', '--no-eval', '--dry-run'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    said, errors = python(code).communicate(timeout=60)
    assert "would be made, public; licence other" in said, errors
    assert "Traceback" not in errors and not hub.writes()


def test_the_revision_of_the_original_is_recorded(
    at_hub: HubServer, tiny_model: Callable[..., Path], calib: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    base = tiny_model()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE.txt\nlanguage: [no]\n---\n"
    )
    store = at_hub.store
    store.create("acme/tiny", private=False)
    lines = [{"key": "header", "value": {"summary": "model"}}] + [
        {"key": "file", "value": {"path": path.name, "content": path.read_bytes()}} for path in base.iterdir()
    ]
    commit = store.commit("acme/tiny", "main", lines, create_pr=False)["oid"]
    again = [lines[0], {"key": "file", "value": {"path": "config.json", "content": b"{}"}}]
    store.commit("acme/tiny", "main", again, create_pr=False)  # the branch goes on, and is no model any more
    small = (
        "--calib",
        calib,
        "--samples",
        2,
        "--seq-len",
        32,
        "--target",
        "none",
        "--recipe",
        "rtn",
        "--device",
        "cpu",
    )
    made = invoke("quantize", f"acme/tiny@{commit[:8]}", "-o", tmp_path / "out", *small)
    assert made.exit_code == 0, made.stderr
    assert "apex4 publish" in made.stdout.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "apex4_report.json").read_text())["model_revision"] == commit
    card = json.loads(invoke("card", tmp_path / "out", "--json").stdout)
    assert (card["base_model"], card["base_model_revision"]) == ("acme/tiny", commit)
    assert card["metadata"]["license_link"] == f"https://huggingface.co/acme/tiny/blob/{commit}/LICENSE.txt"
    assert (card["license"], card["metadata"]["language"]) == ("other", ["no"])
    assert f"apex4 quantize acme/tiny@{commit}" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_s_command_makes_the_same_weights(
    at_hub: HubServer,
    tiny_model: Callable[..., Path],
    calib: Path,
    invoke: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a reader runs it, who has the repository and the original: with a recipe and a plan that are files, and without."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    original = tiny_model()
    for path in (original, calib):
        (there / path.name).symlink_to(path)
    (there / "mine.yaml").write_text("rounding: gptq\nactivation_clip: 0.9\n")
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    entries = {name: {"group_size": "channel", "transform": "none"} for name in names}
    (there / "some.json").write_text(json.dumps({"apex4_plan": 1, "linears": entries}))
    small = ("--calib", calib.name, "--samples", "2", "--seq-len", "32", "--target", "none", "--device", "cpu")
    kept = ("--ignore", "self_attn.*_proj", "--ignore", "mlp.gate_proj", "--ignore", "mlp.up_proj")
    for number, options in enumerate(
        (("--recipe", "rtn", "--group-size", "256"), ("--recipe", "mine.yaml", "--plan", "some.json", *kept))
    ):
        out = there / f"out{number}"
        made = invoke("quantize", original.name, "-o", out, *small, *options)
        assert made.exit_code == 0, made.stderr
        assert invoke("card", out).exit_code == 0
        (block,) = re.findall(r"## Made with\n\n```\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
        shutil.copy(out / "apex4_report.json", there)
        *before, command = block.strip().splitlines()
        subprocess.run(["bash", "-ec", "\n".join(before)], check=True)
        words = [f"again{number}" if word == "OUT" else word for word in shlex.split(command)]
        assert words[:2] == ["apex4", "quantize"]
        again = invoke(*words[1:], "--device", "cpu")
        assert again.exit_code == 0, again.stderr
        files = [
            json.loads((folder / "apex4_report.json").read_text())["files"]
            for folder in (out, there / f"again{number}")
        ]
        assert files[0] == files[1]
