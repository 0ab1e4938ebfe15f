"""`apex4 bench`: W4A4 linears of real models on this GPU, beside cuBLAS BF16, FP8 and Humming, one row a shape and M.

What is timed (`CONTENDERS`): `apex4` is the GEMM alone, on codes; `apex4+q` the activation quantizer with its Hadamard
transform, then the GEMM: what replaces a BF16 linear, and what speed-ups are quoted for. `apex4-a8` and `apex4-a8+q` are the same
with 8-bit activations. `bf16` is torch.matmul, `fp8` torch._scaled_mm with a scale per row (without the quantization of x; with
it, compiled by torch.compile: `fp8+q`), `humming-*` Humming's INT4 weights in groups of
128 with INT4 or INT8 activations in groups of 128, GEMM alone and, with `+q`, with a Hadamard transform and quantization;
`vllm-w4a8` vLLM's CUTLASS operator of INT4 weights in groups of 128 and FP8 activations with a scale per row, with `+q` behind
vLLM's quantizer.

How: random data; a CUDA graph of the call; before every iteration a buffer larger than L2 is read, so that weights
come from memory as they do in a model; CUDA events around the replay; the median. Every result is compared with
the BF16 product first: a contender that is absent, fails or computes something else is named in the table, not left out.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Apex4Error, UsageError
from ..format.number_format import BLOCK, CODE_MAX, WEIGHT_SCALE_MIN
from ..hardware.gpus import GPUS, Gpu, resolve_target
from ..progress import Progress
from .pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# model: layer: [N, K]. q, k and v are one linear, and so are gate and up.
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Llama-2-70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "Llama-2-7B": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "Qwen3-32B": {"qkv": (10240, 5120), "o": (5120, 8192), "gate_up": (51200, 5120), "down": (5120, 25600)},
}
TOKENS = (1, 8, 16, 64, 256, 1024, 2048, 4096, 8192)
QUICK_SHAPES = ("Llama-3-8B:gate_up", "Llama-2-70B:qkv", "Llama-2-70B:down")
QUICK_TOKENS = (1, 16, 2048, 8192)
CONTENDERS = (
    "apex4", "apex4+q", "apex4-a8", "apex4-a8+q", "bf16", "fp8", "fp8+q", "humming-w4a4", "humming-w4a4+q", "humming-w4a8",
    "humming-w4a8+q", "vllm-w4a8", "vllm-w4a8+q",
)  # fmt: skip
DEFAULT_CONTENDERS = ("apex4", "apex4+q", "bf16", "fp8")
FLUSH_BYTES = 256 << 20  # five times the L2 of an H200
WARM_UP, REPEATS = 3, 30
# Largest relative error (Frobenius) against BF16 on random data. Rounding both sides to 4 bits in groups of 128 costs
# about 0.16 (each side: absmax of 128 normal values is 2.7 sigma, a step of 0.38 sigma, 0.11 of noise); FP8 about 0.04.
MAX_ERROR = {"apex4": 0.25, "fp8": 0.08, "humming": 0.25, "vllm": 0.25}

Call = Callable[[], torch.Tensor]


class Unavailable(Exception):
    """Why a contender cannot run here, in a few words."""


@dataclass(frozen=True)
class BenchSettings:
    shapes: tuple[str, ...] = ()  # "Llama-3-8B", "Llama-3-8B:down", "4096x4096"; () is all
    tokens: tuple[int, ...] = ()
    contenders: tuple[str, ...] = DEFAULT_CONTENDERS
    quick: bool = False
    repeats: int = REPEATS
    device: str = "cuda"

    def layers(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of every distinct shape asked for. Raises UsageError for one that is not known."""
        wanted = self.shapes or (QUICK_SHAPES if self.quick else tuple(SHAPES))
        found: dict[tuple[int, int], str] = {}
        for text in wanted:
            model, _, layer = text.partition(":")
            sides = text.lower().split("x")
            if model in SHAPES and (not layer or layer in SHAPES[model]):
                chosen = {f"{model} {name}": side for name, side in SHAPES[model].items() if layer in ("", name)}
            elif len(sides) == 2 and all(side.isdecimal() and int(side) > 0 for side in sides):
                chosen = {"": (int(sides[0]), int(sides[1]))}
            else:
                raise UsageError(f"shape {text!r} is not known: give {', '.join(SHAPES)}, MODEL:LAYER, or NxK")
            for name, side in chosen.items():
                found.setdefault(side, name)
        return [(name, n, k) for (n, k), name in found.items()]

    def rows(self) -> tuple[int, ...]:
        tokens = self.tokens or (QUICK_TOKENS if self.quick else TOKENS)
        if any(m < 1 for m in tokens):
            raise UsageError("a number of tokens must be at least 1")
        return tokens

    def check(self) -> None:
        for name in self.contenders:
            if name not in CONTENDERS:
                raise UsageError(f"contender {name!r} is not known: give some of {', '.join(CONTENDERS)}")
        self.layers(), self.rows()


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_tokens(text: str) -> tuple[int, ...]:
    """ "1,16" -> (1, 16). Raises UsageError for what is no number."""
    parts = parse_list(text)
    for part in parts:
        if not part.isdecimal():
            raise UsageError(f"{part!r} is no number of tokens")
    return tuple(int(part) for part in parts)


