"""LoRA folders of the authors' training scripts: adapter weights, and the projector in `non_lora_trainables.bin`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.models.mobilevlm.original_layout import is_left, our_trainable
from hydra_vlm.models.weights import read_file
from hydra_vlm.reading import read_json

CONFIG, TRAINED_WHOLE = "adapter_config.json", "non_lora_trainables.bin"
_MATRIX = re.compile(r"^(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight$")
# What a plain LoRA adapter does not use; anything else would change the arithmetic of merging.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
}


@dataclass(frozen=True)
class LowRank:
    """An update of a weight [out, in]: scale · B A with A [r, in] and B [out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the update, computed in float32, in the weight's own dtype."""
        wide = weight.to(torch.float32, copy=True)
        return wide.addmm_(self.b.to(torch.float32), self.a.to(torch.float32), alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True)
class LoraFolder:
    """Updates and wholly trained weights, by our names."""

    updates: dict[str, LowRank]
    trained: dict[str, Tensor]
    left: tuple[str, ...]


def is_lora_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str | None:
    """The base model that the adapter's configuration names."""
    name: str | None = read_json(folder / CONFIG).get("base_model_name_or_path")
    return name


def read_lora(folder: Path) -> LoraFolder:
    """Read an adapter folder; ranks come from the tensors, scales from alpha, `alpha_pattern` and `use_rslora`.

    Raises:
        CheckpointError: weights are missing, unpaired or unknown.
        ConfigError: the adapter is not plain LoRA.
    """
    config = read_json(folder / CONFIG)
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{folder / CONFIG}: {key} {config[key]!r} is not supported: only plain LoRA is.")
    path = next((p for n in ("safetensors", "bin") if (p := folder / f"adapter_model.{n}").is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {CONFIG} but neither adapter_model.safetensors nor adapter_model.bin.")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_file(path).items():
        match = _MATRIX.match(name)
        if match is None:
            raise CheckpointError(f"{path}: {name} is not a LoRA matrix (…lora_A.weight or …lora_B.weight).")
        halves.setdefault(match["module"], {})[match["matrix"]] = tensor
    whole = read_file(folder / TRAINED_WHOLE) if (folder / TRAINED_WHOLE).is_file() else {}
    return LoraFolder(
        updates={f"{our_trainable(name)}.weight": _update(name, pair, config, path) for name, pair in halves.items()},
        trained={our_trainable(name): tensor for name, tensor in whole.items() if not is_left(name)},
        left=tuple(name for name in whole if is_left(name)),
    )


def require_fit(updates: dict[str, LowRank], weights: dict[str, Tensor], where: Path) -> None:
    """Raises CheckpointError unless each update has a weight of its shape."""
    for name, update in updates.items():
        weight = weights.get(name)
        shape = (update.b.shape[0], update.a.shape[1])
        if weight is None:
            raise CheckpointError(f"{where} adapts {name}, which the base does not have.")
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{where}: the update of {name} is {shape}, the base's weight {tuple(weight.shape)}: give the base "
                "that this adapter was trained on (--base FOLDER)."
            )


def _update(module: str, pair: dict[str, Tensor], config: dict[str, Any], path: Path) -> LowRank:
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(f"{path}: {module} has lora_{min(pair)} alone; A and B belong together.")
    rank = pair["A"].shape[0]
    if pair["B"].shape[1] != rank:
        raise CheckpointError(f"{path}: {module} has A of rank {rank} and B of rank {pair['B'].shape[1]}.")
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(patterns.keys(), module.removeprefix("base_model.model."))
    alpha = patterns.get(key, config["lora_alpha"])
    return LowRank(pair["A"], pair["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
