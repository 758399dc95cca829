"""A MobileVLM from parts: a language model, a vision tower, and a new projector between them.

    parts = Parts(*load_decoder(llm), *load_tower(vision))
    model, processor = compose(parts, "ldpnetv2", seed=42)

The modules of the parts are taken over as they are, so nothing is held twice in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from hydra_vlm.errors import ConfigError
from hydra_vlm.models.folder import require_readable, require_tokenizer_possible
from hydra_vlm.models.held import require_held
from hydra_vlm.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration, MobileVLMProcessor
from hydra_vlm.models.mobilevlm.projector import PROJECTORS, build_projector
from hydra_vlm.models.mobilevlm.towers import TOWERS, grid_side, tower_kind
from hydra_vlm.models.weights import weight_files
from hydra_vlm.models.whole import load_whole
from hydra_vlm.reading import file_fault, read_object

_WITH_TOWER = ("clip", "siglip")  # whole image-text models; their `vision_model` is the tower
_IMAGE_SETTINGS = ("image_mean", "image_std", "resample")


@dataclass(frozen=True)
class Parts:
    """A decoder with its head and tokenizer, and a tower with what its image processor does differently."""

    decoder: PreTrainedModel
    tokenizer: Any
    tower: PreTrainedModel
    image_settings: Mapping[str, Any] = field(default_factory=dict)


def compose(
    parts: Parts, projector: str, seed: int = 42
) -> tuple[MobileVLMForConditionalGeneration, MobileVLMProcessor]:
    """One model in the decoder's dtype and its processor; the projector's first weights follow from `seed`.

    `<image>` becomes a token of its own behind the vocabulary; the embeddings keep their size, since the model never
    looks it up.

    Raises:
        ConfigError: an unknown projector, a grid that is not square, or a decoder whose head does more than a matrix
            product.
    """
    if projector not in PROJECTORS:
        raise ConfigError(f"projector {projector!r} does not exist: choose one of {', '.join(PROJECTORS)}")
    config = _config(parts, projector)
    tokenizer = parts.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    processor = MobileVLMProcessor.from_config(config, tokenizer, **parts.image_settings)
    config.image_token_id = processor.image_token_id
    with torch.device("meta"):  # the shell alone; every part of it is replaced
        model = MobileVLMForConditionalGeneration(config)
    head = parts.decoder.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(f"{type(parts.decoder).__name__} has no plain linear output head: use a LLaMA-like decoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_projector(projector, config.vision_config.hidden_size, config.text_config.hidden_size)
    model.model.language_model = parts.decoder.base_model
    model.model.vision_tower = parts.tower
    model.model.mm_projector = made
    model.lm_head = head
    model.generation_config = parts.decoder.generation_config
    model = model.to(parts.decoder.dtype).eval().requires_grad_(False)
    _require_same_logits(model, parts.decoder)
    _require_grid(model)
    return model, processor


def load_decoder(path: Path) -> tuple[PreTrainedModel, Any]:
    """Language model and tokenizer of a folder, or of a GGUF file (dequantised; needs the `gguf` package).

    Raises:
        ConfigError: no decoder there.
    """
    gguf = {} if path.is_dir() else {"gguf_file": path.name}
    folder = path if path.is_dir() else path.parent
    fault = gguf and file_fault(path)
    if fault or (gguf and path.suffix != ".gguf"):
        raise ConfigError(
            f"--llm {path} {fault or 'is no GGUF file'}: give the folder of a saved language model, or a GGUF file"
        )
    if not gguf:
        config = _read_config(folder, "--llm")
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(
                f"--llm {path} holds a model of type {config.model_type!r}, which is no text decoder: give the folder "
                "of a causal language model such as LLaMA"
            )
        require_held(AutoModelForCausalLM, config, folder, weight_files(folder))
        with torch.device("meta"):
            _require_like_llama(AutoModelForCausalLM.from_config(config), path)
    decoder = load_whole(AutoModelForCausalLM, folder, dtype="auto", **gguf)
    for key in ("quantization_config", "_pre_quantization_dtype"):  # what is loaded is no longer quantised
        if gguf and hasattr(decoder.config, key):
            delattr(decoder.config, key)
    _require_like_llama(decoder, path)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **gguf)
    if not tokenizer.is_fast:
        raise ConfigError(f"--llm {path} holds no fast tokenizer: save its tokenizer.json there")
    return decoder, tokenizer


def _require_like_llama(decoder: PreTrainedModel, path: Path) -> None:
    if not hasattr(decoder.base_model, "embed_tokens"):
        raise ConfigError(
            f"--llm {path}: {type(decoder).__name__} is not built like LLaMA (no embed_tokens): use a decoder that is"
        )


def load_tower(path: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Vision tower of a folder and the settings of the image processor saved beside it.

    The folder holds a tower (CLIPVisionModel, SiglipVisionModel, EfficientNet-Lite) or a whole CLIP or SigLIP model.

    Raises:
        ConfigError: no known tower there.
    """
    config = _read_config(path, "--vision")
    if config.model_type not in (*TOWERS, *_WITH_TOWER):
        raise ConfigError(
            f"--vision {path} holds a model of type {config.model_type!r}, which is no known vision tower: use one of "
            f"{', '.join((*_WITH_TOWER, *TOWERS))}"
        )
    require_held(AutoModel, config, path, weight_files(path))
    loaded: Any = load_whole(AutoModel, path, dtype="auto")
    return loaded.vision_model if config.model_type in _WITH_TOWER else loaded, _image_settings(path)