@dataclass
class Row:
    layer: str
    m: int
    n: int
    k: int
    seconds: dict[str, float] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)  # contender: why there is no figure
    errors: dict[str, float] = field(default_factory=dict)
    eager: list[str] = field(default_factory=list)  # timed without a CUDA graph
    memory_floor: float | None = None
    tensor_floor: float | None = None

    def speedup(self, name: str) -> float | None:
        """Over BF16."""
        if "bf16" not in self.seconds or name not in self.seconds:
            return None
        return self.seconds["bf16"] / self.seconds[name]

    def as_dict(self) -> dict[str, Any]:
        operations = 2 * self.m * self.n * self.k
        floor = max(self.memory_floor or 0, self.tensor_floor or 0)
        return {
            "layer": self.layer, "m": self.m, "n": self.n, "k": self.k,
            "microseconds": {name: round(s * 1e6, 2) for name, s in self.seconds.items()},
            "tops": {name: round(operations / s / 1e12, 1) for name, s in self.seconds.items()},
            "speedup_over_bf16": {
                name: round(ratio, 3) for name in self.seconds if (ratio := self.speedup(name)) is not None
            },
            "of_floor": {name: round(floor / s, 3) for name, s in self.seconds.items() if floor and "apex4" in name},
            "memory_floor_us": None if self.memory_floor is None else round(self.memory_floor * 1e6, 2),
            "tensor_floor_us": None if self.tensor_floor is None else round(self.tensor_floor * 1e6, 2),
            "relative_error": {name: round(error, 4) for name, error in self.errors.items()},
            "gaps": self.gaps,
            "without_graph": self.eager,
        }  # fmt: skip


def run(settings: BenchSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Measure everything. Raises Apex4Error without a GPU, UsageError for settings that name nothing."""
    settings.check()
    if not torch.cuda.is_available():
        raise Apex4Error("bench needs an NVIDIA GPU and finds none")
    device = torch.device(settings.device)
    torch.cuda.set_device(device.index or 0)
    known = resolve_target("auto").gpu
    rows = []
    if progress is not None:
        progress.line(header(settings.contenders))
    with torch.inference_mode():
        timer = Timer(device, settings.repeats)
        empty = timer.seconds(lambda: None, capture=False)
        for name, n, k in settings.layers():
            for row in _bench_layer(name, n, k, settings, device, timer, GPUS.get(known or "")):
                rows.append(row)
                if progress is not None:
                    progress.line(row_as_text(row, settings.contenders))
            gc.collect()
            torch.cuda.empty_cache()
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "repeats": settings.repeats,
        "empty_measurement_us": round(empty * 1e6, 2),  # in every figure, and not taken out
        "geometric_mean_speedup": means(rows, settings.contenders),
        "rows": [row.as_dict() for row in rows],
    }


class Timer:
    def __init__(self, device: torch.device, repeats: int) -> None:
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.repeats = repeats
        # Warmed up on the stream of the capture: workspaces belong to streams, and a capture cannot make one.
        self.stream = torch.cuda.Stream(device)
        self.eager = False  # the last call could not be captured

    def seconds(self, call: Callable[[], Any], capture: bool = True) -> float:
        """Median time of `call` with cold L2. Calls that cannot be captured into a graph are timed as they are."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                call()
            self.stream.synchronize()
            replay = self._captured(call) if capture else call
            self.eager = capture and replay is call
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats + 1)]
            for begin, end in events:
                # Read, not written: the write-back of dirty lines would be counted against whoever comes next. The second
                # pass keeps the GPU busy while the host prepares the launch.
                self.flush.amax()
                self.flush.amax()
                begin.record()
                replay()
                end.record()
            self.stream.synchronize()
        return float(statistics.median(begin.elapsed_time(end) for begin, end in events[1:])) / 1e3

    def _captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except (RuntimeError, Apex4Error):
            torch.cuda.synchronize()
            return call
        return graph.replay


