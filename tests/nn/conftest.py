from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.nn.linear import Apex4Linear


@pytest.fixture
def small_llama() -> Callable[[], Any]:
    """Makes a Llama of two layers and random codes, always the same, not prepared for any kernel."""

    def make() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config).bfloat16().eval()
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                format = LinearFormat(
                    module.out_features, module.in_features, 128, get_layout("rowmajor"), "hadamard128", 0.9
                )
                codes = torch.randint(-7, 8, (format.out_features, format.padded_k), dtype=torch.int8)
                scales = (torch.rand(format.out_features, format.groups) * 0.01 + 1e-3).half()
                model.model.set_submodule(name, Apex4Linear.from_codes(format, codes, scales, None))
        return model

    return make
