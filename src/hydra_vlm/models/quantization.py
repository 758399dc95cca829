"""The base in four bits (QLoRA, Dettmers et al. 2023): NormalFloat 4 with double quantisation through bitsandbytes.

The decoder's linears alone are quantised. Tower, projector and output head keep their precision: the first two are a
small part of the memory and the projector is trained, the head's error would reach every logit.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from hydra_vlm.errors import ConfigError
from hydra_vlm.models.structure import find_parts

NONE, NF4 = "none", "nf4"
_VALUES = "_values_of"  # an attribute of a model whose plain linears hold quantised values


def require_bitsandbytes(asked: str) -> None:
    """Raises ConfigError, naming the key that asked for it, where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{asked} needs the package bitsandbytes, which is not installed: pip install 'hydra-vlm[bitsandbytes]', "
            "or leave the key at its default"
        )


def require_quantizable(kind: str, place: torch.device) -> None:
    """Check, before anything is loaded, that a base of this kind can be made on the device.

    Raises:
        ConfigError: the library is missing, or the device computes with no four-bit weights.
    """
    if kind == NONE:
        return
    require_bitsandbytes(f"quantization={kind}")
    if place.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"quantization={kind} on device {place}: bitsandbytes has four-bit kernels for CUDA and the CPU: "
            "set quantization=none, or another device"
        )


def quantized_loading(
    kind: str, config: PreTrainedConfig, model_class: Any, place: torch.device, dtype: torch.dtype, pattern: str | None
) -> dict[str, Any]:
    """What `from_pretrained` is to be told (`none`: nothing); what is kept in full is found on the meta device."""
    if kind == NONE:
        return {}
    with torch.device("meta"):
        shape: nn.Module = model_class._from_config(config)
    parts = find_parts(shape, pattern)
    wanted = set(parts.names())
    kept = sorted(n for n, m in shape.named_modules() if isinstance(m, nn.Linear) and n not in wanted)
    wish = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": wish, "device_map": {"": place}}


def quantization_of(model: nn.Module) -> str:
    """Whose values the base's linears have: nf4 for four-bit layers of bitsandbytes and what was made of them."""
    four_bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return NF4 if four_bit or getattr(model, _VALUES, NONE) == NF4 else NONE


def can_quantize(place: torch.device) -> bool:
    """Whether a base in four bits can be loaded here."""
    return importlib.util.find_spec("bitsandbytes") is not None and place.type in ("cuda", "cpu")


def dequantized(model: Any) -> Any:
    """The same model with plain float32 linears that hold the four-bit values, as merging and saving need them."""
    from bitsandbytes.functional import dequantize_4bit  # not installed where nobody asks for it

    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight = nn.Parameter(dequantize_4bit(module.weight.data, module.weight.quant_state).float())
            plain.bias = module.bias
            model.set_submodule(name, plain)
    for owner, key in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, key):
            delattr(owner, key)
    model.is_quantized = model.is_loaded_in_4bit = False
    setattr(model, _VALUES, NF4)
    return model.requires_grad_(False)


def keep_trainable(model: nn.Module) -> None:
    """Have four-bit layers on a CPU compute alike before and after they were first used without gradients.

    bitsandbytes repacks weights for a kernel of processors with AVX-512 when a layer first runs in evaluation mode, and
    that kernel has no backward pass: an adapter trained after an evaluation would silently get wrong gradients.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - a plain attribute to mypy
