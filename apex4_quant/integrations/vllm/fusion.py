"""A compile pass of vLLM: RMSNorm and SiLU(gate) * up become part of the quantizer of the linear behind them.

vLLM compiles a model in pieces, between one attention and the next, and hands the graph of each to its passes before Inductor
makes kernels of it. There a norm is still one operator, and an activation what PyTorch decomposes it into:

    vllm_ir.rms_norm(x, gain)           -> apex4.linear   becomes apex4.rms_norm_linear(x, gain)
    vllm_ir.fused_add_rms_norm(x, r, g) -> apex4.linear   becomes apex4.add_rms_norm_linear(x, r, g), which also returns x + r
    silu(x[:, :K]) * x[:, K:]           -> apex4.linear   becomes apex4.silu_mul_linear of both halves

each only where that linear is the one reader. What the operators are told beside their input is handed on as it is.

Results differ by roundings alone: a norm behind an addition reads the sum as it is stored, where vLLM's own reads it in float32.

The pass is set by the quantization method (`install`), and APEX4_FUSE=0 leaves it out. vLLM's and Inductor's keys of compiled
graphs contain `uuid`. Every compiled graph with linears of ours is logged with what was fused in it, also where that is nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import Match, PatternExpr, fwd_only, gen_pattern
from vllm.compilation.passes.inductor_pass import InductorPass, enable_fake_mode
from vllm.config import CompilationMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ... import __version__
from ...kernels import ops
from ...nn.prepare import fusing_is_asked

logger = init_logger("vllm.apex4")

_RESHAPES = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_SLICE = torch.ops.aten.slice.Tensor


def install(config: VllmConfig) -> None:
    """Have vLLM run the pass when it compiles the model of `config`, unless APEX4_FUSE=0. May be called again."""
    if not fusing_is_asked():
        return
    if config.compilation_config.mode == CompilationMode.NONE:
        logger.info_once("apex4 fuses no norms and activations: vLLM runs without torch.compile")
        return
    passes = config.compilation_config.inductor_compile_config
    there = passes.get(current_platform.pass_key)
    if not isinstance(there, FuseInputs):
        passes[current_platform.pass_key] = FuseInputs(there)


class FuseInputs(InductorPass):
    """The pass. `behind`: one that the user has given, which runs after it."""

    def __init__(self, behind: InductorPass | None = None) -> None:
        self.behind = behind

    def __call__(self, graph: fx.Graph) -> None:
        found = fuse(graph)
        if found.linears:
            log = logger.info_once if found.norms + found.activations or found.linears == 1 else logger.warning_once
            log(
                "apex4 fused %d norms and %d activations into the quantizers of %d linears of a compiled graph%s",
                found.norms, found.activations, found.linears,
                f"; {found.shared} norms have other readers too, or are of another form" if found.shared else "",
            )  # fmt: skip
        if self.behind is not None:
            self.behind(graph)

    def uuid(self) -> str:
        behind = "" if self.behind is None else str(self.behind.uuid())
        digest: str = self.hash_source(__version__, Path(__file__).read_text(), behind)
        return digest


@dataclass
class Found:
    """Of one graph: its linears, the norms and activations that were fused, and the norms in front of linears that were not."""

    linears: int = 0
    norms: int = 0
    activations: int = 0
    shared: int = 0


def fuse(graph: fx.Graph) -> Found:
    """Rewrite the graph. Nodes have fake tensors in `meta["val"]`."""
    found = Found()
    for linear in list(graph.find_nodes(op="call_function", target=ops.linear)):
        found.linears += 1
        source = _without_reshapes(linear.args[0])
        if _is_norm(source):
            if _fuse_norm(graph, linear, source):
                found.norms += 1
            else:
                found.shared += 1
        elif _fuse_silu_mul(graph, linear, source):
            found.activations += 1
    return found


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _without_reshapes(node: Any) -> Any:
    """What `node` is with the shape that it has, if it is a reshape that changes nothing."""
    while isinstance(node, fx.Node) and node.target in _RESHAPES and _shape(node) == _shape(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads it, through reshapes that change nothing."""
    for user in node.users:
        if _without_reshapes(user) is not user:
            yield from _readers(user)
        else:
            yield user


def _is_read_by(node: fx.Node, reader: fx.Node) -> bool:
    """Whether nobody else reads it, and that one once."""
    return list(_readers(node)) == [reader] and sum(argument is node for argument in reader.all_input_nodes) <= 1


# ---- norms -----------------------------------------------------------------------------------------------------------


