"""Linear layers of vLLM in W4A4: their parameters, what becomes of them after loading, and the call of the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
)
from vllm.model_executor.parameter import BasevLLMParameter

from ...errors import Apex4Error
from ...format.feedback import block_clips_of, transform_of
from ...format.number_format import BITS, BLOCK, CODE_MAX
from ...format.quant_config import QuantConfig
from ...format.transform_kind import TransformKind
from ...kernels.operands import TOKEN_FORMAT, layout_of_format
from ...kernels.quantize.configs import prepack_matrix
from . import backend
from .slices import Piece, cut_features, cut_rows
from .stored import Member, ShardId, StoredLinears

logger = init_logger("vllm.apex4")  # vLLM prints what is logged below its own name


def pieces_of(layer: LinearBase) -> list[tuple[ShardId, int, int | None]]:
    """What the layer consists of: (vLLM's name of the part, output features on all ranks, key/value heads or None)."""
    if isinstance(layer, QKVParallelLinear):
        heads = layer.total_num_kv_heads
        return [
            ("q", layer.total_num_heads * layer.head_size, None),
            ("k", heads * layer.head_size, heads),
            ("v", heads * layer.v_head_size, heads),
        ]
    if isinstance(layer, MergedColumnParallelLinear):
        return [(index, size, None) for index, size in enumerate(layer.output_sizes)]
    return [(None, layer.output_size, None)]


def members_of(fields: QuantConfig, layer: LinearBase, names: Sequence[str], cut_k: bool, cut_n: bool) -> list[Member]:
    """The linears of the checkpoint that `layer` runs, with the parts that this rank computes. Raises Apex4Error."""
    parts = pieces_of(layer)
    rank, ranks = layer.tp_rank, layer.tp_size
    rank_n, ranks_n = (rank, ranks) if cut_n else (0, 1)
    rank_k, ranks_k = (rank, ranks) if cut_k else (0, 1)
    if len(names) == len(parts):
        stored = [
            (name, shard, [Piece(0, rows, heads)]) for name, (shard, rows, heads) in zip(names, parts, strict=True)
        ]
    elif len(names) == 1:  # the model's own class has it in one linear (Phi-3)
        pieces, start = [], 0
        for _, rows, heads in parts:
            pieces.append(Piece(start, rows, heads))
            start += rows
        stored = [(names[0], None, pieces)]
    else:
        raise Apex4Error(f"vLLM runs {', '.join(names)} in one layer of {len(parts)} parts, which apex4 does not know")
    members = []
    for name, shard, pieces in stored:
        format = fields.linear_format(name, sum(piece.rows for piece in pieces), layer.input_size)
        ranges = cut_rows(name, format, pieces, rank_n, ranks_n)
        members.append(Member(name, format, shard, ranges, cut_features(name, format, rank_k, ranks_k)))
    return members


class Apex4LinearMethod(LinearMethodBase):
    """The method of one layer: the numbers that `apply` needs are attributes, the tensors are the layer's.

    After loading the layer has
        weight_packed  uint8   in the layout of the kernels, or as stored where PyTorch operations compute
        weight_scale   float16 likewise; for kernels of 8-bit activations the ratio, int16
        apex4_unit     float32, for kernels of 8-bit activations, or None
        apex4_bias     float32 [N] or None
        apex4_matrix   the learned transform as the operator reads it, or None
        apex4_weight, apex4_weight_scale   what a CPU computes with, where that is kept
    """

    def __init__(self, fields: QuantConfig, budget: backend.FloatBudget, names: Sequence[str]) -> None:
        self.fields, self.budget, self.names = fields, budget, tuple(names)
        self.kernel: str | None = None
        self.activation_bits = BITS  # of the computation
        self.is_cached = False

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        assert isinstance(layer, LinearBase)
        cut_k = input_size_per_partition != input_size
        cut_n = layer.tp_size > 1 and sum(output_partition_sizes) != output_size
        members = members_of(self.fields, layer, self.names, cut_k, cut_n)
        self.stored = StoredLinears(members)
        assert self.stored.out_features == sum(output_partition_sizes)
        self.is_dummy = get_current_vllm_config().load_config.load_format == "dummy"
        self.dtype = params_dtype
        first = self.stored.first
        self.n, self.layout = self.stored.out_features, first.format.layout.name
        self.padded_k, self.group = first.padded_k, first.format.group_length
        self.clip = first.format.activation_clip
        self.transform = first.format.transform
        self.hadamard = self.transform is TransformKind.HADAMARD
        for part, (shape, dtype) in self.stored.shapes.items():
            data = torch.empty(shape, dtype=dtype)
            parameter = BasevLLMParameter(data=data, weight_loader=self._loader(part))
            layer.register_parameter(part, parameter)

    def _loader(self, part: str) -> Callable[..., None]:
        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor, shard: ShardId = None) -> None:
            self.stored.load(part, parameter.data, loaded, shard)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and make it what the device computes with. Raises Apex4Error."""
        matrix = getattr(layer, "input_transform", None)
        if self.is_dummy:
            fill_randomly(self.stored, layer.weight_packed.data, layer.weight_scale.data, matrix)
        else:
            self.stored.require_complete()
            self.stored.require_legal(layer.weight_packed.data, layer.weight_scale.data, matrix)
        device = layer.weight_packed.device
        self.kernel, self.activation_bits = backend.arithmetic_of(device, self.dtype, self.stored.first.format)
        layer.apex4_unit = None
        layer.apex4_bias = None if layer.bias is None else constant(layer.bias.float())
        layer.apex4_matrix = (
            None
            if matrix is None
            else constant(
                kernel_matrix(matrix.data, self.kernel, self.activation_bits, self.padded_k, self.group, self.dtype)
            )
        )
        if matrix is not None:
            del layer.input_transform
        if self.kernel == TOKEN_FORMAT:
            self.group, self.clip = self.padded_k, 1.0
        if self.kernel is not None:
            self._pack(layer, self.kernel)
            logger.info_once(
                "apex4 computes with its %s kernels, %d-bit activations", self.kernel, self.activation_bits
            )
        else:
            self._keep_floats(layer, device)
            logger.info_once(
                "apex4 computes with PyTorch operations on %s: exact, and slow for large models", device.type
            )

    def _pack(self, layer: Any, format: str) -> None:
        """Put the rows of all members one behind the other, as activations of this format want them, or in this layout."""
        if format == self.layout and self.stored.is_dense():
            layer.weight_packed = constant(layer.weight_packed.data)
            layer.weight_scale = constant(layer.weight_scale.data)
            return
        packed, scale, unit = self.stored.kernel_operands(layer.weight_packed.data, layer.weight_scale.data, format)
        layer.weight_packed, layer.weight_scale = constant(packed), constant(scale)
        layer.apex4_unit = None if unit is None else constant(unit)
        self.layout = layout_of_format(format).name

    def _keep_floats(self, layer: Any, device: torch.device) -> None:
        """For PyTorch operations: on a CPU the weights as float32, if there is room."""
        self.is_cached = device.type == "cpu" and self.budget.take(4 * self.n * self.padded_k)
        if self.is_cached:
            tensors = layer.weight_packed.data, layer.weight_scale.data
            weight, scale = self.stored.float_weight(*tensors, self.activation_bits)
            layer.apex4_weight = constant(weight)
            layer.apex4_weight_scale = None if scale is None else constant(scale)
            layer.weight_packed = constant(layer.weight_packed.data)
            layer.weight_scale = constant(layer.weight_scale.data)
        else:
            if device.type == "cpu":
                logger.warning_once("apex4: the weights as float32 would take too much memory; unpacked at every call")
            self._pack(layer, self.layout)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N]; `bias` is the layer's or None (another rank adds it, or vLLM later)."""
        rows = x.reshape(-1, x.shape[-1])
        added = None if bias is None else layer.apex4_bias
        if self.kernel is not None:
            y = torch.ops.apex4.linear(
                rows, layer.weight_packed, layer.weight_scale, layer.apex4_unit, added, self.n, layer.apex4_matrix,
                self.padded_k, self.group, self.clip, self.hadamard, self.kernel,
            )  # fmt: skip
        elif self.is_cached:
            y = torch.ops.apex4_vllm.cached_linear(
                rows, layer.apex4_weight, layer.apex4_weight_scale, added, layer.apex4_matrix, self.clip, self.hadamard,
                self.activation_bits,
            )  # fmt: skip
        else:
            y = torch.ops.apex4_vllm.packed_linear(
                rows, layer.weight_packed, layer.weight_scale, self.n, self.layout, added, layer.apex4_matrix, self.clip,
                self.hadamard, self.activation_bits,
            )  # fmt: skip
        output: torch.Tensor = y.view(*x.shape[:-1], self.n)
        return output


