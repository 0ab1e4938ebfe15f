"""One quantization and one GEMM for linears that read one tensor: same bits as without, under any calls, leaving nothing."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import apex4_quant  # noqa: F401  (registers the quantizer)
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import dispatch
from apex4_quant.kernels.operands import GROUPED_FORMATS
from apex4_quant.models.families import FAMILIES
from apex4_quant.nn.call_scope import CallScope
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.nn.prepare import prepare_model
from apex4_quant.nn.shared_input import SharedInput

IDS = torch.arange(48)[None] * 31 % 4096
Call = Callable[..., Any]


class Calls(TorchDispatchMode):
    """Counts the operators of ours that run: quantizers and GEMMs, also where `in_one` operator both do."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.in_one = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "apex4":
            name, linear, _ = func._opname.partition("linear")
            self.count += Counter([f"{name}quantize", "gemm"] if linear else [name])
            self.in_one += bool(linear)
        return func(*args, **kwargs or {})


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def reference_logits(demo_checkpoint: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(demo_checkpoint))


def load(checkpoint: Path, kernel: str | None, shared: bool = True) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prepare_model(model, FAMILIES["LlamaForCausalLM"] if shared else None, kernel)
    return model


# ---- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", GROUPED_FORMATS)
def test_the_fused_model_gives_the_same_bits(
    format: str, demo_checkpoint: Path, reference_logits: torch.Tensor
) -> None:
    fused, alone = load(demo_checkpoint, format), load(demo_checkpoint, format, shared=False)
    with Calls() as calls:
        assert torch.equal(logits_of(fused), reference_logits)
    layers = fused.config.num_hidden_layers
    assert calls.count == {  # qkv, o, gate and up, down
        "rms_norm_quantize": 2 * layers, "quantize": layers, "silu_mul_quantize": layers, "gemm": 4 * layers,
    }  # fmt: skip
    assert calls.in_one == 4 * layers
    with Calls() as calls:
        assert torch.equal(logits_of(alone), reference_logits)
    assert calls.count == {"quantize": 7 * layers, "gemm": 7 * layers} and calls.in_one == 7 * layers
    with torch.inference_mode():
        assert torch.equal(fused(IDS, use_cache=False).logits, reference_logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_eight_bits_are_the_same_fused_alone_and_by_pytorch(
    demo_checkpoint: Path, reference_logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, alone = load(demo_checkpoint, "s8"), load(demo_checkpoint, "s8", shared=False)
    with Calls() as calls:
        logits = logits_of(fused)
    assert calls.in_one == calls.count["gemm"] == 4 * fused.config.num_hidden_layers
    assert torch.equal(logits_of(alone), logits) and not torch.equal(logits, reference_logits)
    stored = AutoModelForCausalLM.from_pretrained(demo_checkpoint).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in fused.state_dict().items())
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    by_torch = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    with Calls() as calls:
        assert torch.equal(logits_of(by_torch), logits) and not calls.count
    monkeypatch.setenv("APEX4_ACTIVATIONS", "4")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(demo_checkpoint)), reference_logits)


def test_loading_on_a_cpu_keeps_the_reference(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    with Calls() as calls:
        logits_of(model)
    assert not calls.count
    assert {module.kernel for module in model.modules() if isinstance(module, Apex4Linear)} == {None}


def test_siblings_are_views_of_one_tensor(demo_checkpoint: Path) -> None:
    model = load(demo_checkpoint, "sm90")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for members in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        for name in ("weight_packed", "weight_scale"):
            parts = [getattr(member, name) for member in members]
            storage = parts[0].untyped_storage()
            assert {part.untyped_storage().data_ptr() for part in parts} == {storage.data_ptr()}
            assert storage.nbytes() == sum(part.numel() * part.itemsize for part in parts)
    assert attention.o_proj.shared is None


@pytest.mark.parametrize("format", GROUPED_FORMATS)
def test_what_is_saved_is_in_the_checkpoints_own_layout(
    format: str, demo_checkpoint: Path, tmp_path: Path, reference_logits: torch.Tensor
) -> None:
    model = load(demo_checkpoint, format)
    model.save_pretrained(tmp_path)
    first, second = (json.loads((p / "config.json").read_text()) for p in (demo_checkpoint, tmp_path))
    assert first["quantization_config"] == second["quantization_config"]
    stored, saved = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (demo_checkpoint, tmp_path)
    )
    assert stored.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in stored.items())
    # And back: a state in the checkpoint's layout goes into a model that computes in another.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Apex4Linear):
                module.weight_packed.zero_()
    assert not torch.equal(logits_of(model), reference_logits)
    model.load_state_dict(saved | {"lm_head.weight": model.lm_head.weight.detach()})
    assert torch.equal(logits_of(model), reference_logits)


