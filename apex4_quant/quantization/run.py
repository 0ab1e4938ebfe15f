"""`apex4 quantize`: one decoder layer at a time, restartable after each. What happens to a layer is in layer.py.

    shard 1       the embedding
    shard n + 2   decoder layer n, made from the calibration text's hidden states that enter it
    last shard    everything else outside the layers

Order of a layer: its shard is written, while the quantized layer makes the hidden states that leave it; they are kept; the
shard's record is written, which is the commit; what was kept for the layer is removed (run_state.py). The index, the report
and config.json follow when all shards are committed.

States of a large model are gigabytes, which take longer to reach a disk than a GPU takes for the next layer. So they are kept and
layers committed while the next layer is worked on, and only when APEX4_KEEP_EVERY seconds have passed since that was done
last: a few layers are then committed together. A kill costs these, and the one in flight; a run that is told to stop keeps all.

Several processes (docs/scaling.md) take the same way together. Each has hidden states of its own windows; the first writes
everything else. None is a layer ahead of another. Between the linears of a layer they ask each other whether all have kept what
entered it: then the first commits the layers before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..distributed.agreement import settings_here, versions_here
from ..distributed.group import Group
from ..distributed.shares import Share
from ..errors import Apex4Error, Stopped, UsageError
from ..format.quant_config import QuantConfig
from ..format.storage import (
    REPORT_NAME,
    RUN_FOLDER,
    format_bytes,
    read_json,
    require_empty,
    require_free_space,
    sha256,
    write_json,
    write_tensors,
)
from ..hardware.devices import DTYPES, on_host
from ..hardware.memory import MemoryBudget, MemoryUse, begin_counting, held_to, memory_used, resident_now
from ..models.companions import companions_of, copy_companions, left_behind_as_text
from ..models.layer_runner import LayerRunner
from ..models.place import require_there
from ..models.source import ModelSource, hub_revision
from ..models.states import States, StoredStates
from ..models.weight_files import INDEX_NAME, NAMED_IN_CONFIG
from ..progress import Progress, step
from ..recipes import Importance
from ..transforms.rewriter import Rewriter
from .calibration import draw_calibration, require_a_window_each, windows_needed
from .distilling import distill, require_distillable, require_windows, take_distilled
from .estimates import estimate_disk
from .layer import LayerQuantizer, QuantizedLayer, return_free_memory
from .memory import MemoryAccount, Windows, fit
from .plan import KeepReason, Plan, plan_as_dict, plan_of
from .predictions import LeavingGradients
from .run_state import BackgroundWork, OutputFolder, RunState, Streams, seconds_to_keep, stored_settings
from .settings import QuantizeSettings, ResolvedSettings, require_same


@dataclass
class QuantizeResult:
    """What the run did; `as_dict` is the object of --json. `records`: by linear, its "name" and "error" among others."""

    out: Path
    model: str
    records: list[dict[str, Any]]
    kept: dict[KeepReason, int]  # tensors that are stored as they were
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float = 0.0
    was_finished: bool = False  # before: this run had nothing to do
    memory: MemoryUse | None = None  # at most, of this run
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    states_on_disk: bool = False  # because of the budget
    experts_at_once: int | None = None  # of a layer, because of the budget; None: all
    left_behind: list[str] = field(default_factory=list)  # of the original's folder: what nobody reads who loads OUT

    def as_dict(self) -> dict[str, Any]:
        errors = [record["error"] for record in self.records]
        return {
            "model": self.model,
            "output": str(self.out),
            "linears_quantized": len(self.records),
            "tensors_kept": sum(self.kept.values()),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "mean_relative_error": sum(errors) / len(errors),
            "max_relative_error": max(errors),
            "seconds": round(self.seconds, 2),
            "peak_memory": None if self.memory is None else self.memory.as_dict(),
            "memory_budget": self.budget.as_dict(),
            "states_on_disk": self.states_on_disk,
            "experts_at_once": self.experts_at_once,
            "left_behind": self.left_behind,
        }

    @classmethod
    def of(cls, out: Path, report: Mapping[str, Any], bytes_after: int) -> QuantizeResult:
        """What a checkpoint's report says."""
        kept: dict[KeepReason, int] = {}
        for entry in report["kept"]:
            kept[KeepReason(entry["reason"])] = kept.get(KeepReason(entry["reason"]), 0) + 1
        return cls(
            out=out,
            model=report["model"],
            records=list(report["quantized"]),
            kept=kept,
            bytes_before=report["bytes_before"],
            bytes_after=bytes_after,
            bits_per_weight=report["bits_per_weight"],
        )


