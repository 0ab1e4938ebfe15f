"""Several ranks on GPUs, each a process of its own: what tests/quantization/test_ranks.py shows on a CPU, with tensors on GPUs.

With two GPUs each rank has one, and they go by NCCL as they are shipped. With one GPU both ranks share it. Then gloo carries its
tensors, which shows that all the rest is right; and NCCL, from 2.30 on, which refuses that unless it is told (an older one can
be replaced: LD_PRELOAD=.../libnccl.so.2). `scripts/gpu_check` leaves these out: they need transformers.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.distributed.group import Group, Ranks
from apex4_quant.distributed.starting import ranks
from apex4_quant.evaluation.evaluate import EvalSettings, evaluate
from apex4_quant.planning.planner import make_plan
from apex4_quant.planning.settings import PlanSettings

from ..conftest import write_tiny_model
from ..distributed.several import HERE, Ended
from ..quantization.test_ranks import contents, differing, settings_of, without_numbers, write_moe
from .conftest import NO_GPU

SHARES_A_GPU = 23000  # the version of NCCL that can
SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
RECIPES = {"llama": "apex4", "moe": "apex4-gptaq"}
Work = Callable[[Path, Group], None]

FORKS = multiprocessing.get_context("forkserver")  # of a process that has everything imported, and has not touched CUDA
FORKS.set_forkserver_preload([__name__])


@pytest.fixture(autouse=True, scope="module")
def on_gpu() -> None:
    """Asked for here, and not at import: who forks afterwards has no GPU."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)


def nccl_version() -> int:
    """Of the library that is loaded, as 22809."""
    found = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(found))
    return found.value


def share_the_gpu(backend: str) -> None:
    """From now on every rank of this process's host is told that it has a GPU, and gets the first."""
    torch.cuda.device_count = lambda: 8
    set_device, begin = torch.cuda.set_device, dist.init_process_group
    torch.cuda.set_device = lambda _: set_device(0)
    if backend == "gloo":
        dist.init_process_group = lambda _, **words: begin("gloo", **words)