def test_a_checkpoint_already_in_the_kernels_layout(
    tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call
) -> None:
    out = tmp_path / "out"
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "H200", "--recipe", "rtn", "--json")
    assert invoke("quantize", tiny_model(), "-o", out, *options).exit_code == 0
    expected = logits_of(AutoModelForCausalLM.from_pretrained(out))
    model = load(out, "sm90")
    assert torch.equal(logits_of(model), expected)
    model.save_pretrained(tmp_path / "again")  # from views of one storage
    assert torch.equal(logits_of(load(tmp_path / "again", "sm90")), expected)


def test_casting_and_copying(demo_checkpoint: Path, reference_logits: torch.Tensor) -> None:
    model = load(demo_checkpoint, "sm80")
    copied = copy.deepcopy(model)
    with Calls() as calls:
        assert torch.equal(logits_of(copied), reference_logits)
    assert calls.count["gemm"] == 4 * model.config.num_hidden_layers
    linears = [copied.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.gate_proj]
    assert linears[0].weight_packed.data_ptr() != linears[1].weight_packed.data_ptr()
    assert linears[0].shared.members[0] is linears[0]
    model.to(torch.float16).to(torch.bfloat16)
    with Calls() as calls:
        logits_of(model)
    assert calls.count["gemm"] == 4 * model.config.num_hidden_layers
    dispatch.warn_of_dtype.cache_clear()
    model.to(torch.float32)
    with pytest.warns(RuntimeWarning, match="float32"):
        logits_of(model)
    with Calls() as calls:
        logits_of(model)
    assert not calls.count


def test_a_model_without_its_head(demo_checkpoint: Path) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(demo_checkpoint)
    expected = base(IDS).last_hidden_state
    prepare_model(base, FAMILIES["LlamaForCausalLM"], "sm90")
    with Calls() as calls:
        assert torch.equal(base(IDS).last_hidden_state, expected)
    assert calls.count["gemm"] == 4 * base.config.num_hidden_layers


@pytest.mark.parametrize(("backend", "format"), [("eager", "sm90"), ("aot_eager", "sm90"), ("aot_eager", "s8")])
def test_a_decoder_layer_compiles_to_one_graph(backend: str, format: str, demo_checkpoint: Path) -> None:
    torch.compiler.reset()  # shapes of other tests make some sizes symbols
    model = load(demo_checkpoint, format)
    layer = model.model.layers[0]
    x = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    positions = model.model.rotary_emb(x, torch.arange(16)[None])
    counted: list[Counter[Any]] = []

    def seen(graph: Any, inputs: Any) -> Any:
        counted.append(Counter(str(node.target) for node in graph.graph.nodes if "apex4" in str(node.target)))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    with torch.no_grad():
        expected = layer(x, position_embeddings=positions)
        compiled = torch.compile(layer, backend=seen, fullgraph=True)
        assert torch.equal(compiled(x, position_embeddings=positions), expected)
    assert [sorted(count.values()) for count in counted] == [[2, 2]]  # behind norms, and the others
    assert torch.equal(layer(x, position_embeddings=positions), expected)  # nothing was left behind


def test_the_layer_of_a_meta_model_runs_without_data(demo_checkpoint: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = load(demo_checkpoint, "sm80").model.layers[0].mlp
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = layer(mode.from_tensor(torch.zeros(2, 5, 256, dtype=torch.bfloat16)))
    assert y.shape == (2, 5, 256) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_linears_are_put_in_order_for_every_call(
    bits: str, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_logits: torch.Tensor
) -> None:
    monkeypatch.setenv("APEX4_ACTIVATIONS", bits)
    if bits == "8":
        reference_logits = logits_of(AutoModelForCausalLM.from_pretrained(demo_checkpoint))
    monkeypatch.setattr(dispatch, "kernel_format", lambda device, bits=4: "s8" if bits == 8 else "sm90")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, device_map=device_map, offload_folder=tmp_path)
    for _ in range(2):
        with Calls() as calls:
            assert torch.equal(logits_of(model), reference_logits)
        assert calls.count["gemm"] == 3 * 4 + 3 * 7


# ---- one parent, any calls -------------------------------------------------------------------------------------------


