"""Mixtures of experts of vLLM in W4A4: all experts of this rank in one call of an operator, or in a loop over them.

An expert has two products: its gate and up projections, which read the layer's input, and its down projection. The tensors of
all experts stand in one parameter each, [experts, ...] of what a linear layer has (`w13_*`: gate then up, `w2_*`: down).

Where kernels compute all experts together (kernels/experts/), torch.ops.apex4.experts does. The log says where they do not, and
why; there is a loop then, of two calls of our operators for each expert.

On a GPU the loop is of one of two kinds. With few tokens every expert multiplies all of them, and the weight of a token that is
not its own is zero: all shapes are fixed, so that a CUDA graph can be captured. With more tokens than any graph has, an expert
multiplies its own tokens, and the GPU waits for the host to learn which. What is slow: the first kind does E / k times the
arithmetic (the traffic of weights, which decides with few tokens, is nearly the same), the second waits once a layer, and both
launch 3 to 4 kernels an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ...errors import Apex4Error
from ...format.number_format import BLOCK, CODE_MAX
from ...format.quant_config import QuantConfig
from ...format.transform_kind import TransformKind
from ...kernels import cuda_ops
from ...kernels.experts import ops as expert_ops
from ...kernels.experts.configs import why_none
from ...kernels.operands import TOKEN_FORMAT, layout_of_format
from ...kernels.quantize.hadamard_product import signs
from . import backend, names
from .linear import constant, fill_randomly, kernel_matrix
from .slices import Piece, cut_features, cut_rows
from .stored import Member, StoredLinears

logger = init_logger("vllm.apex4")

PARTS = ("weight_packed", "weight_scale", "input_transform")
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # by vLLM's names of an expert's linears


class ExpertProducts:
    """One of the two products of all experts of a rank: `stem` is "w13" or "w2"."""

    def __init__(self, stem: str, experts: list[list[Member]], transform_of: Member | None) -> None:
        """`transform_of`: the linear that stores the one transform of all experts' inputs, if there is one."""
        self.stem, self.shared_owner = stem, transform_of
        self.linears = [StoredLinears(members, stores_transform=transform_of is None) for members in experts]
        first = self.linears[0].first
        for other in self.linears[1:]:
            kind, others = first.format.transform, other.first.format.transform
            if first.format.activation_bits != other.first.format.activation_bits:
                raise Apex4Error(
                    f"{first.name} and {other.first.name} have activations of {first.format.activation_bits} and "
                    f"{other.first.format.activation_bits} bits, and vLLM runs all experts of a layer alike: quantize them alike"
                )
            if (first.format.group_size, kind) != (other.first.format.group_size, others):
                raise Apex4Error(
                    f"{first.name} and {other.first.name} have group sizes {first.format.group_size} and "
                    f"{other.first.format.group_size} and transforms {kind} and {others}, and vLLM runs all experts of a "
                    "layer alike: quantize them alike"
                )
        self.transform_loaded = False
        self.format = first.format
        self.n, self.padded_k, self.group = self.linears[0].out_features, first.padded_k, first.format.group_length
        self.layout = first.format.layout.name
        self.clips = [linear.first.format.activation_clip for linear in self.linears]
        self.kernel: str | None = None
        self.activation_bits = self.format.activation_bits

    def register(self, layer: torch.nn.Module, loader: Any) -> None:
        count = len(self.linears)
        for part, (shape, dtype) in self.linears[0].shapes.items():
            self._register(layer, part, (count, *shape), dtype, loader)
        if self.shared_owner is not None:
            blocks = self.shared_owner.matrices.stop - self.shared_owner.matrices.start
            rows = self.format.transform.matrix_rows
            self._register(layer, "input_transform", (1, blocks, rows, BLOCK), torch.float16, loader)

    def _register(
        self, layer: torch.nn.Module, part: str, shape: tuple[int, ...], dtype: torch.dtype, loader: Any
    ) -> None:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader  # type: ignore[attr-defined]
        layer.register_parameter(f"{self.stem}_{part}", parameter)

    def tensor(self, layer: torch.nn.Module, part: str) -> torch.Tensor | None:
        found: torch.Tensor | None = getattr(layer, f"{self.stem}_{part}", None)
        return None if found is None else found.data

    def load(self, layer: torch.nn.Module, part: str, expert: int, shard: str, loaded: torch.Tensor) -> None:
        target = self.tensor(layer, part)
        linear = self.linears[expert]
        if target is None:
            raise Apex4Error(
                f"{linear.by_shard[shard].name}.{part} is in the checkpoint and config.json gives the linear none: they do "
                "not belong together"
            )
        linear.load(part, target[expert], loaded, shard)

    def load_shared_transform(self, layer: torch.nn.Module, loaded: torch.Tensor) -> None:
        target = self.tensor(layer, "input_transform")
        assert target is not None and self.shared_owner is not None
        StoredLinears([self.shared_owner]).load("input_transform", target[0], loaded, self.shared_owner.shard)
        self.transform_loaded = True

    def finish(self, layer: torch.nn.Module, dummy: bool) -> None:
        """Check what was loaded. Raises Apex4Error."""
        packed, scale = self.tensor(layer, "weight_packed"), self.tensor(layer, "weight_scale")
        matrix = self.tensor(layer, "input_transform")
        assert packed is not None and scale is not None
        for index, linear in enumerate(self.linears):
            own = None if matrix is None else matrix[0 if self.shared_owner is not None else index]
            if dummy:
                fill_randomly(linear, packed[index], scale[index], own)
            else:
                linear.require_complete()
                linear.require_legal(packed[index], scale[index], None if self.shared_owner is not None else own)
        if self.shared_owner is not None and not dummy and not self.transform_loaded:
            raise Apex4Error(
                f"the checkpoint has no tensor {self.shared_owner.name}.input_transform: it is incomplete, get it again"
            )

    def prepare(self, layer: torch.nn.Module, cached: bool, dtype: torch.dtype) -> None:
        """Replace the loaded tensors by the operands of the operators."""
        kernel = self.kernel
        if kernel == TOKEN_FORMAT:
            self.group, self.clips = self.padded_k, [1.0] * len(self.clips)
        packed, scale = self.tensor(layer, "weight_packed"), self.tensor(layer, "weight_scale")
        matrix = self.tensor(layer, "input_transform")
        assert packed is not None and scale is not None
        if matrix is not None:
            made = [
                kernel_matrix(each, kernel, self.activation_bits, self.padded_k, self.group, dtype) for each in matrix
            ]
            setattr(layer, f"{self.stem}_input_transform", constant(torch.stack(made)))
        if cached:
            floats = [
                linear.float_weight(packed[index], scale[index], self.activation_bits)
                for index, linear in enumerate(self.linears)
            ]
            setattr(layer, f"{self.stem}_float", constant(torch.stack([weight for weight, _ in floats])))
            scales = [one for _, one in floats if one is not None]
            setattr(layer, f"{self.stem}_float_scale", constant(torch.stack(scales)) if scales else None)
            return
        target = kernel or self.layout
        if target != self.layout or not self.linears[0].is_dense():
            whole: list[torch.Tensor | None] = []  # of all experts: weight_packed, weight_scale, weight_unit
            for index, linear in enumerate(self.linears):
                made_of_one = linear.kernel_operands(packed[index], scale[index], target)
                if index == 0:
                    count = len(self.linears)
                    whole = [None if one is None else one.new_empty((count, *one.shape)) for one in made_of_one]
                for of_all, one in zip(whole, made_of_one, strict=True):
                    if of_all is not None and one is not None:
                        of_all[index] = one
            new_packed, new_scale, unit = whole
            assert new_packed is not None and new_scale is not None
            packed, scale, self.layout = new_packed, new_scale, layout_of_format(target).name
            setattr(layer, f"{self.stem}_unit", None if unit is None else constant(unit))
        setattr(layer, f"{self.stem}_weight_packed", constant(packed))
        setattr(layer, f"{self.stem}_weight_scale", constant(scale))

    def operands(self, layer: torch.nn.Module, cached: bool) -> tuple[Any, ...]:
        """The arguments of torch.ops.apex4_vllm.experts that belong to this product."""
        weight = ("float", "float_scale") if cached else ("weight_packed", "weight_scale")
        return (
            getattr(layer, f"{self.stem}_{weight[0]}"),
            getattr(layer, f"{self.stem}_{weight[1]}"),
            getattr(layer, f"{self.stem}_unit", None),
            getattr(layer, f"{self.stem}_input_transform", None),
            self.n,
            self.padded_k,
            self.group,
            self.clips,
            self.format.transform is TransformKind.HADAMARD,
            self.activation_bits,
            "cached" if cached else f"kernel {self.kernel}" if self.kernel else f"packed {self.layout}",
        )

    def side(self, layer: torch.nn.Module, clip: float) -> tuple[Any, ...]:
        """The arguments of torch.ops.apex4.experts that belong to this product."""
        matrix = getattr(layer, f"{self.stem}_input_transform", None)
        return (
            getattr(layer, f"{self.stem}_weight_packed"),
            getattr(layer, f"{self.stem}_weight_scale"),
            getattr(layer, f"{self.stem}_unit", None),
            matrix if matrix is None or self.shared_owner is None else matrix[0],
            self.n,
            self.padded_k,
            clip,
            self.format.transform is TransformKind.HADAMARD,
        )


