"""Load a vision-language model with its processor, and know its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import hydra_vlm.models.mobilevlm  # noqa: F401  (registers MobileVLM with the Auto classes)
from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.faults import first_line
from hydra_vlm.files import reading
from hydra_vlm.graph import DECODER
from hydra_vlm.models.folder import require_readable
from hydra_vlm.models.held import require_held
from hydra_vlm.models.mobilevlm.original_layout import is_original
from hydra_vlm.models.processors import load_processor, require_own_processor
from hydra_vlm.models.quantization import NONE, keep_trainable, quantized_loading, require_quantizable
from hydra_vlm.models.structure import TOWER, ModelParts, find_parts
from hydra_vlm.models.weights import weight_files
from hydra_vlm.models.whole import load_whole
from hydra_vlm.reading import file_fault

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, its processor and its parts."""

    model: PreTrainedModel
    processor: Any
    parts: ModelParts


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else MPS, else the CPU; any torch device name otherwise.

    Raises:
        ConfigError: the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not a torch device: use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch sees no CUDA device: use auto or cpu")
    return device


def resolve_dtype(name: str, place: torch.device) -> torch.dtype:
    """The type of the weights: float32, bfloat16, or auto for what the device computes best in."""
    if name == "auto":
        return torch.bfloat16 if place.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def resolve_model(name: str) -> Path:
    """The folder of a model: `embedded` is the one in the package.

    Raises:
        ConfigError: the folder holds no model.
    """
    folder = EMBEDDED if name == "embedded" else Path(name)
    fault = file_fault(folder / "config.json")
    if fault:
        raise ConfigError(
            f"model {name!r}: {folder} holds no config.json (it {fault}): give `embedded` or a saved model's folder"
        )
    if is_original(require_readable(folder)):
        raise ConfigError(
            f"model {name!r} is a MobileVLM in its authors' layout: convert it once with "
            f"`hydra-vlm convert {name} NEW_FOLDER` and give the new folder"
        )
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"model {name!r}: {folder} holds an adapter_config.json, so transformers would load an adapter with the "
            "model: keep each in a folder of its own"
        )
    return folder


def load_model(
    name: str,
    device: str = "auto",
    decoder_pattern: str | None = None,
    adapt: Sequence[str] = (DECODER,),
    dtype: str = "auto",
    quantization: str = NONE,
    attention: str = "auto",
) -> LoadedModel:
    """Load model and processor from a folder (or the package), frozen, in evaluation mode.

    Any vision-language model that transformers knows, or a text decoder, whose processor is its tokenizer. `dtype` of
    the weights is float32 or bfloat16; auto: bfloat16 on a CUDA device that computes in it, else float32.
    `attention` is transformers' name of an implementation; auto: eager on a CPU (sdpa in a tower that is not adapted),
    else sdpa. `decoder_pattern` and `adapt` are for `find_parts`. `quantization` nf4 stores the decoder's linears in
    four bits.

    Raises:
        ConfigError: a model of a kind that cannot be loaded, a decoder that is not found, attention that is missing.
        CheckpointError: the folder's weights are not what its configuration asks for, or its processor is another's.
    """
    folder, place = resolve_model(name), resolve_device(device)
    require_quantizable(quantization, place)
    config = model_configuration(folder)
    weights = resolve_dtype(dtype, place)
    mixed = attention == "auto" and place.type == "cpu"
    if attention == "auto":
        # The CPU kernels of fused attention lose to plain matrix products in the backward pass, and win without one.
        attention = "eager" if mixed else "sdpa"
    kind = model_class(config)
    require_held(kind, config, folder, weight_files(folder))
    how = quantized_loading(quantization, config, kind, place, weights, decoder_pattern)
    with reading(folder, "fetch or save the model again", CheckpointError):
        try:
            model: Any = load_whole(kind, folder, dtype=weights, attn_implementation=attention, **how)
        except ImportError as problem:
            asked = f"attention={attention}" if "ttention" in str(problem) else f"model {folder}"
            raise ConfigError(f"{asked}: {first_line(problem)} Install it, or take what asks for it out") from None
    model = (model if how else model.to(place)).eval().requires_grad_(False)
    keep_trainable(model)
    parts = find_parts(model, decoder_pattern, adapt)
    tower = model.get_submodule(parts.tower) if parts.tower else None
    if mixed and TOWER not in adapt and isinstance(tower, PreTrainedModel) and tower._supports_sdpa:
        tower.set_attn_implementation("sdpa")
    processor = load_processor(folder, config)
    require_own_processor(folder, processor, model)
    return LoadedModel(model, processor, parts)


def model_configuration(folder: Path) -> PreTrainedConfig:
    """The configuration of a saved model; raises ConfigError for a kind that transformers does not know."""
    with reading(folder / "config.json", "put back the one that the model was saved with", ConfigError):
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError as problem:
            if "trust_remote_code" in str(problem):
                raise ConfigError(f"model {folder} brings Python code of its own, which is never run here") from None
            raise ConfigError(f"model {folder}: {' '.join(str(problem).split())[:400]}") from None


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class for image and text in, text out; where it has none, the one for text alone.

    Raises:
        ConfigError: it has neither.
    """
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found: type[PreTrainedModel] = mapping[type(config)]
            return found
    raise ConfigError(
        f"a model of type {config.model_type!r} neither answers questions about images nor writes text: give the "
        "folder of a vision-language model or of a text decoder"
    )