def _operator(node: Any) -> str:
    """ "rms_norm" or "fused_add_rms_norm", or "": what operator of vLLM's the node calls."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "vllm_ir":
        return str(target._schema.name.partition("::")[2])
    return ""


def _is_norm(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem and node.args[1] == 0:
        return _operator(node.args[0]) == "fused_add_rms_norm"
    return _operator(node) == "rms_norm"


def _fuse_norm(graph: fx.Graph, linear: fx.Node, normed: fx.Node) -> bool:
    adds = normed.target is operator.getitem
    norm: Any = normed.args[0] if adds else normed
    count = 2 if adds else 1
    inputs, (weight, eps), partial = norm.args[:count], norm.args[count : count + 2], norm.args[count + 2 :]
    gain = _gain(weight, inputs[0])
    if gain is None or any(each is not None for each in partial) or norm.kwargs or len(_shape(inputs[0])) != 2:
        return False
    if not _is_read_by(normed, linear) or not all(map(_is_constant, linear.all_input_nodes[1:])):
        return False
    arguments = (*inputs, gain[0], eps, gain[1], *linear.args[1:])
    value = linear.meta["val"]
    with graph.inserting_before(
        norm
    ):  # there is nothing in front that it needs, and all readers of the sum stand behind
        if not adds:
            y = _call(graph, ops.rms_norm_linear, arguments, linear.kwargs, value)
        else:
            both = _call(graph, ops.add_rms_norm_linear, arguments, linear.kwargs, (value, inputs[0].meta["val"]))
            y = _call(graph, operator.getitem, (both, 0), {}, value)
            total = _call(graph, operator.getitem, (both, 1), {}, inputs[0].meta["val"])
            for user in list(norm.users):
                if user is not normed:
                    user.replace_all_uses_with(total)
                    graph.erase_node(user)
    _replace(graph, linear, y)
    return True


def _gain(weight: Any, x: fx.Node) -> tuple[fx.Node, float] | None:
    """The parameter and what is added to it; None for a gain that the operators do not read.

    A kernel may read the gain before the one in front of it has ended, so that it must be a parameter.
    """
    offset = 0.0
    if (
        isinstance(weight, fx.Node) and weight.target is torch.ops.aten.add.Tensor and weight.args[1:] == (1.0,)
    ):  # Gemma
        weight, offset = weight.args[0], 1.0
        if isinstance(weight, fx.Node) and weight.target is torch.ops.prims.convert_element_type.default:
            weight = weight.args[0]
    if not isinstance(weight, fx.Node) or weight.op not in ("placeholder", "get_attr"):
        return None
    return (weight, offset) if weight.meta["val"].dtype == x.meta["val"].dtype else None


def _is_constant(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


# ---- activations -----------------------------------------------------------------------------------------------------


@cache
def _silu_mul_pattern(dtype: torch.dtype) -> PatternExpr:
    """SiluAndMul of vLLM as PyTorch decomposes it for Inductor. Positions of slices are not part of a pattern."""

    def silu_mul(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.nn.functional.silu(x[..., :half]) * x[..., half:]

    @enable_fake_mode
    def make() -> PatternExpr:
        return gen_pattern(silu_mul, [torch.empty(8, 256, dtype=dtype)], fwd_only)

    pattern: PatternExpr = make()
    return pattern


def _fuse_silu_mul(graph: fx.Graph, linear: fx.Node, product: Any) -> bool:
    if not isinstance(product, fx.Node) or product.target is not torch.ops.aten.mul.Tensor:
        return False
    match = _silu_mul_pattern(product.meta["val"].dtype).match(product)
    if not isinstance(match, Match) or not _is_read_by(product, linear):
        return False
    halves = [node for node in match.nodes if node.target is _SLICE]
    up = next((half for half in halves if half in product.args), None)
    gate = next((half for half in halves if half is not up), None)
    k = _shape(product)[-1]
    if up is None or gate is None or len(_shape(product)) != 2 or _shape(match.kwargs["x"])[-1] != 2 * k:
        return False
    if tuple(gate.args[1:]) != (1, 0, k) or tuple(up.args[1:3]) != (1, k):
        return False
    with graph.inserting_before(linear):
        y = _call(graph, ops.silu_mul_linear, (gate, up, *linear.args[1:]), linear.kwargs, linear.meta["val"])
    _replace(graph, linear, y)
    return True


# ---- rewriting -------------------------------------------------------------------------------------------------------


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
    node = graph.call_function(target, arguments, dict(kwargs))
    node.meta["val"] = value
    return node


def _replace(graph: fx.Graph, linear: fx.Node, y: fx.Node) -> None:
    """Erase the linear, and what nobody reads without it."""
    linear.replace_all_uses_with(y)
    unread = [linear]
    while unread:
        node = unread.pop()
        if not node.users and node.op == "call_function" and node.graph is graph and not node._erased:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            unread += inputs
