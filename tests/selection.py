"""Which tests run: the slow ones only with --all (scripts/test --all), long files first; and the options of tests/gpu.

Slow tests are chosen by their measured seconds (`--durations=0`). Without them every module still has its tests: those named
here are the second and later combination of what a quick one covers, or check accuracy where a quick one checks the bytes.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Patterns of test ids below tests/ (only * is special), by the reason. `@pytest.mark.slow(reason)` says the same of a test
# whose parameters are chosen where it stands.
SLOW: dict[str, tuple[str, ...]] = {
    "the same steps of other layers: a quick test takes one of each kind": (
        "quantization/test_restart.py::test_killed_before_every_other_step",
        "quantization/test_restart.py::test_disk_full_at_every_write",
        "quantization/test_restart.py::test_disk_full_at_the_hidden_states",
        "transforms/test_rewriter.py::test_resumed_runs_write_the_same_bytes[1]",
    ),
    "the accuracy of a whole demo model, quantized several times: quick tests check what it is made of": (
        "quantization/test_gradients.py::test_predictions_are_closer_with_them",
        "transforms/test_learned_transform.py::test_a_shared_transform_is_one_matrix_an_input",
    ),
    "a benchmark script with processes of its own, run in small": (
        "evaluation/test_throughput.py::test_the_end_to_end_benchmark_runs_in_small",
        "scripts/test_bench_quantize.py::test_apex4_is_measured_alone_and_a_line_says_so",
        "scripts/test_bench_quantize.py::test_what_was_measured_is_said",
    ),
    "random cases, more of what quick tests cover by name: CI runs them": (
        "fuzz/test_checkpoint_reader.py::*",
        "fuzz/test_command_line.py::*",
        "fuzz/test_kills.py::*",
        "fuzz/test_numerics.py::*",
        "fuzz/test_publish_kills.py::*",
        "fuzz/test_text_reader.py::*",
        "fuzz/test_with_atheris.py::*",
        "fuzz/test_yaml_files.py::*",
    ),
    "processes that read all of lm-eval's tasks: what makes its command find the format is tested with a script": (
        "test_launch.py::test_lm_eval",
    ),
    "a whole demo model, quantized with the full recipe, evaluated and published: its parts are tested one by one": (
        "publishing/test_uploads.py::test_the_block_of_the_readme",
    ),
    "one more engine of vLLM, for a model, a format or a fault of a kind that a quick test has": (
        *(
            f"integrations/vllm/test_engine.py::test_the_same_tokens_as_transformers[{case}*]"
            for case in (
                "demo-apex4-fast-8",
                "deepseek2",
                "gemma3",
                "granite",
                "llama",
                "mixtral-rtn-8",
                "phi3",
                "qwen3moe",
                "ragged-rtn-sm80",
            )
        ),
        "integrations/vllm/test_engine.py::test_two_ranks[tensor*]",
        "integrations/vllm/test_engine.py::test_weights_that_have_no_room_as_floats_are_unpacked_at_every_call",
        "integrations/vllm/test_engine.py::test_linears_of_four_bits_compute_with_eight_where_that_is_asked_for",
        "integrations/vllm/test_engine.py::test_dummy_weights_run",
        "integrations/vllm/test_engine.py::test_a_damaged_checkpoint_never_loads[missing transform]",
        "integrations/vllm/test_engine.py::test_a_damaged_checkpoint_never_loads[zero scale]",
        "integrations/vllm/test_engine.py::test_a_damaged_checkpoint_never_loads[NaN*",
        "integrations/vllm/test_fusion.py::test_norms_and_activations_of_every_layer_are_fused_and_the_switch_turns_it_off",
        "integrations/vllm/test_humming.py::test_stock_vllm_runs_it[demo*",
        "integrations/vllm/test_humming.py::test_stock_vllm_runs_it[phi3*",
        "integrations/vllm/test_humming.py::test_stock_vllm_runs_it[qwen3*",
        "integrations/vllm/test_linears.py::*[8]",
        "integrations/vllm/test_published_model.py::*",
        "integrations/vllm/test_ties.py::test_codes_differ_at_ties_only[gemma*",
        "integrations/vllm/test_ties.py::test_codes_differ_at_ties_only[qwen3*",
        "evaluation/test_vllm_engine.py::test_throughput",
    ),
    "a process that imports everything, for one more order of imports": (
        "integrations/test_transformers.py::test_registration_works_in_any_import_order[transformers.quantizers.auto]",
    ),
}

# Files that take longest: they start first, so that no worker has one left when the others are done.
LONG: tuple[str, ...] = (
    "integrations/vllm/test_engine.py",
    "models/test_families.py",
    "kernels/quantize/test_quantize_kernels.py",
    "kernels/gemm/test_gemm_kernels.py",
    "quantization/test_restart.py",
    "transforms/test_function_preserving.py",
    "quantization/test_gradients.py",
    "test_cli.py",
)


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests that are marked slow")
    parser.addoption(
        "--fuzz", type=int, default=1, metavar="N", help="tests/fuzz: N times as many cases, other ones for N > 1"
    )
    gpu = parser.getgroup("gpu", "the checks of kernels on a GPU (tests/gpu)")
    gpu.addoption("--gpu-quick", action="store_true", help="fewer shapes of the quantizers")
    gpu.addoption("--gpu-only", action="append", metavar="TEXT", help="checks whose id holds this text")
    gpu.addoption("--gpu-seed", type=int, default=0, metavar="N", help="of all operands (default: 0)")
    gpu.addoption("--gpu-no-emulated", action="store_true", help="on Hopper: leave the kernels of sm_8x out")
    gpu.addoption("--gpu-no-sanitizer", action="store_true", help="leave compute-sanitizer out")
    gpu.addoption("--gpu-as", type=int, metavar="SM", help="with --collect-only: list what a GPU of sm_SM would run")


def header(config: pytest.Config) -> str:
    if config.getoption("--all"):
        return "all tests, also the slow ones"
    return "without the slow tests (scripts/test --all runs them; tests/selection.py says which and why)"


def _id(item: pytest.Item) -> str:
    return f"{item.path.relative_to(ROOT / 'tests')}::{item.nodeid.partition('::')[2]}"


def modify_items(config: pytest.Config, items: list[pytest.Item]) -> None:
    ids = {item: _id(item) for item in items}
    _require_matches(config, list(ids.values()))
    position = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: position.get(ids[item].partition("::")[0], len(LONG)))
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow") or reason_of(ids[item])]
    if slow:
        config.hook.pytest_deselected(items=slow)
        left_out = set(slow)
        items[:] = [item for item in items if item not in left_out]


def reason_of(test_id: str) -> str | None:
    """Why a test is slow; None for one that is not."""
    return next((reason for reason, names in SLOW.items() if any(matches(test_id, each) for each in names)), None)


def matches(test_id: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(test_id, pattern.replace("[", "[[]"))


def _require_matches(config: pytest.Config, ids: list[str]) -> None:
    """A pattern that names no test is a mistake, where the whole of its file was collected."""
    if any("::" in argument for argument in config.args):
        return
    collected = {test_id.partition("::")[0] for test_id in ids}
    for pattern in (each for names in SLOW.values() for each in names):
        file = pattern.partition("::")[0]
        known = file in collected or not (ROOT / "tests" / file).is_file()
        if known and not any(matches(test_id, pattern) for test_id in ids):
            raise pytest.UsageError(f"tests/selection.py: {pattern} is no test")
