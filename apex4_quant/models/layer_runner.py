"""Runs the real transformers model one decoder layer at a time, on weights that are only there while it runs.

The model's skeleton lives on the meta device. Its own forward is run once with the layers replaced by recorders, which
yields what every layer is called with (rotary embeddings, masks, positions) without knowing the architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from transformers import AutoConfig, PreTrainedModel

from ..errors import Apex4Error
from ..hardware.devices import multiplies_fast, multiply_in_float32, room_on_host
from .expert_tensors import published_name
from .experts import unfuse_experts
from .replaying import KEPT_BYTES, Replaying
from .source import ModelSource
from .states import States, StoredStates, brought, put

# Of short windows so many go through a layer at once; of long ones, one. On a CPU more would only take more memory. A GPU
# has then less to do than the calls that start it take.
BATCH_TOKENS, BATCH_TOKENS_ON_GPU = 2048, 8192
HEAD_TOKENS = 512  # whose logits are there at once


def batch_tokens(length: int, on_gpu: bool) -> int:
    """How many tokens of windows of `length` go through a layer at once."""
    return max(length, (BATCH_TOKENS_ON_GPU if on_gpu else BATCH_TOKENS) // length * length)


class _Recorder(nn.Module):
    """Stands where a decoder layer was: keeps the arguments, passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models choose a mask by an attribute of the layer.
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, str | int | float | bool):
                setattr(self, name, value)
        self.kwargs: dict[str, Any] = {}
        self.hidden_states: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.kwargs, self.hidden_states = kwargs, hidden_states
        return hidden_states


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _InputSeen(Exception):
    """Ends a forward pass once the tensor asked for has been seen."""


def _skeleton(source: ModelSource, dtype: torch.dtype) -> tuple[Any, PreTrainedModel]:
    """The model on the meta device. Raises Apex4Error if config.json or the tensors are not those of such a model."""
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, source.family.auto_class).from_config(config, dtype=dtype)
        unfuse_experts(model)
        model.eval()
    except Exception as error:  # transformers raises whatever the missing or odd field leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Apex4Error(
            f"{source.folder / 'config.json'} does not describe a model ({type(error).__name__}: {reason}): get it again"
        ) from error
    family = source.family
    # What stands beside the language model goes from file to file, under whichever names.
    expected = {name: tensor for name, tensor in model.state_dict().items() if not source.is_beside(name)}
    if config.tie_word_embeddings and f"{family.head}.weight" not in source.infos:
        del expected[f"{family.head}.weight"]
    for name, tensor in expected.items():
        info = source.infos.get(name)
        if info is None:
            name = published_name(name, source.stored_names, family)
            raise Apex4Error(f"{source.name} has no tensor {name} (missing): the checkpoint is incomplete")
        if info.shape != tuple(tensor.shape):
            raise Apex4Error(
                f"{info.stored or name} in {info.file} has shape {list(info.shape)} and config.json implies "
                f"{list(tensor.shape)}"
            )
    for name, info in source.infos.items():
        if name.startswith(f"{family.layers}.") and name not in expected:
            raise Apex4Error(f"{info.stored or name} in {info.file} is not of the model that config.json describes")
    return config.get_text_config(), model


