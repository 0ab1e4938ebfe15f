"""What several test files use: a quantized demo, tiny random models, the command line in and out of process."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import apex4_quant
from apex4_quant.cli import cli
from apex4_quant.command_options import BARS_OFF
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.recipes import named_recipes

from . import selection

# One thread for every process of a test: on a busy machine torch's threads wait for each other ten times as long as these
# small models compute. pytest-xdist has one process a core.
torch.set_num_threads(1)
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# Layers of these models take a second. Tests of kills want each to be kept.
os.environ.setdefault("APEX4_KEEP_EVERY", "0")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


MOST_STEPS = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow(reason): left out unless --all is given or the test is named by its id")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selection.modify_items(config, items)


def pytest_report_header(config: pytest.Config) -> str:
    return selection.header(config)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def quickly_learned() -> Iterator[None]:
    """In this process the named recipes learn transforms for fewer steps: most tests quantize, and few are about accuracy."""
    recipes = named_recipes()  # cached: the very dictionary that everybody reads
    full = dict(recipes)
    recipes.update(
        {name: replace(each, transform_steps=min(each.transform_steps, MOST_STEPS)) for name, each in full.items()}
    )
    yield
    recipes.update(full)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file `path` against the other processes of this test run; a process that dies lets go of it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that the workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def demo_checkpoint(run_folder: Path, quickly_learned: None) -> Path:
    """`demo` quantized once a test run, for no GPU in particular. Read only: copy it before changing anything."""
    out = run_folder / "demo-w4a4"
    with locked(run_folder / "demo.lock"):
        if not out.exists():
            unfinished = run_folder / "unfinished"
            settings = apex4_quant.QuantizeSettings(model="demo", target="none", samples=4, seq_len=128, device="cpu")
            apex4_quant.quantize(settings, unfinished)
            unfinished.rename(out)
    return out


@pytest.fixture
def cli_environment() -> dict[str, str]:
    """The environment of subprocesses: the user's, without what forbids the network, and one thread as above."""
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "FORCE_COLOR", *BARS_OFF)
    return {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_cli(tmp_path: Path, cli_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_cli(*arguments, env={}) -> the finished process of `apex4 ARGUMENTS`, started in tmp_path."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "apex4_quant.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=cli_environment | (env or {}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def invoke() -> Iterator[Callable[..., Result]]:
    """invoke(*arguments) -> `apex4 ARGUMENTS` in this process: quick, but a bug's exception is raised here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(cli, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_tiny_model(folder: Path, *, sharded: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """A small random bf16 Llama in `folder`, with the demo's tokenizer; as the fixture tiny_model says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        | overrides
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="600KB" if sharded else "5GB")
    for file in TOKENIZER_FILES:
        shutil.copy(DEMO_PATH / file, folder / file)
    return folder


def write_calibration(path: Path) -> Path:
    path.write_text("The quick brown fox jumps over the lazy dog and sleeps until the morning. " * 40)
    return path


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """tiny_model(name="tiny", sharded=False, seed=0, **config) -> the folder of a small random bf16 Llama in tmp_path.

    It has the demo's tokenizer. `sharded` gives several safetensors files and an index; `config` overrides LlamaConfig.
    """

    def make(name: str = "tiny", **how: Any) -> Path:
        return write_tiny_model(tmp_path / name, **how)

    return make


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    """A short calibration text: the bundled one takes half a second to tokenize."""
    return write_calibration(tmp_path / "calibration.txt")


@pytest.fixture
def quantize_badly(invoke: Callable[..., Result], tmp_path: Path, calib: Path) -> Callable[..., Result]:
    """quantize_badly(model, *options) -> the result of a run into tmp_path/out that must not leave a model there."""

    def run(model: object, *options: object) -> Result:
        out = tmp_path / "out"
        small = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--json")
        result = invoke("quantize", model, "-o", out, *small, *options)
        assert not (out / "config.json").exists(), f"exit code {result.exit_code}: {result.stdout}"
        return result

    return run


@pytest.fixture
def one_sentence() -> Callable[..., str]:
    """one_sentence(result, exit_code, *nouns) asserts on everything a refusal promises and returns its sentence."""

    def check(result: Result | subprocess.CompletedProcess[str], exit_code: int, *nouns: str) -> str:
        given = result.exit_code if isinstance(result, Result) else result.returncode
        assert "Traceback" not in result.stderr + result.stdout
        lines = [line for line in result.stderr.splitlines() if line.startswith("apex4: ")]
        assert len(lines) == 1, f"exit code {given}, stderr {result.stderr!r}"
        assert result.stderr.rstrip().endswith(lines[0]), "something follows the sentence"
        assert (given, result.stdout) == (exit_code, ""), lines[0]
        for noun in nouns:
            assert noun in lines[0]
        return lines[0]

    return check


def stop_after(layers: int, out: Path) -> Callable[[], bool]:
    """A `should_stop` for a run into `out`: as soon as so many decoder layers are written, and the embedding."""
    return lambda: len(list(out.glob("model-*.safetensors"))) > layers
