"""The compile pass: graphs as vLLM hands them to it, computed before and after, and the real vLLM with and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

import vllm.ir.ops  # noqa: F401  vLLM's norms as operators
from torch._inductor.pattern_matcher import fwd_only
from torch._subclasses.fake_tensor import FakeTensorMode

from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels import ops  # noqa: F401  ours

M, K, N, EPS = 5, 256, 192, 1e-5
HOW = (None, K, 128, 0.9, True, "sm90")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Of the shapes, and the packed codes and scales of a linear [N, K]."""
    made = [torch.randn(shape, generator=generator(seed)).to(dtype) for seed, shape in enumerate(shapes)]
    codes = torch.randint(-7, 8, (N, K), dtype=torch.int8, generator=generator(9))
    layout = get_layout("sm90")
    return [*made, layout.pack(codes), layout.pack_scales(torch.full((N, K // 128), 0.01).half())]


def linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.apex4.linear(x.reshape(-1, K), packed, scale, None, None, N, *HOW).view(
        *x.shape[:-1], N
    )
    return y


def norm(x: torch.Tensor, gain: torch.Tensor, *rest: Any) -> torch.Tensor:
    y: torch.Tensor = torch.ops.vllm_ir.rms_norm(x, gain, EPS, *rest)
    return y


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x[..., :K]) * x[..., K:]


def after_norm(x: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(norm(x, gain), packed, scale)


def after_gemma_norm(x: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(norm(x, gain.float() + 1.0), packed, scale)


def after_addition(
    x: torch.Tensor, r: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor
) -> Any:
    normed, total = torch.ops.vllm_ir.fused_add_rms_norm(x, r, gain, EPS)
    return total * 2, linear(normed, packed, scale), total + 1


def after_activation(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(silu_mul(x), packed, scale)


def read_twice(x: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    normed = norm(x, gain)
    return linear(normed, packed, scale), normed + 1


def of_a_part(x: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(norm(x, gain, 128), packed, scale)


def with_a_computed_gain(x: torch.Tensor, gain: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(norm(x, gain * 2), packed, scale)


def activation_read_twice(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    product = silu_mul(x)
    return linear(product, packed, scale), product + 1


def of_swapped_halves(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(torch.nn.functional.silu(x[..., K:]) * x[..., :K], packed, scale)


def of_other_columns(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(torch.nn.functional.silu(x[..., 1 : K + 1]) * x[..., K:], packed, scale)


def gelu(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> Any:
    return linear(torch.nn.functional.gelu(x[..., :K]) * x[..., K:], packed, scale)


def traced(function: Callable[..., Any], inputs: list[torch.Tensor]) -> fx.GraphModule:
    with FakeTensorMode() as mode:
        graph: fx.GraphModule = fwd_only(function, [mode.from_tensor(each) for each in inputs])
    return graph


def targets(graph: fx.GraphModule) -> list[str]:
    return [
        str(node.target) for node in graph.graph.nodes if "apex4" in str(node.target) or "vllm_ir" in str(node.target)
    ]


X, WIDE, GAIN = (M, K), (M, 2 * K), (K,)
FUSED = {
    "norm": (after_norm, (X, GAIN), "rms_norm_linear"),
    "norm of Gemma": (after_gemma_norm, (X, GAIN), "rms_norm_linear"),
    "addition and norm": (after_addition, (X, X, GAIN), "add_rms_norm_linear"),
    "activation": (after_activation, (WIDE,), "silu_mul_linear"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_and_computes_the_same(name: str, dtype: torch.dtype) -> None:
    from apex4_quant.integrations.vllm.fusion import Found, fuse

    function, shapes, operator = FUSED[name]
    inputs = operands(dtype, *shapes)
    graph = traced(function, inputs)
    expected = graph(*inputs)
    found = fuse(graph.graph)
    assert found == Found(linears=1, norms=int("norm" in name), activations=int("norm" not in name))
    graph.graph.lint()
    graph.recompile()
    assert targets(graph) == [f"apex4.{operator}.default"]
    results = graph(*inputs)
    for result, wanted in zip(
        *(each if isinstance(each, tuple) else (each,) for each in (results, expected)), strict=True
    ):
        assert result.dtype == dtype
        # In 16 bits a norm behind an addition reads the rounded sum, and a code in some hundreds moves by one.
        tolerance = 1e-6 if dtype == torch.float32 else 0.03
        assert float((result - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("function", "shapes", "norms_that_stay"),
    [
        (read_twice, (X, GAIN), 1),
        (of_a_part, (X, GAIN), 1),
        (with_a_computed_gain, (X, GAIN), 1),
        (activation_read_twice, (WIDE,), 0),
        (of_swapped_halves, (WIDE,), 0),
        (of_other_columns, (WIDE,), 0),
        (gelu, (WIDE,), 0),
    ],
)
def test_what_is_left_alone(function: Any, shapes: Any, norms_that_stay: int) -> None:
    from apex4_quant.integrations.vllm.fusion import Found, fuse

    graph = traced(function, operands(torch.bfloat16, *shapes))
    before = str(graph.graph)
    assert fuse(graph.graph) == Found(linears=1, shared=norms_that_stay)
    assert str(graph.graph) == before


def test_a_gain_of_another_dtype_stays_with_its_norm() -> None:
    from apex4_quant.integrations.vllm.fusion import fuse

    x, gain, packed, scale = operands(torch.bfloat16, X, GAIN)
    assert fuse(traced(after_norm, [x, gain.float(), packed, scale]).graph).norms == 0


def test_the_key_of_compiled_graphs_knows_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig

    from apex4_quant.integrations.vllm import fusion

    def config() -> VllmConfig:
        made = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE))
        made.compilation_config.mode = CompilationMode.VLLM_COMPILE  # on a CPU vLLM chooses another
        return made

    def key() -> str:
        made = config()
        fusion.install(made)
        fusion.install(made)  # once for each layer
        hashed: str = made.compilation_config.compute_hash()
        return hashed

    fused = key()
    assert fused == key()
    monkeypatch.setattr(fusion, "__version__", "999")
    of_another_version = key()
    monkeypatch.setenv("APEX4_FUSE", "0")
    assert key() == config().compilation_config.compute_hash()
    assert len({fused, of_another_version, key()}) == 3
    monkeypatch.delenv("APEX4_FUSE")
    calls: list[str] = []
    own = CallableInductorPass(lambda graph: calls.append("own"), uuid="own")
    chained = config()
    chained.compilation_config.inductor_compile_config["post_grad_custom_post_pass"] = own
    fusion.install(chained)
    chained.compilation_config.inductor_compile_config["post_grad_custom_post_pass"](fx.Graph())
    assert calls == ["own"], "a pass that the user gives runs too"


# ---- the real vLLM ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM compiles as on a GPU, in pieces and with its passes, and our layers call the operators of the kernels."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    from apex4_quant.integrations.vllm import backend

    usual = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        compiles = compilation.mode == CompilationMode.VLLM_COMPILE
        usual(cls, config)
        if compiles:
            compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
            compilation.ir_enable_torch_wrap, compilation.compile_sizes = True, []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    monkeypatch.setattr(backend, "kernel_of", lambda *_: "sm90")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the pass logs of each compiled graph."""
    from apex4_quant.integrations.vllm import experts, fusion, linear  # noqa: F401  who else makes this logger, makes its methods

    lines: list[str] = []

    def log(message: str, *arguments: Any) -> None:
        lines.append(message % arguments)

    for name in ("info_once", "warning_once"):
        monkeypatch.setattr(fusion.logger, name, log)
    return lines


def test_norms_and_activations_of_every_layer_are_fused_and_the_switch_turns_it_off(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], as_on_a_gpu: None, logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, options = quantized("llama", "rtn", layout="sm90"), {"enforce_eager": False, "max_num_batched_tokens": 128}
    fused = serve_here(folder, **options)
    of = "apex4 fused {} norms and {} activations into the quantizers of {} linears of a compiled graph"
    assert logged == [of.format(1, 0, 1), of.format(2, 1, 4), of.format(1, 1, 3)]  # of two layers, cut at attention
    logged.clear()
    again = serve_here(folder, **options)
    assert not logged and again == fused, "a graph from vLLM's cache is the fused one"
    monkeypatch.setenv("APEX4_FUSE", "0")
    apart = serve_here(folder, **options)
    assert not logged
    for one, other in zip(fused, apart, strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    monkeypatch.delenv("APEX4_FUSE")
    serve_here(folder, max_num_batched_tokens=128)
    assert logged == ["apex4 fuses no norms and activations: vLLM runs without torch.compile"] * 8