class LayerRunner:
    """`device` and `dtype` are those the layers compute in; hidden states rest on the CPU in that dtype, or on the disk
    (`keep_states_in`)."""

    def __init__(self, source: ModelSource, device: str, dtype: torch.dtype) -> None:
        self._family = source.family
        self.device, self.dtype = torch.device(device), dtype
        self.config, self.model = _skeleton(source, dtype)
        if not multiplies_fast(self.device, dtype):
            multiply_in_float32(self.model)
        self._set(self._family.rotary, type(self._get(self._family.rotary))(self.config).to(self.device))
        layers = self._get(self._family.layers)
        assert isinstance(layers, nn.ModuleList)
        self._layers = layers
        self._calls: list[dict[str, Any]] = []
        self._replaying = Replaying(remembering=self.device.type == "cpu")
        self._states_folder: Path | None = None

    def _get(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _set(self, name: str, module: nn.Module) -> None:
        self.model.set_submodule(name, module)

    @property
    def reads_ahead_of(self) -> torch.device | None:
        """The device, if weights of the next layer are read while it computes one: a GPU leaves the host time for it, and memory
        unless states have to stay on the disk."""
        return self.device if self.device.type == "cuda" and self._states_folder is None else None

    def keep_states_in(self, folder: Path) -> None:
        """From now on states that leave a layer are written into this folder, and nothing of a layer is remembered."""
        self._states_folder = folder
        self._replaying = Replaying(remembering=False)

    @torch.no_grad()
    def embed(self, samples: torch.Tensor, embedding: torch.Tensor) -> States:
        """Token windows int64 [S, L] and the embedding matrix -> hidden states entering layer 0, [S, L, hidden]."""
        weight = embedding.to(self.device, self.dtype)
        states = self.resting((*samples.shape, self.config.hidden_size))
        for window, ids in enumerate(samples):
            embedded = nn.functional.embedding(ids[None].to(self.device), weight)
            if self._family.scaled_embedding:
                # In this order and precision, as the class does it: the scale is rounded before it is applied.
                embedded = embedded * torch.tensor(self.config.hidden_size**0.5, device=self.device).to(self.dtype)
            put(states, window, self._run_recorders(embedded))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return states

    def resting(self, shape: Sequence[int]) -> States:
        """Room for hidden states. A GPU copies memory without the CPU, while both go on, if it may be pinned."""
        if self._states_folder is not None:
            return StoredStates.new(self._states_folder, shape, self.dtype)
        return room_on_host(shape, self.dtype) if self.device.type == "cuda" else torch.empty(shape, dtype=self.dtype)

    @torch.no_grad()
    def prepare(self, seq_len: int) -> None:
        """Record what every layer is called with, for windows of `seq_len` tokens."""
        hidden = torch.zeros(1, seq_len, self.config.hidden_size, device=self.device, dtype=self.dtype)
        self._run_recorders(hidden)

    def _run_recorders(self, embeddings: torch.Tensor) -> torch.Tensor:
        recorders = [_Recorder(layer) for layer in self._layers]
        norm = self._get(self._family.final_norm)
        self._set(self._family.layers, nn.ModuleList(recorders))
        self._set(self._family.final_norm, nn.Identity())
        try:
            self._get(self._family.language_model)(inputs_embeds=embeddings, use_cache=False)
        finally:
            self._set(self._family.layers, self._layers)
            self._set(self._family.final_norm, norm)
        self._calls = [recorder.kwargs for recorder in recorders]
        assert recorders[0].hidden_states is not None
        return recorders[0].hidden_states

    def load_layer(self, index: int, tensors: dict[str, torch.Tensor]) -> nn.Module:
        """Decoder layer `index` on the device, made of the source's tensors of that layer (checked by `_skeleton`)."""
        prefix = self._family.layer_prefix(index)
        layer = self._layers[index]
        self._replaying.forget()
        state = {n.removeprefix(prefix): t.to(self.device, self._dtype_of(n)) for n, t in tensors.items()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False)

    def _dtype_of(self, name: str) -> torch.dtype:
        """What transformers loads the tensor in: of some (a router's corrections) it keeps float32."""
        wide = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        return torch.float32 if set(name.split(".")) & set(wide) else self.dtype

    def arguments(self, index: int) -> dict[str, Any]:
        """What layer `index` is called with beside the hidden states: rotary embeddings, masks, positions. See `prepare`."""
        return self._calls[index]

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index`, on the meta device unless it is loaded."""
        return self._layers[index]

    def drop_layer(self, index: int) -> None:
        self._layers[index].to("meta")
        self._replaying.forget()

    @torch.no_grad()
    def run_layer(self, index: int, hidden: States) -> States:
        """hidden [S, L, H] through the layer as it is now -> the same shape. What `calls_of` remembers is used."""
        out = self.resting(hidden.shape)
        done = 0
        with self._replaying.during(self._layers[index]):
            for batch in self._batches(hidden):
                result = self._layers[index](batch, **self._calls[index])
                result = result[0] if isinstance(result, tuple) else result
                put(out, done, result)
                done += len(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # until then it is on its way
        return out

    def run_with_graph(self, index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [S, L, H] through the layer -> what enters and what leaves it, both of that shape and on the device, with
        what a backward pass from the second to the first needs.

        Attention by plain products: its gradients are the same in every run. Memory is for all of `hidden` at once.
        """
        dtype = next(self._layers[index].parameters()).dtype
        batch = hidden.to(self.device, dtype).requires_grad_()
        calls = tree_map(lambda value: _in_dtype(value, dtype), self._calls[index])
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            result = self._layers[index](batch, **calls)
        return batch, result[0] if isinstance(result, tuple) else result

    def output_gradients(
        self, hidden: torch.Tensor, tensors: dict[str, torch.Tensor], seed: int, before: int = 0
    ) -> torch.Tensor:
        """hidden [S, L, H] leaving the last layer -> of the same shape, float32 on the CPU, the gradient of -log p(y) with
        respect to them, y drawn for every token from the model's own distribution p.

        `tensors` are the final norm's and the head's (the embedding, where they are tied). Its mean square is the Fisher
        information: KL(p, p of hidden + e) = E (g . e)^2 / 2 to second order. `before`: tokens of other processes that come
        before these, and have drawn.
        """
        family, generator = self._family, torch.Generator().manual_seed(seed)
        torch.rand(before, 1, generator=generator)
        norm = self._get(family.final_norm)
        weight = tensors.get(f"{family.head}.weight", tensors.get(f"{family.embedding}.weight"))
        assert weight is not None
        weight, cap = weight.to(self.device).float(), getattr(self.config, "final_logit_softcapping", None)
        scaling = getattr(self.config, "logits_scaling", 1.0)
        norm.load_state_dict({"weight": tensors[f"{family.final_norm}.weight"].to(self.device).float()}, assign=True)
        gradients = []
        for states in hidden.flatten(0, 1).split(HEAD_TOKENS) if len(hidden) else ():
            states = states.to(self.device).float().requires_grad_()
            with torch.enable_grad():
                logits = nn.functional.linear(norm(states), weight) / scaling
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                chance = torch.rand(len(states), 1, generator=generator).to(self.device)
                drawn = (logits.detach().softmax(-1).cumsum(-1) < chance).sum(-1).clamp_max(logits.shape[-1] - 1)
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            gradients.append(states.grad.cpu())
        norm.to("meta")
        return torch.cat(gradients).view(hidden.shape) if gradients else torch.empty(hidden.shape)

    @contextlib.contextmanager
    def widened(self, index: int) -> Iterator[nn.Module]:
        """The layer, in float32 as long as this lasts if its products are slow in its own dtype here (devices.py).

        Backward passes suffer most. Its parameters are the same objects and have the same values afterwards.
        """
        layer = self._layers[index]
        if multiplies_fast(self.device, self.dtype):
            yield layer
            return
        kept = [(tensor, tensor.data) for tensor in (*layer.parameters(), *layer.buffers())]
        try:
            for tensor, data in kept:
                tensor.data = _in_dtype(data, torch.float32)
            yield layer
        finally:
            for tensor, data in kept:
                tensor.data = data

    def _batches(self, hidden: States) -> Iterator[torch.Tensor]:
        """hidden [S, L, H] by a few windows at a time, on the device. A batch is there until the next is asked for."""
        length = hidden.shape[1]
        return brought(hidden.split(batch_tokens(length, self.device.type == "cuda") // length), self.device)

    @torch.no_grad()
    def calls_of(
        self, index: int, module: str, hidden: States, settled: tuple[str, ...] = (), last: bool = False
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """What `module` of the layer is called with, a few windows at a time. The rest of the layer is not computed.

        For a linear that is one tensor [B, L, K], for experts their hidden_states [B L, H] and routing (experts.py).
        `settled` are modules of the layer that run before it and will not change until the next layer is loaded: they
        are computed in the first pass that names them only. `last`: nothing but `module`, a linear, will change in the
        module that holds it (replaying.py). The iterator must be exhausted. What it gives is there until the next is asked for.
        """
        seen: list[tuple[torch.Tensor, ...]] = []

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args)
            raise _InputSeen

        handle = self._layers[index].get_submodule(module).register_forward_pre_hook(stop)
        try:
            with self._replaying.during(self._layers[index], settled):
                if last:
                    self._replaying.begin_keeping(module, max(KEPT_BYTES, hidden.nbytes))
                for batch in self._batches(hidden):
                    try:
                        self._layers[index](batch, **self._calls[index])
                    except _InputSeen:
                        call = seen.pop()
                        if last:
                            self._replaying.keep(call[0])
                        yield call
                    else:
                        raise Apex4Error(f"{self._family.layer_prefix(index)}{module} is never run by its layer")
        finally:
            handle.remove()
