"""What lies beside the weights in either layout: tower configuration, tokenizer, image processor, generation ids."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.files import write_json
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.llama_tokenizer import llama_tokenizer, read_sentencepiece
from hydra_vlm.models.mobilevlm.original_layout import CLIP_LARGE_336, their_tower_name, vision_half
from hydra_vlm.models.mobilevlm.processing import IMAGE_TOKEN, MobileVLMProcessor
from hydra_vlm.names import path_fault
from hydra_vlm.reading import TOKENIZER, read_json

SENTENCEPIECE, FAST, PREPROCESSOR = "tokenizer.model", "tokenizer.json", "preprocessor_config.json"
GENERATION = "generation_config.json"
_GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_clip_config(theirs: Mapping[str, Any], vision: Path | None, roots: Sequence[Path]) -> dict[str, Any] | None:
    """The config.json of the tower: `vision`'s, or the one that `mm_vision_tower` leads to from one of the roots.

    None stands for the published tower, known by its name.

    Raises:
        ConfigError: the tower's settings are not known.
    """
    if vision is not None:
        if not (vision / "config.json").is_file():
            raise ConfigError(f"--vision {vision} holds no config.json: give the folder of a CLIP model")
        config: dict[str, Any] = read_json(vision / "config.json")
        kind = (config.get("vision_config") or config).get("model_type", "clip_vision_model")
        if kind not in ("clip", "clip_vision_model"):
            raise ConfigError(f"--vision {vision} holds a {kind} model: MobileVLM's layout knows CLIP only")
        return config
    found = tower_folder(theirs, roots)
    if found is not None:
        return dict(read_json(found / "config.json"))
    name = theirs.get("mm_vision_tower")
    if str(name).endswith(CLIP_LARGE_336.partition("/")[2]):
        return None
    raise ConfigError(
        f"the settings of the tower {name!r} are not known: give the folder of that CLIP model with --vision FOLDER"
    )


def tower_folder(theirs: Mapping[str, Any], roots: Sequence[Path]) -> Path | None:
    """The folder that `mm_vision_tower` names within one of the roots or beside it; another is for the user to name."""
    name = theirs.get("mm_vision_tower")
    inside = name.removeprefix("../") if isinstance(name, str) else ""
    places = (
        [root.parent / inside if inside != name else root / inside for root in roots] if not path_fault(inside) else []
    )
    return next((place for place in places if (place / "config.json").is_file()), None)


def copy_generation_config(roots: Sequence[Path], config: MobileVLMConfig, folder: Path) -> None:
    """The first generation_config.json there is; otherwise one with the decoder's token ids."""
    for root in roots:
        if (root / GENERATION).is_file():
            shutil.copyfile(root / GENERATION, folder / GENERATION)
            return
    write_json(folder / GENERATION, {key: getattr(config.text_config, key, None) for key in _GENERATION_IDS})


def write_our_processor(
    config: MobileVLMConfig, roots: Sequence[Path], theirs: Mapping[str, Any], max_length: int, folder: Path
) -> list[str]:
    """Save tokenizer and image processor together, and set the configuration's `image_token_id` to the tokenizer's.

    Without a tokenizer only the image processor is saved. Returns what the user should know.

    Raises:
        CheckpointError: tokenizer or image processor do not fit the model.
    """
    tower = tower_folder(theirs, roots)
    images = _image_processor(config, [*roots, *([tower] if tower else [])])
    tokenizer, path = _tokenizer(roots, max_length)
    if tokenizer is None:
        images.save_pretrained(folder)
        return [
            f"no tokenizer: the weights alone are converted. Put LLaMA's {SENTENCEPIECE} (or a {FAST}) into {roots[0]} "
            "and convert again"
        ]
    rows = config.text_config.vocab_size
    if len(tokenizer) - (IMAGE_TOKEN in tokenizer.get_vocab()) > rows:
        raise CheckpointError(
            f"{path} has {len(tokenizer)} tokens, but the model embeds {rows}: it is another model's."
        )
    processor = MobileVLMProcessor(images, tokenizer, config.image_tokens, config.image_aspect_ratio)
    config.image_token_id = processor.image_token_id
    processor.save_pretrained(folder)
    if path.name == SENTENCEPIECE:
        shutil.copyfile(path, folder / SENTENCEPIECE)  # what a way back to the authors' layout needs
    return [f"tokenizer from {path}"]


