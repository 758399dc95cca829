"""The weights of a MobileVLM gathered from where its authors' scripts leave them, and checked against the model.

Names and shapes are compared with a model on the meta device, so a check costs neither time nor memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hydra_vlm.errors import CheckpointError
from hydra_vlm.models.mobilevlm import original_layout as layout
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.modeling import MobileVLMForConditionalGeneration
from hydra_vlm.models.mobilevlm.original_lora import LowRank, read_lora
from hydra_vlm.models.weights import few, read_file, read_weights, weight_files
from hydra_vlm.models.whole import integer_buffers, require_sound


@dataclass
class Parts:
    """Weights by our names, while they are gathered, and where each came from."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    updates: dict[str, LowRank] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        stored: Mapping[str, Tensor],
        rename: Callable[[str], str],
        is_left: Callable[[str], bool],
        where: Path | None = None,
    ) -> None:
        """Take stored tensors under our names, `where` if not from the source; an earlier one is replaced."""
        for name, tensor in stored.items():
            if is_left(name):
                self.left.append(name)
            else:
                self.weights[rename(name)] = tensor
                self.origins[rename(name)] = name if where is None else f"{name} of {where}"

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.weights)


def expected_shapes(config: MobileVLMConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a model of this configuration stores; a tied head is stored once."""
    model = _without_weights(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _without_weights(config: MobileVLMConfig) -> MobileVLMForConditionalGeneration:
    with torch.device("meta"):
        return MobileVLMForConditionalGeneration(config)


def gather(source: Path, base: Path | None, projector: Path | None, vision: Path | None) -> Parts:
    """All weights by our names: base, then what LoRA training kept whole, the projector, and the tower if it lacks."""
    parts = Parts()
    whole = base or source
    parts.add(read_folder(whole), layout.our_name, layout.is_left, base)
    if base is not None:
        lora = read_lora(source)
        parts.updates, parts.left = lora.updates, parts.left + list(lora.left)
        parts.add(lora.trained, str, lambda _: False, source)
        parts.notes.append(f"merged {len(lora.updates)} LoRA updates of {source} into {base}")
        if not lora.trained:
            parts.notes.append(f"{source} has no non_lora_trainables.bin: the projector is the base's")
    if projector is not None:
        parts.add(read_file(projector), layout.our_projector_name, layout.is_left, projector)
        parts.notes.append(f"projector from {projector}")
    if vision is not None and parts.has(layout.TOWER):
        parts.notes.append(f"the checkpoint's own tower is kept, not {vision}'s")
    elif vision is not None:
        parts.add(read_folder(vision), layout.our_tower_name, layout.is_left_of_clip, vision)
        parts.notes.append(f"tower from {vision}")
    return parts


def require_complete(parts: Parts, config: MobileVLMConfig, source: Path) -> None:
    """Every tensor of the model is there with its shape, finite and of its kind, and nothing else is."""
    expected = expected_shapes(config)
    if config.tie_word_embeddings and parts.weights.pop("lm_head.weight", None) is not None:
        parts.left.append(parts.origins["lm_head.weight"])
    missing = sorted(expected.keys() - parts.weights.keys())
    extra = sorted(parts.weights.keys() - expected.keys())
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.weights.items()}
    wrong = sorted(name for name, shape in shapes.items() if expected.get(name, shape) != shape)
    problems = []
    for prefix, what, option in (
        (layout.TOWER, "the vision tower", "--vision FOLDER, a CLIP model"),
        (layout.PROJECTOR, "the projector", "--projector FILE, a stage-I mm_projector.bin"),
    ):
        if not parts.has(prefix):
            problems.append(f"it holds no weights of {what}: give {option}")
            missing = [name for name in missing if not name.startswith(prefix)]
    if missing:
        problems.append(f"{few(map(layout.their_name, missing))} missing")
    if extra:
        problems.append(f"{few(parts.origins[name] for name in extra)} not part of this model")
    if wrong:
        seen = (f"{parts.origins[name]} {shapes[name]} instead of {expected[name]}" for name in wrong)
        problems.append(f"of another shape than config.json says: {few(seen)}")
    if problems:
        raise CheckpointError(f"{source} is not the MobileVLM that its config.json describes: {'; '.join(problems)}.")
    updates = {f"{name}, LoRA {m}": getattr(update, m) for name, update in parts.updates.items() for m in "ab"}
    require_sound(parts.weights | updates, str(source), integer_buffers(_without_weights(config)))


def read_folder(folder: Path) -> dict[str, Tensor]:
    files = weight_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights: neither model*.safetensors nor pytorch_model*.bin, whole or in shards."
        )
    return read_weights(files)
