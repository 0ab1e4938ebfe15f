"""One rival recipe on one model, in the rivals' environment: quantize, measure, print JSON in the last line.

    rivals_worker.py --list
    rivals_worker.py RECIPE MODEL IDS [--device cpu] [--batch 8] [--group 128]

scripts/bench/rivals, scripts/bench/quantize and scripts/bench/real_models start it. IDS is a file of token windows (`calibration`, and `heldout`
if perplexity is to be measured) that apex4's own code drew.
Under torchrun it is one of several ranks of llm-compressor's data-parallel mode, of which the first prints: its times, and the peaks of
the rank that needed most.
The model stays in memory as llm-compressor leaves it, which is how that library simulates the quantized model: weights
and activations are rounded to their grids and computed in floating point.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

if not {"cuda", "--device=cuda"} & set(sys.argv):
    # llm-compressor takes any GPU that torch sees, and does not ask.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from compressed_tensors.offload import init_dist, load_offloaded_model
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, QuIPModifier, SmoothQuantModifier, SpinQuantModifier
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from apex4_quant.evaluation.predictions import RecordedPredictions, compare, measure_perplexity

GROUP = 128
if "--group" in sys.argv:  # recipes below are made of it
    GROUP = int(sys.argv[sys.argv.index("--group") + 1])

if not torch.accelerator.is_available():
    # AWQ pins memory for a GPU without looking whether there is one, and would not run here.
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment]


def token_scheme() -> dict[str, Any]:
    """The library's preset: weights in groups of 128, one activation scale for a whole token."""
    return {"scheme": "W4A4", "ignore": ["lm_head"]}


def group_scheme(observer: str = "mse") -> dict[str, Any]:
    """What apex4 does: groups of 128 on both sides. `observer` chooses weight scales; `mse` searches a clip."""
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**int4, observer=observer),
        input_activations=QuantizationArgs(**int4, dynamic=True),
    )
    return {"config_groups": {"w4a4": scheme}, "ignore": ["lm_head"]}


def weight_scheme() -> dict[str, Any]:
    """W4A16: weights in groups of 128 with a searched clip, activations as they are."""
    int4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**int4, observer="mse"))
    return {"config_groups": {"w4a16": scheme}, "ignore": ["lm_head"]}


def spinquant(*rotations: str, block: int | None = None) -> SpinQuantModifier:
    """Of the kinds of Hadamard matrix only the randomized one exists for widths that are no power of two."""
    return SpinQuantModifier(rotations=list(rotations), transform_type="random-hadamard", transform_block_size=block)


def quip(block: int | None) -> QuIPModifier:
    """A Hadamard of order `block` (None: of all K) on the input of every linear, at run time."""
    return QuIPModifier(rotations=["v"], transform_type="random-hadamard", transform_block_size=block)


@dataclass(frozen=True)
class Recipe:
    """`activations` is the reach of one activation scale, NONE where they are not rounded; `online` what is multiplied at
    run time."""

    activations: str
    summary: str
    modifiers: Callable[[], list[Any]]
    online: str = "nothing"


