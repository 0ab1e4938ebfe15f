"""The `apex4` command. Parses, calls the library, prints; everything else lives in apex4_quant.

Results go to stdout (with --json: one object), progress and messages to stderr. Exit codes: 0 ok, 1 failed, 2 usage,
75 stopped and resumable. Libraries are imported inside the commands: `apex4 --help` needs none of them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from apex4_quant import __version__
from apex4_quant.errors import Apex4Error, UsageError


def _reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """One sentence on stderr and the exit code, instead of a traceback, for what a user can cause."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        for library in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
            os.environ.setdefault(library, "error")
        try:
            command(*args, **kwargs)
        except Apex4Error as error:
            click.echo(f"apex4: {error}", err=True)
            sys.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of stdout is gone (`apex4 inspect ... | head`): nothing to tell it any more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return wrapped


def _progress(as_json: bool) -> Any:
    from apex4_quant.progress import Progress, TerminalProgress

    return Progress() if as_json else TerminalProgress()


def _stop_on_signals() -> Callable[[], bool]:
    """After the first SIGINT or SIGTERM the returned function says yes; a second one ends the process at once."""
    asked = False

    def handle(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)
        click.echo("apex4: stopping after the layer in flight (once more: at once)", err=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return lambda: asked


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="apex4")
def cli() -> None:
    """Quantize LLMs to W4A4 (INT4 weights and activations, groups of 128), check them, evaluate them."""