def _bench_layer(
    name: str, n: int, k: int, settings: BenchSettings, device: torch.device, timer: Timer, gpu: Gpu | None
) -> Iterator[Row]:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device, generator=generator).mul_(k**-0.5)
    makers: dict[str, Callable[[torch.Tensor], Call]] = {}
    missing: dict[str, str] = {}
    for family in dict.fromkeys(name.partition("+")[0] for name in settings.contenders):
        try:
            makers |= _FAMILIES[family](weight)
        except Exception as error:
            missing[family] = _reason(error)
    for m in settings.rows():
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device, generator=generator)
        row = Row(name, m, n, k)
        if gpu is not None:
            row.memory_floor, row.tensor_floor = floors(gpu, m, n, k)
        expected = (x @ weight.t()).float()
        for contender in settings.contenders:
            family = contender.partition("+")[0]
            if family in missing:
                row.gaps[contender] = missing[family]
                continue
            try:
                call = makers[contender](x)
                wrong = float(torch.linalg.vector_norm(call().float() - expected) / torch.linalg.vector_norm(expected))
                limit = MAX_ERROR.get(family.partition("-")[0], 0.01)
                row.errors[contender] = wrong
                if not wrong <= limit:
                    raise Unavailable(f"wrong result (relative error {wrong:.2g})")
                row.seconds[contender] = timer.seconds(call)
                if timer.eager:
                    row.eager.append(contender)
            except torch.cuda.OutOfMemoryError:
                row.gaps[contender] = "out of memory"
                torch.cuda.empty_cache()
            except Exception as error:
                row.gaps[contender] = _reason(error)
        yield row


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    kind = "" if isinstance(error, Unavailable | Apex4Error) else f"{type(error).__name__}: "
    return (kind + (text[0] if text else "no message"))[:160]


def floors(gpu: Gpu, m: int, n: int, k: int) -> tuple[float, float]:
    """Least seconds of the W4A4 GEMM by the memory bandwidth and by the tensor-core rate of the data sheet."""
    blocks = math.ceil(k / BLOCK)
    moved = n * blocks * (BLOCK / 2 + 2) + m * blocks * (BLOCK / 2 + 4) + 2 * m * n
    return moved / (gpu.memory_gbs * 1e9), 2 * m * n * k / (gpu.tensor_tops * 1e12)


# ---- contenders: what a weight [N, K] becomes, {name: x [M, K] -> call} --------------------------------------------------


def _bf16(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Call]]:
    return {"bf16": lambda x: lambda: torch.matmul(x, weight.t())}


def _apex4(bits: int) -> Callable[[torch.Tensor], dict[str, Callable[[torch.Tensor], Call]]]:
    """Activations of 4 or 8 bits."""

    def prepare(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Call]]:
        from ..kernels import ops
        from ..kernels.hadamard import apply_block_hadamard
        from ..kernels.operands import TOKEN_FORMAT, fold_scales, layout_of_format
        from ..kernels.runtime.architectures import eight_bit_family, kernel_family

        major, minor = torch.cuda.get_device_capability(weight.device)
        family = (kernel_family if bits == 4 else eight_bit_family)(10 * major + minor)
        if family is None:
            raise Unavailable(f"no kernel for {bits}-bit activations for sm_{major}{minor}")
        format = TOKEN_FORMAT if bits == 8 else family.removeprefix("gemm_")
        n, k = weight.shape
        padded = math.ceil(k / BLOCK) * BLOCK
        grouped = apply_block_hadamard(torch.nn.functional.pad(weight.float(), (0, padded - k))).unflatten(
            1, (-1, BLOCK)
        )
        scale = (grouped.abs().amax(-1) / CODE_MAX).clamp_min(WEIGHT_SCALE_MIN).half()
        codes = torch.round(grouped / scale.float()[..., None]).clamp_(-CODE_MAX, CODE_MAX).flatten(1).to(torch.int8)
        del grouped
        layout = layout_of_format(format)
        packed = layout.pack(codes).contiguous()
        scales, unit = fold_scales(scale) if bits == 8 else (layout.pack_scales(scale).contiguous(), None)
        del codes

        how = (None, padded, padded if bits == 8 else BLOCK, 1.0, True, format)

        def alone(x: torch.Tensor) -> Call:
            codes, factors = ops.quantize(x, *how)
            return lambda: ops.gemm(codes, factors, packed, scales, unit, None, len(x), n, x.dtype)

        name = "apex4" if bits == 4 else "apex4-a8"
        return {name: alone, f"{name}+q": lambda x: lambda: ops.linear(x, packed, scales, unit, None, n, *how)}

    return prepare