class Parent(nn.Module):
    """Three linears that read x, called as `plan` says: pairs of a linear's name and the input's name."""

    def __init__(self, sizes: tuple[int, int, int], bias: bool, **formats: Any) -> None:
        super().__init__()
        layout = get_layout("rowmajor")
        self.plan: tuple[tuple[str, str], ...] = (("q", "x"), ("k", "x"), ("v", "x"))
        self.fails = False
        for seed, (name, n) in enumerate(zip("qkv", sizes, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            format = replace(LinearFormat(n, 200, 128, layout, "hadamard128", 0.9), **formats.get(name, {}))
            codes = torch.randint(-7, 8, (n, format.padded_k), dtype=torch.int8, generator=generator)
            scales = (torch.rand(n, format.groups, generator=generator) * 0.01 + 1e-3).half()
            has_bias = bias and name != "k"
            added = torch.randn(n, generator=generator).bfloat16() if has_bias else None
            setattr(self, name, Apex4Linear.from_codes(format, codes, scales, added))

    def members(self) -> tuple[Apex4Linear, ...]:
        return tuple(self.children())  # type: ignore[arg-type]

    def forward(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        results = [getattr(self, name)(inputs[which]) for name, which in self.plan]
        if self.fails:
            raise ValueError("as asked")
        return results


def made(
    sizes: tuple[int, int, int] = (128, 64, 192), bias: bool = True, format: str = "sm90", **formats: Any
) -> Parent:
    parent = Parent(sizes, bias, **formats)
    for member in parent.members():
        member.prepare(format)
    SharedInput(parent.members()).attach(parent)
    return parent


def some_input(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3)), 200, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def inputs() -> Iterator[dict[str, torch.Tensor]]:
    yield {"x": some_input(1), "z": some_input(2)}


def expected(parent: Parent, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [getattr(parent, name).reference(inputs[which]) for name, which in parent.plan]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("plan", "gemms"),
    [
        ("qx kx vx", 1), ("vx qx kx", 1), ("qx", 1), ("kx", 1), ("qx qx kx", 2), ("qx kx vx qx kx vx", 2),
        ("qx kz vx", 3), ("qx qz kx kz vx vz", 6), ("qx kx vx qz kz vz", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["sm90", "s8"])
def test_any_order_of_calls(format: str, plan: str, gemms: int, bias: bool, inputs: dict[str, torch.Tensor]) -> None:
    parent = made(bias=bias, format=format)
    parent.plan = tuple((call[0], call[1]) for call in plan.split())
    with Calls() as calls:
        found = parent(**inputs)
    assert same(found, expected(parent, inputs))
    assert calls.count == {"quantize": gemms, "gemm": gemms}


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 0), (1, 1)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    parent, x = made(), torch.randn(*shape, 200).bfloat16()
    assert same(parent(x=x), expected(parent, {"x": x}))


def test_outside_its_parents_call_a_linear_is_alone(inputs: dict[str, torch.Tensor]) -> None:
    parent = made()
    parent(**inputs)
    with Calls() as calls:
        assert torch.equal(parent.k(inputs["x"]), parent.k.reference(inputs["x"]))
    assert calls.count == {"quantize": 1, "gemm": 1}
    assert CallScope.of(parent).current() is None


def test_a_write_between_two_calls_is_seen(inputs: dict[str, torch.Tensor]) -> None:
    parent = made()
    x = inputs["x"]
    wanted = [parent.q.reference(x), parent.k.reference(x * 2)]

    def write(*_: Any) -> None:
        x.mul_(2)

    parent.q.register_forward_hook(write)
    parent.plan = (("q", "x"), ("k", "x"))
    assert same(parent(x=x), wanted)


def test_nothing_outlives_the_call(inputs: dict[str, torch.Tensor]) -> None:
    parent = made()
    for plan, fails in ((("q", "k", "v"), False), (("k",), False), (("q", "v"), True)):
        parent.plan, parent.fails = tuple((name, "x") for name in plan), fails
        x = some_input(3)
        alive = weakref.ref(x)
        if fails:
            with pytest.raises(ValueError, match="as asked"):
                parent(x=x)
        else:
            parent(x=x)
        del x
        gc.collect()
        assert alive() is None
    parent.fails = False
    assert same(parent(**inputs), expected(parent, inputs))


def test_results_of_one_call_survive_the_next(inputs: dict[str, torch.Tensor]) -> None:
    parent = made()
    first = parent(x=inputs["x"])
    kept = [y.clone() for y in first]
    parent(x=inputs["z"])
    assert same(first, kept)


@pytest.mark.parametrize("sizes", [(128, 64, 70), (70, 64, 64), (100, 36, 65)])
def test_where_weights_cannot_lie_together_codes_are_made_once(
    sizes: tuple[int, int, int], inputs: dict[str, torch.Tensor]
) -> None:
    parent = made(sizes)
    with Calls() as calls:
        found = parent(**inputs)
    assert same(found, expected(parent, inputs))
    assert calls.count == {"quantize": 1, "gemm": 3}


def test_only_linears_that_quantize_alike_share(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    layer = model.model.layers[0]
    own: dict[str, Any] = {"transform": TransformKind.HADAMARD, "transform_from": None, "activation_clip": 0.5}
    layer.self_attn.k_proj.format = replace(layer.self_attn.k_proj.format, **own)
    layer.mlp.up_proj.format = replace(layer.mlp.up_proj.format, **own)
    prepare_model(model, FAMILIES["LlamaForCausalLM"])
    assert layer.self_attn.q_proj.shared is layer.self_attn.v_proj.shared is not None
    assert layer.self_attn.k_proj.shared is None
    for module in model.modules():
        if isinstance(module, Apex4Linear) and module.shared is not None:
            module.shared.detach()
    wanted = logits_of(model)
    prepare_model(model, FAMILIES["LlamaForCausalLM"], "sm90")
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.shared is attention.v_proj.shared is not None
    assert attention.k_proj.shared is mlp.up_proj.shared is mlp.gate_proj.shared is None
    with Calls() as calls:
        assert torch.equal(logits_of(model), wanted)
    assert calls.count["gemm"] == 4 * model.config.num_hidden_layers + 2


def test_preparing_for_another_kernel_fuses_anew(inputs: dict[str, torch.Tensor]) -> None:
    parent = made()
    wanted = expected(parent, inputs)
    parent(**inputs)
    for member in parent.members():
        member.prepare("sm80")
    with Calls() as calls:
        assert same(parent(**inputs), wanted)
    assert calls.count == {"quantize": 1, "gemm": 1}
    for member in parent.members():
        member.prepare(None)
    assert same(parent(**inputs), wanted)


# ---- inputs that are computed where they are quantized ---------------------------------------------------------------


def test_norms_and_activations_are_tensors_outside_their_layer(demo_checkpoint: Path) -> None:
    model = load(demo_checkpoint, "sm90")
    plain = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer, other = model.model.layers[2], plain.model.layers[2]
    assert torch.equal(layer.input_layernorm(x), other.input_layernorm(x))
    assert torch.equal(layer.mlp.act_fn(x), other.mlp.act_fn(x))
    assert torch.equal(layer.mlp(x), other.mlp(x))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_linear_that_was_put_in_a_readers_place_gets_a_tensor(demo_checkpoint: Path) -> None:
    model, plain = load(demo_checkpoint, "sm90"), AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    torch.manual_seed(0)
    other = nn.Linear(256, model.model.layers[2].self_attn.k_proj.out_features, bias=False, dtype=torch.bfloat16)
    for each in (model, plain):
        each.model.layers[2].self_attn.k_proj = other
    with Calls() as calls:
        assert torch.equal(logits_of(model), logits_of(plain))
    assert calls.count["rms_norm_quantize"] == 2 * model.config.num_hidden_layers - 1


def test_a_layer_with_one_linear_kept_defers_nothing_to_it(
    tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call
) -> None:
    out = tmp_path / "out"
    options = ("--calib", calib, "--samples", 2, "--seq-len", 32, "--target", "none", "--recipe", "rtn", "--json")
    ignored = (
        "--ignore",
        "layers.0.self_attn.v_proj",
        "--ignore",
        "layers.1.mlp.up_proj",
        "--ignore",
        "layers.0.mlp.down_proj",
    )
    assert invoke("quantize", tiny_model(), "-o", out, *options, *ignored).exit_code == 0
    expected = logits_of(AutoModelForCausalLM.from_pretrained(out))
    with Calls() as calls:
        assert torch.equal(logits_of(load(out, "sm80")), expected)
    assert calls.count == {"rms_norm_quantize": 2, "quantize": 4, "silu_mul_quantize": 1, "gemm": 7}


def test_preparing_under_inference_mode_leaves_ordinary_tensors(inputs: dict[str, torch.Tensor]) -> None:
    parent = Parent((128, 64, 192), bias=True)
    with torch.inference_mode():
        for member in parent.members():
            member.prepare("sm90")
        SharedInput(parent.members()).attach(parent)
        parent(**inputs)
    assert not any(parameter.is_inference() for parameter in parent.parameters())
    assert same(parent(**inputs), expected(parent, inputs))
    parent.load_state_dict(Parent((128, 64, 192), bias=True).state_dict())
    assert same(parent(**inputs), expected(parent, inputs))