def constant(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)


def kernel_matrix(
    matrix: torch.Tensor, kernel: str | None, activation_bits: int, padded_k: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """A learned transform, float16 as stored, as the operator that computes reads it: with its error feedback, if there is any and
    activations have 4 bits."""
    if activation_bits != BITS:
        matrix = transform_of(matrix)
    if kernel is not None and (group == BLOCK or kernel == TOKEN_FORMAT) and matrix.device.type == "cuda":
        return prepack_matrix(matrix, dtype)
    matrix = matrix.expand(padded_k // BLOCK, -1, -1).contiguous()
    return matrix if kernel is not None else matrix.float()


def fill_randomly(
    stored: StoredLinears, packed: torch.Tensor, scale: torch.Tensor, matrix: torch.Tensor | None
) -> None:
    """Legal tensors for vLLM's `--load-format dummy`: speed does not depend on what they are."""
    if matrix is not None:
        matrix.data.copy_(torch.randn_like(matrix.data, dtype=torch.float32) * BLOCK**-0.5)
        clips = block_clips_of(matrix.data.flatten(0, -3))
        if clips is not None:
            clips.fill_(1.0)
    layout = stored.first.format.layout
    shape = len(packed) * layout.tile_n, stored.first.padded_k
    packed.copy_(layout.pack(torch.randint(-CODE_MAX, CODE_MAX + 1, shape, dtype=torch.int8, device=packed.device)))
    scale.fill_(0.005)  # of weights with a standard deviation of 0.02