def _fp8(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Call]]:
    if torch.cuda.get_device_capability(weight.device) < (8, 9):
        raise Unavailable("this GPU has no FP8 tensor cores")

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn), scale

    weight_codes, weight_scale = rows(weight)

    def make(x: torch.Tensor) -> Call:
        codes, scale = rows(x)
        return lambda: torch._scaled_mm(
            codes, weight_codes.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def quantized(x: torch.Tensor) -> Call:
        torch.compiler.reset()  # which compiles a function for a few shapes only
        compiled_rows = torch.compile(rows, dynamic=False)  # one pass over x, as a kernel of our own would make

        def call() -> torch.Tensor:
            codes, scale = compiled_rows(x)
            return torch._scaled_mm(
                codes, weight_codes.t(), scale, weight_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )

        return call

    return {"fp8": make, "fp8+q": quantized}


def _humming(bits: int) -> Callable[[torch.Tensor], dict[str, Callable[[torch.Tensor], Call]]]:
    """INT4 weights and INT4 or INT8 activations in groups of 128, as humming-kernels 0.1.19 offers them."""
    name = f"humming-w4a{bits}"

    def prepare(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Call]]:
        try:
            from humming.forward import may_process_input
            from humming.layer import HummingLayer
        except ImportError as error:
            raise Unavailable(f"not installed: pip install humming-kernels ({error})") from error
        n, k = weight.shape
        layers: dict[bool, Any] = {}
        for hadamard in (False, True):  # the transform belongs to weights and inputs alike
            layer = HummingLayer(
                shape_n=n,
                shape_k=k,
                weight_config={"dtype": "int4", "group_size": BLOCK},
                input_config={"dtype": f"int{bits}", "group_size": BLOCK},
                torch_dtype=torch.bfloat16,
            ).to(weight.device)
            layer.load_from_unquantized(_transformed(weight) if hadamard else weight)
            layer.transform()
            layers[hadamard] = layer

        def alone(x: torch.Tensor) -> Call:
            codes, groups, tokens = may_process_input(layers[False].humming_config, x)
            scale = groups if groups is not None else tokens
            return lambda: layers[False](codes, input_scale=scale)

        def with_quantization(x: torch.Tensor) -> Call:
            return lambda: layers[True](x, hadamard_block_size=BLOCK)

        return {name: alone, f"{name}+q": with_quantization}

    return prepare