def settings_to_resume(out: Path, asked: Mapping[str, Any]) -> ResolvedSettings | None:
    """The settings of the run or checkpoint in `out`; None if it is empty and `asked` has a model, with which to begin.

    `asked` are the fields of QuantizeSettings that are given explicitly now. Raises UsageError if they are not those that
    were recorded, or there is nothing to resume.
    """
    found = OutputFolder.look(out)
    if found in (OutputFolder.RUN, OutputFolder.CHECKPOINT):
        first = stored_settings(out)
        require_same(out, first, asked)
        return first
    if found is OutputFolder.EMPTY and "model" in asked:
        return None
    if found is OutputFolder.EMPTY:
        raise UsageError(f"{out} holds no run: there is nothing to resume, give a MODEL to begin one")
    raise UsageError(f"{out} holds no run and is not empty: choose another folder, or empty it and give a MODEL")


def quantize(
    settings: QuantizeSettings | ResolvedSettings,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    group: Group | None = None,
    memory: MemoryBudget | None = None,
) -> QuantizeResult:
    """Quantize `settings.model` into the folder `out`, which must be absent or empty.

    With `resume` it may also hold a run or a checkpoint with the same settings: the first goes on, and of the second
    nothing is left to do. `should_stop` is asked after every decoder layer; if it says yes, Stopped is raised and
    `resume=True` goes on from there. Raises UsageError or Apex4Error, with one sentence each; `out` is never left looking
    complete when it is not.

    `memory` is what each process may use: hidden states stay on the disk where they would be too much, and a run that cannot
    keep to it is refused before it begins. What it used is in the result.

    All processes of `group` call this with the same arguments, and an `out` that all of them see. A run may be resumed by
    fewer or more of them.
    """
    started = time.perf_counter()
    progress, group = progress or Progress(), group or Group()
    keep_every = seconds_to_keep()
    out = Path(out)
    found = OutputFolder.look(out) if resume else OutputFolder.EMPTY
    if found in (OutputFolder.RUN, OutputFolder.CHECKPOINT):
        first = stored_settings(out)
        require_same(out, first, settings.asked())
        if found is OutputFolder.CHECKPOINT:
            return _finished(out, group)
        settings = first
    else:
        require_there(settings.model)
        require_empty(out)
        if resume:
            progress.line(f"{out} holds no run yet: it is begun")
    asked_seq_len = settings.seq_len
    source = ModelSource(settings.model)
    resolved = settings.resolve(source)
    plan = plan_of(source, resolved)
    require_distillable(source, plan, group)
    windows = windows_needed(plan, resolved)
    if windows < resolved.samples:
        progress.line(
            f"nothing is learned from text: {windows} of {resolved.samples} calibration windows are used, to measure errors"
        )
    samples, bos = draw_calibration(source, replace(resolved, samples=windows), asked_seq_len, progress)
    dtype = DTYPES[resolved.dtype]
    require_a_window_each(group, len(samples))
    require_windows(plan, len(samples))
    if found is not OutputFolder.RUN:
        require_free_space(out, estimate_disk(source, plan, samples.shape, dtype))
    runner = LayerRunner(source, resolved.device, dtype)
    begin_counting(resolved.device)
    here = Windows(group.share(len(samples)).size, samples.shape[1], len(samples))
    account = MemoryAccount(source, plan, here, dtype, resolved.device)
    kept_to = fit(account, memory or MemoryBudget(), resident_now(), resolved.device)
    experts_at_once = min(group.gather(kept_to.experts_at_once))  # a portion is collected by all processes together
    with progress.stage("checking weights", source.total_bytes, "B") as advance:
        digests = source.verify(advance)
    recorded = resolved.as_dict() | {
        "apex4_version": __version__,
        "inputs": {
            f"weights of {source.name}": digests,
            f"config.json of {source.name}": sha256(source.folder / "config.json"),
            f"calibration text {resolved.calib!r}": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
            # A named one may be another in another checkout of the same version.
            f"recipe {plan.recipe.name!r}": hashlib.sha256(json.dumps(plan.recipe.as_dict()).encode()).hexdigest(),
        },
    }
    group.require_equal(_seen_here(recorded, found, runner))
    state = _state(out, recorded, found, source.num_layers, len(samples), group)
    try:
        run = _Run(
            source,
            resolved,
            plan,
            samples,
            bos,
            runner,
            state,
            progress,
            should_stop,
            group,
            keep_every,
            kept_to.streamed,
            experts_at_once,
        )
        with held_to(kept_to.budget.gpu, resolved.device):
            result = run.execute()
    except torch.OutOfMemoryError as error:
        if kept_to.budget.gpu is None:
            raise
        raise Apex4Error(
            f"the {format_bytes(kept_to.budget.gpu)} of the GPU that --memory allows are not enough: allow more; "
            f"'apex4 quantize --resume -o {out}' goes on"
        ) from error
    finally:
        state.close()
    if group.is_first:
        state.finish()
    result.seconds = time.perf_counter() - started
    result.memory, result.budget, result.states_on_disk = memory_used(resolved.device), kept_to.budget, kept_to.streamed
    result.experts_at_once = experts_at_once if experts_at_once < account.experts else None
    return result


