"""The layout in which MobileVLM's authors publish checkpoints: names of weights, keys of config.json, both ways.

Source: Meituan-AutoML/MobileVLM at 688fdec and the configurations of its published checkpoints.

| part | the authors' names | ours |
|---|---|---|
| decoder | `model.layers.N.`, `model.embed_tokens.`, `model.norm.` | the same behind `model.language_model.` |
| head | `lm_head.` | the same |
| projector | `model.mm_projector.` | the same |
| tower | `model.vision_tower.vision_tower.vision_model.` | `model.vision_tower.` |
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig

CLIP_LARGE_336 = "openai/clip-vit-large-patch14-336"
TOWER, PROJECTOR, DECODER, HEAD = "model.vision_tower.", "model.mm_projector.", "model.language_model.", "lm_head."
THEIR_TOWER = "model.vision_tower.vision_tower."

# Buffers that versions of transformers stored and later ones compute.
_LEFT = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
# What of a whole CLIP model is not its vision tower.
_LEFT_OF_CLIP = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)")

# Sizes that must be given; other keys of the decoder have the defaults of LlamaConfig. The 3B configurations also carry
# lit-gpt's `n_head`, `n_embd`, `n_layer` and more, which contradict these (16 heads for 32): they are never read.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT = (
    *_SIZES,
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "pretraining_tp",
    "attention_dropout",
    "tie_word_embeddings",
)
_GRID = 24  # LDPv2 pools to 12 x 12 in the reference code, whatever the tower


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the authors' layout (or a LoRA folder's or a stage-I folder's of theirs)."""
    return "text_config" not in config and (
        "mm_projector_type" in config or "MobileLlamaForCausalLM" in (config.get("architectures") or ())
    )


def is_left(name: str) -> bool:
    """Whether a stored tensor is deliberately left: position ids and rotary frequencies, which are computed."""
    return _LEFT.search(name) is not None


def is_left_of_clip(name: str) -> bool:
    """Whether a tensor of a CLIP folder is deliberately left: the text half, and buffers."""
    return is_left(name) or _LEFT_OF_CLIP.match(name) is not None


def our_name(name: str) -> str:
    """Our name of a weight in the authors' layout; a name that fits nowhere is returned as it is."""
    if name.startswith(THEIR_TOWER):
        return TOWER + name.removeprefix(THEIR_TOWER).removeprefix("vision_model.")
    if name.startswith("model.") and not name.startswith(("model.vision_", PROJECTOR, DECODER)):
        return DECODER + name.removeprefix("model.")
    return name


def our_trainable(name: str) -> str:
    """Our name of a weight in a LoRA folder's files, whose names PEFT's wrapping has prefixed."""
    bare = name.removeprefix("base_model.")
    return our_name(bare.removeprefix("model.") if bare.startswith("model.model.") else bare)


def our_projector_name(name: str) -> str:
    """Our name of a weight in a stage-I `mm_projector.bin`: all up to and including `mm_projector.` is dropped."""
    return PROJECTOR + name.rpartition("mm_projector.")[2]


def our_tower_name(name: str) -> str:
    """Our name of a weight in the folder of a CLIP model or of its vision half."""
    return TOWER + name.removeprefix("vision_model.")


def their_name(name: str) -> str:
    """The authors' name of one of our weights."""
    if name.startswith(TOWER):
        return f"{THEIR_TOWER}vision_model.{name.removeprefix(TOWER)}"
    return name.replace(DECODER, "model.", 1) if name.startswith(DECODER) else name


def their_tower_name(name: str) -> str:
    """The name that CLIPVisionModel of transformers 4 gives to one of our tower weights."""
    return f"vision_model.{name.removeprefix(TOWER)}"


