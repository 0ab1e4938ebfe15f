"""The float model as a recipe wants it before quantization: its tensors on the way from the source to quantization.

One decoder layer at a time, in float32 and rounded once, to the dtype it came in. Everything depends on the source, the
recipe, the seed and the hidden states alone, so a resumed run writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..distributed.group import Group
from ..errors import Apex4Error, UsageError
from ..hardware.dtype_names import wider_than
from ..models.families import InputGroup
from ..models.layer_runner import LayerRunner
from ..models.source import ModelSource
from ..models.states import States
from ..recipes import Recipe
from .function_preserving import Tensors, balance, merged_by_norm, rotate_reader, rotate_stream, rotate_values
from .orthogonal import Orthogonal, derived_seed

EMBEDDING_ROWS_AT_ONCE = 8192  # of an embedding that are float32 at a time


def require_rotatable(source: ModelSource, recipe: Recipe) -> None:
    """Raise UsageError if the recipe rotates the residual stream and the architecture does not let it."""
    if recipe.rotation and not source.family.rotatable:
        raise UsageError(
            f"recipe {recipe.name!r} rotates the residual stream, which {source.family.architecture} does not allow "
            "(what its layers add to the stream passes a norm first): use another recipe, such as apex4"
        )


class Rewriter:
    """`say` is told what a user should know of the changes."""

    def __init__(
        self,
        source: ModelSource,
        runner: LayerRunner,
        recipe: Recipe,
        seed: int,
        say: Callable[[str], None],
        group: Group | None = None,
    ) -> None:
        """Each process of `group` has hidden states of its own."""
        require_rotatable(source, recipe)
        self._group = group or Group()
        self._source, self._family, self._runner = source, source.family, runner
        self._rotation, self._diagonal = recipe.rotation, recipe.diagonal
        self._seed, self._say = seed, say
        # Of the parsed config: config.json may leave them to the class's defaults.
        self._kv_heads = int(runner.config.num_key_value_heads)
        self._tied = bool(runner.config.tie_word_embeddings)
        self._reported: set[str] = set()

    @cached_property
    def _stream(self) -> Orthogonal:
        return Orthogonal(int(self._source.config["hidden_size"]), derived_seed(self._seed, "stream"))

    def config_changes(self) -> dict[str, Any]:
        """What config.json says otherwise than the source's."""
        return {"tie_word_embeddings": False} if self._rotation and self._tied else {}

    def embedding(self, tensors: Tensors) -> Tensors:
        """The embedding's tensors, changed in place."""
        if self._rotation:
            for weight in tensors.values():
                self._by_rows(weight, self._stream.apply)
        return tensors

    def stream_gradients(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients by states of the source's residual stream, [..., hidden], as those by the rewritten one's, in float32 if they are
        others."""
        return self._stream.apply(gradients.float()) if self._rotation else gradients

    def outer(self, tensors: Tensors) -> Tensors:
        """Everything outside the layers but the embedding; a head that was the embedding is added."""
        if not self._rotation:
            return tensors
        head, norm = f"{self._family.head}.weight", f"{self._family.final_norm}.weight"
        if self._tied:
            embedding = f"{self._family.embedding}.weight"
            tensors[head] = self._source.read([embedding])[embedding]
            self._say(f"{head} is written: the rotated embedding and head are no longer one tensor")
        gain = tensors[norm].to(self._runner.device, torch.float32) + self._family.norm_offset

        def read(rows: torch.Tensor) -> torch.Tensor:
            rotate_reader(rows, gain, self._stream)
            return rows

        self._by_rows(tensors[head], read)
        tensors[norm].fill_(1 - self._family.norm_offset)
        return tensors

    def layer(self, index: int, stored: Tensors, hidden: States) -> Tensors:
        """A decoder layer's tensors, under their full names, rewritten; `stored` is used up.

        hidden [S, L, H] are the calibration states that enter the layer. Raises Apex4Error if they lead to a value that
        is not finite.
        """
        if not self._rotation and not self._diagonal:
            return stored
        prefix = self._family.layer_prefix(index)
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        tensors = {
            name.removeprefix(prefix): stored.pop(name).to(self._runner.device, torch.float32) for name in dtypes
        }
        input_groups = merged_by_norm(self._family.groups(self._source.config, index))
        if self._rotation:
            writers = self._family.residual_writers(self._source.config, index)
            rotate_stream(tensors, input_groups, writers, self._family.norm_offset, self._stream)
        if self._diagonal:  # after R1, which takes the gains in which it is folded; before R2, which spreads channels
            self._balance(index, tensors, input_groups, hidden)
        if self._rotation:
            self._rotate_values(index, tensors, input_groups)
        return {name: tensors.pop(name.removeprefix(prefix)).to("cpu", dtype) for name, dtype in dtypes.items()}

    def _rotate_values(self, index: int, tensors: Tensors, input_groups: list[InputGroup]) -> None:
        for input_group in input_groups:
            producer = input_group.producer
            if producer is not None and producer.per_head and not producer.gated:
                width = tensors[f"{input_group.linears[0]}.weight"].shape[1] // int(
                    self._runner.config.num_attention_heads
                )
                rotations = [
                    Orthogonal(width, derived_seed(self._seed, "values", index, head)) for head in range(self._kv_heads)
                ]
                rotate_values(tensors, input_group, self._kv_heads, rotations)

    def _balance(self, index: int, tensors: Tensors, input_groups: list[InputGroup], hidden: States) -> None:
        prefix = self._family.layer_prefix(index)
        named = {prefix + n: t for n, t in tensors.items()}
        squares = mean_squares(self._runner, index, named, input_groups, hidden, self._group)
        # Producers first: their rows are read by the norms' readers, whose sums of squares then are the final ones.
        for input_group in sorted(input_groups, key=lambda input_group: input_group.norm is not None):
            mean_square = squares.get(input_group)
            if mean_square is None:
                continue
            if not bool(torch.isfinite(mean_square).all()):
                raise Apex4Error(
                    f"the input of {prefix}{input_group.linears[0]} is not finite: {wider_than(self._runner.dtype)}"
                )
            offset, alpha = self._family.norm_offset, self._diagonal
            folded = balance(
                tensors, input_group, mean_square, kv_heads=self._kv_heads, norm_offset=offset, alpha=alpha
            )
            if not folded and input_group.linears[0] not in self._reported:
                self._reported.add(input_group.linears[0])
                self._say(f"{', '.join(input_group.linears)}: the diagonal can be folded nowhere and is left away")

    def _by_rows(self, weight: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for rows in weight.split(EMBEDDING_ROWS_AT_ONCE):
            rows.copy_(change(rows.to(self._runner.device, torch.float32)))


def mean_squares(
    runner: LayerRunner,
    index: int,
    tensors: Tensors,
    input_groups: list[InputGroup],
    hidden: States,
    group: Group | None = None,
) -> dict[InputGroup, torch.Tensor]:
    """E[x_k^2] over the calibration tokens at every input of a layer, float64 [K], from one pass in the model's dtype, over the
    `hidden` states of all processes.

    `tensors` are the layer's, under full names. An expert that no token reaches has no entry.
    """
    module = runner.load_layer(index, tensors)
    sums: dict[InputGroup, torch.Tensor] = {}
    tokens: dict[InputGroup, int] = {}

    def add(input_group: InputGroup, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        sums[input_group] = sums.get(input_group, 0) + rows.square().sum(0).double()
        tokens[input_group] = tokens.get(input_group, 0) + len(rows)

    handles = [_watch(module, input_group, partial(add, input_group)) for input_group in input_groups]
    try:
        runner.run_layer(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    group = group or Group()
    for input_group in input_groups:
        linear = module.get_submodule(input_group.linears[0])
        assert isinstance(linear, nn.Linear)
        none = torch.zeros(linear.in_features, dtype=torch.float64, device=runner.device)
        sums[input_group] = group.sum(sums.get(input_group, none))
        (tokens[input_group],) = group.sum(torch.tensor([tokens.get(input_group, 0)])).tolist()
    return {input_group: total / tokens[input_group] for input_group, total in sums.items() if tokens[input_group]}


def _watch(module: nn.Module, input_group: InputGroup, see: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Show `see` the group's input. Of what comes from a norm that is its output: experts read only a part each."""
    if input_group.norm is not None:
        return module.get_submodule(input_group.norm).register_forward_hook(lambda _, args, output: see(output))
    return module.get_submodule(input_group.linears[0]).register_forward_pre_hook(lambda _, args: see(args[0]))