def _seen_here(recorded: Mapping[str, Any], found: OutputFolder, runner: LayerRunner) -> dict[str, Any]:
    """What must be the same for all processes of a run, by what a user calls it."""
    return {
        **versions_here(runner.device),
        "content of the output folder": str(found),
        **{name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in recorded["inputs"].items()},
        **settings_here({name: value for name, value in recorded.items() if name not in ("inputs", "apex4_version")}),
    }


def _state(
    out: Path, recorded: dict[str, Any], found: OutputFolder, layers: int, windows: int, group: Group
) -> RunState:
    """Begun or resumed by the first process, joined by the others. Raises UsageError or Apex4Error."""

    def begin() -> RunState:
        if found is not OutputFolder.RUN:
            return RunState.begin(out, recorded)
        state = RunState.resume(out, recorded)
        state.drop_uncommitted()
        state.withdraw_unfollowed(layers, windows)
        return state

    if group.is_first:
        state = begin()
        group.barrier()
        return state
    group.barrier()
    return RunState.join(out, recorded)


def _finished(out: Path, group: Group) -> QuantizeResult:
    """What was made in `out` before. Raises Apex4Error if files of it are gone."""
    report = read_json(out / REPORT_NAME)
    for name, entry in report["files"].items():
        if not (out / name).is_file() or (out / name).stat().st_size != entry["bytes"]:
            raise Apex4Error(f"{out} is finished, but {name} is missing or damaged: begin again in another folder")
    if group.is_first:
        shutil.rmtree(out / RUN_FOLDER, ignore_errors=True)  # what a kill left, that came when all was written
    total = int(read_json(out / INDEX_NAME)["metadata"]["total_size"])
    result = QuantizeResult.of(out, report, total)
    result.was_finished = True
    return result


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}