def _read_config(folder: Path, option: str) -> Any:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{option} {folder} holds no config.json: give the folder of a saved transformers model")
    require_readable(folder)
    require_tokenizer_possible(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as problem:
        raise ConfigError(f"{option} {folder}: {str(problem).splitlines()[0]}") from None


def _image_settings(folder: Path) -> dict[str, Any]:
    """Normalisation and resampling as the tower was trained with, where a processor is saved beside it."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            saved = read_object(folder / name)
            saved = saved.get("image_processor", saved)
            return {key: saved[key] for key in _IMAGE_SETTINGS if saved.get(key) is not None}
    return {}


def _config(parts: Parts, projector: str) -> MobileVLMConfig:
    vision = parts.tower.config
    try:
        side = grid_side(vision)
        kind = tower_kind(vision)
    except ValueError as problem:
        raise ConfigError(f"the vision tower cannot be used: {problem}") from None
    if side < 2:
        raise ConfigError(f"the vision tower gives {side} x {side} patches: a projector needs at least 2 x 2")
    if not isinstance(vision.image_size, int):
        vision.image_size = vision.image_size[0]
    for part in (vision, parts.decoder.config):  # where a part once lay and how it was stored is no part of a model
        part.name_or_path, part.dtype = "", parts.decoder.dtype
    return MobileVLMConfig(
        vision_config=vision,
        text_config=parts.decoder.config,
        projector_type=projector,
        vision_feature_layer=kind.layer,
        dtype=parts.decoder.dtype,
    )


@torch.no_grad()
def _require_same_logits(model: MobileVLMForConditionalGeneration, decoder: PreTrainedModel) -> None:
    """Without images the composed model must say what the decoder says: soft-capped or scaled heads do not."""
    ids = torch.tensor([[token for token in range(1, 10) if token != model.config.image_token_id]])
    ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (model, decoder))
    if not torch.equal(ours, theirs):
        raise ConfigError(
            f"{type(decoder).__name__} does more to its logits than a matrix product (largest difference "
            f"{_largest(ours - theirs):.3g}): use a LLaMA-like decoder"
        )


@torch.no_grad()
def _require_grid(model: MobileVLMForConditionalGeneration) -> None:
    """The tower's and the projector's real shapes are the ones that the configuration tells."""
    vision = model.config.vision_config
    blank = torch.zeros(1, 3, vision.image_size, vision.image_size, dtype=model.dtype)
    features = model.encode_images(blank)
    expected = (1, grid_side(vision) ** 2, vision.hidden_size)
    if features.shape != expected or model.model.project(features).shape[1] != model.config.image_tokens:
        raise ConfigError(
            f"the vision tower gives features of shape {tuple(features.shape)}, its configuration says {expected}: "
            "is its grid of patches square, without special tokens besides the class token?"
        )


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