TOKEN, G128, NONE = "token", "g128", "none"
RECIPES: dict[str, Recipe] = {
    "token-rtn": Recipe(TOKEN, "preset W4A4, nearest", lambda: [QuantizationModifier(**token_scheme())]),
    "token-gptq": Recipe(TOKEN, "preset W4A4, GPTQ", lambda: [GPTQModifier(**token_scheme())]),
    "token-r12-gptq": Recipe(
        TOKEN, "SpinQuant R1 R2, preset W4A4, GPTQ", lambda: [spinquant("R1", "R2"), GPTQModifier(**token_scheme())]
    ),
    "token-r124-gptq": Recipe(
        TOKEN, "SpinQuant R1 R2 R4, preset W4A4, GPTQ",
        lambda: [spinquant("R1", "R2", "R4"), GPTQModifier(**token_scheme())], "down",
    ),
    "token-quip-gptq": Recipe(
        TOKEN, "QuIP over all K, preset W4A4, GPTQ", lambda: [quip(None), GPTQModifier(**token_scheme())], "every input"
    ),
    "g128-rtn": Recipe(G128, "nearest, absmax scales", lambda: [QuantizationModifier(**group_scheme("minmax"))]),
    "g128-rtn-mse": Recipe(G128, "nearest, searched scales", lambda: [QuantizationModifier(**group_scheme())]),
    "g128-gptq": Recipe(G128, "GPTQ", lambda: [GPTQModifier(**group_scheme())]),
    "g128-gptq-imatrix": Recipe(
        G128, "GPTQ, scales weighted by activations", lambda: [GPTQModifier(**group_scheme("imatrix_mse"))]
    ),
    "g128-smooth-gptq": Recipe(
        G128, "SmoothQuant 0.5, GPTQ", lambda: [SmoothQuantModifier(), GPTQModifier(**group_scheme())]
    ),
    "g128-awq-gptq": Recipe(G128, "AWQ, GPTQ", lambda: [AWQModifier(), GPTQModifier(**group_scheme())]),
    "g128-r12-rtn": Recipe(
        G128, "SpinQuant R1 R2, nearest", lambda: [spinquant("R1", "R2"), QuantizationModifier(**group_scheme())]
    ),
    "g128-r12-gptq": Recipe(
        G128, "SpinQuant R1 R2, GPTQ", lambda: [spinquant("R1", "R2"), GPTQModifier(**group_scheme())]
    ),
    "g128-r124-gptq": Recipe(
        G128, "SpinQuant R1 R2 R4, GPTQ",
        lambda: [spinquant("R1", "R2", "R4"), GPTQModifier(**group_scheme())], "down",
    ),
    "g128-r14-b128-gptq": Recipe(
        G128, "SpinQuant R1 R2 R4, R1 and R4 in blocks of 128, GPTQ",
        lambda: [spinquant("R1", "R2", "R4", block=GROUP), GPTQModifier(**group_scheme())], "down",
    ),
    "g128-quip-gptq": Recipe(
        G128, "QuIP over all K, GPTQ", lambda: [quip(None), GPTQModifier(**group_scheme())], "every input"
    ),
    "g128-quip128-rtn": Recipe(
        G128, "QuIP in blocks of 128, nearest",
        lambda: [quip(GROUP), QuantizationModifier(**group_scheme())], "every input",
    ),
    "g128-quip128-gptq": Recipe(
        G128, "QuIP in blocks of 128, GPTQ", lambda: [quip(GROUP), GPTQModifier(**group_scheme())], "every input"
    ),
    "g128-quip128-imatrix": Recipe(
        G128, "QuIP in blocks of 128, GPTQ, scales weighted by activations",
        lambda: [quip(GROUP), GPTQModifier(**group_scheme("imatrix_mse"))], "every input",
    ),
    "g128-r12-quip128-gptq": Recipe(
        G128, "SpinQuant R1 R2, QuIP in blocks of 128, GPTQ",
        lambda: [spinquant("R1", "R2"), quip(GROUP), GPTQModifier(**group_scheme())], "every input",
    ),
    "g128-smooth-quip128-gptq": Recipe(
        G128, "SmoothQuant 0.5, QuIP in blocks of 128, GPTQ",
        lambda: [SmoothQuantModifier(), quip(GROUP), GPTQModifier(**group_scheme())], "every input",
    ),
    "g128-awq-quip128-gptq": Recipe(
        G128, "AWQ, QuIP in blocks of 128, GPTQ",
        lambda: [AWQModifier(), quip(GROUP), GPTQModifier(**group_scheme())], "every input",
    ),
    "w4a16-gptq": Recipe(NONE, "W4A16, GPTQ", lambda: [GPTQModifier(**weight_scheme())]),
    "g128-autoround": Recipe(G128, "AutoRound, 200 steps", lambda: [AutoRoundModifier(**group_scheme("minmax"))]),
    "g128-r12-autoround": Recipe(
        G128, "SpinQuant R1 R2, AutoRound, 200 steps",
        lambda: [spinquant("R1", "R2"), AutoRoundModifier(**group_scheme("minmax"))],
    ),
}  # fmt: skip


