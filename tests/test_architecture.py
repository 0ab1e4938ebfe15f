"""The shape of the source tree: who may import whom, how large a package may be, where a module's tests are.

Every import counts: those inside functions and under TYPE_CHECKING, too. An import that only runs later still says that
one module knows of another, and a cycle of such imports breaks as soon as somebody moves one of them to the top.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "apex4_quant"

# Lowest first. A part is a module or a sub-package of apex4_quant. It may import itself and parts of the lines above
# its own, nothing else. The root module `apex4_quant` (its public names) is the last line: nothing imports it.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "private_names", "environment", "calib"),
    ("format",),
    ("hardware", "recipes", "distributed"),
    ("kernels",),
    ("models",),
    ("nn", "transforms"),
    ("rounding", "distillation"),
    ("quantization",),
    ("planning",),
    ("integrations",),
    ("checkpoint",),
    ("evaluation", "tools"),
    ("publishing",),
    ("command_options",),
    ("cli",),
    ("__main__", "launch", ""),
)
# The same for the modules and sub-packages of `kernels`; "*" stands for those that are named nowhere. Here the modules of
# one line may import each other.
KERNELS_ORDER: tuple[tuple[str, ...], ...] = (
    ("runtime",),
    ("*",),
    ("quantize",),
    ("gemm", "sweeps", "training"),  # some GEMMs quantize what they read
    ("cpu_ops", "cuda_ops", "ops"),
    ("experts",),
    ("catalogue",),
    ("analysis",),
)
MOST_FILES = 14  # of Python, in one package, its __init__.py counted

# Of the root module one may ask for the version, which it has at once. What else it has is loaded on demand, from above.
ALWAYS_THERE = "__version__"

SMALL = 60  # lines: a module no longer than that may be tested with those that use it
# Modules whose tests are in a file of another name below tests/, by the reason.
TESTED_IN: dict[str, dict[str, str]] = {
    "one file for all parts of one kernel: configurations, launch and CUDA source only mean something together": {
        "kernels/experts/configs.py": "kernels/experts/test_expert_kernels.py",
        "kernels/gemm/configs.py": "kernels/gemm/test_gemm_kernels.py",
        "kernels/gemm/s8_configs.py": "kernels/gemm/test_s8_kernels.py",
        "kernels/gemm/sm90_s8_configs.py": "kernels/gemm/test_sm90_s8_kernels.py",
        "kernels/quantize/configs.py": "kernels/quantize/test_quantize_kernels.py",
        "kernels/training/configs.py": "kernels/training/test_training_kernels.py",
        "kernels/training/ops.py": "kernels/training/test_training_kernels.py",
        "kernels/quantize/launch.py": "kernels/quantize/test_quantize_kernels.py",
    },
    "what is chosen is only seen in what the operators do with it": {
        "kernels/gemm/fused_linear.py": "kernels/test_ops.py",
        "kernels/gemm/tuned.py": "tools/test_tuning.py",
    },
    "the command or the run that it implements is tested as a whole": {
        "checkpoint/check.py": "test_bad_models.py",
        "checkpoint/inspect.py": "test_cli.py",
        "checkpoint/load.py": "integrations/test_transformers.py",
        "evaluation/engine.py": "evaluation/test_throughput.py",
        "evaluation/generation_speed.py": "evaluation/test_throughput.py",
        "evaluation/lm_eval_tasks.py": "evaluation/test_evaluate.py",
        "evaluation/transformers_engine.py": "evaluation/test_evaluate.py",
        "planning/outcome.py": "planning/test_planner.py",
        "publishing/base_model.py": "publishing/test_card.py",
        "publishing/facts.py": "publishing/test_card.py",
        "publishing/folder.py": "publishing/test_publish.py",
        "publishing/pictures.py": "publishing/test_report.py",
        "publishing/records.py": "publishing/test_card.py",
        "publishing/remote.py": "publishing/test_faults.py",
        "distillation/own_text.py": "distillation/test_distill.py",
        "distillation/step.py": "distillation/test_distill.py",
        "distillation/student.py": "distillation/test_distill.py",
        "quantization/distilling.py": "distillation/test_distill.py",
        "quantization/run.py": "quantization/test_restart.py",
        "quantization/run_state.py": "quantization/test_restart.py",
        "tools/kernel_build.py": "tools/test_doctor.py",
    },
    "only the real vLLM says whether they are right": {
        "integrations/vllm/config.py": "integrations/vllm/test_engine.py",
        "integrations/vllm/experts.py": "integrations/vllm/test_engine.py",
        "integrations/vllm/linear.py": "integrations/vllm/test_engine.py",
    },
    "tested with the class that it serves": {
        "calib/hessian.py": "rounding/test_gptq.py",
        "calib/text.py": "test_bad_input.py",
        "format/storage.py": "quantization/test_restart.py",
        "evaluation/lm_eval_tasks.py": "evaluation/test_evaluate.py",
        "kernels/runtime/bindings.py": "kernels/runtime/test_launcher.py",
        "planning/outcome.py": "planning/test_planner.py",
        "hardware/gpus.py": "hardware/test_devices.py",
        "integrations/transformers/quantizer.py": "integrations/test_transformers.py",
        "models/expert_tensors.py": "models/test_experts.py",
        "models/layer_runner.py": "models/test_families.py",
        "models/source.py": "models/test_families.py",
        "kernels/analysis/mainloops.py": "kernels/analysis/test_sass.py",
    },
}


def modules() -> dict[str, Path]:
    """Dotted name below apex4_quant ("" for the root module, a package by its name) -> file; links are followed."""
    top = ROOT / PACKAGE
    found: dict[str, Path] = {}
    for path in sorted((*top.rglob("*.py"), *(top / "calib").rglob("*.py"))):
        parts = path.relative_to(top).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """(module of ours, line) of every import statement of a module, wherever it stands."""
    inside = name.split(".") if name else []
    package = inside if path.name == "__init__.py" else inside[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield nearest(alias.name.split(".")[1:]), node.lineno
        elif isinstance(node, ast.ImportFrom):
            given = node.module.split(".") if node.module else []
            if node.level:
                assert node.level - 1 <= len(package), f"{path}:{node.lineno} leaves {PACKAGE}"
                base = package[: len(package) - node.level + 1] + given
            elif given[0] == PACKAGE:
                base = given[1:]
            else:
                continue
            for alias in node.names:
                if base or alias.name != ALWAYS_THERE:
                    yield nearest([*base, alias.name]), node.lineno


def nearest(parts: list[str]) -> str:
    """The longest beginning of `parts` that is a module: what is behind it are names in it."""
    while ".".join(parts) not in MODULES:
        parts = parts[:-1]
    return ".".join(parts)


EDGES = {
    (name, target, line) for name, path in MODULES.items() for target, line in imports(name, path) if target != name
}


def line_of(part: str, order: tuple[tuple[str, ...], ...]) -> int:
    for wanted in (part, "*"):
        for number, line in enumerate(order):
            if wanted in line:
                return number
    pytest.fail(f"{part} has no place in ORDER of {Path(__file__).name}")


def upward(order: tuple[tuple[str, ...], ...], inside: str = "") -> list[str]:
    """The imports between two parts of `inside` (a package, "" for all) that do not go to an earlier line of `order`."""
    wrong = []
    below = f"{inside}." if inside else ""
    for name, target, number in sorted(EDGES):
        if not (name.startswith(below) and target.startswith(below)):
            continue
        own, other = (each.removeprefix(below).split(".")[0] for each in (name, target))
        up = line_of(other, order) - line_of(own, order)
        modules_of_a_line = up == 0 and inside and {below + own, below + other} <= set(MODULES) - PACKAGES
        if own != other and up >= 0 and not modules_of_a_line:
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{number} ({name}) imports {target or PACKAGE}")
    return wrong


def test_the_graph_is_drawn() -> None:
    """It has the edges of all kinds that exist: at the top, in functions, under TYPE_CHECKING, of links."""
    text = "import apex4_quant.errors\ndef f():\n    from .plan import Plan\nif TYPE_CHECKING:\n    from ..format import storage\n"
    assert len(MODULES) > 60 and {"cli", "calib.text", "kernels.gemm", ""} <= set(MODULES)
    assert len(EDGES) > 150
    probe = ROOT / PACKAGE / "quantization" / "plan.py"
    tree = ast.parse(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "parse", lambda *_: tree)
        assert list(imports("quantization.run", probe)) == [
            ("errors", 1),
            ("quantization.plan", 3),
            ("format.storage", 5),
        ]


def test_no_module_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, target, _ in EDGES:
        graph[name].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a cycle of imports: " + " <- ".join(str(name) or PACKAGE for name in error.args[1]))


@pytest.mark.parametrize(("order", "inside"), [(ORDER, ""), (KERNELS_ORDER, "kernels")], ids=["all", "kernels"])
def test_packages_import_downwards_only(order: tuple[tuple[str, ...], ...], inside: str) -> None:
    wrong = upward(order, inside)
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_place_and_every_place_a_part() -> None:
    parts = {name.split(".")[0] for name in MODULES}
    placed = [part for line in ORDER for part in line]
    assert len(placed) == len(set(placed)) and set(placed) == parts


def test_no_package_is_crowded() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        count = len(list(folder.glob("*.py")))
        assert count <= MOST_FILES, f"{folder.relative_to(ROOT)} has {count} Python files, {MOST_FILES} are the most"


def test_every_module_has_its_tests() -> None:
    """tests/ mirrors apex4_quant/: the tests of PKG/MODULE.py are in tests/PKG/test_MODULE.py, or where TESTED_IN says."""
    elsewhere = {module: file for files in TESTED_IN.values() for module, file in files.items()}
    wrong = []
    for path in MODULES.values():
        module = path.relative_to(ROOT / PACKAGE)
        lines = len(path.read_text().splitlines())
        named = Path("tests") / module.parent / f"test_{module.stem}.py"
        exists, placed = (ROOT / named).is_file(), elsewhere.pop(str(module), None)
        if placed is not None and exists:
            wrong.append(f"TESTED_IN names {module}, which has {named}: take it out")
        elif placed is not None and not (ROOT / "tests" / placed).is_file():
            wrong.append(f"TESTED_IN: tests/{placed} does not exist")
        elif placed is None and not exists and lines > SMALL and path.name != "__init__.py":
            wrong.append(f"{module} ({lines} lines): no {named}")
    wrong += [f"TESTED_IN names {module}, which does not exist" for module in elsewhere]
    assert not wrong, "\n".join(wrong)


def test_no_test_file_is_named_after_nothing() -> None:
    """A folder of tests/ is a package of apex4_quant, or one of those that test something else."""
    others = {"cuda_on_cpu", "fuzz", "gpu", "hub_server", "kernel_cases", "scripts"}
    packages = {path.parent.relative_to(ROOT / PACKAGE) for path in MODULES.values()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert folder in packages or (folder.parts and folder.parts[0] in others), f"{path} mirrors no package"
