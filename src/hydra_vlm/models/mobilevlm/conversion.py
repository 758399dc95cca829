"""MobileVLM checkpoints in and out of the authors' layout, tensor by tensor and strictly.

Names and shapes are compared with a model on the meta device before anything is written: every stored tensor is used
or deliberately left and named, every tensor of the model is there. Weights pass from mapped file to file, so memory
holds no copy of the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_vlm.errors import ConfigError
from hydra_vlm.files import require_free, whole_folder, write_json
from hydra_vlm.models.folder import require_readable
from hydra_vlm.models.mobilevlm import original_layout as layout
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.modeling import MobileVLMForConditionalGeneration
from hydra_vlm.models.mobilevlm.original_files import (
    copy_generation_config,
    read_clip_config,
    write_our_processor,
    write_their_tokenizer,
    write_their_tower,
)
from hydra_vlm.models.mobilevlm.original_lora import base_of, is_lora_folder, require_fit
from hydra_vlm.models.mobilevlm.original_weights import Parts, gather, read_folder, require_complete
from hydra_vlm.models.weights import write_weights
from hydra_vlm.names import shown
from hydra_vlm.reading import file_fault, read_json

STAGE_ONE_PROJECTOR = "mm_projector.bin"


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote: tensors and their bytes, what it deliberately left, and what the user should know."""

    folder: Path
    layout: str
    tensors: int
    size: int
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The lines that the command prints."""
        left = [f"left, since the model computes it: {name}" for name in self.left]
        head = f"{self.folder}: {self.layout}, {self.tensors} tensors, {self.size / 1e6:,.1f} MB"
        return "\n".join([head, *left, *self.notes])

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "tensors": self.tensors,
            "bytes": self.size,
            "left": list(self.left),
            "notes": list(self.notes),
        }


def to_hydra(
    source: Path,
    target: Path,
    vision: Path | None = None,
    projector: Path | None = None,
    base: Path | None = None,
) -> Conversion:
    """Read a checkpoint in the authors' layout and write it as a folder that transformers' Auto classes load.

    `source` is a whole checkpoint, or a LoRA folder, which is merged into `base`. `vision` is the folder of a CLIP
    model, for a checkpoint without tower weights; a checkpoint's own tower is kept. `projector` is a stage-I
    `mm_projector.bin` (or its folder) that replaces the projector.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape; the message names it.
        ConfigError: the source is not in the authors' layout, or an option is missing or contradicts.
        RunFolderError: the target holds something already.
    """
    require_free(target)
    base = _base(source, base)
    projector = _projector_file(projector)
    roots = [root for root in (source, base) if root is not None]
    theirs = _their_config(source, base, projector)
    where = str(source / "config.json")
    layout.require_supported(theirs, where)
    config = layout.our_config(theirs, read_clip_config(theirs, vision, roots), where)
    parts = gather(source, base, projector, vision)
    require_complete(parts, config, source)
    if parts.updates:
        require_fit(parts.updates, parts.weights, source)
    config.dtype = config.dtype or parts.weights["model.language_model.embed_tokens.weight"].dtype
    config.architectures = [MobileVLMForConditionalGeneration.__name__]

    def finish(name: str, tensor: Tensor) -> Tensor:
        return parts.updates[name].added_to(tensor) if name in parts.updates else tensor

    with whole_folder(target) as draft:
        length = theirs.get("max_sequence_length") or config.text_config.max_position_embeddings
        parts.notes += write_our_processor(config, [*roots, *([vision] if vision else [])], theirs, length, draft)
        config.save_pretrained(draft)
        copy_generation_config(roots, config, draft)
        write_weights(draft, parts.weights, finish if parts.updates else None)
    return _conversion(target, "transformers layout", parts.weights, parts)


def to_original(source: Path, target: Path) -> Conversion:
    """Read a MobileVLM folder of ours and write it in the authors' layout, as the reference code loads it.

    A tower of the published shape is named by its hub name; any other is written beside, as `vision_tower/`.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape.
        ConfigError: the source is not a MobileVLM folder, or has parts for which the authors' layout has no place.
        RunFolderError: the target holds something already.
    """
    require_free(target)
    stored = _read_config(source)
    if layout.is_original(stored):
        raise ConfigError(f"{source} is in the authors' layout already.")
    if stored.get("model_type") != MobileVLMConfig.model_type:
        raise ConfigError(
            f"{source} holds a {stored.get('model_type')} model, not a MobileVLM: it cannot be converted."
        )
    config = MobileVLMConfig.from_pretrained(source)
    published = layout.is_clip_large(config)
    theirs = layout.their_config(config, layout.CLIP_LARGE_336 if published else "vision_tower")
    parts = Parts()
    parts.add(read_folder(source), str, layout.is_left)
    require_complete(parts, config, source)
    with whole_folder(target) as draft:
        write_json(draft / "config.json", theirs)
        copy_generation_config([source], config, draft)
        parts.notes += write_their_tokenizer(source, theirs, draft)
        if not published:
            tower = {name: tensor for name, tensor in parts.weights.items() if name.startswith(layout.TOWER)}
            parts.notes += write_their_tower(source, config, tower, draft / "vision_tower")
        weights = {layout.their_name(name): tensor for name, tensor in parts.weights.items()}
        torch.save(weights, draft / "pytorch_model.bin")  # writes mapped tensors one after another
    return _conversion(target, "the authors' layout", parts.weights, parts)


def _their_config(source: Path, base: Path | None, projector: Path | None) -> dict[str, Any]:
    """The authors' config.json of the source over its base's; a stage-I folder's where neither knows a projector."""
    own = _read_config(source) if base is None or (source / "config.json").is_file() else {}
    if "text_config" in own:
        raise ConfigError(
            f"{source} is not in the authors' layout: it has a text_config of its own, as saved models do."
        )
    theirs = {**(_read_config(base) if base is not None else {}), **own}
    if projector is not None and "mm_projector_type" not in theirs:
        beside = projector.with_name("config.json")
        known = read_json(beside) if beside.is_file() else {}
        theirs |= {k: v for k, v in known.items() if k.startswith(("mm_", "image_", "vision_tower_type"))}
    return theirs


def _read_config(folder: Path) -> dict[str, Any]:
    fault = file_fault(folder / "config.json")
    if fault:
        raise ConfigError(f"{folder} holds no config.json (it {fault}): give the folder of a checkpoint")
    return require_readable(folder)


def _base(source: Path, base: Path | None) -> Path | None:
    """The folder that a LoRA folder is merged into."""
    if not is_lora_folder(source):
        if base is not None:
            raise ConfigError(f"--base is for LoRA folders, and {source} has no adapter_config.json: leave it out")
        return None
    if base is None:  # a path in somebody's file is not followed
        raise ConfigError(
            f"{source} is a LoRA folder, trained on {shown(str(base_of(source)))}: give that checkpoint's folder with "
            "--base FOLDER"
        )
    if not (base / "config.json").is_file():
        raise ConfigError(f"--base {base} holds no config.json: give the folder of a checkpoint")
    return base


def _projector_file(path: Path | None) -> Path | None:
    if path is None:
        return None
    file = path / STAGE_ONE_PROJECTOR if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--projector {path}: {file} does not exist: give the mm_projector.bin of a stage-I run")
    return file


def _conversion(target: Path, kind: str, weights: Mapping[str, Tensor], parts: Parts) -> Conversion:
    size = sum(tensor.nbytes for tensor in weights.values())
    return Conversion(target, kind, len(weights), size, tuple(parts.left), tuple(parts.notes))
