"""Formats of other programs that `apex4 export` writes. Apart, so that the command line need not import torch."""

from __future__ import annotations

from enum import StrEnum


class ExportFormat(StrEnum):
    VLLM_HUMMING = "vllm-humming"  # the quantization method "humming" of vLLM from 0.33 on
