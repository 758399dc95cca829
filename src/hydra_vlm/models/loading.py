"""Load a vision-language model with its processor, and know its parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import hydra_vlm.models.mobilevlm  # noqa: F401  (registers MobileVLM with the Auto classes)
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.structure import ModelParts, find_parts

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


def resolve_model(name: str) -> Path:
    """The folder of a model: `embedded` is the one in the package.

    Raises:
        ConfigError: the folder holds no model.
    """
    folder = EMBEDDED if name == "embedded" else Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model {name!r}: {folder} holds no config.json: give `embedded` or the folder of a saved model"
        )
    return folder


def load_model(name: str, device: str = "auto") -> LoadedModel:
    """Load model and processor from a folder (or the package), frozen, in evaluation mode.

    Weights are bfloat16 on a CUDA device that computes in it, float32 elsewhere.
    """
    folder, place = resolve_model(name), resolve_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    # The CPU kernels of fused attention lose to plain matrix products in the backward pass at bfloat16.
    attention = "eager" if place.type == "cpu" else "sdpa"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model = model.to(place).eval().requires_grad_(False)
    return LoadedModel(model, AutoProcessor.from_pretrained(folder), find_parts(model))