@dataclass
class _Run:
    """One run from the embedding to config.json. Layers that are committed are left as they are."""

    source: ModelSource
    settings: ResolvedSettings
    plan: Plan
    samples: torch.Tensor
    bos: bool  # whether they begin with it
    runner: LayerRunner
    state: RunState
    progress: Progress
    should_stop: Callable[[], bool]
    group: Group
    keep_every: float  # seconds
    streamed: bool = False  # hidden states stay on the disk
    experts_at_once: int | None = None  # of a layer, of which there are statistics
    original: LayerRunner | None = field(
        init=False
    )  # for GPTAQ: the layers before quantization, on states of their own
    rewriter: Rewriter = field(init=False)
    predictions: LeavingGradients | None = field(init=False)
    share: Share = field(init=False)  # of the windows
    embedded: Streams | None = field(init=False, default=None)  # what enters the first layer, if this run made it
    finished: frozenset[int] = field(init=False)  # the shards that were, when this run began
    notes: list[str] = field(init=False, default_factory=list)  # since the last commit
    background: BackgroundWork = field(init=False, default_factory=BackgroundWork)
    # Layers that are written, how they are committed: when states that enter a layer behind them are kept.
    written: list[Callable[[], None]] = field(init=False, default_factory=list)
    kept_at: float = field(init=False, default_factory=time.monotonic)  # when that was begun last
    # Of several processes: what is committed when all have kept their states.
    waiting: Callable[[], None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        recipe, source, runner = self.plan.recipe, self.source, self.runner
        self.original = LayerRunner(source, self.settings.device, runner.dtype) if recipe.gptaq else None
        self.rewriter = Rewriter(source, runner, recipe, self.settings.seed, self._note, self.group)
        if self.streamed:
            for each in self._runners:
                each.keep_states_in(self.state.folder)
        by_gradients = recipe.importance is Importance.GRADIENTS
        self.predictions = (
            LeavingGradients(source, runner, self.state, self.samples, self.group) if by_gradients else None
        )
        self.share = self.group.share(len(self.samples))
        # None of the layers that are finished now is begun again, and one that is finished later is not asked about.
        finished = self.group.from_first(lambda: sorted(self.state.records()))
        self.finished = frozenset(finished)

    def _note(self, text: str) -> None:
        """Say what a reader of the checkpoint should know, too: it is recorded with the shard that is worked on."""
        self.progress.line(text)
        self.notes.append(text)

    def _take_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes

    @property
    def _runners(self) -> list[LayerRunner]:
        return [self.runner] if self.original is None else [self.runner, self.original]

    @property
    def _shard_count(self) -> int:
        return self.source.num_layers + 2  # embedding, layers, the rest

    def execute(self) -> QuantizeResult:
        """Raises Stopped or Apex4Error."""
        with self.background:
            return self._execute()

    def _execute(self) -> QuantizeResult:
        if self.group.from_first(lambda: self.state.is_distilled):
            return self._finish_distilled()
        for runner in self._runners:
            runner.prepare(self.samples.shape[1])
        embedding = f"{self.source.family.embedding}.weight"
        if 1 not in self.finished:
            self._embed(embedding)
        layers = range(self.source.num_layers)
        if self.predictions is not None:
            first = next((layer for layer in layers if layer + 2 not in self.finished), len(layers))
            self.predictions.take(first, self.settings.seed, self.progress, self.should_stop)
            return_free_memory()
        self._quantize_layers(layers)
        rest = [name for name in self.source.outer_tensors if name != embedding]
        written = self._write_shard(self._shard_count, self.rewriter.outer(self.source.read(rest)))
        self._commit(self._shard_count, written, [], self._take_notes())
        if not self.plan.recipe.distill_steps:
            return self._finish()
        return_free_memory()
        distill(self.source, self.plan, self.settings, self.state, self.progress, self.should_stop)
        return self._finish_distilled()

    def _finish_distilled(self) -> QuantizeResult:
        take_distilled(self.state)
        return self._finish()

    def _embed(self, embedding: str) -> None:
        """Write it."""
        tensors = self.rewriter.embedding(self.source.read([embedding]))
        written = self._write_shard(1, tensors)
        hidden = self.runner.embed(self.samples[self.share.slice], tensors[embedding])
        self.embedded = Streams(hidden, self._copied(hidden) if self.original else None, self.share)
        self.state.save_hidden(0, self.embedded)
        self._commit(1, written, [], self._take_notes())

    def _copied(self, states: States) -> States:
        return states.copy(self.state.folder) if isinstance(states, StoredStates) else states.clone()

    def _quantize_layers(self, layers: range) -> None:
        quantizer = LayerQuantizer(
            self.source,
            self.plan,
            self.runner,
            self.original,
            self.rewriter,
            self.predictions,
            self.progress.line,
            self._note,
            self.group,
            self.experts_at_once or None,
        )
        total = sum(linear.elements for linear in self.plan.linears)
        streams, self.embedded = self.embedded, None  # nothing else may hold them: they are gigabytes
        with self.progress.stage("quantizing", total, "w") as advance:
            for layer in layers:
                if layer + 2 in self.finished:
                    advance(sum(linear.elements for linear in self.plan.of_layer(layer)))
                    self._drop_states(layer)
                    streams = None  # they would enter a layer that is finished
                    continue
                if self.group.any(self.should_stop()):
                    self._commit_waiting()
                    if self.written:
                        assert streams is not None
                        self._keep(layer, streams)
                        self._commit_waiting()
                    self.background.finish()
                    self.group.barrier()  # who ends first may take the others along
                    raise Stopped(
                        f"stopped before layer {layer} of {self.source.num_layers}, nothing is lost: "
                        f"'apex4 quantize --resume -o {self.state.out}' goes on"
                    )
                streams = streams or self.state.load_hidden(layer, self.original is not None, self.share, self.streamed)
                streams = self._quantize_layer(quantizer, layer, streams, advance)
        self._commit_waiting()
        self.background.finish()

    def _quantize_layer(
        self, quantizer: LayerQuantizer, layer: int, streams: Streams, advance: Callable[[int], None]
    ) -> Streams:
        """Quantize and write one layer, and have it committed. Returns the streams that leave it."""

        def done(elements: int) -> None:
            advance(elements)
            self._commit_waiting(at_once=True)

        quantized = quantizer.quantize(layer, streams, done)
        self._commit_waiting()
        with step("waiting for the disk"):
            self.background.finish()  # what it reads is about to be dropped, and what it is asked for to be written
        written, records = bytes_of(quantized.tensors), quantized.records
        if self.group.is_first:
            self._begin_writing(layer + 2, quantized)
        del quantized  # of its tensors the runner needs those that its module holds
        with step("forward to the next layer"):
            leaving = Streams(self.runner.run_layer(layer, streams.hidden), share=self.share)
            if self.original is not None and streams.original is not None:
                leaving = leaving._replace(original=self.original.run_layer(layer, streams.original))
        with step("writing"):
            self.background.finish()
        self.written.append(partial(self._record, layer + 2, written, records, self._take_notes()))
        if self.streamed or layer + 1 == self.source.num_layers or self._keeps_now():
            self._keep(layer + 1, leaving)
        for runner in self._runners:
            runner.drop_layer(layer)
        return_free_memory()
        return leaving

    def _keeps_now(self) -> bool:
        """Whether it is time again; one answer for all processes."""
        return self.group.from_first(lambda: time.monotonic() - self.kept_at >= self.keep_every)

    def _keep(self, layer: int, streams: Streams) -> None:
        """Keep the streams that enter `layer`, if there is one, and have the layers that are written committed."""
        layers, self.written = self.written, []

        def keep() -> None:
            if self.streamed or layer < self.source.num_layers:
                self.state.save_hidden(layer, streams)

        def commit() -> None:
            for each in layers:
                each()
            # Not before all are: a kill in between goes on with the first of them (RunState.withdraw_unfollowed).
            for before in range(layer - len(layers), layer):
                self._drop_states(before)

        def keep_and_commit() -> None:
            keep()
            commit()

        if self.streamed:  # what is on the disk already is only renamed
            keep()
            self.group.barrier()
            commit()
        elif self.group.size == 1:
            self.background.start(keep_and_commit)
        else:  # processes agree on a commit
            self.background.start(keep)
            self.waiting = commit
        self.kept_at = time.monotonic()

    @step("waiting for the disk")
    def _commit_waiting(self, at_once: bool = False) -> None:
        """Have the first process commit what waits for states that are being kept, when all have kept theirs; `at_once`: if they have.

        All processes ask together. A failure is met by who has it before the others hear that it has kept its states.
        """
        if self.waiting is None:
            return
        kept = self.background.is_done or not at_once
        if kept:
            self.background.finish()
        if self.group.any(not kept):
            return
        commit, self.waiting = self.waiting, None
        self.background.start(commit)

    def _drop_states(self, layer: int) -> None:
        if self.group.is_first:
            self.state.drop_all(layer)

    def _shard_path(self, shard: int) -> Path:
        return self.state.out / f"model-{shard:05}-of-{self._shard_count:05}.safetensors"

    @step("writing")
    def _write_shard(self, shard: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Returns the bytes of each tensor."""
        if self.group.is_first:
            write_tensors(self._shard_path(shard), tensors)
        return bytes_of(tensors)

    @step("writing")
    def _begin_writing(self, shard: int, quantized: QuantizedLayer) -> None:
        """While the layer computes what leaves it. What readers of the file must find is looked for in it."""
        path, rounded = self._shard_path(shard), quantized.rounded
        tensors = on_host(quantized.tensors)

        def write() -> None:
            write_tensors(path, tensors)
            for name, rows in rounded.items():
                rows.require_in(path, name)

        self.background.start(write)

    def _commit(self, shard: int, tensors: dict[str, int], records: list[dict[str, Any]], notes: list[str]) -> None:
        """When all processes have kept their states. Without a barrier behind it: who is ahead asks for nothing that is missing."""
        self.group.barrier()
        self._record(shard, tensors, records, notes)

    def _record(self, shard: int, tensors: dict[str, int], records: list[dict[str, Any]], notes: list[str]) -> None:
        if not self.group.is_first:
            return
        path = self._shard_path(shard)
        self.state.commit(
            shard,
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "tensors": tensors,
                "linears": records,
                "messages": notes,
            },
        )

    def _finish(self) -> QuantizeResult:
        """config.json and what belongs to it; the result is known to all processes."""
        return self.group.from_first(self._write_rest)

    def _write_rest(self) -> QuantizeResult:
        out = self.state.out
        committed = [self.state.record(shard) for shard in range(1, self._shard_count + 1)]
        shards = [shard for shard in committed if shard is not None]
        if len(shards) < len(committed):
            raise Apex4Error(f"{out} has unfinished shards: run again with --resume")
        records = [record for shard in shards for record in shard["linears"]]
        if [record["name"] for record in records] != [linear.name for linear in self.plan.linears]:
            raise Apex4Error(
                f"{len(records)} linears were quantized and {len(self.plan.linears)} were planned: "
                f"{out} is not complete and was not marked so"
            )
        weight_map = {name: shard["file"] for shard in shards for name in shard["tensors"]}
        total = sum(sum(shard["tensors"].values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        companions, left_behind = companions_of(self.source.folder)
        copy_companions(self.source.folder, companions, out)
        if left_behind:
            self.progress.line(left_behind_as_text(self.source.folder, left_behind))
        report = self._report(shards, records)
        write_json(out / INDEX_NAME, index)
        write_json(out / REPORT_NAME, report)
        # Last: without config.json no reader takes the folder for a model.
        section = {"quantization_config": self._config(records).to_dict()}
        config = {name: value for name, value in self.source.stored_config.items() if name != NAMED_IN_CONFIG}
        named = {"architectures": [self.source.family.architecture]}  # vLLM asks for it; not every original has it
        write_json(out / "config.json", named | config | self._dtype() | self.rewriter.config_changes() | section)
        return replace(QuantizeResult.of(out, report, total), left_behind=left_behind)

    def _dtype(self) -> dict[str, str]:
        """What config.json says of a float16 original that was run in a dtype of larger range: in its own it overflows."""
        keys = [key for key in ("dtype", "torch_dtype") if self.source.stored_config.get(key) == "float16"]
        return dict.fromkeys(keys, self.settings.dtype)

    def _config(self, records: list[dict[str, Any]]) -> QuantConfig:
        """The plan's, with the clip ratios that were found on the way."""
        config = self.plan.config
        modules = {name: dict(entry) for name, entry in config.modules.items()}
        for record in records:
            if record["activation_clip"] != config.activation_clip:
                modules.setdefault(record["name"], {})["activation_clip"] = record["activation_clip"]
        return replace(config, modules=modules)

    def _report(self, shards: list[dict[str, Any]], records: list[dict[str, Any]]) -> dict[str, Any]:
        """Depends on the input alone, so that a resumed run writes the same bytes: no times, no host."""
        import transformers

        plan = plan_as_dict(self.plan, self.source)
        found_on_the_way = ("error", "activation_clip", "calibration_tokens", "fallback")
        for entry, record in zip(plan["quantized"], records, strict=True):
            entry |= {key: record[key] for key in found_on_the_way if key in record}
        messages = [text for shard in shards for text in shard.get("messages", ())]
        plan |= {"messages": messages} if messages else {}
        revision = hub_revision(self.source.folder)
        plan |= {"model_revision": revision} if revision else {}
        return plan | {
            "versions": {
                "apex4": __version__,
                "torch": torch.__version__.partition("+")[0],
                "transformers": transformers.__version__,
            },
            "settings": self.settings.as_dict(),
            **({"distillation": self.state.load_distilled()[1]["distillation"]} if self.state.is_distilled else {}),
            "calibration_tokens": self.samples.numel(),
            "calibration_bos": self.bos,
            "files": {shard["file"]: {"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in shards},
        }