def run_rank(rank: int, size: int, port: int, backend: str | None, folder: Path, work: Work) -> None:
    """What a process does that was started for it. `backend`: of ranks that share one GPU."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": HERE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} | (SHARING if backend == "nccl" else {})
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    if backend is not None:
        share_the_gpu(backend)
    with ranks("cuda") as group:
        assert isinstance(group, Ranks)
        work(folder, group)


def run(size: int, backend: str | None, folder: Path, work: Work, seconds: float = 240) -> list[Ended]:
    folder.mkdir(parents=True, exist_ok=True)
    store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)
    words = (size, store.port, backend, folder, work)
    processes = [FORKS.Process(target=run_rank, args=(rank, *words)) for rank in range(size)]
    for process in processes:
        process.start()
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    texts = [[(folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr")] for rank in range(size)]
    ended = [Ended(process.exitcode or 0, *text) for process, text in zip(processes, texts, strict=True)]
    assert not late, f"{len(late)} ranks did not end: {ended}"
    return ended


@pytest.fixture(params=["gloo", "nccl"], scope="module")
def backend(request: pytest.FixtureRequest, on_gpu: None) -> str | None:
    """Of two ranks here. None: of two GPUs, where nothing is replaced."""
    if torch.cuda.device_count() > 1:
        return None if request.param == "nccl" else pytest.skip("two GPUs go by NCCL")
    if request.param == "nccl" and nccl_version() < SHARES_A_GPU:
        pytest.skip(f"needs two GPUs, or NCCL 2.30 (found {nccl_version()})")
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    write_tiny_model(made / "llama", num_hidden_layers=3)
    write_moe(made / "moe")
    return made


def settings_on_gpu(folder: Path, kind: str) -> QuantizeSettings:
    return replace(settings_of(folder, folder / kind, RECIPES[kind]), device="cuda")


def figures(folder: Path, kind: str, out: Path, group: Group | None = None) -> dict[str, Any]:
    settings = EvalSettings(str(out), str(folder / kind), limit=40, seq_len=64, device="cuda")
    return evaluate(settings, group=group)


def everything(models: Path, folder: Path, group: Group) -> None:
    """Both models, what is measured of them, and a plan."""
    said = {}
    for kind in RECIPES:
        out = folder / kind
        quantize(settings_on_gpu(models, kind), out, group=group)
        said[kind] = figures(models, kind, out, group)
    calib = str(models / "calibration.txt")
    plan = PlanSettings(str(models / "moe"), target="A100", calib=calib, samples=7, seq_len=64, device="cuda")
    said["plan"] = make_plan(plan, group=group).as_dict()["predicted"]
    if group.is_first:
        print(json.dumps(said))


def killed(models: Path, folder: Path, group: Group) -> None:
    """Rank 1 of this run, when two shards are written."""
    out = folder.parent / "killed"

    def kill_me() -> bool:
        if group.rank == 1 and len(list(out.glob("model-*.safetensors"))) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    quantize(settings_on_gpu(models, "llama"), out, group=group, should_stop=kill_me)


def resumed(models: Path, folder: Path, group: Group) -> None:
    quantize(settings_on_gpu(models, "llama"), folder.parent / "killed", group=group, resume=True)


def without_memory(models: Path, folder: Path, group: Group) -> None:
    if group.rank == 1:
        torch.cuda.set_per_process_memory_fraction(1e-4)
        torch.empty(2**20, device="cuda")
    quantize(settings_on_gpu(models, "llama"), folder / "out", group=group)


def whole(ended: list[Ended]) -> None:
    assert [each.code for each in ended] == [0] * len(ended), ended


def test_one_rank_is_one_process(folder: Path, tmp_path: Path) -> None:
    """By NCCL, to the last bit."""
    made = run(1, None, tmp_path / "ranks", partial(everything, folder))
    whole(made)
    said = json.loads(made[0].stdout.splitlines()[-1])
    for kind in RECIPES:
        quantize(settings_on_gpu(folder, kind), tmp_path / kind)
        assert contents(tmp_path / kind) == contents(tmp_path / "ranks" / kind)
        assert figures(folder, kind, tmp_path / kind)["divergence"] == said[kind]["divergence"]


def test_two_ranks(backend: str | None, folder: Path, tmp_path: Path) -> None:
    """They make what one process makes but for the order of sums, the same every time, also after a kill."""
    sys.stdout.flush()
    made = run(2, backend, tmp_path / "ranks", partial(everything, folder))
    whole(made)
    said = json.loads(made[0].stdout.splitlines()[-1])
    for kind in RECIPES:
        one, two = tmp_path / kind, tmp_path / "ranks" / kind
        quantize(settings_on_gpu(folder, kind), one)
        reports = [json.loads((out / "apex4_report.json").read_text()) for out in (one, two)]
        assert without_numbers(reports[0]) == without_numbers(reports[1])
        errors = [sum(entry["error"] for entry in report["quantized"]) for report in reports]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
        found = figures(folder, kind, one)["divergence"]
        changed = [f"{100 * differing(one, two, layer):.1f} %" for layer in range(2)]
        print(f"{backend}, {kind}: bytes of codes that differ {changed}, KL {found} and {said[kind]['divergence']}")
        assert said[kind]["divergence"] == pytest.approx(found, rel=0.3)  # another seed moves it by 16 %

    began = time.monotonic()
    ended = run(2, backend, tmp_path / "first", partial(killed, folder))
    lines = [line for line in ended[0].stderr.splitlines() if line.startswith("apex4: ")]
    print(f"{backend}: {time.monotonic() - began:.0f} s until both had ended: {lines}")
    assert [each.code for each in ended] == [75, -signal.SIGKILL] and len(lines) == 1, ended
    assert "rank 1" in lines[0] and "nothing finished is lost" in lines[0]
    whole(run(2, backend, tmp_path / "second", partial(resumed, folder)))
    assert contents(tmp_path / "killed") == contents(tmp_path / "ranks" / "llama")


def test_a_gpu_without_memory_is_named(backend: str | None, folder: Path, tmp_path: Path) -> None:
    ended = run(2, backend, tmp_path / "ranks", partial(without_memory, folder))
    said = [line for each in ended for line in each.stderr.splitlines() if line.startswith("apex4: ")]
    assert [each.code for each in ended] == [75, 75] and len(said) == 1, ended
    assert "rank 1 has no memory of its GPU left" in said[0]
