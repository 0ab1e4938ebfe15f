"""Layers that are committed together, as they are where a layer takes seconds: killed before any step, a run goes on to the same
bytes; told to stop, it loses nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apex4_quant import quantize
from apex4_quant.errors import Stopped, UsageError
from apex4_quant.format.storage import RUN_FOLDER
from apex4_quant.quantization import run as run_module
from apex4_quant.quantization.layer import LayerQuantizer
from apex4_quant.quantization.run_state import RunState, Streams

from ..conftest import stop_after
from ..distributed.several import Several
from .test_ranks import whole
from .test_restart import Job, Killed, before_each_step, contents, make_job

LAYERS, TOGETHER = 4, 2


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), recipe="apex4-fast", layers=LAYERS)


@contextlib.contextmanager
def together(layers: int) -> Iterator[None]:
    """So many layers are written before their states are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module._Run, "_keeps_now", lambda self: len(self.written) == layers)
        yield


def test_every_second_state_is_kept_and_none_behind_the_last_layer(job: Job, tmp_path: Path) -> None:
    out, steps = tmp_path / "out", list[str]()
    with together(TOGETHER), before_each_step(out, lambda number, step, unfinished: steps.append(step)):
        quantize(job.settings, out)
    assert contents(out) == job.whole
    kept = [step for step in steps if f"write {RUN_FOLDER}/hidden" in step]
    assert kept == [f"write {RUN_FOLDER}/hidden-{layer:05}.safetensors" for layer in (0, 2)]
    # Records before what was kept for any of their layers is removed, and the states behind them before the records.
    place = {step.removeprefix(f"write {RUN_FOLDER}/"): number for number, step in enumerate(steps)}
    assert place["hidden-00002.safetensors"] < place["shard-00002.json"] < place["shard-00003.json"]
    assert place["shard-00003.json"] < steps.index(f"remove {RUN_FOLDER}/hidden-00000.safetensors")


def test_states_are_let_go_of_with_their_layer(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two sets of them are in memory at most, also of those that the embedding made."""
    work, entered = LayerQuantizer.quantize, list[weakref.ref[Any]]()

    def quantize_layer(self: LayerQuantizer, layer: int, streams: Streams, *rest: Any) -> Any:
        gc.collect()
        assert [each() for each in entered] == [None] * layer
        entered.append(weakref.ref(streams.hidden))
        return work(self, layer, streams, *rest)

    monkeypatch.setattr(LayerQuantizer, "quantize", quantize_layer)
    with together(TOGETHER):
        quantize(job.settings, tmp_path / "out")
    assert len(entered) == LAYERS


def test_killed_before_any_step(job: Job, tmp_path: Path) -> None:
    """Each step is survived once, whoever goes on keeps as many layers together as it likes."""
    out, folder, points = tmp_path / "out", tmp_path / "points", list[str]()

    def keep(number: int, step: str, unfinished: Path) -> None:
        points.append(step)
        shutil.copytree(out, folder / f"{number}")

    with together(TOGETHER), before_each_step(out, keep):
        quantize(job.settings, out)
    assert len(points) > 15
    for number, step in enumerate(points):
        with together((1, TOGETHER, LAYERS)[number % 3]):
            quantize(job.settings, folder / f"{number}", resume=True)
        assert contents(folder / f"{number}") == job.whole, step
        shutil.rmtree(folder / f"{number}")


def test_killed_again_while_it_goes_on(job: Job, tmp_path: Path) -> None:
    """Each attempt lives a few steps longer than the one before, also within what it withdraws."""
    out, kills = tmp_path / "out", 0

    def kill(number: int, step: str, unfinished: Path) -> None:
        if number == kills:
            raise Killed

    while True:
        with together(LAYERS), before_each_step(out, kill), contextlib.suppress(Killed):
            quantize(job.settings, out, resume=(out / RUN_FOLDER / "settings.json").exists())
            break
        kills += 2
        assert kills < 150, "it makes no progress"
    assert kills > 10 and contents(out) == job.whole


def test_layers_that_were_being_committed_are_made_again(job: Job, tmp_path: Path) -> None:
    """A kill between two records of one keeping: neither is followed by states."""
    out = tmp_path / "out"

    def kill(number: int, step: str, unfinished: Path) -> None:
        if step == f"write {RUN_FOLDER}/shard-00004.json":  # of layer 2, behind those of layers 0 and 1
            raise Killed

    with together(3), before_each_step(out, kill), contextlib.suppress(Killed):
        quantize(job.settings, out)
    names = {path.name for path in (out / RUN_FOLDER).glob("shard-*.json")}
    assert names == {f"shard-{shard:05}.json" for shard in (1, 2, 3)}
    state = RunState(out)
    state.drop_uncommitted()
    state.withdraw_unfollowed(LAYERS, job.settings.samples)
    assert {path.name for path in (out / RUN_FOLDER).glob("shard-*.json")} == {"shard-00001.json"}
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


def test_told_to_stop_it_loses_nothing(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for layers in (2, 3):
        with together(LAYERS), pytest.raises(Stopped, match=f"stopped before layer {layers}"):
            quantize(job.settings, out, resume=layers > 2, should_stop=stop_after(layers, out))
        assert len(list((out / RUN_FOLDER).glob("shard-*.json"))) == 1 + layers
    quantize(job.settings, out, resume=True)
    assert contents(out) == job.whole


def test_ranks_keep_layers_together(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work(group: object, stop: int | None = None) -> None:
        with together(TOGETHER):
            if stop is None:
                quantize(job.settings, out, resume=True, group=group)  # type: ignore[arg-type]
            else:
                quantize(job.settings, out, should_stop=stop_after(stop, out), group=group)  # type: ignore[arg-type]

    ended = Several(2, tmp_path / "first", lambda group: work(group, 3)).wait()
    assert [each.code for each in ended] == [75, 75]
    assert len(list((out / RUN_FOLDER).glob("shard-*.json"))) == 4
    whole(Several(2, tmp_path / "second", work).wait())
    report = json.loads((out / "apex4_report.json").read_text())
    assert len(report["quantized"]) == 7 * LAYERS


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "soon"])
def test_a_wrong_number_of_seconds(text: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_KEEP_EVERY", text)
    with pytest.raises(UsageError, match=f"APEX4_KEEP_EVERY is '{text}': give a number of seconds, 0 or more"):
        quantize(job.settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seconds_decide(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_KEEP_EVERY", "1e6")
    steps = list[str]()
    with before_each_step(tmp_path / "out", lambda number, step, unfinished: steps.append(step)):
        quantize(job.settings, tmp_path / "out")
    assert [step for step in steps if f"write {RUN_FOLDER}/hidden" in step] == [
        f"write {RUN_FOLDER}/hidden-00000.safetensors"
    ]
    assert contents(tmp_path / "out") == job.whole
