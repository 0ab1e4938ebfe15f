"""The `apex4` command. Parses, calls the library, prints; everything else lives in apex4_quant.

Results go to stdout (with --json: one object), progress and messages to stderr. Exit codes: 0 ok, 1 failed, 2 usage,
75 stopped and resumable. Libraries are imported inside the commands: `apex4 --help` needs none of them. What options
take, and how a refusal is said, is in apex4_quant/command_options.py.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from apex4_quant import __version__, environment
from apex4_quant import command_options as options
from apex4_quant.errors import STOPPING, UsageError
from apex4_quant.evaluation.engine import EngineName
from apex4_quant.format.export_format import ExportFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.cost_model import DEFAULT_BUDGET, DEFAULT_TOKENS, MAINLOOPS, OURS
from apex4_quant.planning.options import Mode
from apex4_quant.planning.settings import PLANNED_TRANSFORMS, TOKENS, PlanSettings
from apex4_quant.progress import Progress, TerminalProgress

if TYPE_CHECKING:
    from apex4_quant.quantization.estimates import Preview
    from apex4_quant.quantization.run import QuantizeResult


def _progress(as_json: bool) -> Progress:
    return Progress() if as_json or not options.is_first_rank() else TerminalProgress()


def _print(as_json: bool, value: Mapping[str, Any], text: Callable[[], str]) -> None:
    if not options.is_first_rank():
        return
    if not as_json:
        click.echo(text())
        return
    from apex4_quant.format.storage import json_text

    click.echo(json_text(value))


def _stop_on_signals() -> Callable[[], bool]:
    """After the first SIGINT or SIGTERM the returned function says yes; a second one ends the process at once.

    One of several ranks says nothing and ignores a second one: launchers send them to those that are left when one has ended.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if not options.is_rank():
            signal.signal(number, signal.SIG_DFL)
            click.echo(f"apex4: {STOPPING}", err=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: asked


def _share(gpus: int | None, device: str) -> None:
    """Do it on so many GPUs, and exit, if that is asked for and this process is not one of those that were started for it."""
    if options.is_rank() and gpus is not None and gpus != options.ranks_started():
        raise UsageError(f"--gpus is {gpus} and {options.ranks_started()} ranks were started: leave --gpus away")
    if gpus is not None and not options.is_rank():
        from apex4_quant.distributed.starting import launch

        sys.exit(launch(gpus, sys.argv[1:], device))


def _given(context: click.Context) -> set[str]:
    """The options that stand on the command line."""
    return {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}


# \b: click leaves the lines of a block as they are.
_ENVIRONMENT = "\b\nEnvironment:\n" + "\n".join(f"  {name:17}  {text}" for name, text in environment.MEANING.items())


@click.group(
    "apex4",
    cls=options.Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_ENVIRONMENT,
)
@click.version_option(__version__, prog_name="apex4")
@click.pass_context
def cli(context: click.Context) -> None:
    """Quantize LLMs to W4A4 or W4A8 (INT4 weights in groups of 128), check them, evaluate them, publish them."""
    command = context.invoked_subcommand
    if options.is_rank() and options.ranks_started() > 1 and command not in ("quantize", "plan", "eval"):
        raise UsageError(
            f"'apex4 {command}' runs in one process and WORLD_SIZE is {options.ranks_started()}: start one"
        )


@cli.command()
@click.argument("model", required=False)
@options.OUT_OR_RESUME
@options.RECIPE
@options.GROUP_SIZE
@click.option("--plan", metavar="FILE", help="Group size and transform of every linear, from 'apex4 plan'.")
@options.TARGET
@options.LAYOUT
@options.choice("--transform", list(TransformKind), None, "Group transform.  [default: the recipe's]")
@options.ACTIVATION_BITS
@options.calibration(128, "Calibration windows.")
@options.DEVICE
@options.DTYPE
@click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Keep matching linears, e.g. '*.down_proj'. Repeatable."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in OUT, with its settings; begin it if OUT is empty and MODEL is given.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its estimates; write nothing.")
@click.option("--verbose", is_flag=True, help="With --dry-run: one line for every linear, not for every kind.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory to keep to, e.g. 20GiB or host=16GiB,gpu=20GiB: hidden states stay on disk, or it is refused.",
)
@options.GPUS
@options.JSON
@click.pass_context
def quantize(
    context: click.Context,
    /,
    model: str | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    verbose: bool,
    memory: str | None,
    gpus: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Quantize MODEL ('demo', a local folder, or a Hub id) into a W4A4 or W4A8 checkpoint."""
    given = _given(context)
    if model is None and not resume:
        raise UsageError("quantize needs a MODEL: give 'demo', a local folder, or a Hub id")
    if out is None and not dry_run:
        raise UsageError("quantize needs an output folder: give -o OUT, or --dry-run to see the plan only")
    if asked["plan"] and "group_size" in given:
        raise UsageError("--plan decides every group size: leave --group-size away")
    if verbose and not dry_run:
        raise UsageError("--verbose is for --dry-run: add that, or leave it away")
    if resume and out is None:
        raise UsageError("--resume needs the folder of the run: give -o OUT")
    if dry_run and (gpus is not None or options.is_rank()):
        raise UsageError("--dry-run is for one process: leave --gpus, or torchrun, away")
    _share(gpus, asked["device"])
    from apex4_quant.hardware.memory import MemoryBudget
    from apex4_quant.quantization import run
    from apex4_quant.quantization.estimates import preview
    from apex4_quant.quantization.settings import QuantizeSettings, ResolvedSettings

    def settings_of() -> QuantizeSettings | ResolvedSettings:
        found = None
        if resume and out is not None:
            changed = {name: value for name, value in asked.items() if name in given}
            found = run.settings_to_resume(out, changed | ({"model": model} if model else {}))
        return QuantizeSettings(model=str(model), **asked) if found is None else found

    budget = None if memory is None else MemoryBudget.parse(memory)
    if out is None or dry_run:
        expected = preview(settings_of(), budget)
        _print(as_json, expected.as_dict(), lambda: _preview_as_text(expected, verbose))
        return
    from apex4_quant.distributed.starting import ranks

    should_stop = _stop_on_signals()
    with ranks(asked["device"]) as group:
        progress = _progress(as_json)
        result = run.quantize(
            settings_of(), out, resume=resume, progress=progress, should_stop=should_stop, group=group, memory=budget
        )
        _print(as_json, result.as_dict(), lambda: _quantized_as_text(out, result))


def _preview_as_text(expected: Preview, verbose: bool) -> str:
    from apex4_quant.format.storage import format_bytes
    from apex4_quant.quantization.plan import plan_as_text

    settings = expected.settings
    return (
        f"{plan_as_text(expected.plan, expected.source, verbose)}\n"
        f"  {_seconds_as_text(*expected.seconds)} on {settings.device}; at the worst moment about "
        f"{format_bytes(expected.peak_host)} of the host{_on_gpu(expected)}{_kept_to(expected)}, "
        f"and {format_bytes(expected.disk)} of the disk; layout {settings.layout}; nothing was written"
    )


def _on_gpu(expected: Preview) -> str:
    from apex4_quant.format.storage import format_bytes

    return f" and {format_bytes(expected.memory.gpu)} of the GPU" if expected.memory.gpu else ""


def _kept_to(run: Preview | QuantizeResult) -> str:
    """What was allowed, beside what is used."""
    from apex4_quant.format.storage import format_bytes

    allowed = [f"{name} {format_bytes(size)}" for name, size in run.budget.as_dict().items() if size is not None]
    where = ", hidden states on the disk" if run.states_on_disk else ""
    if run.experts_at_once is not None:
        where += f", statistics of {run.experts_at_once} experts at once"
    return f" (allowed: {', '.join(allowed)}{where})" if allowed else ""


def _used_as_text(result: QuantizeResult) -> str:
    from apex4_quant.format.storage import format_bytes

    if result.memory is None:
        return ""
    gpu = "" if result.memory.gpu is None else f", of the GPU {format_bytes(result.memory.gpu)}"
    kept_to = _kept_to(result)
    return f"  memory at most: of the host {format_bytes(result.memory.host)}{gpu}{kept_to}\n"


def _seconds_as_text(least: float, most: float) -> str:
    """A machine that does something else beside takes longer: a range says how sure an estimate can be."""
    return f"about {least:.0f} s" if most < 1.2 * least or most < 5 else f"about {least:.0f} to {most:.0f} s"


def _quantized_as_text(out: Path, result: QuantizeResult) -> str:
    from apex4_quant.format.storage import format_bytes

    if result.was_finished:
        return f"{out}: finished before with these settings, nothing is left to do"
    summary = result.as_dict()
    kept = ", ".join(f"{count} {reason}" for reason, count in result.kept.items())
    before, after = summary["bytes_before"], summary["bytes_after"]
    return (
        f"{out}: {summary['linears_quantized']} linears quantized; tensors kept: {kept}\n"
        f"  {format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f}x smaller), "
        f"{summary['bits_per_weight']:.3f} bits per quantized weight, {summary['seconds']:.1f} s\n"
        f"  relative output error of a linear: mean {summary['mean_relative_error']:.4f}, "
        f"largest {summary['max_relative_error']:.4f}\n"
        f"{_used_as_text(result)}"
        f"  next: apex4 eval {out} --baseline {summary['model']} --record; apex4 publish {out} ORG/NAME"
    )


@cli.command()
@options.JSON
def gpus(as_json: bool) -> None:
    """The GPUs that are known: rates, rho, and how much of the dequantization hides behind the tensor cores."""
    from apex4_quant.planning.cost_model import gpus_as_dict, gpus_as_text

    _print(as_json, gpus_as_dict(), gpus_as_text)


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Plan file to write: .yaml, .yml or .json.")
@options.RECIPE
@click.option("--target", default="auto", show_default=True, help="GPU of 'apex4 gpus', or auto.")
@options.choice(
    "--mode",
    list(Mode),
    Mode.AUTO,
    "w4a4: 4 bits only; g128: of these, transforms only; mixed: 128 for down_proj only.",
)
@click.option(
    "--budget",
    type=options.Multiple(),
    help=f"Time allowed, in multiples of the fastest plan's.  [default: {DEFAULT_BUDGET}; mixed: any]",
)
@click.option(
    "--max-loss", type=options.Multiple(), help="Loss allowed, in multiples of the least; then time is minimised."
)
@options.number("--tokens", options.COUNT, DEFAULT_TOKENS, "Tokens a step, for predicted times.")
@options.choice("--mainloop", list(MAINLOOPS), OURS.name, "Whose time is predicted; naive to compare.")
@options.choice(
    "--transform",
    PLANNED_TRANSFORMS,
    None,
    f"For all.  [default: {TransformKind.HADAMARD}, and the recipe's if that is learned]",
)
@options.calibration(None, f"Calibration windows.  [default: {TOKENS} tokens]")
@options.GPUS
@options.COMPUTING
def plan(out: Path | None, gpus: int | None, as_json: bool, **asked: Any) -> None:
    """Choose group size, transform and bits of activations of every linear of MODEL on a GPU, by predicted loss and time."""
    _share(gpus, asked["device"])
    from apex4_quant.distributed.starting import ranks
    from apex4_quant.planning.planner import make_plan

    with ranks(asked["device"]) as group:
        result = make_plan(PlanSettings(**asked), out, _progress(as_json), group)
        _print(as_json, result.as_dict(), result.as_text)


def _command_line(context: click.Context) -> list[str]:
    """The command as it was given, without the program's name and without --json."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        if name == "as_json" or name not in _given(context):
            continue
        option = [parameter.opts[0]] if isinstance(parameter, click.Option) else []
        words += option if value is True else [*option, str(value)]
    return words


def _recorder(context: click.Context, path: str) -> Callable[[dict[str, Any]], object]:
    """What keeps a result in the checkpoint `path`. Refuses a folder that cannot, before anything is measured."""
    from apex4_quant.publishing.records import record_evaluation, require_recordable

    require_recordable(path)
    return lambda result: record_evaluation(path, result, _command_line(context))


@cli.command("eval")
@click.argument("path")
@click.option(
    "--baseline", metavar="MODEL", help="The original: measure it too, and how far the predictions are from it."
)
@click.option("--text", default="heldout", show_default=True, help="heldout, wikitext2, a file, or a Hub data set.")
@options.number("--seq-len", options.Whole(2, options.LARGEST), 2048, "Window length, at most the model's context.")
@options.BOS
@options.listed("--tasks", "lm-eval tasks; apex4_choice and apex4_lastword are bundled.")
@click.option("--include-path", help="Folder with more lm-eval task YAMLs.")
@options.number("--batch-size", options.COUNT, 8, "For --tasks.")
@options.number("--limit", options.COUNT, None, "At most so many windows of text and rows of each task.")
@click.option("--throughput", is_flag=True, help="Measure tokens a second and memory instead.")
@options.choice("--engine", list(EngineName), EngineName.TRANSFORMERS, "What computes; vllm: as 'vllm serve' does.")
@click.option(
    "--record", is_flag=True, help="Keep the result in the checkpoint PATH, for 'apex4 card' and 'apex4 publish'."
)
@options.number("--batch", options.COUNT, 1, "Requests at once, for --throughput.")
@options.number("--prompt-len", options.COUNT, 512, "Tokens of a prompt, for --throughput.")
@options.number("--gen-len", options.Whole(2, options.LARGEST), 128, "Tokens of an answer, for --throughput.")
@options.DEVICE_MAP
@options.GPUS
@options.COMPUTING
@click.pass_context
def evaluate(
    context: click.Context,
    /,
    path: str,
    tasks: str,
    throughput: bool,
    batch: int,
    prompt_len: int,
    gen_len: int,
    record: bool,
    gpus: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Perplexity and lm-eval tasks, or the speed, of PATH (a quantized or original model, or 'demo')."""
    if throughput:
        others, advice = (
            {"tasks", "text", "seq_len", "bos", "include_path", "batch_size", "limit"},
            "is not for --throughput: leave it away",
        )
    else:
        others, advice = {"batch", "prompt_len", "gen_len"}, "is for --throughput: add that"
    if asked["device_map"] is not None and (throughput or gpus is not None):
        other, does = ("--throughput", "measures") if throughput else ("--gpus", "starts a process for")
        raise UsageError(f"--device-map spreads one model over devices and {other} {does} each device: leave one away")
    for name in sorted(others & _given(context)):
        raise UsageError(f"--{name.replace('_', '-')} {advice}")
    if throughput and (gpus is not None or options.is_rank()):
        raise UsageError("--throughput is for one process: leave --gpus, or torchrun, away")
    _share(gpus, asked["device"])
    keep = _recorder(context, path) if record else lambda result: None
    if throughput:
        from apex4_quant.evaluation import throughput as speed

        common = {name: asked[name] for name in ("baseline", "device", "dtype", "engine")}
        settings = speed.ThroughputSettings(model=path, batch=batch, prompt_len=prompt_len, gen_len=gen_len, **common)
        measured = speed.throughput(settings, _progress(as_json))
        try:
            keep(measured)
        finally:  # a disk that is full costs nobody what was measured for hours
            _print(as_json, measured, lambda: speed.throughput_as_text(measured))
        return
    from apex4_quant.evaluation import evaluate as quality

    names = tuple(task.strip() for task in tasks.split(",") if task.strip())
    from apex4_quant.distributed.starting import ranks

    with ranks(asked["device"]) as group:
        settings_of_quality = quality.EvalSettings(model=path, tasks=names, **asked)
        result = quality.evaluate(settings_of_quality, _progress(as_json), group)
        try:
            if group.is_first:
                keep(result)
        finally:
            _print(as_json, result, lambda: quality.evaluation_as_text(result))


@cli.command()
@click.argument("path")
@options.JSON
def inspect(path: str, as_json: bool) -> None:
    """Show what is in the quantized checkpoint PATH, linear by linear."""
    from apex4_quant.checkpoint.inspect import inspect, inspection_as_text

    result = inspect(path)
    _print(as_json, result, lambda: inspection_as_text(result))


@cli.command()
@click.argument("path")
@options.JSON
def check(path: str, as_json: bool) -> None:
    """Check that the quantized checkpoint PATH is complete, undamaged and runs."""
    from apex4_quant.checkpoint.check import check

    done = check(path, (lambda line: None) if as_json else click.echo)
    _print(as_json, {"path": path, "ok": True, "checks": done}, lambda: f"{path} is whole")


@cli.command()
@click.argument("path")
@options.OUT
@options.TARGET
@options.JSON
def repack(path: str, out: Path, target: str, as_json: bool) -> None:
    """Rewrite the quantized checkpoint PATH in the order another GPU reads: the same codes, no quantization."""
    from apex4_quant.checkpoint.repack import repack

    result = repack(path, out, target, (lambda line: None) if as_json else functools.partial(click.echo, err=True))
    _print(
        as_json,
        result,
        lambda: (
            f"{out}: {result['linears']} linears, {result['layout_before']} -> {result['layout']}, {result['target']}"
        ),
    )


@cli.command()
@click.argument("path")
@options.OUT
@click.option("--to", type=options.OneOf(list(ExportFormat)), required=True, help="vllm-humming: stock vLLM >= 0.33.")
@options.JSON
def export(path: str, out: Path, to: str, as_json: bool) -> None:
    """Write the quantized checkpoint PATH in the format of another program, which runs it without apex4."""
    from apex4_quant.checkpoint.export import export

    result = export(path, out, to, (lambda line: None) if as_json else functools.partial(click.echo, err=True))
    _print(as_json, result, lambda: f"{out}: {result['linears']} linears in the format {result['format']}")


@cli.command()
@options.JSON
def doctor(as_json: bool) -> None:
    """What computes here: torch, driver, NVRTC, each GPU's kernels, the cache; exit code 1 if a GPU lacks something."""
    from apex4_quant.tools.doctor import as_text, examine

    found = examine()
    _print(as_json, found, lambda: as_text(found))
    if found["problems"]:
        sys.exit(1)


@cli.command()
@options.SHAPES
@options.listed("--m", "Numbers of tokens.  [default: 1 to 8192]", name="tokens")
@options.listed(
    "--contenders",
    "Also humming-w4a4, humming-w4a4+q, humming-w4a8, humming-w4a8+q, vllm-w4a8, vllm-w4a8+q; +q: with quantization.",
    default="apex4,apex4+q,bf16,fp8",
)
@click.option("--quick", is_flag=True, help="Three shapes, four numbers of tokens.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the speed-ups to write, .svg or .png.")
@options.JSON
def bench(shapes: str, tokens: str, contenders: str, quick: bool, plot: Path | None, as_json: bool) -> None:
    """Time W4A4 and W4A8 linears of real models on this GPU, beside BF16 and FP8."""
    from apex4_quant.tools.bench import BenchSettings, as_text, draw, parse_list, parse_tokens, run
    from apex4_quant.tools.pictures import check_picture, save_picture

    if plot is not None:
        check_picture(plot)
    settings = BenchSettings(parse_list(shapes), parse_tokens(tokens), parse_list(contenders), quick)
    result = run(settings, _progress(as_json))
    if plot is not None:
        save_picture(plot, lambda: draw(result))
    _print(as_json, result, lambda: as_text(result))


@cli.group()
def kernels() -> None:
    """The GPU kernels: list them, compile them all beforehand (without a GPU), tune them for this GPU."""


@kernels.command("build")
@click.option("--arch", "archs", multiple=True, required=True, metavar="ARCH", help="For example sm_86. Repeatable.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for .cubin files, beside the cache.")
@options.number("--jobs", options.COUNT, None, "Processes.  [default: one a core]")
@options.JSON
def build_kernels(archs: tuple[str, ...], out: Path | None, jobs: int | None, as_json: bool) -> None:
    """Compile every kernel of ARCH, so that nobody waits at first use: into the cache, and into OUT if given."""
    from apex4_quant.tools.kernel_build import build

    result = build(archs, out, jobs, _progress(as_json))
    _print(as_json, result.as_dict(), result.as_text)


@kernels.command("tune")
@options.listed("--shapes", "Those of models, a model's layer, or NxK, as in 'apex4 bench'.")
@options.listed("--m", "Numbers of tokens.  [default: 16 to 8192]", name="tokens")
@options.choice("--out-dtype", ("bf16", "fp16"), "bf16", "Of y.")
@options.number("--repeats", options.COUNT, 10, "Measurements of every plan.")
@options.JSON
def tune_kernels(shapes: str, tokens: str, out_dtype: str, repeats: int, as_json: bool) -> None:
    """Time every plan of the GEMM for some shapes on this GPU, and use the fastest from now on."""
    from apex4_quant.tools.tuning import settings_of, tune

    result = tune(settings_of(shapes, tokens, out_dtype, repeats), _progress(as_json))
    _print(as_json, result, lambda: f"{len(result['shapes'])} plans kept in {result['file']}")


@kernels.command("list")
@click.option("--arch", "archs", multiple=True, metavar="ARCH", help="Only these. Repeatable.")
@options.JSON
def list_kernels(archs: tuple[str, ...], as_json: bool) -> None:
    """Every kernel: architecture, name, source, macros."""
    from apex4_quant.tools.kernel_build import kernels_as_dict, kernels_as_text

    _print(as_json, kernels_as_dict(archs), lambda: kernels_as_text(archs))


_CHECKPOINT = click.argument("path", type=click.Path(path_type=Path))
_ORIGIN = options.together(
    click.option(
        "--base-model", metavar="ORG/NAME[@REVISION]", help="The original, where it was quantized from a folder."
    ),
    click.option("--license", "licence", help="Hub identifier of the licence.  [default: the original's]"),
)


@cli.command()
@_CHECKPOINT
@click.option("--repository", metavar="ORG/NAME", help="Where it will be published, for the commands that load it.")
@_ORIGIN
@click.option("--pictures", is_flag=True, help="Draw them too (needs matplotlib: pip install 'apex4-quant[plot]').")
@options.JSON
def card(path: Path, as_json: bool, **asked: Any) -> None:
    """Write the model card, README.md, of the checkpoint PATH; hand-written text in it stays."""
    from apex4_quant.publishing.card import card_as_text, write_card

    result = write_card(path, **asked)
    _print(as_json, result, lambda: card_as_text(result))


@cli.command()
@_CHECKPOINT
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
@options.JSON
def report(path: Path, out: Path, as_json: bool) -> None:
    """Write one HTML page about the checkpoint PATH: measurements, errors of all linears, plan, pictures."""
    from apex4_quant.publishing.report import write_report

    result = write_report(path, out)
    _print(as_json, result, lambda: f"{out}: {result['linears']} linears, {result['records']} measurements")


@cli.command()
@_CHECKPOINT
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option("--revision", metavar="BRANCH", help="Branch to publish to, made if there is none.  [default: main]")
@click.option("--tag", help="Tag to set on the published commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", help="Of the commit.")
@click.option("--no-eval", "without_records", is_flag=True, help="Publish although nothing was measured.")
@click.option("--exist-ok", is_flag=True, help="Replace another model that the repository holds.")
@_ORIGIN
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; change nothing.")
@options.JSON
def publish(path: Path, repository: str, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Check the checkpoint PATH, make its card and publish both on the Hub as ORG/NAME."""
    from apex4_quant.publishing.publish import PublishSettings, publication_as_text, publish

    result = publish(PublishSettings(path, repository, **asked), _progress(as_json), dry_run)
    _print(as_json, result, lambda: publication_as_text(result))


def main() -> None:
    cli(prog_name="apex4")


if __name__ == "__main__":
    main()
