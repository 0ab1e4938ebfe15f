"""peft: adapters on quantized linears are refused by name, as README says, and never trained in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")


def test_an_adapter_on_a_quantized_linear_is_refused(demo_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    assert not model.hf_quantizer.is_trainable  # the Trainer of transformers refuses by this
    with pytest.raises(ValueError, match=r"Apex4Linear.* is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
