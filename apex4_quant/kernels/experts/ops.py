"""torch.ops.apex4.experts: the experts of a layer, from its input and the router's choice to the weighted sum.

    y[t] = sum_j topk_weights[t, j] down_e(SiLU(gate_e(x[t])) * up_e(x[t])),   e = topk_ids[t, j]

All shapes follow from those of x and topk_ids: nothing waits for the GPU, CUDA graphs and torch.compile take it as it is. The
launches, each for all experts (nothing is moved into the order of experts or out of it):

    route       choices sorted by expert, and cut into tiles (cuda/experts/route.cu)
    quantize    x, once per token: gate and up projections of all experts read one tensor, with one transform and one clip
    GEMM        gate and up; tiles read their tokens' rows by the router's table, y is in the order of experts
    quantize    SiLU(gate) * up, once per choice; if every expert has a transform or a clip of its own, by tiles of the table
    GEMM        down; rows of y are choices again
    combine     the sum over a token's choices, in their order and in float32: the same bits every time

Operands: x [T, in_k or fewer], topk_ids int32 or int64 [T, k], topk_weights [T, k], expert_map int32 [all experts] or None: the
number of an expert here, negative if another GPU has it. `in_`: gate rows, then up rows, of E experts: weight_packed
[E, tiles, in_k / 128, 4096], weight_scale and weight_unit as operands.py has them, [E, ...]; in_n = 2 inner. `out_`: the same of
the down projections. in_matrix as the operators of ops.py take it. out_matrix: on a GPU [E, out_k / 128 or 1, 16384], prepacked, else
[E, out_k / 128, 128, 128]; with error feedback [E, out_k / 128, 23552], else [E, out_k / 128, 184, 128], and with sixteen levels 23680
or 185. out_clip_factors float32 [E]: clip / 7 of each expert, in the place of out_clip.
Groups are of 128 with 4-bit activations.
"""

from __future__ import annotations

from ctypes import c_float, c_int
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from ...errors import Apex4Error
from ...format.number_format import BLOCK, CODE_MAX
from ...private_names import current_cuda_stream
from .. import cpu_ops, cuda_ops
from ..operands import HALVES, MATRIX_ROWS, ROW_BYTES, TOKEN_FORMAT, feedback_of_matrix, row_stride
from ..quantize.configs import DENSE_THREADS, measuring_config
from ..quantize.hadamard_product import signs
from ..quantize.launch import chunks_of_block, rows_are_aligned
from ..runtime import launcher, workspace
from ..runtime.launcher import Launch
from .configs import (
    COMBINE_COLUMNS,
    ROUTE_THREADS,
    SMALL_TILE,
    choose_experts,
    combine_config,
    most_tiles,
    quantizer_config,
    route_config,
    why_none,
)

MOST_CHOICES = 65536  # that are computed at once: bounds the memory of what stands between the products
_ALIGNMENT = 256

_SIDE = "Tensor {0}_packed, Tensor {0}_scale, Tensor? {0}_unit, Tensor? {0}_matrix, int {0}_n, int {0}_k, float {0}_clip, bool {0}_hadamard"
_SCHEMA = (
    f"(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor? expert_map, {_SIDE.format('in')}, {_SIDE.format('out')}, "
    "Tensor? out_clip_factors, str format) -> Tensor"
)


class Product(NamedTuple):
    """One of the two products of all experts: the operator's arguments `in_` or `out_`."""

    packed: torch.Tensor
    scale: torch.Tensor
    unit: torch.Tensor | None
    matrix: torch.Tensor | None
    n: int
    k: int
    clip: float
    hadamard: bool

    @property
    def blocks_per_group(self) -> int:
        return self.packed.shape[2] // self.scale.shape[2]

    def quantization(self, format: str) -> tuple[int, int, float, bool, str]:
        """The last arguments of the operators of ops.py."""
        return self.k, self.k if format == TOKEN_FORMAT else BLOCK, self.clip, self.hadamard, format

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, None, int]:
        """The weights as the operators of ops.py take them."""
        return self.packed[expert], self.scale[expert], None if self.unit is None else self.unit[expert], None, self.n