def require_supported(theirs: Mapping[str, Any], where: str) -> None:
    """Refuse what is not a whole configuration, and settings that no published checkpoint uses and this model lacks.

    Raises:
        CheckpointError: a key is missing.
        ConfigError: a setting is not supported.
    """
    for key in (*_SIZES, "mm_projector_type", "mm_vision_select_layer"):
        if theirs.get(key) is None:
            raise CheckpointError(f"{where} has no {key}: it is not the whole configuration of a MobileVLM.")
    wanted = {
        "mm_use_im_start_end": (False, None),
        "mm_vision_select_feature": ("patch", None),
        "vision_tower_type": ("clip", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
    }
    for key, allowed in wanted.items():
        if theirs.get(key) not in allowed:
            raise ConfigError(f"{where}: {key} {theirs[key]!r} is not supported, only {allowed[0]!r} is.")


def our_config(theirs: Mapping[str, Any], vision: Mapping[str, Any] | None, where: str) -> MobileVLMConfig:
    """Our configuration for a config.json of the authors; `vision` is CLIP's, None for CLIP-L at 336 px.

    Raises:
        CheckpointError: a key is missing, or the two halves contradict.
        ConfigError: the checkpoint uses what this model does not have.
    """
    require_supported(theirs, where)
    text = {key: theirs[key] for key in _TEXT if theirs.get(key) is not None}
    rope = {key: theirs[key] for key in ("rope_theta", "rope_scaling") if theirs.get(key) is not None}
    dtype = theirs.get("torch_dtype") or theirs.get("dtype")
    config = MobileVLMConfig(
        text_config={**text, **rope, "model_type": "llama"},
        vision_config={**vision_half(vision), "model_type": "clip_vision_model"} if vision is not None else None,
        projector_type=_projector_type(theirs["mm_projector_type"], where),
        vision_feature_layer=theirs["mm_vision_select_layer"],
        image_token_id=theirs["vocab_size"],
        image_aspect_ratio="pad" if theirs.get("image_aspect_ratio") == "pad" else "square",
        **({"dtype": dtype} if dtype else {}),
    )
    width = theirs.get("mm_hidden_size", config.vision_config.hidden_size)
    if width != config.vision_config.hidden_size:
        raise CheckpointError(
            f"{where} says mm_hidden_size {width}, but the tower's width is {config.vision_config.hidden_size}: "
            "give the tower that this checkpoint was trained with (--vision FOLDER)."
        )
    require_same_grid(config)
    return config


def vision_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision tower's configuration in a CLIP folder's config.json, whole model or vision half."""
    half = config.get("vision_config") or config
    known = CLIPVisionConfig().to_dict().keys() - {"architectures", "transformers_version", "dtype"}
    return {key: half[key] for key in half if key in known}


def their_config(config: MobileVLMConfig, tower: str, max_length: int | None = None) -> dict[str, Any]:
    """The authors' config.json for one of our configurations; `tower` goes into `mm_vision_tower`.

    Raises:
        ConfigError: the model has parts for which their layout has no place.
    """
    text, vision = config.text_config, config.vision_config
    _require_expressible(config)
    require_same_grid(config)
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    values = {key: getattr(text, key, None) for key in _TEXT}
    return {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        **{key: value for key, value in values.items() if value is not None},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "max_sequence_length": max_length or text.max_position_embeddings,
        "torch_dtype": str(config.dtype or text.dtype or "float32").removeprefix("torch."),
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": None,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_use_im_patch_token": False,  # absent means true to the reference loader, which then grows the vocabulary
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "vision_tower_type": "clip",
        "transformers_version": "4.33.1",
    }


def is_clip_large(config: MobileVLMConfig) -> bool:
    """Whether the tower has the shape of the published one, so that its hub name describes it."""
    published = MobileVLMConfig().vision_config.to_dict()
    ours = config.vision_config.to_dict()
    return all(ours.get(key) == value for key, value in published.items() if key not in ("dtype", "architectures"))


def require_same_grid(config: MobileVLMConfig) -> None:
    """Raises ConfigError where LDPv2 would pool to another grid here (half the side) than in the reference (12)."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.projector_type == "ldpnetv2" and side != _GRID:
        raise ConfigError(
            f"LDPv2 pools to 12 x 12 in the authors' code and to half the tower's grid here; they agree for a grid of "
            f"{_GRID} x {_GRID} patches, and this tower has {side} x {side} (image_size {vision.image_size}, "
            f"patch_size {vision.patch_size}): such a model has no equal in their layout."
        )


def _projector_type(name: str, where: str) -> str:
    """The authors' factory goes by the beginning of the name, V2 first."""
    for known in ("ldpnetv2", "ldpnet"):
        if name.startswith(known):
            return known
    raise ConfigError(f"{where}: mm_projector_type {name!r} is not supported: only ldpnetv2 and ldpnet are.")


def _require_expressible(config: MobileVLMConfig) -> None:
    text, vision = config.text_config, config.vision_config
    refused: Iterable[tuple[bool, str]] = (
        (not isinstance(text, LlamaConfig), f"a decoder of type {text.model_type}: only LLaMA"),
        (vision.model_type != "clip_vision_model", f"a tower of type {vision.model_type}: only CLIP"),
        (bool(getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)), "biases in the decoder"),
        (
            getattr(text, "head_dim", None) not in (None, text.hidden_size // text.num_attention_heads),
            f"heads of width {getattr(text, 'head_dim', None)}: only hidden size / heads",
        ),
    )
    for applies, what in refused:
        if applies:
            raise ConfigError(f"the authors' layout has no place for {what}.")
