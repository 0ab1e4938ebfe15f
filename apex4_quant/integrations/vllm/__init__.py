"""vLLM: `vllm serve OUT` of an apex4 checkpoint, as a plugin of unmodified vLLM (0.26 to 0.32). docs/serving.md.

The entry point `vllm.general_plugins` of this package is `register`. vLLM calls it in each of its processes before it reads
a model's configuration. It adds the quantization method `apex4` under the name that `quant_method` of config.json has, so that
no option is needed. Importing this package imports neither torch nor vLLM; vLLM's layers are imported when a model is built.

From a tensor of a safetensors file to an operand of a kernel:

    config.json          quantization_config -> format.quant_config.QuantConfig: read and checked, config.Apex4Config
    a layer is built     vLLM has one layer for linears that read one tensor (`qkv_proj` for q, k and v). names.py says which
                         linears of the checkpoint it stands for. slices.py says which rows and input features of them this
                         tensor-parallel rank computes, and refuses a cut through a tile or a group. The layer gets
                             weight_packed    uint8   [sum of tiles, K / 128, 64 T]   in the checkpoint's layout
                             weight_scale     float16 [sum of tiles, G, T]
                             input_transform  float16 [K / 128 or 1, rows, 128] with 128, 184 or 185 rows, where the transform is learned
                         of this rank's sizes. Members' tiles stand one behind the other.
    weights are loaded   vLLM hands each stored tensor to the parameter's loader (parameters.py), which compares shape and
                         dtype with the format's, cuts out the rank's tiles and blocks, and copies them. The transform of an
                         input is stored by one of its readers and is loaded from that one only.
    after loading        linear.py: every tensor must have come, codes and scales must be legal. The members' rows become one
                         matrix [N, K] without the padding between them, in the layout that the device's kernels read
                         (`weight_packed`, `weight_scale`); nothing is done where the tiles are that already. The learned
                         matrices become what the quantizer kernel reads (`prepack_matrix`), the bias float32.
    a step               apply: one call of torch.ops.apex4.linear quantizes the input once and multiplies by all members.

vLLM's own code does the rest as for every other model: biases, embeddings, heads, linears that stayed unquantized, attention.

Where a GPU has no kernels the load fails, unless APEX4_KERNEL=reference asks for PyTorch operations. A CPU has PyTorch operations
only (backend.py): there the weights are kept as float32 with their scales in them, as long as they take less than half of the
free memory. One line in the log says what computes.

Mixtures of experts: experts.py. Compilation: the operators are opaque to torch.compile and have fake implementations; what is
constant in a compiled graph (clip, sizes, kernel) is in the key of vLLM's cache, through the model's config.json and
`Apex4Config.maybe_update_config`.
"""

from __future__ import annotations


def register() -> None:
    """Add the quantization method `apex4` to vLLM. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ...format.quant_config import QUANT_METHOD
    from .config import Apex4Config

    register_quantization_config(QUANT_METHOD)(Apex4Config)