def run(name: str, folder: Path, ids: dict[str, torch.Tensor], device: str, batch: int, dtype: str) -> dict[str, Any]:
    fallbacks: list[str] = []
    # It goes on with rounding to nearest where GPTQ fails, which would be another recipe.
    logger.add(
        fallbacks.append, level="WARNING", format="{message}", filter=lambda each: "inversion" in each["message"]
    )
    rank, ranks = join(device)
    started = time.perf_counter()
    model = load_model(folder, dtype, ranks).eval()
    layers_done = mark_layers(model, device)
    own = ids["calibration"].tensor_split(ranks)[rank]
    windows = [{"input_ids": window} for window in own.split(batch)]
    oneshot(
        model=model,
        recipe=RECIPES[name].modifiers(),
        dataset=DataLoader(windows, batch_size=None),  # type: ignore[arg-type]
        num_calibration_samples=len(own),
        max_seq_length=own.shape[1],
    )
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "ranks": ranks,
        "seconds": seconds,
        "layers_done": [each - started for each in layers_done],
        "finished": time.time(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "quantized_linears": sum(is_quantized(each, RECIPES[name].activations) for each in model.modules()),
        "fallbacks": fallbacks,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    if ranks > 1:
        everyones: list[dict[str, Any]] = [{}] * ranks
        dist.all_gather_object(everyones, result)
        for peak in ("peak_rss_bytes", "peak_gpu_bytes"):
            result[peak] = max(each[peak] or 0 for each in everyones) or None
        dist.destroy_process_group()
    if "heldout" not in ids or ranks > 1:
        return result
    model.eval()
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).to(model.device).eval()
    measured = compare(model, RecordedPredictions(original, ids["heldout"]))
    result |= {"perplexity": measured.perplexity, "divergence": measured.divergence}
    result["top1_agreement"] = measured.top1_agreement
    del original
    # Scales in bfloat16 cost something that a kernel with float32 scales would not: show the rival without it too.
    result["perplexity_float32"] = measure_perplexity(model.float(), ids["heldout"])
    return result


def join(device: str) -> tuple[int, int]:
    """Which of how many ranks torchrun started this is: 0 of 1, if it did not."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return 0, 1
    if device == "cuda":
        init_dist()
    else:  # that asks for an accelerator
        dist.init_process_group("gloo")
    return dist.get_rank(), ranks


def load_model(folder: Path, dtype: str, ranks: int) -> PreTrainedModel:
    """As the library's examples do: with several ranks its weights are there once."""
    if ranks == 1:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    with load_offloaded_model():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, device_map="auto_offload"
        )


def mark_layers(model: torch.nn.Module, device: str) -> list[float]:
    """To be filled with when the last linear of each decoder layer was quantized, by recipes that go layer by layer."""
    times: list[float] = []
    linears = {module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)}
    plain = LifecycleCallbacks.sequential_epoch_end

    def marked(modules: Iterable[torch.nn.Module], **kwargs: Any) -> Any:
        modules = list(modules)
        done = plain(modules, **kwargs)
        if 0 < len(linears.intersection(modules)) < len(linears):  # all at once: a modifier that needs no data
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        return done

    LifecycleCallbacks.sequential_epoch_end = marked
    return times


def is_quantized(module: torch.nn.Module, activations: str) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    enabled = getattr(module, "quantization_enabled", True)
    if not enabled or scheme is None or not scheme.weights:
        return False
    return (scheme.input_activations is None) == (activations == NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=RECIPES)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("ids", nargs="?", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="windows that go through the model at once")
    # "auto": the dtype of the checkpoint, as `apex4 eval` computes in it.
    parser.add_argument("--dtype", choices=("auto", "float32"), default="auto", help="that the model computes in")
    parser.add_argument("--group", type=int, default=GROUP, help="channels of a group, a divisor of every width")
    parser.add_argument("--list", action="store_true", help="print the recipes as JSON and stop")
    args = parser.parse_args()
    if args.list:
        print(json.dumps({n: {"activations": r.activations, "summary": r.summary, "online": r.online}
                          for n, r in RECIPES.items()}))  # fmt: skip
        return
    if args.ids is None:
        parser.error("RECIPE, MODEL and IDS are needed")
    torch.manual_seed(0)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("RuntimeError: torch finds no CUDA GPU in the rivals' environment")
    found = run(args.recipe, args.model, load_file(args.ids), args.device, args.batch, args.dtype)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