@cli.command()
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Output folder: absent or empty, or --resume.")
@click.option(
    "--recipe",
    default="apex4",
    show_default=True,
    help="apex4, apex4-gptaq, apex4-shared, apex4-hadamard, quarot-128g, gptq, rtn, or a YAML file.",
)
@click.option("--group-size", default="128", show_default=True, help="128, 256, 512, ... or 'channel'.")
@click.option("--plan", metavar="FILE", help="Group size and transform of every linear, from 'apex4 plan'.")
@click.option("--target", default="auto", show_default=True, help="GPU ('RTX 3090'), sm_XX, none, or auto.")
@click.option("--layout", help="Order of the packed codes: rowmajor, sm80 or sm90.  [default: what the target reads]")
@click.option("--transform", help="Group transform: hadamard128, dense128, shared128 or none.  [default: the recipe's]")
@click.option("--calib", default="bundled", show_default=True, help="Text: bundled, a .txt or .jsonl, a Hub data set.")
@click.option("--samples", default=128, show_default=True, help="Calibration windows.")
@click.option("--seq-len", default=2048, show_default=True, help="Tokens a window, at most the model's context.")
@click.option("--seed", default=0, show_default=True, help="Which windows of the text are drawn.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype layers run in: bfloat16, float16, float32.")
@click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Keep matching linears, e.g. '*.down_proj'. Repeatable."
)
@click.option("--resume", is_flag=True, help="Go on with the stopped run in OUT, with its settings.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its estimates; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@click.pass_context
@_reports_errors
def quantize(
    context: click.Context,
    model: str | None,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantize MODEL ('demo', a local folder, or a Hub id) into a W4A4 checkpoint."""
    if model is None and not resume:
        raise UsageError("quantize needs a MODEL: give 'demo', a local folder, or a Hub id")
    if out is None and not dry_run:
        raise UsageError("quantize needs an output folder: give -o OUT, or --dry-run to see the plan only")
    if options["plan"] and context.get_parameter_source("group_size") == ParameterSource.COMMANDLINE:
        raise UsageError("--plan decides every group size: leave --group-size away")
    from apex4_quant.format.storage import format_bytes
    from apex4_quant.quantization import run as pipeline
    from apex4_quant.quantization.plan import plan_as_text

    if resume:
        if out is None:
            raise UsageError("--resume needs the folder of the run: give -o OUT")
        given = [name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
        asked = {name: options[name] for name in given} | ({"model": model} if model else {})
        settings = pipeline.settings_to_resume(out, asked)
    else:
        settings = pipeline.QuantizeSettings(model=str(model), **options)
    if dry_run:
        plan = pipeline.preview(settings)
        if as_json:
            click.echo(json.dumps(plan.as_dict()))
            return
        click.echo(plan_as_text(plan.plan, plan.source))
        click.echo(
            f"  about {plan.seconds:.0f} s on {plan.settings.device}, about {format_bytes(plan.peak_memory)} of tensors "
            f"at the worst moment; layout {plan.settings.layout}; nothing was written"
        )
        return
    assert out is not None
    result = pipeline.quantize(
        settings, out, resume=resume, progress=_progress(as_json), should_stop=_stop_on_signals()
    )
    summary = result.as_dict()
    if as_json:
        click.echo(json.dumps(summary))
        return
    reasons: dict[str, int] = {}
    for kept in result.plan.kept:
        reasons[kept.reason] = reasons.get(kept.reason, 0) + 1
    kept_text = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    before, after = summary["bytes_before"], summary["bytes_after"]
    click.echo(f"{out}: {summary['linears_quantized']} linears quantized; tensors kept: {kept_text}")
    click.echo(
        f"  {format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f}x smaller), "
        f"{summary['bits_per_weight']:.3f} bits per quantized weight, {summary['seconds']:.1f} s"
    )
    click.echo(
        f"  relative output error of a linear: mean {summary['mean_relative_error']:.4f}, "
        f"largest {summary['max_relative_error']:.4f}"
    )
    click.echo(f"  next: apex4 eval {out} --baseline {summary['model']} --record; apex4 publish {out} ORG/NAME")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def gpus(as_json: bool) -> None:
    """The GPUs that are known: rates, rho, and how much of the dequantization hides behind the tensor cores."""
    from apex4_quant.planning.cost_model import gpus_as_dict, gpus_as_text

    click.echo(json.dumps(gpus_as_dict()) if as_json else gpus_as_text())


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Plan file to write: .yaml, .yml or .json.")
@click.option(
    "--recipe", default="apex4", show_default=True, help="That of 'apex4 quantize': what transforms there are."
)
@click.option("--target", default="auto", show_default=True, help="GPU of 'apex4 gpus', or auto.")
@click.option(
    "--mode", default="auto", show_default=True, help="auto, g128 (transforms only), mixed (128 for down_proj only)."
)
@click.option(
    "--budget", type=float, help="Time allowed, in multiples of the fastest plan's.  [default: 1.05; mixed: any]"
)
@click.option("--max-loss", type=float, help="Loss allowed, in multiples of the least; then time is minimised.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens a step, for predicted times.")
@click.option("--mainloop", default="two-ffma", show_default=True, help="two-ffma, or naive to compare.")
@click.option(
    "--transform",
    help="For all: hadamard128, dense128 or none.  [default: hadamard128 and dense128 if the recipe has that]",
)
@click.option("--calib", default="bundled", show_default=True, help="Text: bundled, a .txt or .jsonl, a Hub data set.")
@click.option("--samples", type=int, help="Calibration windows.  [default: 8192 tokens]")
@click.option("--seq-len", default=2048, show_default=True, help="Tokens a window, at most the model's context.")
@click.option("--seed", default=0, show_default=True, help="Which windows of the text are drawn.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
@click.option("--dtype", default="auto", show_default=True, help="Dtype layers run in: bfloat16, float16, float32.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@_reports_errors
def plan(out: Path | None, as_json: bool, **options: Any) -> None:
    """Choose group size and transform of every linear of MODEL on a GPU, from predicted loss and predicted time."""
    from apex4_quant.planning.planner import PlanSettings, make_plan

    result = make_plan(PlanSettings(**options), out, _progress(as_json))
    click.echo(json.dumps(result.as_dict()) if as_json else result.as_text())


def _command_line(context: click.Context) -> list[str]:
    """The command as it was given, without the program's name and without what only prints."""
    words = [str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        if name == "as_json" or context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            continue
        option = [parameter.opts[0]] if isinstance(parameter, click.Option) else []
        words += option if value is True else [*option, str(value)]
    return words


def _recorder(context: click.Context, path: str) -> Callable[[dict[str, Any]], object]:
    """What keeps a result in the checkpoint `path`. Refuses a folder that cannot, before anything is measured."""
    from apex4_quant.publishing.records import record_evaluation, require_recordable

    require_recordable(path)
    command = _command_line(context)
    return lambda result: record_evaluation(path, result, command)


@cli.command("eval")
@click.argument("path")
@click.option("--baseline", metavar="MODEL", help="Measure this model too and print the difference.")
@click.option("--text", default="heldout", show_default=True, help="heldout, wikitext2, a file, or a Hub data set.")
@click.option("--seq-len", default=2048, show_default=True, help="Window length, at most the model's context.")
@click.option(
    "--tasks", default="", help="lm-eval tasks, comma separated; apex4_choice and apex4_lastword are bundled."
)
@click.option("--include-path", help="Folder with more lm-eval task YAMLs.")
@click.option("--batch-size", default=8, show_default=True, help="For --tasks.")
@click.option("--limit", type=int, help="At most so many windows of text and rows of each task.")
@click.option("--throughput", is_flag=True, help="Measure tokens a second and memory instead.")
@click.option(
    "--record", is_flag=True, help="Keep the result in the checkpoint PATH, for 'apex4 card' and 'apex4 publish'."
)
@click.option("--batch", default=1, show_default=True, help="Requests at once, for --throughput.")
@click.option("--prompt-len", default=512, show_default=True, help="Tokens of a prompt, for --throughput.")
@click.option("--gen-len", default=128, show_default=True, help="Tokens of an answer, for --throughput.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N or auto.")
@click.option(
    "--dtype", default="auto", show_default=True, help="bfloat16, float16, float32, or auto: the checkpoint's."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@click.pass_context
@_reports_errors
def evaluate(
    context: click.Context, path: str, tasks: str, throughput: bool, record: bool, as_json: bool, **options: Any
) -> None:
    """Perplexity and lm-eval tasks, or the speed, of PATH (a quantized or original model, or 'demo')."""
    keep = _recorder(context, path) if record else None
    speed = {name: options.pop(name) for name in ("batch", "prompt_len", "gen_len")}
    given = {name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    others = ("tasks", "text", "seq_len", "include_path", "batch_size", "limit") if throughput else tuple(speed)
    for name in others:
        if name in given:
            advice = "is not for --throughput: leave it away" if throughput else "is for --throughput: add that"
            raise UsageError(f"--{name.replace('_', '-')} {advice}")
    if throughput:
        from apex4_quant.evaluation.throughput import ThroughputSettings, throughput_as_text
        from apex4_quant.evaluation.throughput import throughput as measure

        common = {name: options[name] for name in ("baseline", "device", "dtype")}
        measured = measure(ThroughputSettings(model=path, **common, **speed), _progress(as_json))
        if keep:
            keep(measured)
        click.echo(json.dumps(measured) if as_json else throughput_as_text(measured))
        return
    from apex4_quant.evaluation.evaluate import EvalSettings, evaluate, evaluation_as_text

    names = tuple(task.strip() for task in tasks.split(",") if task.strip())
    result = evaluate(EvalSettings(model=path, tasks=names, **options), _progress(as_json))
    if keep:
        keep(result)
    click.echo(json.dumps(result) if as_json else evaluation_as_text(result))


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def inspect(path: str, as_json: bool) -> None:
    """Show what is in the quantized checkpoint PATH, linear by linear."""
    from apex4_quant.checkpoint.inspect import inspect, inspection_as_text

    result = inspect(path)
    click.echo(json.dumps(result) if as_json else inspection_as_text(result))


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def check(path: str, as_json: bool) -> None:
    """Check that the quantized checkpoint PATH is complete, undamaged and runs."""
    from apex4_quant.checkpoint.check import check

    done = check(path, (lambda line: None) if as_json else click.echo)
    click.echo(json.dumps({"path": path, "ok": True, "checks": done}) if as_json else f"{path} is whole")


@cli.command()
@click.argument("path")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder: absent or empty.")
@click.option("--target", default="auto", show_default=True, help="GPU ('RTX 3090'), sm_XX, none, or auto.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def repack(path: str, out: Path, target: str, as_json: bool) -> None:
    """Rewrite the quantized checkpoint PATH in the order another GPU reads: the same codes, no quantization."""
    from apex4_quant.checkpoint.repack import repack

    result = repack(path, out, target, (lambda line: None) if as_json else functools.partial(click.echo, err=True))
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{out}: {result['linears']} linears, {result['layout_before']} -> {result['layout']}, {result['target']}"
    )


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def doctor(as_json: bool) -> None:
    """What computes here: torch, driver, NVRTC, each GPU's kernels, the cache; exit code 1 if a GPU lacks something."""
    from apex4_quant.tools.doctor import as_text, examine

    found = examine()
    click.echo(json.dumps(found) if as_json else as_text(found))
    if found["problems"]:
        sys.exit(1)


@cli.command()
@click.option(
    "--shapes", default="", metavar="LIST", help="Llama-3-8B, Llama-2-70B:down, 4096x4096 (NxK), ...  [default: all]"
)
@click.option(
    "--m", "tokens", default="", metavar="LIST", help="Numbers of tokens, comma separated.  [default: 1 to 8192]"
)
@click.option(
    "--contenders", default="apex4,apex4+q,bf16,fp8", show_default=True, metavar="LIST",
    help="Also humming-w4a4, humming-w4a4+q, humming-w4a8, humming-w4a8+q; +q: with quantization.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Three shapes, four numbers of tokens.")
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the speed-ups to write, .svg.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@_reports_errors
def bench(shapes: str, tokens: str, contenders: str, quick: bool, plot: Path | None, as_json: bool) -> None:
    """Time W4A4 linears of real models on this GPU, beside BF16 and FP8."""
    from apex4_quant.tools.bench import BenchSettings, as_svg, as_text, parse_list, parse_tokens, run

    settings = BenchSettings(parse_list(shapes), parse_tokens(tokens), parse_list(contenders), quick)
    result = run(settings, _progress(as_json))
    if plot is not None:
        plot.write_text(as_svg(result), encoding="utf-8")
    click.echo(json.dumps(result) if as_json else as_text(result))


@cli.group()
def kernels() -> None:
    """The GPU kernels: list them, compile them all beforehand (without a GPU), tune them for this GPU."""


@kernels.command("build")
@click.option("--arch", "archs", multiple=True, required=True, metavar="ARCH", help="For example sm_86. Repeatable.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for .cubin files, beside the cache.")
@click.option("--jobs", type=int, help="Processes.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@_reports_errors
def build_kernels(archs: tuple[str, ...], out: Path | None, jobs: int | None, as_json: bool) -> None:
    """Compile every kernel of ARCH, so that nobody waits at first use: into the cache, and into OUT if given."""
    from apex4_quant.tools.kernel_build import build

    result = build(archs, out, jobs, _progress(as_json))
    click.echo(json.dumps(result.as_dict()) if as_json else result.as_text())


@kernels.command("tune")
@click.option("--shapes", default="", help="Models of 'apex4 bench', MODEL:LAYER, or NxK, comma separated.")
@click.option("--m", "tokens", default="", help="Numbers of tokens, comma separated.  [default: 16 to 8192]")
@click.option("--out-dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp16"]), help="Of y.")
@click.option("--repeats", default=10, show_default=True, help="Measurements of every plan.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@_reports_errors
def tune_kernels(shapes: str, tokens: str, out_dtype: str, repeats: int, as_json: bool) -> None:
    """Time every plan of the GEMM for some shapes on this GPU, and use the fastest from now on."""
    from apex4_quant.tools.tuning import settings_of, tune

    result = tune(settings_of(shapes, tokens, out_dtype, repeats), _progress(as_json))
    click.echo(json.dumps(result) if as_json else f"{len(result['shapes'])} plans kept in {result['file']}")


@kernels.command("list")
@click.option("--arch", "archs", multiple=True, metavar="ARCH", help="Only these. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def list_kernels(archs: tuple[str, ...], as_json: bool) -> None:
    """Every kernel: architecture, name, source, macros."""
    from apex4_quant.tools.kernel_build import kernels_as_dict, kernels_as_text

    click.echo(json.dumps(kernels_as_dict(archs)) if as_json else kernels_as_text(archs))


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--repository", metavar="ORG/NAME", help="Where it will be published, for the commands that load it.")
@click.option("--base-model", metavar="ORG/NAME[@REVISION]", help="The original, where it was quantized from a folder.")
@click.option("--license", "licence", help="Hub identifier of the licence.  [default: the original's]")
@click.option("--pictures", is_flag=True, help="Draw them too (needs matplotlib: pip install 'apex4-quant[report]').")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def card(path: Path, as_json: bool, **options: Any) -> None:
    """Write the model card, README.md, of the checkpoint PATH; hand-written text in it stays."""
    from apex4_quant.publishing.card import write_card

    result = write_card(path, **options)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{result['card']}: {'written' if result['changed'] else 'unchanged'}, {result['records']} measurements")
    if result["license"] is None:
        click.echo("  the licence is not known: give --license, or 'apex4 publish' will refuse", err=True)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@_reports_errors
def report(path: Path, out: Path, as_json: bool) -> None:
    """Write one HTML page about the checkpoint PATH: measurements, errors of all linears, plan, pictures."""
    from apex4_quant.publishing.report import write_report

    result = write_report(path, out)
    click.echo(
        json.dumps(result) if as_json else f"{out}: {result['linears']} linears, {result['records']} measurements"
    )


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a private repository.")
@click.option("--revision", metavar="BRANCH", help="Branch to publish to, made if there is none.  [default: main]")
@click.option("--tag", help="Tag to set on the published commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", help="Of the commit.")
@click.option("--no-eval", "without_records", is_flag=True, help="Publish although nothing was measured.")
@click.option("--exist-ok", is_flag=True, help="Replace another model that the repository holds.")
@click.option("--base-model", metavar="ORG/NAME[@REVISION]", help="The original, where it was quantized from a folder.")
@click.option("--license", "licence", help="Hub identifier of the licence.  [default: the original's]")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; change nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, no progress.")
@_reports_errors
def publish(path: Path, repository: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Check the checkpoint PATH, make its card and publish both on the Hub as ORG/NAME."""
    from apex4_quant.publishing.publish import PublishSettings, publication_as_text, publish

    settings = PublishSettings(path, repository, **options)
    result = publish(settings, _progress(as_json), dry_run)
    click.echo(json.dumps(result) if as_json else publication_as_text(result))


def main() -> None:
    cli(prog_name="apex4")


if __name__ == "__main__":
    main()
