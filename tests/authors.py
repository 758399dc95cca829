"""Tiny checkpoints in the layout of MobileVLM's authors, with every name and shape written out."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hydra_vlm.errors import CheckpointError
from hydra_vlm.models.mobilevlm.conversion import to_hydra

LAYERS, WIDTH, FEED_FORWARD, HEADS, VOCABULARY = 2, 32, 48, 4, 420
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def authors_config(version: str, **changes: Any) -> dict[str, Any]:
    """config.json with the keys of a published checkpoint; a change to None takes the key out."""
    keys = {
        "architectures": ["MobileLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_projector_type": {"v1": "ldpnet", "v2": "ldpnetv2"}[version],
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "model_type": "mobilevlm",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.33.1",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vision_tower_type": "clip",
        "vocab_size": VOCABULARY,
    }
    return {key: value for key, value in (keys | changes).items() if value is not None or key not in changes}


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (FEED_FORWARD, WIDTH) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
        shapes |= {f"{name}.{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def tower_shapes(prefix: str = TOWER_PREFIX) -> dict[str, tuple[int, ...]]:
    width, inner, patch = 16, 24, 14
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": (577, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(3):
        name = f"encoder.layers.{layer}"
        linears = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for linear, (out, into) in linears.items():
            shapes |= {f"{name}.{linear}.weight": (out, into), f"{name}.{linear}.bias": (out,)}
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def projector_shapes(version: str, prefix: str = "model.mm_projector.") -> dict[str, tuple[int, ...]]:
    into, c, squeezed = 16, WIDTH, 8
    if version == "v2":
        linears = {"mlp.mlp.0": (c, into), "mlp.mlp.2": (c, c), "peg.peg.0": (c, 1, 3, 3)}
        norms: list[str] = []
        bare = {}
    else:
        linears = {"model.mlp.1": (c, into), "model.mlp.3": (c, c)}
        norms, bare = [], {}
        for block in ("model.mb_block.1.block", "model.mb_block.2.block"):
            linears |= {f"{block}.1.fc1": (squeezed, c, 1, 1), f"{block}.1.fc2": (c, squeezed, 1, 1)}
            bare |= {f"{block}.0.0.weight": (c, 1, 3, 3), f"{block}.2.0.weight": (c, c, 1, 1)}
            norms += [f"{block}.0.1", f"{block}.2.1"]
    shapes: dict[str, tuple[int, ...]] = dict(bare)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{kind}": (c,) for norm in norms for kind in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def fill(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random weights large enough that every part matters; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (0.25 * torch.randn(shape, generator=generator) + ("norm.weight" in name)).to(dtype)
        for name, shape in shapes.items()
    }


def waves(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by a formula, the same everywhere: 0.3 sin(1 + number of the tensor + 0.7 index^1.1), norms around 1."""
    made = {}
    for number, name in enumerate(sorted(shapes)):
        index = torch.arange(math.prod(shapes[name]), dtype=torch.float64)
        values = 0.3 * torch.sin(1 + number + 0.7 * index**1.1) + ("norm.weight" in name)
        made[name] = values.reshape(shapes[name])
    return made


def authors_shapes(version: str) -> dict[str, tuple[int, ...]]:
    return decoder_shapes() | tower_shapes() | projector_shapes(version)


def write_tower_config(folder: Path) -> None:
    """The tower's settings where `mm_vision_tower` "tower" of a checkpoint in `folder` leads to."""
    (folder / "tower").mkdir(parents=True, exist_ok=True)
    (folder / "tower" / "config.json").write_text(json.dumps(TOWER))


def save_authors(
    folder: Path, version: str, weights: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint as pytorch_model.bin, with its tower's settings in a folder within."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tower_config(folder)
    (folder / "config.json").write_text(json.dumps(config or authors_config(version)))
    torch.save(fill(authors_shapes(version)) if weights is None else weights, folder / "pytorch_model.bin")
    return folder


def rewrite(folder: Path, form: str) -> None:
    """Turn pytorch_model.bin into shards or safetensors: "bin-3", "bin-3-index", "safetensors", "safetensors-2"."""
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    suffix, count, indexed = (*form.split("-"), "1", "")[:3]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, files = list(weights), {}
    for number in range(int(count)):
        part = {name: weights[name] for name in names[number :: int(count)]}
        file = f"{stem}.{suffix}" if count == "1" else f"{stem}-{number + 1:05d}-of-{int(count):05d}.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
        files |= dict.fromkeys(part, file)
    if indexed == "index":
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def same(first: dict[str, Tensor], second: dict[str, Tensor], names: Iterable[str] | None = None) -> bool:
    """Whether tensors agree in name, dtype and every bit."""
    if names is None and first.keys() != second.keys():
        return False
    return all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in names or first
    )


def theirs_in(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def refused(message: str, source: Path, target: Path, error: type = CheckpointError, **options: Any) -> None:
    """The conversion fails with this message and leaves nothing behind."""
    with pytest.raises(error, match=message):
        to_hydra(source, target, **options)
    assert not list(target.parent.glob(f"*{target.name}*"))