def why_one_after_the_other(entering: ExpertProducts, leaving: ExpertProducts, device: torch.device) -> str | None:
    """Why the experts of a layer are computed in a loop; None: they are computed together."""
    kernel = entering.kernel
    if kernel is None or kernel != leaving.kernel:
        return "kernels do not compute them" if kernel is None else "their activations have different formats"
    for product in (entering, leaving):
        blocks = 1 if kernel == TOKEN_FORMAT else product.group // BLOCK
        reason = why_none(cuda_ops.gpu(device.index or 0)[0], kernel, blocks)
        if reason is not None:
            return reason
    if len(set(entering.clips)) > 1:
        return "their gate and up projections have clip ratios of their own"
    if len(set(leaving.clips)) > 1 and leaving.format.transform is TransformKind.NONE:
        return "their down projections have clip ratios of their own and no transform"
    return None


class Apex4MoEMethod(FusedMoEMethodBase):
    """The method of the experts of one layer."""

    def __init__(self, fields: QuantConfig, budget: backend.FloatBudget, layer: RoutedExperts, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.fields, self.budget, self.prefix = fields, budget, names.stored_name(prefix)
        self.is_cached = False
        if layer.apply_router_weight_on_input:
            raise Apex4Error(
                f"the experts of {self.prefix} weigh their inputs, and apex4's plugin weighs outputs only: load the checkpoint with "
                "transformers"
            )
        if layer.moe_config.activation != MoEActivation.SILU:
            raise Apex4Error(
                f"the experts of {self.prefix} join gate and up by {layer.moe_config.activation.value}, and apex4's plugin computes "
                "SiLU(gate) * up only: load the checkpoint with transformers"
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        vllm = get_current_vllm_config()
        self.is_dummy = vllm.load_config.load_format == "dummy"
        self.dtype = params_dtype
        # Up to so many tokens a CUDA graph may be captured.
        self.most_captured = vllm.compilation_config.max_cudagraph_capture_size or 0
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        inner = intermediate_size_per_partition * ranks
        if layer.global_num_experts != self.moe.num_logical_experts:
            raise Apex4Error("apex4 has no redundant experts: serve without expert-parallel load balancing")

        def member(expert: int, name: str, shard: str, rows: int, features: int, down: bool) -> Member:
            full = f"{self.prefix}.{expert}.{name}"
            format = self.fields.linear_format(full, rows, features)
            cut_n, cut_k = ((0, 1), (rank, ranks)) if down else ((rank, ranks), (0, 1))
            return Member(
                full,
                format,
                shard,
                cut_rows(full, format, [Piece(0, rows)], *cut_n),
                cut_features(full, format, *cut_k),
            )

        def entering(expert: int) -> list[Member]:
            return [
                member(expert, name, shard, inner, hidden_size, False)
                for name, shard in ((PROJECTIONS[one], one) for one in ("w1", "w3"))
            ]

        ours = [
            expert
            for expert in range(layer.global_num_experts)
            if layer._map_global_expert_id_to_local_expert_id(expert) >= 0
        ]
        assert len(ours) == num_experts
        owner = next(
            (
                one
                for expert in range(layer.global_num_experts)
                for one in entering(expert)
                if one.format.transform_shape is not None
            ),
            None,
        )
        gate_up = [entering(expert) for expert in ours]
        self._require_one_input(gate_up, owner)
        self.gate_up = ExpertProducts("w13", gate_up, owner)
        self.down = ExpertProducts(
            "w2", [[member(expert, "down_proj", "w2", hidden_size, inner, True)] for expert in ours], None
        )
        for product in (self.gate_up, self.down):
            product.register(layer, self._loader(layer))
        # vLLM's own loaders take a tensor of three dimensions for one of all experts, and know their own quantizations.
        layer.load_weights = lambda weights: self._load(layer, weights)

    def _require_one_input(self, experts: list[list[Member]], owner: Member | None) -> None:
        for members in experts:
            for one in members:
                if one.format.transform.is_learned and (
                    owner is None or one.format.transform_from not in (None, owner.name)
                ):
                    raise Apex4Error(
                        f"{one.name} takes its transform from {one.format.transform_from}, which is not of this layer's "
                        "experts: the checkpoint cannot be served"
                    )
                if one.format.transform_shape is not None and owner is not None and one.name != owner.name:
                    raise Apex4Error(
                        f"{owner.name} and {one.name} read one input and have a transform each: quantize them alike"
                    )

    def _load(self, layer: RoutedExperts, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """`weights` have names like "3.w1.weight_packed" (Mixtral) or "3.gate_proj.weight_packed"."""
        shards = {
            layer.ckpt_gate_proj_name: "w1",
            layer.ckpt_down_proj_name: "w2",
            layer.ckpt_up_proj_name: "w3",
        }
        for name, loaded in weights:
            index, projection, part = name.split(".")
            shard = shards[projection]
            self._load_one(layer, int(index), shard, part, loaded)
            yield f"{'w2' if shard == 'w2' else 'w13'}_{part}"

    def _load_one(self, layer: RoutedExperts, expert: int, shard: str, part: str, loaded: torch.Tensor) -> bool:
        """A tensor of the linear `shard` ("w1": gate, "w3": up, "w2": down) of an expert; False: another rank's."""
        product = self.down if shard == "w2" else self.gate_up
        linear = f"{self.prefix}.{expert}.{PROJECTIONS[shard]}"
        if part not in PARTS:
            raise Apex4Error(f"{linear}.{part} is not quantized and config.json says that it is: get it again")
        if part == "input_transform" and product.shared_owner is not None:
            if product.shared_owner.name != linear:
                raise Apex4Error(
                    f"{linear}.{part} is in the checkpoint and config.json gives the linear none: they do not belong together"
                )
            product.load_shared_transform(layer, loaded)
            return True
        local = layer._map_global_expert_id_to_local_expert_id(expert)
        if local < 0:
            return False
        product.load(layer, part, local, shard, loaded)
        return True

    def _loader(self, layer: RoutedExperts) -> Callable[..., bool | None]:
        """What models of vLLM call that load experts tensor by tensor (DeepSeek's), for a parameter of `_register`."""

        def load(
            parameter: torch.nn.Parameter,
            loaded: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            part = weight_name.rpartition(".")[2].removeprefix("w13_").removeprefix("w2_")
            found = self._load_one(layer, expert_id, shard_id, part, loaded)
            return found if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and make it what the device computes with. Raises Apex4Error."""
        products = self.gate_up, self.down
        for product in products:
            product.finish(layer, self.is_dummy)
        device = layer.w13_weight_packed.device
        for product in products:
            product.kernel, product.activation_bits = backend.arithmetic_of(device, self.dtype, product.format)
        size = sum(4 * len(product.linears) * product.n * product.padded_k for product in products)
        self.is_cached = device.type == "cpu" and self.budget.take(size)
        for product in products:
            product.prepare(layer, self.is_cached, self.dtype)
        reason = why_one_after_the_other(*products, device)
        self.together = None if reason is not None else self._together(layer, device)
        if self.together is None:
            self.operands = (*self.gate_up.operands(layer, self.is_cached), *self.down.operands(layer, self.is_cached))
            logger.info_once("apex4 computes experts one after the other on %s: %s", device.type, reason)

    def _together(self, layer: Any, device: torch.device) -> tuple[Any, ...]:
        """The arguments of torch.ops.apex4.experts behind expert_map."""
        clips, factors = self.down.clips, None
        if len(set(clips)) > 1:
            factors = torch.tensor([clip / CODE_MAX for clip in clips], dtype=torch.float32, device=device)
            signs(device.index or 0, self.dtype)  # which may not be made while a graph is captured
        entering, leaving = self.gate_up.side(layer, self.gate_up.clips[0]), self.down.side(layer, clips[0])
        return *entering, *leaving, factors, self.gate_up.kernel

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, H], topk_weights and topk_ids [T, k] -> the weighted sum of this rank's experts [T, H]."""
        y: torch.Tensor
        if self.together is not None:
            ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int32)
            y = expert_ops.experts(x, ids, topk_weights, layer.expert_map, *self.together)
            return y
        y = torch.ops.apex4_vllm.experts(
            x, topk_weights, topk_ids, layer.expert_map, *self.operands, self.most_captured
        )
        return y


_SCHEMA = (
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    + ", ".join(
        f"Tensor {p}_weight, Tensor? {p}_scale, Tensor? {p}_unit, Tensor? {p}_matrix, int {p}_n, int {p}_k, int {p}_group, "
        f"float[] {p}_clips, bool {p}_hadamard, int {p}_bits, str {p}_how"
        for p in ("in", "out")
    )
    + ", int most_captured) -> Tensor"
)
backend.library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("apex4_vllm::experts", lib=backend.library)
def _(x: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(x)


class _Product:
    """One product of all experts: the arguments of the operator that begin with `in_` or `out_`."""

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        unit: torch.Tensor | None,
        matrix: torch.Tensor | None,
        n: int,
        k: int,
        group: int,
        clips: list[float],
        hadamard: bool,
        bits: int,
        how: str,
    ) -> None:
        self.kind, _, self.layout = how.partition(" ")  # of a kernel, the format of the activations
        self.weight, self.scale, self.unit, self.matrix = weight, scale, unit, matrix
        self.n, self.k, self.group, self.clips, self.hadamard, self.bits = n, k, group, clips, hadamard, bits

    def _matrix(self, expert: int) -> torch.Tensor | None:
        # One matrix where all experts read one input.
        return None if self.matrix is None else self.matrix[expert if len(self.matrix) > 1 else 0]

    def _scale(self, expert: int) -> torch.Tensor | None:
        return None if self.scale is None else self.scale[expert]

    def _unit(self, expert: int) -> torch.Tensor | None:
        return None if self.unit is None else self.unit[expert]

    def how(self, expert: int) -> tuple[Any, ...]:
        return self._matrix(expert), self.k, self.group, self.clips[expert], self.hadamard, self.layout

    def __call__(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        weight, scale = self.weight[expert], self._scale(expert)
        if self.kind == "kernel":
            y: torch.Tensor = torch.ops.apex4.linear(
                x, weight, scale, self._unit(expert), None, self.n, *self.how(expert)
            )
            return y
        last = None, self._matrix(expert), self.clips[expert], self.hadamard, self.bits
        if self.kind == "cached":
            return backend.cached_linear(x, weight, scale, *last)
        assert scale is not None
        return backend.packed_linear(x, weight, scale, self.n, self.layout, *last)

    def of_gated(self, both: torch.Tensor, expert: int) -> torch.Tensor:
        """y of SiLU(gate) * up, where `both` [T, 2 K] is gate, up."""
        gate, up = both.chunk(2, -1)
        if self.kind != "kernel":
            return self(torch.nn.functional.silu(gate) * up, expert)
        y: torch.Tensor = torch.ops.apex4.silu_mul_linear(
            gate, up, self.weight[expert], self._scale(expert), self._unit(expert), None, self.n, *self.how(expert)
        )
        return y


def _experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    *arguments: Any,
) -> torch.Tensor:
    *products, most_captured = arguments
    entering, leaving = _Product(*products[: len(products) // 2]), _Product(*products[len(products) // 2 :])
    local = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    count = len(entering.weight)
    if x.device.type == "cuda" and len(x) <= most_captured:
        for expert in range(count):
            weight = (topk_weights * (local == expert)).sum(-1, keepdim=True)
            total += leaving.of_gated(entering(x, expert), expert) * weight
        return total.to(x.dtype)
    for expert in local.unique().tolist():
        if expert < 0:
            continue  # of another rank
        tokens, places = torch.where(local == expert)
        y = leaving.of_gated(entering(x[tokens], expert), expert)
        total.index_add_(0, tokens, (y * topk_weights[tokens, places, None]).float())
    return total.to(x.dtype)


for _device in ("CPU", "CUDA"):
    backend.library.impl("experts", _experts, _device)