_Arguments: TypeAlias = tuple[Product, Product, torch.Tensor | None, str]


def _split(arguments: tuple[Any, ...]) -> _Arguments:
    return Product(*arguments[:8]), Product(*arguments[8:16]), arguments[16], arguments[17]


# ---- what is asked of the operands -----------------------------------------------------------------------------------


def _require(condition: bool, what: str, got: object, needed: str) -> None:
    if not condition:
        shown = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else got
        raise Apex4Error(f"apex4.experts: {what} is {shown}, and {needed} is needed")


def _require_operands(
    kernels: bool, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None,
    arguments: _Arguments,
) -> None:  # fmt: skip
    entering, leaving, factors, format = arguments
    _require(format in (TOKEN_FORMAT, "sm80"), "format", repr(format), f"{TOKEN_FORMAT} or sm80")
    _require(x.dim() == 2 and x.shape[1] <= entering.k, "x", x, f"[T, at most {entering.k}]")
    _require(not kernels or x.dtype in HALVES, "x's dtype", x.dtype, "bfloat16 or float16")
    _require(ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64), "topk_ids", ids, "int32 or int64 [T, k]")
    _require(len(ids) == len(x) and weights.shape == ids.shape, "topk_weights", weights, f"[{len(x)}, k] as topk_ids")
    if expert_map is not None:
        _require(expert_map.dim() == 1 and expert_map.dtype == torch.int32, "expert_map", expert_map, "int32 [experts]")
    _require(entering.n % 2 == 0, "in_n", entering.n, "an even number")
    _require(entering.n // 2 <= leaving.k, "out_k", leaving.k, f"at least the {entering.n // 2} features of up")
    experts = len(entering.packed)
    for name, product in (("in", entering), ("out", leaving)):
        packed, blocks = product.packed, product.k // BLOCK
        tiles = packed.shape[1] if packed.dim() == 4 else 0
        fits = packed.shape == (experts, tiles, blocks, 4096) and packed.dtype == torch.uint8 and packed.is_contiguous()
        _require(fits and product.k % BLOCK == 0, f"{name}_packed", packed, f"uint8 [{experts}, tiles, {blocks}, 4096]")
        _require(0 < product.n <= 64 * tiles, f"{name}_n", product.n, f"1 to the {64 * tiles} outputs of {name}_packed")
        scale, dtype = product.scale, torch.int16 if format == TOKEN_FORMAT else torch.float16
        groups = scale.shape[2] if scale.dim() == 4 else 0
        fits = scale.shape == (experts, tiles, groups, 64) and scale.dtype == dtype and scale.is_contiguous()
        fits &= groups > 0 and blocks % groups == 0 and (format == TOKEN_FORMAT or groups == blocks)
        _require(fits, f"{name}_scale", scale, f"{dtype} [{experts}, {tiles}, groups, 64]")
        unit = product.unit
        if format == TOKEN_FORMAT:
            fits = unit is not None and unit.shape == (experts, 64 * tiles) and unit.dtype == torch.float32
            _require(fits and unit.is_contiguous(), f"{name}_unit", unit, f"float32 [{experts}, {64 * tiles}]")  # type: ignore[union-attr]
        else:
            _require(unit is None, f"{name}_unit", unit, f"None with the format {format}")
        for tensor in (packed, scale, unit):
            _require(
                tensor is None or tensor.get_device() == x.get_device(), f"a tensor of {name}_", tensor, "x's device"
            )
    matrix = leaving.matrix
    if matrix is not None:
        blocks = leaving.k // BLOCK
        fits = len(matrix) == experts and matrix.is_contiguous()
        rows = MATRIX_ROWS if format != TOKEN_FORMAT else MATRIX_ROWS[:1]
        if kernels:
            shapes = [(1, BLOCK * BLOCK), *((blocks, each * BLOCK) for each in rows)]
            fits &= matrix.dtype == x.dtype and matrix.shape[1:] in shapes
        else:
            fits &= matrix.shape[1:] in [(blocks, each, BLOCK) for each in rows]
        _require(fits, "out_matrix", matrix, f"a matrix for each of {experts} experts")
    if factors is not None:
        fits = factors.shape == (experts,) and factors.dtype == torch.float32 and format != TOKEN_FORMAT
        _require(fits, "out_clip_factors", factors, f"float32 [{experts}] with 4-bit activations, and None with 8")
        _require(leaving.hadamard or matrix is not None, "out_matrix", matrix, "a transform with out_clip_factors")


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def _fake(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    arguments = _split(rest)
    _require_operands(x.is_cuda, x, ids, weights, expert_map, arguments)
    return x.new_empty((x.shape[0], arguments[1].n))


def _local(ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int) -> torch.Tensor:
    """The experts' numbers here, int64 [T, k]; -1 where one is not here."""
    everywhere = experts if expert_map is None else len(expert_map)
    known = (ids >= 0) & (ids < everywhere)
    local = ids.long().clamp(0, everywhere - 1)
    if expert_map is not None:
        local = expert_map.long()[local]
    return torch.where(known & (local >= 0) & (local < experts), local, -1)


def _on_cpu(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    arguments = entering, leaving, factors, format = _split(rest)
    _require_operands(False, x, ids, weights, expert_map, arguments)
    local = _local(ids, expert_map, len(entering.packed))
    outputs = x.new_zeros((*ids.shape, leaving.n))
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        tokens, places = torch.where(local == expert)
        both = cpu_ops.linear(x[tokens], *entering.of_expert(expert), entering.matrix, *entering.quantization(format))
        gate, up = both.chunk(2, -1)
        own = leaving if factors is None else leaving._replace(clip=CODE_MAX * float(factors[expert]))
        matrix = None if own.matrix is None else own.matrix[expert]
        outputs[tokens, places] = cpu_ops.silu_mul_linear(
            gate, up, *own.of_expert(expert), matrix, *own.quantization(format)
        )
    total = torch.zeros((len(x), leaving.n), dtype=torch.float32)
    for place in range(ids.shape[1]):
        total.addcmul_(outputs[:, place].float(), weights[:, place, None].float())
    return total.to(x.dtype)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """All that the launches of a layer depend on but pointers."""

    device: int
    sm: int
    sm_count: int
    tokens: int
    top_k: int
    experts: int
    all_experts: int
    in_n: int
    in_blocks: int
    in_blocks_per_group: int
    out_n: int
    out_blocks: int
    out_blocks_per_group: int
    id_words: int
    dtype: torch.dtype
    format: str
    own_quantizers: bool  # a transform or a clip for each expert
    expert_matrices: int  # of an expert; 0: all share one
    feedback: str  # behind each of them
    clip: float


@dataclass(frozen=True)
class _Layer:
    """The launches of one layer, and where in its memory things lie."""

    route: Launch
    enter: Launch
    quantize: Launch | None  # of tiles of experts
    measure: Launch | None
    leave: Launch
    combine: Launch
    enter_counters: int  # bytes
    leave_counters: int
    size: int
    places: dict[str, int]


def _layer(shape: _Shape) -> _Layer:
    return _made_layer(launcher.kernel, shape)


@lru_cache(maxsize=1024)
def _made_layer(kernel: Any, shape: _Shape) -> _Layer:
    short, long = ("bf16", "bfloat16") if shape.dtype == torch.bfloat16 else ("fp16", "float16")
    choices, experts, format = shape.tokens * shape.top_k, shape.experts, shape.format
    enter, leave = choose_experts(
        shape.sm, shape.sm_count, choices, experts,
        ((shape.in_n, shape.in_blocks), (shape.out_n, shape.out_blocks)), format, short,
    )  # fmt: skip
    small_tiles = most_tiles(choices, experts, SMALL_TILE)
    in_stride, out_stride = row_stride(shape.tokens), row_stride(choices)
    eight_bit = format == TOKEN_FORMAT
    groups = 1 if eight_bit else shape.out_blocks
    sizes = {
        "rows": 4 * choices,
        "tiles": 16 * enter.tiles_m,
        "small_tiles": 16 * small_tiles if shape.own_quantizers else 0,
        "between": 2 * choices * shape.in_n,
        "codes": shape.out_blocks * out_stride * ROW_BYTES[format] if shape.own_quantizers else 0,
        "scales": 4 * groups * out_stride if shape.own_quantizers else 0,
        "absmax": 4 * shape.out_blocks * out_stride if shape.own_quantizers and eight_bit else 0,
        "outputs": 2 * choices * shape.out_n,
        "partial": 4 * max(enter.workspace_words, leave.workspace_words),
    }
    places, size = {}, 0
    for name, needed in sizes.items():
        places[name] = size
        size += -(-needed // _ALIGNMENT) * _ALIGNMENT

    def bind(
        config: Any, grid: tuple[int, int, int], block: int, pointers: int, *numbers: float, shared: int = 0
    ) -> Launch:
        made = kernel(config.source, config.entry, config.defines, shape.device)
        values = [c_float(each) if isinstance(each, float) else c_int(each) for each in numbers]
        launch: Launch = made.bind(grid, block, pointers, values, shared_bytes=shared, programmatic=shape.sm >= 90)
        return launch

    routing = shape.id_words, shape.all_experts, experts
    route = bind(
        route_config(), (experts, 1, 1), ROUTE_THREADS, 5,
        choices, *routing, enter.config.tile_m, enter.tiles_m, SMALL_TILE, small_tiles, shared=4 * experts,
    )  # fmt: skip
    products = []
    for plan, blocks, per_group, stride, divisor in (
        (enter, shape.in_blocks, shape.in_blocks_per_group, in_stride, shape.top_k),
        (leave, shape.out_blocks, shape.out_blocks_per_group, out_stride, 1),
    ):
        products.append(
            bind(
                plan.config,
                plan.grid,
                plan.config.threads,
                12 if eight_bit else 11,
                plan.m,
                plan.n,
                blocks,
                per_group,
                stride,
                plan.n,
                plan.splits,
                divisor,
                shared=plan.config.shared_bytes,
            )
        )
    quantize = measure = None
    if shape.own_quantizers:
        inner = shape.in_n // 2
        aligned = rows_are_aligned(inner, (0, shape.in_n))
        shared_matrix = shape.expert_matrices == 0
        chunks = chunks_of_block(shape.feedback)
        numbers = (
            choices, inner, out_stride, shape.in_n, shape.in_n, SMALL_TILE,
            0 if shape.expert_matrices <= 1 else chunks, BLOCK**-0.5 if shared_matrix else 1.0,
            shape.clip / CODE_MAX, 0.0, 0, int(aligned), shape.expert_matrices * chunks,
        )  # fmt: skip
        config = quantizer_config(long, format, shape.feedback)
        grid = shape.out_blocks, small_tiles, 1
        quantize = bind(config, grid, DENSE_THREADS, 9 if eight_bit else 8, *numbers)
        if eight_bit:
            measure = bind(measuring_config(config), grid, DENSE_THREADS, 9, *numbers)
    combine = bind(
        combine_config(short), (shape.tokens, -(-shape.out_n // COMBINE_COLUMNS), 1), 128, 5,
        shape.top_k, shape.out_n, *routing, int(shape.out_n % 8 == 0),
    )  # fmt: skip
    return _Layer(
        route, products[0], quantize, measure, products[1], combine,
        4 * enter.counters if enter.splits > 1 else 0, 4 * leave.counters if leave.splits > 1 else 0, size, places,
    )  # fmt: skip


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_gpu(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    arguments = _split(rest)
    _require_operands(True, x, ids, weights, expert_map, arguments)
    y = torch.empty((x.shape[0], arguments[1].n), dtype=x.dtype, device=x.device)
    ids, weights = ids.contiguous(), weights.float().contiguous()
    at_once = max(1, MOST_CHOICES // ids.shape[1])
    for start in range(0, len(x), at_once):
        some = slice(start, start + at_once)
        _compute(y[some], x[some], ids[some], weights[some], expert_map, arguments)
    return y


def _compute(
    y: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None,
    arguments: _Arguments,
) -> None:  # fmt: skip
    entering, leaving, factors, format = arguments
    index = x.get_device()
    sm, sm_count = cuda_ops.gpu(index)
    for product in (entering, leaving):
        reason = why_none(80 if sm == 90 and format == "sm80" else sm, format, product.blocks_per_group)
        if reason is not None:
            raise Apex4Error(f"apex4.experts: {reason}")
    own_quantizers = leaving.matrix is not None or factors is not None
    matrix, matrices = leaving.matrix, 0
    if own_quantizers and matrix is None:
        matrix = signs(index, x.dtype)
        if matrix is None:
            raise Apex4Error("apex4.experts: run the model once before a CUDA graph is captured")
    elif matrix is not None:
        matrices = matrix.shape[1]
    experts = len(entering.packed)
    layer = _layer(
        _Shape(
            index, sm, sm_count, len(x), ids.shape[1], experts, experts if expert_map is None else len(expert_map),
            entering.n, entering.k // BLOCK, entering.blocks_per_group, leaving.n, leaving.k // BLOCK,
            leaving.blocks_per_group, 2 if ids.dtype == torch.int64 else 1, x.dtype, format, own_quantizers, matrices,
            feedback_of_matrix(leaving.matrix), leaving.clip,
        )
    )  # fmt: skip
    stream = current_cuda_stream(index)
    memory = torch.empty(layer.size, dtype=torch.uint8, device=x.device)
    start = memory.data_ptr()
    at = {name: start + place for name, place in layer.places.items()}
    routing = ids.data_ptr(), _address(expert_map)
    tiles, rows = at["tiles"], at["rows"]
    layer.route(stream, rows, tiles, at["small_tiles"] if own_quantizers else 0, *routing)

    counters = max(layer.enter_counters, layer.leave_counters)
    counter = workspace.counters(index, stream, counters).data_ptr() if counters else 0

    def weights_of(product: Product) -> list[int]:
        units = [] if product.unit is None else [product.unit.data_ptr()]
        return [product.packed.data_ptr(), product.scale.data_ptr(), *units, 0]

    codes, scales = cuda_ops.quantize(x, entering.matrix, *entering.quantization(format))
    layer.enter(
        stream, at["between"], codes.data_ptr(), scales.data_ptr(), *weights_of(entering), at["partial"], counter, tiles,
        rows, 0,
    )  # fmt: skip
    inner = entering.n // 2
    if layer.quantize is None:
        first = layer.places["between"]
        both = memory[first : first + 2 * ids.numel() * entering.n].view(x.dtype).view(ids.numel(), entering.n)
        made = cuda_ops.silu_mul_quantize(both[:, :inner], both[:, inner:], None, *leaving.quantization(format))
        inner_codes, inner_scales = made[0].data_ptr(), made[1].data_ptr()
    else:
        inner_codes, inner_scales = at["codes"], at["scales"]
        gate, up = at["between"], at["between"] + 2 * inner
        behind = at["small_tiles"], _address(factors)
        if layer.measure is None:
            layer.quantize(stream, inner_codes, inner_scales, gate, up, 0, _address(matrix), *behind)
        else:
            absmax = at["absmax"]
            layer.measure(stream, 0, absmax, gate, up, 0, _address(matrix), 0, *behind)
            layer.quantize(stream, inner_codes, inner_scales, gate, up, 0, _address(matrix), absmax, *behind)
    layer.leave(
        stream, at["outputs"], inner_codes, inner_scales, *weights_of(leaving), at["partial"], counter, tiles, 0, rows
    )
    layer.combine(stream, y.data_ptr(), at["outputs"], weights.data_ptr(), *routing)


_library = torch.library.Library("apex4", "FRAGMENT")
_library.define(f"experts{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("apex4::experts", _fake, lib=_library)
_library.impl("experts", _on_cpu, "CPU")
_library.impl("experts", _on_gpu, "CUDA")
experts = torch.ops.apex4.experts.default