def write_their_tokenizer(source: Path, theirs: Mapping[str, Any], folder: Path) -> list[str]:
    """The tokenizer as the reference code loads it: `tokenizer.model`, with added tokens by id."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    if not (source / SENTENCEPIECE).is_file():
        if not (source / FAST).is_file():
            return [f"no tokenizer: put LLaMA's {SENTENCEPIECE} into the new folder"]
        shutil.copyfile(source / FAST, folder / FAST)
        return [f"no {SENTENCEPIECE} in {source}: the reference's slow tokenizer needs one; {FAST} is copied"]
    shutil.copyfile(source / SENTENCEPIECE, folder / SENTENCEPIECE)
    pieces = len(read_sentencepiece(source / SENTENCEPIECE).pieces)
    known = read_json(source / FAST, TOKENIZER).get("added_tokens", []) if (source / FAST).is_file() else []
    added = {t["content"]: t["id"] for t in known if t["id"] >= pieces and t["content"] != IMAGE_TOKEN}
    if added:
        write_json(folder / "added_tokens.json", added)
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": theirs["max_sequence_length"],
            "padding_side": "right",
        },
    )
    return []


def write_their_tower(source: Path, config: MobileVLMConfig, tower: Mapping[str, Tensor], folder: Path) -> list[str]:
    """A tower that no hub name describes, as a CLIP folder of transformers 4 with its image processor."""
    folder.mkdir()
    vision = vision_half(config.vision_config.to_dict())
    write_json(
        folder / "config.json", {**vision, "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    )
    images = _image_processor(config, [source]).to_dict()
    write_json(folder / PREPROCESSOR, {**images, "image_processor_type": "CLIPImageProcessor"})
    torch.save({their_tower_name(name): tensor for name, tensor in tower.items()}, folder / "pytorch_model.bin")
    return [f"the tower is written as {folder.name}/; the reference code looks for that name from where it is started"]


def _image_processor(config: MobileVLMConfig, folders: Sequence[Path]) -> CLIPImageProcessorPil:
    """The first image processor found; otherwise CLIP's at the tower's size."""
    side = config.vision_config.image_size
    for folder in folders:
        stored, path = _stored_image_processor(folder)
        if stored is None:
            continue
        stored = {key: value for key, value in stored.items() if not key.endswith(("_type", "_class"))}
        images = CLIPImageProcessorPil.from_dict(stored)
        crop = images.crop_size
        if (crop["height"], crop["width"]) != (side, side):
            raise CheckpointError(
                f"{path} crops to {crop['height']} x {crop['width']}, the tower takes {side} x {side}."
            )
        return images
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _stored_image_processor(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    ours, theirs = folder / "processor_config.json", folder / PREPROCESSOR
    if ours.is_file():
        return read_json(ours).get("image_processor"), ours
    return (read_json(theirs) if theirs.is_file() else None), theirs


def _tokenizer(roots: Sequence[Path], max_length: int) -> tuple[PreTrainedTokenizerFast | None, Path]:
    """The tokenizer of the first folder that has one; `tokenizer.model`, which the reference reads, goes first."""
    for root in roots:
        slow, fast = root / SENTENCEPIECE, root / FAST
        if slow.is_file():
            return llama_tokenizer(slow, max_length), slow
        if fast.is_file():
            marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
            stored = root / "special_tokens_map.json"
            for key, value in (read_json(stored) if stored.is_file() else {}).items():
                if key in marks:
                    marks[key] = value["content"] if isinstance(value, dict) else value
            return PreTrainedTokenizerFast(tokenizer_file=str(fast), model_max_length=max_length, **marks), fast
    return None, Path()