def _vllm_w4a8(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Call]]:
    """As CutlassW4A8LinearKernel of vLLM 0.26 prepares and calls it. The weights' scales of groups are rounded to e4m3."""
    if torch.cuda.get_device_capability(weight.device) != (9, 0):
        raise Unavailable("it is for sm_90 only")
    if not hasattr(torch.ops._C, "cutlass_w4a8_mm"):
        try:
            importlib.import_module("vllm._C_stable_libtorch")
        except ImportError as error:
            raise Unavailable(f"not installed: pip install vllm ({error})") from error
    operators: Any = torch.ops._C
    n, k = weight.shape
    if n % BLOCK or k % BLOCK:
        raise Unavailable(f"it has multiples of {BLOCK} only")

    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        operators.dynamic_per_token_scaled_fp8_quant(codes, x, scale, None)
        return codes, scale

    grouped = weight.float().unflatten(1, (-1, BLOCK))
    group_scale = (grouped.abs().amax(-1) / CODE_MAX).clamp_min(WEIGHT_SCALE_MIN)
    codes = torch.round(grouped / group_scale[..., None]).clamp_(-CODE_MAX, CODE_MAX).flatten(1).int()
    del grouped
    words = torch.zeros(n, k // 8, dtype=torch.int32, device=weight.device)
    for place in range(8):
        words |= (codes[:, place::8] & 15) << 4 * place
    del codes
    packed = operators.cutlass_encode_and_reorder_int4b(words.t())
    scales, channel = quantize(group_scale.bfloat16())
    scales = operators.cutlass_pack_scale_fp8((scales.float() / 8).to(torch.float8_e4m3fn).t().contiguous())
    channel = channel * 8

    def multiply(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = operators.cutlass_w4a8_mm(codes, packed, scales, BLOCK, channel, scale, None, None)
        return y

    def alone(x: torch.Tensor) -> Call:
        operands = quantize(x)
        return lambda: multiply(*operands)

    return {"vllm-w4a8": alone, "vllm-w4a8+q": lambda x: lambda: multiply(*quantize(x))}


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    from ..kernels.hadamard import apply_block_hadamard

    return apply_block_hadamard(weight.float()).to(weight.dtype)


_FAMILIES: dict[str, Callable[[torch.Tensor], dict[str, Callable[[torch.Tensor], Call]]]] = {
    "apex4": _apex4(4),
    "apex4-a8": _apex4(8),
    "bf16": _bf16,
    "fp8": _fp8,
    "humming-w4a4": _humming(4),
    "humming-w4a8": _humming(8),
    "vllm-w4a8": _vllm_w4a8,
}


# ---- what is printed -----------------------------------------------------------------------------------------------------


def means(rows: list[Row], contenders: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """{M: {contender: geometric mean over shapes of the speed-up over BF16}}."""
    found: dict[str, dict[str, float]] = {}
    for m in dict.fromkeys(row.m for row in rows):
        for name in contenders:
            ratios = [ratio for row in rows if row.m == m and (ratio := row.speedup(name)) is not None]
            if ratios and name != "bf16":
                found.setdefault(str(m), {})[name] = round(statistics.geometric_mean(ratios), 3)
    return found


def header(contenders: tuple[str, ...]) -> str:
    columns = "".join(f" {name:>22}" for name in contenders)
    return f"{'layer':20} {'N':>6} {'K':>6} {'M':>5}{columns} {'of floor':>9}"


def row_as_text(row: Row, contenders: tuple[str, ...]) -> str:
    """us, TOPS and speed-up over BF16 of every contender; of the larger floor: the GEMM alone; gaps by name."""
    cells = []
    for name in contenders:
        if name in row.seconds:
            ratio = row.speedup(name)
            tops = 2 * row.m * row.n * row.k / row.seconds[name] / 1e12
            cells.append(f"{row.seconds[name] * 1e6:.1f} {tops:.0f} {'' if ratio is None else f'{ratio:.2f}x'}".strip())
        else:
            cells.append("-")
    floor = max(row.memory_floor or 0, row.tensor_floor or 0)
    share = f"{floor / row.seconds['apex4']:9.0%}" if floor and "apex4" in row.seconds else f"{'-':>9}"
    text = f"{row.layer:20} {row.n:6} {row.k:6} {row.m:5}" + "".join(f" {cell:>22}" for cell in cells) + f" {share}"
    text += "".join(f"\n    {name}: timed without a CUDA graph" for name in row.eager)
    return text + "".join(f"\n    {name}: {reason}" for name, reason in row.gaps.items())


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{result['gpu']}, torch {result['torch']}, CUDA {result['cuda']}; speed-up over BF16, geometric mean:"]
    for m, ratios in result["geometric_mean_speedup"].items():
        lines.append(f"  M {m:>5}  " + "  ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> Figure:
    """Geometric mean of the speed-up over BF16 against the number of tokens M: one line for each contender."""
    from matplotlib.figure import Figure

    by_m: dict[str, dict[str, float]] = result["geometric_mean_speedup"]
    tokens = list(by_m)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(name for ratios in by_m.values() for name in ratios)):
        places = [place for place, m in enumerate(tokens) if name in by_m[m]]
        ratios = [by_m[tokens[place]][name] for place in places]
        axes.plot(places, ratios, marker="o", markersize=4, color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(1, color="#333333", linewidth=0.8)
    axes.set_xticks(range(len(tokens)), tokens)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens M")
    axes.set_ylabel("speed-up over BF16")
    axes.set_title(f"{result['gpu']}: geometric mean of the shapes")
    if by_m:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
