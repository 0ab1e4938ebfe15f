"""The sizes of published models, for benchmarks that need no weights of theirs. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """`intermediate`: of the MLP, or of each expert. Without `experts` it is a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int  # at least that of the demo's tokenizer, which the model gets
    head_dim: int | None = None  # None: hidden / heads
    experts: int = 0
    experts_per_token: int = 8

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer: sizes by name. Those with one size are gains of norms."""
        queries, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        attention: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, queries),
        }  # fmt: skip
        norms: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("input_layernorm", "post_attention_layernorm"), (self.hidden,)
        )
        if not self.experts:
            return attention | norms | self._mlp("mlp")
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_width,))
        mixture: dict[str, tuple[int, ...]] = {"mlp.gate": (self.experts, self.hidden)}
        for expert in range(self.experts):
            mixture |= self._mlp(f"mlp.experts.{expert}")
        return attention | norms | mixture

    def _mlp(self, name: str) -> dict[str, tuple[int, ...]]:
        entering, leaving = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return {f"{name}.gate_proj": entering, f"{name}.up_proj": entering, f"{name}.down_proj": leaving}


SHAPES = {
    "Llama-3-8B": Shape(4096, 14336, 32, 8, 128256),
    "Llama-2-70B": Shape(8192, 28672, 64, 8, 32000),
    "Qwen3-235B-A22B": Shape(4096, 1536, 64, 4, 151936, head_dim=128, experts=128),
}
